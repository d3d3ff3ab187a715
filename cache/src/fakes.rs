//! Fakes of containerd, the kernel and the images, which can be stopped, or made to fail, at every effect; and a
//! process that runs on them.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use cowshed_gc::reserve::Policy;
use cowshed_leases::{
    BootId, DeviceIdentity, DeviceNumber, Grace, Lease, Mode, Moment, Release, Scratch, State, Ttl,
    UnixMicros, Uptime,
};
use tonic::Status;

use crate::{
    acquire::{Acquirer, Wish},
    admission::Admission,
    clock::Clock,
    containerd::{CallError, Mount, Snapshots},
    drain::Drain,
    error::{Error, Reason, Result},
    flights::Flights,
    image::{
        Access, Cache, Digest, ImageCache, ImageRef, Platform, ProcessConfig, ResolvedImage, RunningPulls,
    },
    kernel::{Devices, Holder, Kernel, KernelError, Load, PoolMode, PoolUsage},
    ledger::Ledger,
    making::{Making, Wishes},
    metrics::Metrics,
    reclaim::{Reclaimer, Waiting, Wake},
    rescue::Hindrances,
    tasks::Tasks,
    writes::{Usage, Writes},
};

/// containerd and the kernel in one: leases, snapshots, devices; and a count-down to a failure.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) state: Mutex<State_>,
    /// How often everything was looked at.
    pub(crate) looks: AtomicUsize,
    /// The image has to be pulled.
    pub(crate) absent: AtomicBool,
    /// containerd does not say how snapshots are mounted.
    pub(crate) hangs: AtomicBool,
    /// Pulls fail.
    pub(crate) pulls_fail: AtomicBool,
    /// Which boot it is, and how many seconds it is old.
    pub(crate) time: Mutex<(u8, u64)>,
    /// Whoever has these keeps pulls and Prepares from being done.
    pub(crate) pulls: tokio::sync::Mutex<()>,
    pub(crate) prepares: tokio::sync::Mutex<()>,
    effects: AtomicUsize,
    fail_at: AtomicUsize,
    fault: Mutex<Fault>,
}

/// What happens at the effect that is counted down to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is not made, and says so.
    #[default]
    Refused,
    /// It is made, and says that it was not.
    AnswerLost,
    /// It is not made, and the process is gone: it never answers.
    CrashBefore,
    /// It is made, and the process is gone.
    CrashAfter,
    /// It is made, and its caller panics.
    Panics,
}

/// What the kernel tells of a device that is there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Sight {
    #[default]
    Clear,
    NotThin,
    Blind,
}

#[derive(Default)]
pub(crate) struct State_ {
    pub(crate) leases: BTreeSet<String>,
    /// Key → device name.
    pub(crate) snapshots: BTreeMap<String, String>,
    /// Device name → open count.
    pub(crate) devices: BTreeMap<String, u32>,
    next_device: u32,
    /// What the kernel tells of devices.
    pub(crate) sight: Sight,
    /// Devices without a snapshot stay until this is over.
    pub(crate) at_leisure: bool,
    /// How often somebody had containerd collect.
    pub(crate) collections: usize,
    /// How often somebody had containerd look for what it does not know.
    pub(crate) sweeps: usize,
    /// Snapshots that something else than their leases holds as well.
    pub(crate) held_elsewhere: BTreeSet<String>,
    /// The device that somebody opens when a snapshot is removed.
    pub(crate) opened_by_removal: Option<String>,
    /// The device that somebody opens when it is looked at what it maps.
    pub(crate) opened_by_look: Option<String>,
    /// How often the pool still answers; always, if `None`.
    pub(crate) pool_answers: Option<usize>,
    pub(crate) parents: BTreeSet<String>,
    /// Devices that the kernel keeps from being written.
    pub(crate) read_only: BTreeSet<String>,
    /// It keeps none: views are read-only by name.
    pub(crate) all_writable: bool,
    /// How many views were made.
    pub(crate) views: usize,
    /// How much of the pool's data is in use, in bytes.
    pub(crate) data_used: u64,
    /// Whether it works.
    pub(crate) pool_mode: PoolMode,
    /// What was written to each device, in bytes.
    pub(crate) written: BTreeMap<String, u64>,
    /// What is written to a device while containerd is asked what it has, in bytes.
    pub(crate) written_by_usage: u64,
    /// containerd does not tell what snapshots have.
    pub(crate) usage_fails: bool,
    /// Sizes of empty devices.
    sizes: BTreeMap<String, u64>,
    /// What devices count, by name.
    pub(crate) loads: BTreeMap<String, Load>,
}

