//! The real kernel.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use devicemapper::{DM, DevId, Device, DeviceInfo, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::{
    Access, Activation, Deactivated, DeviceError, DeviceName, Live, PREFIX, Pool, PoolEvents, PoolFacts,
    REPAIR, audit, ioctl,
    table::{self, DeviceNumber, PoolMode},
};
use crate::tree::ThinId;

/// So long lvextend may keep a pool suspended, which activates nothing meanwhile.
const EXTENSION: Duration = Duration::from_secs(5);

/// Device-mapper, and one thin pool of it.
pub struct DeviceMapper {
    pool: String,
    /// Its uuid: what is done to it is done to no other that gets its name. Empty if it has none.
    uuid: String,
    dm: DM,
    control: File,
}

impl DeviceMapper {
    /// `pool` is the pool's device-mapper name; "" means the only one there is.
    ///
    /// # Errors
    /// If there is no device-mapper, or it cannot be told which pool is meant.
    pub fn new(pool: &str) -> Result<Self, DeviceError> {
        let no_dm = |e: &dyn std::fmt::Display| {
            DeviceError::NoPool(format!("device-mapper cannot be used ({e}): modprobe dm_thin_pool, as root"))
        };
        let dm = DM::new().map_err(|e| no_dm(&e))?;
        let control = ioctl::control().map_err(|e| no_dm(&e))?;
        let mut this = Self { pool: pool.to_owned(), uuid: String::new(), dm, control };
        if pool.is_empty() {
            this.pool = this.only_pool()?;
        }
        let found = this.targets(&this.pool, DmFlags::DM_STATUS_TABLE)?;
        this.uuid = found.and_then(|(info, _)| info.uuid().map(ToString::to_string)).unwrap_or_default();
        Ok(this)
    }

    fn only_pool(&self) -> Result<String, DeviceError> {
        let devices = self.dm.list_devices().map_err(|e| refused("listing devices", &e))?;
        let mut pools = Vec::new();
        for (name, _, _) in devices {
            let name = name.to_string();
            let (_, targets) = self.targets(&name, DmFlags::DM_STATUS_TABLE)?.unzip();
            if matches!(targets.as_deref(), Some([(_, _, kind, _)]) if kind == "thin-pool") {
                pools.push(name);
            }
        }
        match &pools[..] {
            [one] => Ok(one.clone()),
            [] => {
                Err(DeviceError::NoPool("this host has no active thin pool: activate or make one".to_owned()))
            }
            many => Err(DeviceError::NoPool(format!(
                "this host has {} thin pools ({}): name the one in [pool] name",
                many.len(),
                many.join(", ")
            ))),
        }
    }

    fn targets(
        &self,
        name: &str,
        flags: DmFlags,
    ) -> Result<Option<(DeviceInfo, Vec<table::Target>)>, DeviceError> {
        let options = DmOptions::default().set_flags(flags | DmFlags::DM_NOFLUSH);
        match self.dm.table_status(&id(name)?, options) {
            Ok(found) => Ok(Some(found)),
            Err(error) if errno(&error) == Some(Errno::ENXIO) => Ok(None),
            Err(error) => Err(refused(&format!("looking at {name}"), &error)),
        }
    }

    fn pool_table(&self) -> Result<(DeviceInfo, Vec<table::Target>), DeviceError> {
        self.of_pool(DmFlags::DM_STATUS_TABLE)
    }

    fn status(&self) -> Result<(DeviceInfo, Vec<table::Target>), DeviceError> {
        self.of_pool(DmFlags::empty())
    }

    fn of_pool(&self, flags: DmFlags) -> Result<(DeviceInfo, Vec<table::Target>), DeviceError> {
        let missing = || {
            DeviceError::NoPool(format!(
                "there is no thin pool {}: activate or make it (if LVM2 does not, see deploy/README.md)",
                self.pool
            ))
        };
        let (info, targets) = self.targets(&self.pool, flags)?.ok_or_else(missing)?;
        let uuid = info.uuid().map(ToString::to_string).unwrap_or_default();
        if uuid != self.uuid {
            return Err(self.no_pool(format!("it has the uuid {uuid:?}, and was {:?} before", self.uuid)));
        }
        Ok((info, targets))
    }

    /// Whether it writes, without asking how large it is.
    fn mode(&self) -> Result<PoolMode, DeviceError> {
        Ok(self.events()?.mode)
    }

    fn no_pool(&self, what: impl std::fmt::Display) -> DeviceError {
        DeviceError::NoPool(format!("{} is not a usable thin pool: {what}", self.pool))
    }

