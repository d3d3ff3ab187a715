//! A thin pool in memory, for tests: keeps what dm-thin keeps, refuses what it refuses, and can be stopped at any call.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
};

use crate::{
    device::{
        Access, Activation, Deactivated, DeviceError, DeviceName, Filesystem, Live, PREFIX, Pool, PoolEvents,
        PoolFacts, PoolMode, PoolUsage,
    },
    tree::ThinId,
};

/// What becomes of a call that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fuse {
    /// This many more are made, and the one after them never returns: it was not made.
    CrashBefore(usize),
    /// This many more are made, and the last one never returns.
    CrashAfter(usize),
    /// This many more are made, and the one after them fails, once.
    FailAt(usize),
    /// All are made.
    Whole,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    thin: ThinId,
    access: Access,
    open: u32,
    suspended: bool,
    loaded: bool,
    linked: bool,
}

/// Bytes of the pool's data.
const DATA: u64 = 1 << 40;

#[derive(Debug)]
struct State {
    thins: BTreeMap<ThinId, String>,
    /// What the disk has of those that were written and not flushed.
    unflushed: BTreeMap<ThinId, String>,
    devices: BTreeMap<String, Device>,
    fuse: Fuse,
    creations: u32,
    events: u32,
    suspensions: usize,
    uuid: String,
    mode: PoolMode,
    data_used: u64,
    refuses_activations: bool,
    activations_refused: usize,
    /// Thin devices deactivated and deleted, in order.
    reclaimed: Vec<Reclaimed>,
    /// How many heirs its snapshotter keeps.
    heirs: usize,
    /// Bytes that each active device maps, until they are discarded.
    mapped: u64,
    block: u64,
    passes_discards: bool,
}

/// What the reclaimer does to a thin device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reclaimed {
    Deactivated,
    Discarded,
    Deleted,
}

/// Pool and filesystem tools. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct FakePool(Arc<Mutex<State>>);

