//! What the kernel says of thin devices and their pool. Asked, never cached: it is the authority.

mod devices;
mod holders;

use std::{
    fs, io,
    os::{linux::fs::MetadataExt as _, unix::fs::FileTypeExt as _},
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use cowshed_leases::{DeviceIdentity, DeviceNumber};
use cowshed_pool::device::table;
use devicemapper::{DM, DevId, DeviceInfo, DmError, DmFlags, DmName, DmOptions, errors};
use nix::{errno::Errno, sys::stat};
use thiserror::Error as ThisError;

pub use cowshed_pool::device::{Events, PoolMode, PoolUsage};
pub use devices::Devices;
pub use holders::Holder;

/// The seam to device-mapper; tests put a fake here. Calls block: for microseconds, or while device-mapper is busy. From
/// async code they are made through [`Devices`].
pub trait Kernel: Send + Sync {
    /// The thin device behind `path`, which can be opened.
    fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError>;
    /// How often the device-mapper device `name` is open, mounted or held. `None` if there is no such device.
    fn open_count(&self, name: &str) -> Result<Option<u32>, KernelError>;
    /// How much the thin device `name` maps, what it shares included, in bytes. `None` if there is no such device.
    fn mapped(&self, name: &str) -> Result<Option<u64>, KernelError>;
    /// Who has the device behind `path` open, as far as that can be told.
    fn holders(&self, path: &str) -> Result<Vec<Holder>, KernelError>;
    /// The thin pool that the configuration means.
    fn pool(&self) -> Result<PoolUsage, KernelError>;
    /// What the device-mapper device `name` counts. `None` if there is none, or none that tells.
    fn load(&self, name: &str) -> Result<Option<Load>, KernelError>;
}

/// What a thin device counts, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Of the blocks that it maps, shared ones too.
    pub mapped: u64,
    /// Written to it since it was activated.
    pub written: u64,
    /// Read from it since then.
    pub read: u64,
}

/// What the kernel did not tell.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum KernelError {
    /// There is no such path or device.
    #[error("there is no device {0}")]
    Missing(String),
    /// Something is there, but no thin device.
    #[error("{path} is not a thin device: {what}")]
    NotThin {
        /// What was looked at.
        path: String,
        /// What it is.
        what: String,
    },
    /// It cannot be told which pool is meant, or the one that is meant is not there.
    #[error("{0}")]
    NoPool(String),
    /// The kernel refused.
    #[error("device-mapper, {what}: {error}")]
    Refused {
        /// What was asked.
        what: String,
        /// Its answer.
        error: String,
    },
    /// The kernel has not answered yet.
    #[error(
        "device-mapper, {what}: no answer within {} s; it is busy, or a device is suspended (dmsetup info)", .after.as_secs()
    )]
    Slow {
        /// What was asked.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
}

/// The real kernel.
pub struct DeviceMapper {
    /// Name of the pool; empty for the only one there is.
    pool: String,
    /// That one, once it was found: to find it, every device of the host is looked at.
    found: Mutex<String>,
    /// How it is asked, once that was possible.
    context: OnceLock<DM>,
}

type Targets = Vec<(u64, u64, String, String)>;

impl DeviceMapper {
    /// `pool` is a device-mapper name, or empty.
    pub fn new(pool: String) -> Self {
        Self { pool, found: Mutex::default(), context: OnceLock::new() }
    }

    fn context(&self) -> Result<&DM, KernelError> {
        if let Some(context) = self.context.get() {
            return Ok(context);
        }
        let context = DM::new().map_err(|e| {
            KernelError::NoPool(format!("device-mapper cannot be used ({e}): modprobe dm_thin_pool, as root"))
        })?;
        Ok(self.context.get_or_init(|| context))
    }