    fn message(&self, text: &str) -> Result<(), DmError> {
        let pool = if self.uuid.is_empty() {
            DevId::Name(DmName::new(&self.pool)?)
        } else {
            DevId::Uuid(DmUuid::new(&self.uuid)?)
        };
        self.dm.target_msg(&pool, Some(0), text).map(drop)
    }

    /// A message about a thin device that was refused: the kernel's code, or what it means.
    fn not_done(&self, what: &str, error: &DmError) -> DeviceError {
        match errno(error) {
            // A pool that does not write refuses all messages.
            Some(Errno::EOPNOTSUPP) => DeviceError::PoolRefuses { name: self.pool.clone(), advice: REPAIR },
            _ => refused(what, error),
        }
    }

    /// A message's own commit can fail without its sender being told, and the pool turns read-only then.
    fn writes_still(&self) -> Result<(), DeviceError> {
        self.expect_writing(self.mode().map_err(|e| said("looking at the pool afterwards", e))?)
    }

    fn expect_writing(&self, mode: PoolMode) -> Result<(), DeviceError> {
        match mode {
            PoolMode::ReadWrite | PoolMode::OutOfDataSpace => Ok(()),
            PoolMode::ReadOnly | PoolMode::NeedsCheck | PoolMode::Failed => {
                Err(DeviceError::PoolStopped { name: self.pool.clone(), mode, advice: REPAIR })
            }
        }
    }

    /// Puts a table into use and makes the link to its node.
    fn load(&self, activation: &Activation, device: Device) -> Result<(), DeviceError> {
        let name = activation.name.as_str();
        let (pool, _) = self.pool_table()?;
        let params = format!("{} {}", pool.device(), activation.thin.0);
        let targets = [(0, activation.bytes.0 / 512, "thin".to_owned(), params)];
        let flags = match activation.access {
            Access::ReadWrite => DmFlags::empty(),
            Access::ReadOnly => DmFlags::DM_READONLY,
        };
        let options = DmOptions::default().set_flags(flags);
        let begun = Instant::now();
        loop {
            match self.dm.table_load(&id(name)?, &targets, options) {
                Ok(_) => break,
                // The pool is suspended for a moment: somebody extends it.
                Err(error)
                    if errno(&error) == Some(Errno::EINVAL)
                        && begun.elapsed() < EXTENSION
                        && self.mode()? != PoolMode::Failed =>
                {
                    pause();
                }
                Err(error) if errno(&error) == Some(Errno::ENODATA) => {
                    return Err(DeviceError::ThinMissing(activation.thin));
                }
                Err(error) => return Err(refused(&format!("loading the table of {name}"), &error)),
            }
        }
        ioctl::resume(&self.control, name).map_err(|e| said(&format!("resuming {name}"), e))?;
        link(&activation.name, device).map_err(|e| said(&format!("linking {}", activation.name.path()), e))
    }
}

impl Pool for DeviceMapper {
    fn facts(&self) -> Result<PoolFacts, DeviceError> {
        let (info, tables) = self.pool_table()?;
        let (_, status) = self.status()?;
        let usage = table::parse_pool(&self.pool, &tables, &status).map_err(|what| self.no_pool(what))?;
        let uuid = info.uuid().map(ToString::to_string).unwrap_or_default();
        Ok(PoolFacts { usage, uuid })
    }

    fn events(&self) -> Result<PoolEvents, DeviceError> {
        let (info, status) = self.status()?;
        let mode = table::parse_pool_mode(&status).map_err(|what| self.no_pool(what))?;
        Ok(PoolEvents { count: info.event_nr(), mode })
    }

    fn create_thin(&self, thin: ThinId) -> Result<(), DeviceError> {
        let made = self.message(&format!("create_thin {}", thin.0));
        made.map_err(|e| match errno(&e) {
            Some(Errno::EEXIST) => DeviceError::ThinExists(thin),
            _ => self.not_done(&format!("making thin device {}", thin.0), &e),
        })?;
        self.writes_still()
    }

    fn create_snap(&self, thin: ThinId, origin: ThinId) -> Result<(), DeviceError> {
        let made = self.message(&format!("create_snap {} {}", thin.0, origin.0));
        made.map_err(|e| match errno(&e) {
            Some(Errno::EEXIST) => DeviceError::ThinExists(thin),
            Some(Errno::ENODATA) => DeviceError::ThinMissing(origin),
            _ => self.not_done(&format!("making snapshot {} of thin device {}", thin.0, origin.0), &e),
        })?;
        self.writes_still()
    }

    fn delete(&self, thin: ThinId) -> Result<(), DeviceError> {
        match self.message(&format!("delete {}", thin.0)) {
            Ok(()) => self.writes_still(),
            Err(error) if errno(&error) == Some(Errno::ENODATA) => Ok(()),
            Err(error) => Err(self.not_done(&format!("deleting thin device {}", thin.0), &error)),
        }
    }