impl FakePool {
    pub(crate) fn new() -> Self {
        let state = State {
            thins: BTreeMap::new(),
            unflushed: BTreeMap::new(),
            devices: BTreeMap::new(),
            fuse: Fuse::Whole,
            creations: 0,
            events: 0,
            suspensions: 0,
            uuid: "LVM-fake".to_owned(),
            mode: PoolMode::ReadWrite,
            data_used: 0,
            refuses_activations: false,
            activations_refused: 0,
            reclaimed: Vec::new(),
            heirs: 0,
            mapped: 65536,
            block: 64 << 10,
            passes_discards: true,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn with_heirs(heirs: usize) -> Self {
        let pool = Self::new();
        pool.state().heirs = heirs;
        pool
    }

    pub(crate) fn heirs(&self) -> usize {
        self.state().heirs
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn set_fuse(&self, fuse: Fuse) {
        self.state().fuse = fuse;
    }

    pub(crate) fn fuse(&self) -> Fuse {
        self.state().fuse
    }

    /// The power goes: devices are gone, thin devices stay, but for what was not flushed.
    pub(crate) fn cut_power(&self) {
        let mut state = self.state();
        state.devices.clear();
        let on_disk = std::mem::take(&mut state.unflushed);
        state.thins.extend(on_disk);
    }

    /// Writes to a device; what is written is not flushed.
    pub(crate) fn write(&self, name: &str, what: &str) {
        let mut state = self.state();
        let thin = state.devices[name].thin;
        let before = state.thins[&thin].clone();
        state.thins.insert(thin, before.clone() + what);
        state.unflushed.entry(thin).or_insert(before);
    }

    pub(crate) fn thins(&self) -> BTreeMap<ThinId, String> {
        self.state().thins.clone()
    }

    pub(crate) fn device_names(&self) -> BTreeSet<String> {
        self.state().devices.keys().cloned().collect()
    }

    pub(crate) fn open(&self, name: &str, times: u32) {
        self.state().devices.get_mut(name).unwrap().open = times;
    }

    pub(crate) fn close_all(&self) {
        self.state().devices.values_mut().for_each(|device| device.open = 0);
    }

    pub(crate) fn is_read_only(&self, name: &str) -> bool {
        self.state().devices[name].access == Access::ReadOnly
    }

    /// Whether all devices have their tables and links.
    pub(crate) fn all_whole(&self) -> bool {
        self.state().devices.values().all(|device| device.loaded && device.linked)
    }

    pub(crate) fn times_suspended(&self) -> usize {
        self.state().suspensions
    }

    pub(crate) fn any_suspended(&self) -> bool {
        self.state().devices.values().any(|device| device.suspended)
    }

    pub(crate) fn add_foreign(&self, thin: ThinId) {
        self.state().thins.insert(thin, "foreign".to_owned());
    }

    /// As if the filesystems on all thin devices were mounted, written and never unmounted.
    pub(crate) fn soil(&self) {
        self.state().thins.values_mut().for_each(|content| content.push_str(", unclean"));
    }

    /// As `lvconvert --repair` loses the latest.
    pub(crate) fn lose(&self, thin: ThinId) {
        self.state().thins.remove(&thin);
    }

    /// As a pool does that has become full, and again when it has room.
    pub(crate) fn tell_event(&self) {
        self.state().events += 1;
    }

    /// As another pool has that got its name.
    pub(crate) fn set_uuid(&self, uuid: &str) {
        uuid.clone_into(&mut self.state().uuid);
    }

    pub(crate) fn set_mode(&self, mode: PoolMode) {
        self.state().mode = mode;
    }

    pub(crate) fn set_data_used_percent(&self, percent: u64) {
        self.state().data_used = DATA / 100 * percent;
    }

    /// As the kernel does while it has no memory for another device.
    pub(crate) fn refuse_activations(&self, refuses: bool) {
        self.state().refuses_activations = refuses;
    }

    pub(crate) fn activations_refused(&self) -> usize {
        self.state().activations_refused
    }

    pub(crate) fn reclaimed(&self) -> Vec<Reclaimed> {
        self.state().reclaimed.clone()
    }

    pub(crate) fn set_mapped(&self, bytes: u64) {
        self.state().mapped = bytes;
    }

    pub(crate) fn set_block(&self, bytes: u64) {
        self.state().block = bytes;
    }

    pub(crate) fn set_passes_discards(&self, passes: bool) {
        self.state().passes_discards = passes;
    }

    /// All calls wait while this is held.
    pub(crate) fn hold(&self) -> impl Drop {
        self.state()
    }

    pub(crate) fn set_creations(&self, creations: u32) {
        self.state().creations = creations;
    }

    /// A call that changes something.
    fn effect<T>(&self, change: impl FnOnce(&mut State) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        let mut state = self.state();
        match state.fuse {
            Fuse::CrashBefore(0) => never(state),
            Fuse::CrashAfter(0) => panic!("it has crashed"),
            Fuse::FailAt(0) => {
                state.fuse = Fuse::Whole;
                return Err(refused("told to fail"));
            }
            Fuse::CrashBefore(n) => state.fuse = Fuse::CrashBefore(n - 1),
            Fuse::FailAt(n) => state.fuse = Fuse::FailAt(n - 1),
            Fuse::CrashAfter(_) | Fuse::Whole => {}
        }
        let changed = change(&mut state);
        if let Fuse::CrashAfter(n) = state.fuse {
            state.fuse = if n == 1 { Fuse::CrashBefore(0) } else { Fuse::CrashAfter(n - 1) };
            if n == 1 {
                never(state);
            }
        }
        changed
    }
}

/// What a call looks like whose process was killed: it does not return.
fn never(state: MutexGuard<'_, State>) -> ! {
    drop(state);
    loop {
        std::thread::park();
    }
}

fn refused(what: &str) -> DeviceError {
    DeviceError::Refused { what: what.to_owned(), error: "EIO".to_owned() }
}

impl Pool for FakePool {
    fn facts(&self) -> Result<PoolFacts, DeviceError> {
        let state = self.state();
        let usage = PoolUsage {
            name: "fake".to_owned(),
            data_used: state.data_used,
            data_total: DATA,
            metadata_used: 0,
            metadata_total: 1 << 30,
            block_bytes: state.block,
            mode: state.mode,
            zeroing: true,
        };
        Ok(PoolFacts { usage, uuid: state.uuid.clone() })
    }

    fn events(&self) -> Result<PoolEvents, DeviceError> {
        let state = self.state();
        Ok(PoolEvents { count: state.events, mode: state.mode })
    }

    fn create_thin(&self, thin: ThinId) -> Result<(), DeviceError> {
        self.effect(|state| {
            if state.thins.contains_key(&thin) {
                return Err(DeviceError::ThinExists(thin));
            }
            state.thins.insert(thin, "raw".to_owned());
            Ok(())
        })
    }

    fn create_snap(&self, thin: ThinId, origin: ThinId) -> Result<(), DeviceError> {
        self.effect(|state| {
            if state.thins.contains_key(&thin) {
                return Err(DeviceError::ThinExists(thin));
            }
            let content = state.thins.get(&origin).ok_or(DeviceError::ThinMissing(origin))?.clone();
            let moving =
                state.devices.values().any(|d| d.thin == origin && d.loaded && !d.suspended && d.open > 0);
            assert!(!moving, "a snapshot of {origin:?} was made while its device was active");
            state.thins.insert(thin, content);
            state.creations += 1;
            Ok(())
        })
    }

    fn delete(&self, thin: ThinId) -> Result<(), DeviceError> {
        self.effect(|state| {
            assert!(!state.devices.values().any(|d| d.thin == thin), "{thin:?} was deleted while active");
            state.thins.remove(&thin);
            state.reclaimed.push(Reclaimed::Deleted);
            Ok(())
        })
    }

    fn activate(&self, activation: &Activation) -> Result<(), DeviceError> {
        let name = activation.name.as_str();
        if self.state().refuses_activations {
            self.state().activations_refused += 1;
            return Err(refused("told to refuse"));
        }
        let device = Device {
            thin: activation.thin,
            access: activation.access,
            open: 0,
            // As the kernel may say of one without a table.
            suspended: true,
            loaded: false,
            linked: false,
        };
        if !self.state().devices.contains_key(name) {
            self.effect(|state| {
                state.devices.insert(name.to_owned(), device);
                Ok(())
            })?;
        }
        let loaded = self.effect(|state| {
            if !state.thins.contains_key(&activation.thin) {
                return Err(DeviceError::ThinMissing(activation.thin));
            }
            let there = state.devices.get_mut(name).ok_or_else(|| refused("load"))?;
            assert_eq!(there.thin, activation.thin, "one name, two thin devices");
            (there.loaded, there.suspended) = (true, false);
            Ok(())
        });
        let linked = loaded.and_then(|()| {
            self.effect(|state| {
                state.devices.get_mut(name).ok_or_else(|| refused("link"))?.linked = true;
                Ok(())
            })
        });
        if linked.is_err() {
            self.state().devices.remove(name);
        }
        linked
    }

    fn deactivate(&self, name: &DeviceName) -> Result<Deactivated, DeviceError> {
        let open = self.state().devices.get(name.as_str()).map(|device| device.open);
        match open {
            None => Ok(Deactivated::Gone),
            Some(0) => self.effect(|state| {
                state.devices.remove(name.as_str());
                state.reclaimed.push(Reclaimed::Deactivated);
                Ok(Deactivated::Gone)
            }),
            Some(_) => Ok(Deactivated::InUse),
        }
    }

    fn flush(&self, name: &DeviceName) -> Result<(), DeviceError> {
        self.effect(|state| {
            let thin = state.devices.get(name.as_str()).ok_or_else(|| refused("flush"))?.thin;
            state.unflushed.remove(&thin);
            Ok(())
        })
        .map_err(|error| DeviceError::NotFlushed { path: name.path(), error: error.to_string() })
    }

    fn passes_discards(&self) -> Result<bool, DeviceError> {
        Ok(self.state().passes_discards)
    }

    fn discard(&self, name: &DeviceName, from: u64, bytes: u64) -> Result<(), DeviceError> {
        self.effect(|state| {
            let device = state.devices.get(name.as_str()).ok_or_else(|| refused("discard"))?;
            assert!(
                device.access == Access::ReadWrite && device.open == 0,
                "{name} is not for that: {device:?}"
            );
            // Parts of blocks are passed over.
            let (first, last) = (from.div_ceil(state.block), (from + bytes) / state.block);
            state.mapped = state.mapped.saturating_sub(last.saturating_sub(first) * state.block);
            state.reclaimed.push(Reclaimed::Discarded);
            Ok(())
        })
    }

    fn suspend(&self, name: &DeviceName) -> Result<(), DeviceError> {
        self.effect(|state| {
            state.devices.get_mut(name.as_str()).ok_or_else(|| refused("suspend"))?.suspended = true;
            state.suspensions += 1;
            Ok(())
        })
    }

    fn resume(&self, name: &DeviceName) -> Result<(), DeviceError> {
        self.effect(|state| {
            let there = state.devices.get_mut(name.as_str()).filter(|device| device.loaded);
            there.ok_or_else(|| refused("resume"))?.suspended = false;
            Ok(())
        })
    }

    fn look(&self, name: &DeviceName) -> Result<Option<Live>, DeviceError> {
        let state = self.state();
        let device = state.devices.get(name.as_str());
        Ok(device.map(|d| Live {
            open: d.open,
            suspended: d.suspended,
            mapped: d.loaded.then_some(state.mapped),
        }))
    }

    fn names(&self) -> Result<BTreeSet<String>, DeviceError> {
        Ok(self.device_names().into_iter().filter(|name| name.starts_with(PREFIX)).collect())
    }

    fn thin_ids(&self) -> Result<BTreeSet<ThinId>, DeviceError> {
        Ok(self.state().thins.keys().copied().collect())
    }

    fn damage(&self) -> Result<Option<String>, DeviceError> {
        Ok(None)
    }

    fn creations(&self) -> Result<u32, DeviceError> {
        Ok(self.state().creations)
    }
}

impl FakePool {
    fn rewrite(&self, path: &str, content: impl FnOnce(&str) -> String) -> Result<(), DeviceError> {
        self.effect(|state| {
            let name = path.strip_prefix("/dev/mapper/").unwrap();
            let thin = state.devices.get(name).ok_or_else(|| refused("no such device"))?.thin;
            let before = state.thins[&thin].clone();
            state.thins.insert(thin, content(&before));
            Ok(())
        })
    }
}

impl Filesystem for FakePool {
    fn name(&self) -> &'static str {
        "ext4"
    }

    fn make(&self, path: &str, _zeroed: bool) -> Result<(), DeviceError> {
        self.rewrite(path, |_| "empty".to_owned())
    }

    fn grow(&self, path: &str) -> Result<(), DeviceError> {
        self.rewrite(path, |before| format!("{before}, grown"))
    }

    fn needs_recovery(&self, path: &str) -> Result<bool, DeviceError> {
        let state = self.state();
        let device = state.devices.get(path.strip_prefix("/dev/mapper/").unwrap());
        let device = device.ok_or_else(|| refused("no such device"))?;
        Ok(state.thins[&device.thin].contains("unclean"))
    }
}