    fn targets(
        context: &DM,
        name: &str,
        flags: DmFlags,
    ) -> Result<Option<(DeviceInfo, Targets)>, KernelError> {
        let dm_name = DmName::new(name).map_err(|e| refused(name, &e))?;
        let options = DmOptions::default().set_flags(flags | DmFlags::DM_NOFLUSH);
        match context.table_status(&DevId::Name(dm_name), options) {
            Ok(found) => Ok(Some(found)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(refused(name, &error)),
        }
    }

    /// The only pool there is; the one that was found before, if it still is one.
    fn only_pool(&self, context: &DM) -> Result<PoolUsage, KernelError> {
        let known = self.found.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if !known.is_empty()
            && let Ok(usage) = Self::usage(context, &known)
        {
            return Ok(usage);
        }
        let name = Self::find_pool(context)?;
        let usage = Self::usage(context, &name)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = name;
        Ok(usage)
    }

    fn usage(context: &DM, name: &str) -> Result<PoolUsage, KernelError> {
        let missing = || KernelError::NoPool(format!("there is no thin pool {name}: activate or make it"));
        let (_, tables) = Self::targets(context, name, DmFlags::DM_STATUS_TABLE)?.ok_or_else(missing)?;
        let (_, status) = Self::targets(context, name, DmFlags::empty())?.ok_or_else(missing)?;
        table::parse_pool(name, &tables, &status)
            .map_err(|what| KernelError::NoPool(format!("{name} is not a usable thin pool: {what}")))
    }

    /// What device-mapper says of the device `number`, which is behind `path`.
    fn device(&self, path: &str, number: DeviceNumber) -> Result<(DeviceInfo, Targets), KernelError> {
        let context = self.context()?;
        let is_it = |(info, _): &(DeviceInfo, Targets)| {
            let device = info.device();
            DeviceNumber { major: device.major, minor: device.minor } == number
        };
        // It mostly has its path's name. If not, sysfs knows it.
        let usual = path.strip_prefix("/dev/mapper/").filter(|name| !name.contains('/'));
        if let Some(name) = usual
            && let Some(found) = Self::targets(context, name, DmFlags::DM_STATUS_TABLE)?.filter(is_it)
        {
            return Ok(found);
        }
        let name = fs::read_to_string(format!("/sys/dev/block/{number}/dm/name")).map_err(|_| {
            KernelError::NotThin { path: path.to_owned(), what: "it has no device-mapper name".to_owned() }
        })?;
        let name = name.trim_end();
        let found = Self::targets(context, name, DmFlags::DM_STATUS_TABLE)?.filter(is_it);
        found.ok_or_else(|| KernelError::Missing(name.to_owned()))
    }

    fn find_pool(context: &DM) -> Result<String, KernelError> {
        let devices = context.list_devices().map_err(|e| refused("list", &e))?;
        let mut pools = Vec::new();
        for (name, _, _) in devices {
            let name = name.to_string();
            let found = Self::targets(context, &name, DmFlags::DM_STATUS_TABLE)?;
            if matches!(found.as_ref().map(|(_, t)| &t[..]), Some([(_, _, kind, _)]) if kind == "thin-pool") {
                pools.push(name);
            }
        }
        match &pools[..] {
            [one] => Ok(one.clone()),
            [] => {
                Err(KernelError::NoPool("this host has no active thin pool: activate or make one".to_owned()))
            }
            many => Err(KernelError::NoPool(format!(
                "this host has {} thin pools ({}): name the snapshotter's in [pool] name",
                many.len(),
                many.join(", ")
            ))),
        }
    }
}

impl Kernel for DeviceMapper {
    fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError> {
        let number = block_device(path)?;
        let not_thin = |what: String| KernelError::NotThin { path: path.to_owned(), what };
        let (info, targets) = self.device(path, number)?;
        let thin = table::parse_thin(&targets).map_err(&not_thin)?;
        fs::File::open(path)
            .map_err(|e| KernelError::Refused { what: format!("opening {path}"), error: e.to_string() })?;
        Ok(DeviceIdentity {
            path: path.to_owned(),
            number,
            dm_name: info.name().map(ToString::to_string).unwrap_or_default(),
            dm_uuid: info.uuid().map(ToString::to_string),
            thin_id: thin.id,
            pool: DeviceNumber { major: thin.pool.major, minor: thin.pool.minor },
            size_bytes: thin.size_bytes,
            read_only: info.flags().contains(DmFlags::DM_READONLY),
        })
    }