impl State_ {
    /// A new snapshot and its device.
    fn snapshot(&mut self, lease: &str, key: &str) -> String {
        assert!(self.leases.contains(lease), "a snapshot that nothing holds");
        self.next_device += 1;
        let device = format!("snap-{}", self.next_device);
        self.devices.insert(device.clone(), 0);
        self.snapshots.insert(key.to_owned(), device.clone());
        device
    }
}

pub(crate) fn image() -> ResolvedImage {
    ResolvedImage {
        name: ImageRef::parse("r.example/app:1").unwrap(),
        target: Digest::of(b"target"),
        manifest: Digest::of(b"manifest"),
        platform: Platform::host(),
        chain_id: Digest::of(b"chain"),
        process: ProcessConfig { cmd: vec!["/bin/app".into()], ..ProcessConfig::default() },
        compressed_bytes: 1,
        layers: 1,
        created_at: None,
    }
}

fn gone() -> CallError {
    CallError::Status { call: "fake", status: Box::new(Status::not_found("not there")) }
}

fn broken() -> CallError {
    CallError::Status { call: "fake", status: Box::new(Status::unavailable("cut off")) }
}

impl World {
    /// An effect, or the fault that it is to have.
    async fn effect<T>(
        &self,
        make: impl FnOnce(&mut State_) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        let number = self.effects.fetch_add(1, Ordering::SeqCst) + 1;
        let fault = *self.fault.lock().unwrap();
        let fault = (number == self.fail_at.load(Ordering::SeqCst)).then_some(fault);
        let made = match fault {
            Some(Fault::Refused | Fault::CrashBefore) => Err(broken()),
            None | Some(Fault::AnswerLost | Fault::CrashAfter | Fault::Panics) => {
                make(&mut self.state.lock().unwrap())
            }
        };
        match fault {
            None => made,
            Some(Fault::Refused | Fault::AnswerLost) => Err(broken()),
            Some(Fault::Panics) => panic!("as the test wants it"),
            Some(Fault::CrashBefore | Fault::CrashAfter) => std::future::pending().await,
        }
    }

    pub(crate) fn arm(&self, fault: Fault, fail_at: usize) {
        *self.fault.lock().unwrap() = fault;
        self.effects.store(0, Ordering::SeqCst);
        self.fail_at.store(fail_at, Ordering::SeqCst);
    }

    pub(crate) fn now(&self) -> Moment {
        let (boot, up) = *self.time.lock().unwrap();
        Moment { wall: UnixMicros(0), boot: BootId::from_bits(boot.into()), up: Uptime(up * 1_000_000) }
    }

    pub(crate) fn has_struck(&self) -> bool {
        let at = self.fail_at.load(Ordering::SeqCst);
        at > 0 && self.effects.load(Ordering::SeqCst) >= at
    }

    pub(crate) fn look<T>(&self, look: impl FnOnce(&State_) -> T) -> T {
        look(&self.state.lock().unwrap())
    }

    pub(crate) fn set_open(&self, device: &str, count: u32) {
        self.state.lock().unwrap().devices.insert(device.to_owned(), count);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.look(|s| s.leases.is_empty() && s.snapshots.is_empty() && s.devices.is_empty())
    }
}

#[async_trait::async_trait]
impl Snapshots for World {
    async fn create_lease(&self, id: &str, _labels: HashMap<String, String>) -> Result<(), CallError> {
        self.effect(|s| {
            s.leases.insert(id.to_owned());
            Ok(())
        })
        .await
    }