    fn activate(&self, activation: &Activation) -> Result<(), DeviceError> {
        let name = activation.name.as_str();
        let uuid = activation.name.uuid();
        let what = |doing: &str| format!("{doing} {name}");
        let dm_name = DmName::new(name).map_err(|e| refused(name, &e))?;
        let dm_uuid = DmUuid::new(&uuid).map_err(|e| refused(name, &e))?;
        match self.dm.device_create(dm_name, Some(dm_uuid), DmOptions::default()) {
            Ok(made) => self.load(activation, made.device()).map_err(|failed| {
                let undone = self.deactivate(&activation.name);
                match undone {
                    Ok(Deactivated::Gone) => failed,
                    other => said(&what(&format!("{failed}; and then removing")), format!("{other:?}")),
                }
            }),
            Err(error) if errno(&error) == Some(Errno::EBUSY) => {
                let gone = || said(&what("activating"), "another device has its uuid");
                let (info, targets) = self.targets(name, DmFlags::DM_STATUS_TABLE)?.ok_or_else(gone)?;
                // Half made by one that was killed, or whole.
                match table::parse_thin(&targets) {
                    Ok(thin) if thin.id == activation.thin.0 => {
                        if info.flags().contains(DmFlags::DM_SUSPEND) {
                            ioctl::resume(&self.control, name).map_err(|e| said(&what("resuming"), e))?;
                        }
                        link(&activation.name, info.device()).map_err(|e| said(&what("linking"), e))
                    }
                    Ok(other) => Err(said(&what("activating"), format!("it is of thin device {}", other.id))),
                    Err(_) => self.load(activation, info.device()),
                }
            }
            Err(error) => Err(refused(&what("making"), &error)),
        }
    }

    fn deactivate(&self, name: &DeviceName) -> Result<Deactivated, DeviceError> {
        let Some(live) = self.look(name)? else {
            unlink(name).map_err(|e| said(&format!("unlinking {}", name.path()), e))?;
            return Ok(Deactivated::Gone);
        };
        if live.open > 0 {
            return Ok(Deactivated::InUse);
        }
        // The link first: it must not lead to the next device that gets these numbers.
        unlink(name).map_err(|e| said(&format!("unlinking {}", name.path()), e))?;
        match ioctl::remove(&self.control, name.as_str()) {
            Ok(()) | Err(Errno::ENXIO) => Ok(Deactivated::Gone),
            Err(error) => {
                if let Some((info, _)) = self.targets(name.as_str(), DmFlags::DM_STATUS_TABLE)? {
                    link(name, info.device()).map_err(|e| said(&format!("linking {}", name.path()), e))?;
                }
                if error == Errno::EBUSY {
                    Ok(Deactivated::InUse)
                } else {
                    Err(said(&format!("removing {name}"), error))
                }
            }
        }
    }

    fn flush(&self, name: &DeviceName) -> Result<(), DeviceError> {
        let path = name.path();
        let device = File::open(&path).map_err(|e| said(&format!("opening {path}"), e))?;
        device.sync_all().map_err(|e| DeviceError::NotFlushed { path, error: e.to_string() })?;
        match self.mode()? {
            // It may have dropped what was written before.
            mode @ PoolMode::OutOfDataSpace => {
                let advice = "extend it (cowshed pool extend), and make this snapshot anew";
                Err(DeviceError::PoolStopped { name: self.pool.clone(), mode, advice })
            }
            mode => self.expect_writing(mode),
        }
    }

    fn passes_discards(&self) -> Result<bool, DeviceError> {
        let (_, status) = self.status()?;
        Ok(table::passes_discards(&status))
    }

    fn discard(&self, name: &DeviceName, from: u64, bytes: u64) -> Result<(), DeviceError> {
        let path = name.path();
        let device =
            File::options().write(true).open(&path).map_err(|e| said(&format!("opening {path}"), e))?;
        ioctl::discard(&device, from, bytes)
            .map_err(|e| said(&format!("discarding {bytes} bytes of {path} from {from} on"), e))
    }

    fn suspend(&self, name: &DeviceName) -> Result<(), DeviceError> {
        let options = DmOptions::default().set_flags(DmFlags::DM_SUSPEND);
        let suspended = self.dm.device_suspend(&id(name.as_str())?, options);
        suspended.map(drop).map_err(|e| refused(&format!("suspending {name}"), &e))
    }