    fn open_count(&self, name: &str) -> Result<Option<u32>, KernelError> {
        let dm_name = DmName::new(name).map_err(|e| refused(name, &e))?;
        match self.context()?.device_info(&DevId::Name(dm_name)) {
            Ok(info) => Ok(Some(info.open_count().unsigned_abs())),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(refused(name, &error)),
        }
    }

    fn mapped(&self, name: &str) -> Result<Option<u64>, KernelError> {
        let Some((_, status)) = Self::targets(self.context()?, name, DmFlags::empty())? else {
            return Ok(None);
        };
        let not_thin = |what: String| KernelError::NotThin { path: name.to_owned(), what };
        table::parse_thin_status(&status).map(Some).map_err(not_thin)
    }

    fn holders(&self, path: &str) -> Result<Vec<Holder>, KernelError> {
        Ok(holders::of(block_device(path)?))
    }

    fn pool(&self) -> Result<PoolUsage, KernelError> {
        let context = self.context()?;
        if self.pool.is_empty() { self.only_pool(context) } else { Self::usage(context, &self.pool) }
    }

    fn load(&self, name: &str) -> Result<Option<Load>, KernelError> {
        let Some((info, status)) = Self::targets(self.context()?, name, DmFlags::empty())? else {
            return Ok(None);
        };
        let device = info.device();
        let counted = fs::read_to_string(format!("/sys/dev/block/{}:{}/stat", device.major, device.minor));
        let counted = counted.ok().and_then(|stat| transferred(&stat));
        let mapped = table::parse_thin_status(&status).ok();
        Ok(mapped.zip(counted).map(|(mapped, (read, written))| Load { mapped, written, read }))
    }
}

/// Bytes read and written, in a block device's `stat` (kernel: Documentation/block/stat.rst), which counts sectors of 512.
fn transferred(stat: &str) -> Option<(u64, u64)> {
    let word = |at: usize| stat.split_ascii_whitespace().nth(at)?.parse::<u64>().ok();
    Some((word(2)?.saturating_mul(512), word(6)?.saturating_mul(512)))
}

fn block_device(path: &str) -> Result<DeviceNumber, KernelError> {
    let found = fs::metadata(Path::new(path)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KernelError::Missing(path.to_owned()),
        _ => KernelError::Refused { what: format!("looking at {path}"), error: error.to_string() },
    })?;
    if !found.file_type().is_block_device() {
        return Err(KernelError::NotThin { path: path.to_owned(), what: "it is no block device".to_owned() });
    }
    let part = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let device = found.st_rdev();
    Ok(DeviceNumber { major: part(stat::major(device)), minor: part(stat::minor(device)) })
}

fn is_missing(error: &DmError) -> bool {
    matches!(error, DmError::Core(errors::Error::Ioctl(_, _, _, errno)) if **errno == Errno::ENXIO)
}

fn refused(what: &str, error: &DmError) -> KernelError {
    let error = match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => errno.to_string(),
        other => other.to_string(),
    };
    KernelError::Refused { what: what.to_owned(), error }
}

#[cfg(test)]
mod tests {
    use super::transferred;

    #[test]
    fn sectors_are_counted_in_bytes() {
        let stat = "     254        3     4098       12     100        7   102400       55        0       60       67        0        0        0        0        0        0\n";
        assert_eq!(transferred(stat), Some((4098 * 512, 102_400 * 512)));
        for bad in ["", "1 2 3 4 5 6", "1 2 x 4 5 6 7"] {
            assert_eq!(transferred(bad), None, "{bad:?}");
        }
    }
}