    async fn delete_lease(&self, id: &str, sync: bool) -> Result<(), CallError> {
        self.effect(|s| {
            s.leases.remove(id);
            s.collections += usize::from(sync);
            // The collection: snapshots without a lease, then devices without a snapshot.
            let held: BTreeSet<String> = s.leases.union(&s.held_elsewhere).cloned().collect();
            s.snapshots.retain(|key, _| held.contains(key));
            if s.at_leisure {
                return Ok(());
            }
            let kept: BTreeSet<&String> = s.snapshots.values().collect();
            for (device, open) in &s.devices {
                assert!(kept.contains(device) || *open == 0, "{device} was removed while open");
            }
            s.devices.retain(|device, _| kept.contains(device));
            Ok(())
        })
        .await
    }

    async fn our_leases(&self) -> Result<Vec<String>, CallError> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        Ok(self.look(|s| s.leases.iter().cloned().collect()))
    }

    async fn prepare(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError> {
        // Not kept: a process that crashes in here would hold up the next one.
        drop(self.prepares.lock().await);
        self.effect(|s| {
            if !s.parents.contains(parent) {
                return Err(gone());
            }
            Ok(vec![mount(&s.snapshot(lease, key))])
        })
        .await
    }

    async fn view(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError> {
        drop(self.prepares.lock().await);
        self.effect(|s| {
            if !s.parents.contains(parent) {
                return Err(gone());
            }
            s.views += 1;
            let device = s.snapshot(lease, key);
            if !s.all_writable {
                s.read_only.insert(device.clone());
            }
            Ok(vec![mount(&device)])
        })
        .await
    }

    async fn empty(&self, lease: &str, key: &str, scratch: Scratch) -> Result<Vec<Mount>, CallError> {
        self.effect(|s| {
            let device = s.snapshot(lease, key);
            s.sizes.insert(device.clone(), scratch.size_bytes);
            Ok(vec![mount(&device)])
        })
        .await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, CallError> {
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.look(|s| s.snapshots.get(key).map(|device| vec![mount(device)]).ok_or_else(gone))
    }

    async fn remove(&self, key: &str) -> Result<(), CallError> {
        self.effect(|s| {
            s.snapshots.remove(key);
            if let Some(device) = s.opened_by_removal.take() {
                s.devices.insert(device, 1);
            }
            Ok(())
        })
        .await
    }

    async fn keys(&self, prefix: &str) -> Result<Vec<String>, CallError> {
        Ok(self.look(|s| s.snapshots.keys().filter(|key| key.starts_with(prefix)).cloned().collect()))
    }

    async fn hold(&self, lease: &str, key: &str) -> Result<(), CallError> {
        // Here a lease holds the snapshot of its own name.
        assert_eq!(lease, key);
        assert!(
            self.look(|s| s.leases.contains(lease) && s.snapshots.contains_key(key)),
            "{key} is not there"
        );
        Ok(())
    }

    async fn sweep(&self) -> Result<(), CallError> {
        let mut state = self.state.lock().unwrap();
        state.sweeps += 1;
        let kept: BTreeSet<String> = state.snapshots.values().cloned().collect();
        state.devices.retain(|device, open| kept.contains(device) || *open > 0);
        Ok(())
    }

    fn explain(&self, error: CallError) -> Error {
        Error::new(Reason::ContainerdUnavailable, error.to_string())
    }
}

fn mount(device: &str) -> Mount {
    Mount { r#type: "ext4".into(), source: format!("/dev/mapper/{device}"), ..Mount::default() }
}

/// What each disk shares with its image, in bytes.
const BASE: u64 = 1000;

#[async_trait::async_trait]
impl Usage for World {
    async fn usage(&self, snapshot: &str) -> Result<Option<u64>> {
        let mut state = self.state.lock().unwrap();
        if state.usage_fails {
            return Err(Error::new(Reason::ContainerdUnavailable, "containerd does not answer"));
        }
        let Some(device) = state.snapshots.get(snapshot).cloned() else { return Ok(None) };
        let busy = state.written_by_usage;
        let written = state.written.entry(device).or_default();
        let before = *written;
        *written += busy;
        Ok(Some(before))
    }
}

impl Kernel for World {
    fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError> {
        let name = path.rsplit('/').next().unwrap().to_owned();
        if !self.look(|s| s.devices.contains_key(&name)) {
            return Err(KernelError::Missing(path.to_owned()));
        }
        match self.look(|s| s.sight) {
            Sight::Clear => {}
            Sight::NotThin => {
                return Err(KernelError::NotThin { path: path.to_owned(), what: "linear".into() });
            }
            Sight::Blind => {
                return Err(KernelError::Refused { what: "opening".into(), error: "EMFILE".into() });
            }
        }
        let thin_id = name.trim_start_matches("snap-").parse().unwrap();
        Ok(DeviceIdentity {
            path: path.to_owned(),
            number: DeviceNumber { major: 253, minor: thin_id },
            size_bytes: self.look(|s| s.sizes.get(&name).copied().unwrap_or(1 << 30)),
            read_only: self.look(|s| s.read_only.contains(&name)),
            dm_name: name,
            dm_uuid: None,
            thin_id,
            pool: DeviceNumber { major: 253, minor: 0 },
        })
    }

    fn open_count(&self, name: &str) -> Result<Option<u32>, KernelError> {
        Ok(self.look(|s| s.devices.get(name).copied()))
    }

    fn mapped(&self, name: &str) -> Result<Option<u64>, KernelError> {
        let opened = self.state.lock().unwrap().opened_by_look.take_if(|opened| opened == name);
        opened.iter().for_each(|device| self.set_open(device, 1));
        let written = |s: &State_| s.written.get(name).copied().unwrap_or_default();
        Ok(self.look(|s| s.devices.contains_key(name).then(|| BASE + written(s))))
    }

    fn holders(&self, _path: &str) -> Result<Vec<Holder>, KernelError> {
        Ok(Vec::new())
    }

    fn load(&self, name: &str) -> Result<Option<Load>, KernelError> {
        Ok(self.look(|s| s.devices.get(name).map(|_| s.loads.get(name).copied().unwrap_or_default())))
    }

    fn pool(&self) -> Result<PoolUsage, KernelError> {
        match &mut self.state.lock().unwrap().pool_answers {
            None => {}
            Some(0) => {
                return Err(KernelError::Slow { what: "looking at the pool".into(), after: Duration::ZERO });
            }
            Some(left) => *left -= 1,
        }
        Ok(PoolUsage {
            name: "pool".into(),
            data_used: self.look(|s| s.data_used),
            data_total: 1 << 40,
            metadata_used: 0,
            metadata_total: 100,
            block_bytes: 64 << 10,
            mode: self.look(|s| s.pool_mode),
            zeroing: true,
        })
    }
}

#[async_trait::async_trait]
impl ImageCache for World {
    async fn resolve(
        &self,
        _image: &ImageRef,
        _platform: &Platform,
        _access: &Access,
    ) -> Result<Option<ResolvedImage>> {
        Ok(Some(image()).filter(|_| !self.absent.load(Ordering::SeqCst)))
    }

    async fn local(&self, _image: &ImageRef, _platform: &Platform) -> Result<Option<ResolvedImage>> {
        Ok(Some(image()).filter(|_| !self.absent.load(Ordering::SeqCst)))
    }

    async fn ensure(
        &self,
        _image: &ImageRef,
        _platform: &Platform,
        _access: &Access,
    ) -> Result<(ResolvedImage, Cache)> {
        drop(self.pulls.lock().await);
        if self.pulls_fail.load(Ordering::SeqCst) {
            return Err(Error::new(Reason::RegistryUnavailable, "the registry does not answer"));
        }
        self.state.lock().unwrap().parents.insert(image().chain_id.to_string());
        Ok((image(), Cache::Miss))
    }
}

impl RunningPulls for World {
    fn running(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }
}

/// A moment of the first boot, and what a ledger can be asked for without any containerd.
pub(crate) mod book {
    use cowshed_leases::{
        Acquisition, Ask, BootId, DeviceIdentity, DeviceNumber, Grant, Lease, LeaseId, Moment, Process,
        Release, Spec, UnixMicros, Uptime,
    };

    use crate::ledger::{GivenUp, Ledger};

    pub(crate) fn now() -> Moment {
        Moment { wall: UnixMicros(0), boot: BootId::from_bits(1), up: Uptime(0) }
    }

    /// The id of the lease that VM `n` gets.
    pub(crate) fn id(n: u32) -> LeaseId {
        LeaseId::from_random(u128::from(n))
    }

    pub(crate) fn spec() -> Spec {
        Spec { image: "registry.example/app:1".into(), platform: "linux/amd64".into(), ..Spec::default() }
    }

    pub(crate) fn ask(n: u32) -> Ask {
        let vm = format!("vm-{n}").parse().unwrap();
        Ask { vm, spec: spec(), ttl: None, fresh: false, expects: 0, request: None, share: None, spare: None }
    }

    /// Whatever VM `n` has.
    pub(crate) fn back(n: u32) -> Release {
        Release { vm: ask(n).vm, lease: None, generation: None, request: None, abandon: false }
    }

    /// The disk that VM `n` gets.
    pub(crate) fn grant(n: u32) -> Grant {
        let number = |minor| DeviceNumber { major: 253, minor };
        let device = DeviceIdentity {
            path: format!("/dev/mapper/snap-{n}"),
            number: number(n),
            dm_name: format!("snap-{n}"),
            dm_uuid: None,
            thin_id: n,
            pool: number(0),
            size_bytes: 1 << 30,
            read_only: false,
        };
        let (filesystem, image_digest) = ("ext4".into(), "sha256:0".into());
        Grant {
            device,
            filesystem,
            scratch: None,
            image_digest,
            process: Process::default(),
            at: UnixMicros(0),
        }
    }

    /// What VM `n` has then.
    pub(crate) fn lease(n: u32) -> Lease {
        use cowshed_leases::{Generation, Revision, State, Term};
        Lease {
            id: id(n),
            vm: ask(n).vm,
            generation: Generation(u64::from(n)),
            spec: spec(),
            created_at: UnixMicros(0),
            term: Term { ttl: None, boot: now().boot, until: None },
            revision: Revision(0),
            shares: None,
            expects: 0,
            state: State::Granted(Box::new(grant(n))),
        }
    }

    /// A new lease, in preparation.
    pub(crate) async fn acquire(ledger: &Ledger, n: u32) -> Lease {
        match ledger.acquire(ask(n), id(n), now(), GivenUp::default()).await.unwrap() {
            Acquisition::New { lease, .. } => *lease,
            other => panic!("{other:?}"),
        }
    }
}

/// One process: what it has in memory; the world and the directory outlive it.
pub(crate) struct Process_ {
    pub(crate) acquirer: Arc<Acquirer>,
    pub(crate) reclaimer: Reclaimer,
    pub(crate) writes: Arc<Writes>,
}

pub(crate) fn start(world: &Arc<World>, directory: &Path) -> Process_ {
    start_within(world, directory, Policy::default())
}

/// One in which no more is promised than that.
pub(crate) fn start_within(world: &Arc<World>, directory: &Path, limits: Policy) -> Process_ {
    let ledger = Ledger::open(directory).unwrap();
    let kernel = Devices::new(world.clone());
    let (wake, making) = (Wake::default(), Making::default());
    let clock = {
        let world = world.clone();
        Clock::of(move || world.now())
    };
    let limits = Arc::new(limits);
    let writes = Arc::new(Writes::new(ledger.clone(), kernel.clone(), world.clone(), limits.clone()));
    let acquirer = Acquirer {
        ledger: ledger.clone(),
        images: world.clone(),
        snapshots: world.clone(),
        kernel: kernel.clone(),
        admission: Admission {
            data_headroom_percent: 5,
            metadata_headroom_percent: 5,
            allow_unzeroed: false,
            limits,
            hindrances: Hindrances::default(),
        },
        room: Arc::new(crate::evict::NoRoom),
        drain: Drain::default(),
        wake: wake.clone(),
        making: making.clone(),
        wishes: Wishes::default(),
        clock: clock.clone(),
        tasks: Tasks::default(),
        flights: Flights::default(),
        crowd: crate::crowd::Crowd::new(32, 1024),
        spares: crate::spares::Spares::new(crate::config::Config::default().spares()),
        sharing: Flights::default(),
    };
    let reclaimer = Reclaimer {
        ledger,
        snapshots: world.clone(),
        kernel,
        running_pulls: world.clone(),
        making,
        writes: writes.clone(),
        wake,
        clock,
        grace: Grace { expired: Ttl::from_seconds(10).unwrap(), boot: Ttl::from_seconds(100).unwrap() },
        waiting: Waiting::default(),
        metrics: Metrics::new().unwrap(),
        retry: Duration::from_millis(1),
        interval: Duration::from_millis(1),
        suspects: Mutex::default(),
        closed: Mutex::default(),
        collected: Mutex::default(),
    };
    Process_ { acquirer: Arc::new(acquirer), reclaimer, writes }
}

pub(crate) fn world() -> Arc<World> {
    let world = World::default();
    world.state.lock().unwrap().parents.insert(image().chain_id.to_string());
    Arc::new(world)
}

pub(crate) fn wish(vm: &str) -> Wish {
    Wish {
        vm: vm.parse().unwrap(),
        image: image().name,
        platform: Platform::host(),
        access: Access::default(),
        mode: Mode::CopyOnWrite,
        scratch: None,
        ttl: None,
        fresh: false,
        request: None,
        until: None,
    }
}

/// Whatever the VM has.
pub(crate) fn back(vm: &str) -> Release {
    Release { vm: vm.parse().unwrap(), lease: None, generation: None, request: None, abandon: false }
}

impl Process_ {
    /// Acquire, release, reclaim, as far as it gets before the fault strikes.
    pub(crate) async fn story(&self, world: &World, wish: Wish) {
        let struck = async {
            while !world.has_struck() {
                tokio::task::yield_now().await;
            }
        };
        let all = async {
            let acquired = self.acquirer.acquire(wish).await.unwrap();
            self.acquirer.release(back(acquired.lease.vm.as_str())).await.unwrap();
            self.settle().await;
        };
        tokio::select! {
            () = all => {}
            () = struck => {}
        }
    }

    /// What the service does between requests, to the end.
    pub(crate) async fn settle(&self) {
        for _ in 0..4 {
            self.reclaimer.pass_over_everything().await;
        }
    }

    /// Invariants 1 and 2: every granted lease has its own device, or shares that of one that has, and there is nothing else.
    pub(crate) fn audit(&self, world: &World, what: &str) {
        let granted: BTreeMap<String, String> = self.acquirer.ledger.read(|book| {
            let of = |lease: &Lease| Some((lease.id.snapshot_key(), lease.own_device()?.dm_name.clone()));
            // Of what has failed nothing is left but the reason.
            let cleared = |lease: &&Lease| !matches!(lease.state, State::Failed { cleared: true, .. });
            for lease in book.after(None).filter(cleared) {
                let root = book.get(lease.root()).and_then(Lease::grant).unwrap();
                assert_eq!(root.device.dm_name, lease.grant().unwrap().device.dm_name, "{what}: shares");
            }
            book.after(None).filter(cleared).filter_map(of).collect()
        });
        world.look(|s| {
            assert_eq!(s.snapshots, granted, "{what}: snapshots");
            assert_eq!(s.leases, granted.keys().cloned().collect(), "{what}: containerd leases");
            assert_eq!(
                s.devices.keys().collect::<BTreeSet<_>>(),
                granted.values().collect::<BTreeSet<_>>(),
                "{what}: devices"
            );
        });
    }
}