    fn resume(&self, name: &DeviceName) -> Result<(), DeviceError> {
        ioctl::resume(&self.control, name.as_str()).map_err(|e| said(&format!("resuming {name}"), e))
    }

    fn look(&self, name: &DeviceName) -> Result<Option<Live>, DeviceError> {
        let Some((info, status)) = self.targets(name.as_str(), DmFlags::empty())? else { return Ok(None) };
        Ok(Some(Live {
            open: info.open_count().unsigned_abs(),
            suspended: info.flags().contains(DmFlags::DM_SUSPEND),
            mapped: table::parse_thin_status(&status).ok(),
        }))
    }

    fn names(&self) -> Result<BTreeSet<String>, DeviceError> {
        let devices = self.dm.list_devices().map_err(|e| refused("listing devices", &e))?;
        let names = devices.into_iter().map(|(name, _, _)| name.to_string());
        Ok(names.filter(|name| name.starts_with(PREFIX)).collect())
    }

    fn thin_ids(&self) -> Result<BTreeSet<ThinId>, DeviceError> {
        let metadata = self.metadata()?;
        self.with_metadata_snap(metadata, || audit::thin_ls(metadata))?
    }

    fn damage(&self) -> Result<Option<String>, DeviceError> {
        let metadata = self.metadata()?;
        self.with_metadata_snap(metadata, || audit::thin_check(metadata))?
    }

    fn creations(&self) -> Result<u32, DeviceError> {
        audit::superblock_time(self.metadata()?)
    }
}

impl DeviceMapper {
    /// Programs read the metadata of a pool that is in use from a snapshot of it. There is one at a time, for whatever
    /// process: whoever has the lock of the metadata's device.
    fn with_metadata_snap<T>(
        &self,
        metadata: DeviceNumber,
        work: impl FnOnce() -> T,
    ) -> Result<T, DeviceError> {
        let path = audit::node(metadata);
        let device = File::open(&path).map_err(|e| said(&format!("opening {path}"), e))?;
        let _alone = Flock::lock(device, FlockArg::LockExclusive)
            .map_err(|(_, e)| said(&format!("locking {path}"), e))?;
        // One that was killed may have left its own.
        if self.holds_metadata_snap()? {
            self.message("release_metadata_snap")
                .map_err(|e| refused("releasing an old snapshot of the metadata", &e))?;
        }
        self.message("reserve_metadata_snap")
            .map_err(|e| refused("reserving a snapshot of the metadata", &e))?;
        let done = work();
        self.message("release_metadata_snap")
            .map_err(|e| refused("releasing the snapshot of the metadata", &e))?;
        Ok(done)
    }

    /// The held root is the fourth word of a pool's status; "-" if there is none.
    fn holds_metadata_snap(&self) -> Result<bool, DeviceError> {
        let status = self.targets(&self.pool, DmFlags::empty())?;
        let held =
            status.as_ref().and_then(|(_, targets)| targets.first()?.3.split_ascii_whitespace().nth(3));
        Ok(held.is_some_and(|root| root != "-"))
    }

    fn metadata(&self) -> Result<DeviceNumber, DeviceError> {
        let (_, tables) = self.pool_table()?;
        let metadata = table::parse_pool_table(&tables).map_err(|what| self.no_pool(what))?;
        Ok(metadata)
    }
}

#[allow(clippy::disallowed_methods, reason = "calls of the kernel block, and have threads of their own")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Makes `/dev/mapper/NAME`, as udev will when it gets to it.
fn link(name: &DeviceName, device: Device) -> io::Result<()> {
    let (path, node) = (name.path(), format!("../dm-{}", device.minor));
    if fs::read_link(&path).is_ok_and(|found| found.as_os_str() == node.as_str()) {
        return Ok(());
    }
    // Not a name that udev or LVM would look at; one that was killed may have left it.
    let fresh = format!("/dev/mapper/.{name}.new");
    let _left = fs::remove_file(&fresh);
    symlink(node, &fresh)?;
    fs::rename(fresh, path)
}

fn unlink(name: &DeviceName) -> io::Result<()> {
    match fs::remove_file(name.path()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn id(name: &str) -> Result<DevId<'_>, DeviceError> {
    DmName::new(name).map(DevId::Name).map_err(|e| refused(name, &e))
}

pub(super) fn errno(error: &DmError) -> Option<Errno> {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => Some(**errno),
        _ => None,
    }
}

pub(super) fn refused(what: &str, error: &DmError) -> DeviceError {
    match errno(error) {
        Some(errno) => said(what, errno),
        None => said(what, error),
    }
}

pub(super) fn said(what: &str, error: impl ToString) -> DeviceError {
    DeviceError::Refused { what: what.to_owned(), error: error.to_string() }
}
