//! A pool and the device-mapper devices that it stands on, and those that stand on it: for those who work on the pool itself.

use std::{collections::BTreeSet, fs::File};

use devicemapper::{DM, DevId, Device, DmFlags, DmName, DmOptions};
use nix::errno::Errno;

use super::{
    DeviceError,
    behaviour::{self, Behaviour},
    dm::{errno, refused, said},
    ioctl,
    table::{self, PoolUsage, Target},
};

/// Device-mapper.
pub struct Stack {
    dm: DM,
    control: File,
}

/// An active pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActivePool {
    /// Its device-mapper uuid.
    pub uuid: String,
    /// How full, and whether it works.
    pub usage: PoolUsage,
    /// What it does by itself; `None` if it tells nothing any more.
    pub behaviour: Option<Behaviour>,
    /// Whether its I/O stands still.
    pub suspended: bool,
}

/// A thin device of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveThin {
    /// Its name.
    pub name: String,
    /// How often it is open, mounted or held.
    pub open: u32,
}

impl Stack {
    /// # Errors
    /// If there is no device-mapper.
    pub fn new() -> Result<Self, DeviceError> {
        let no_dm = |e: &dyn std::fmt::Display| {
            DeviceError::NoPool(format!("device-mapper cannot be used ({e}): modprobe dm_thin_pool, as root"))
        };
        let dm = DM::new().map_err(|e| no_dm(&e))?;
        let control = ioctl::control().map_err(|e| no_dm(&e))?;
        Ok(Self { dm, control })
    }

    /// The pool; `None` if no device has this name. One with thin volumes of LVM2's own has another name in the kernel.
    ///
    /// # Errors
    /// If it is something else, or the kernel refuses.
    pub fn pool(&self, name: &str) -> Result<Option<ActivePool>, DeviceError> {
        let layer = format!("{name}-tpool");
        let name = if self.is_pool(name)? || !self.is_pool(&layer)? { name } else { &layer };
        let Some((info, tables)) = self.targets(name, DmFlags::DM_STATUS_TABLE)? else { return Ok(None) };
        let Some((_, status)) = self.targets(name, DmFlags::empty())? else { return Ok(None) };
        let no_pool = |what| DeviceError::NoPool(format!("{name} is not a usable thin pool: {what}"));
        let usage = table::parse_pool(name, &tables, &status).map_err(no_pool)?;
        let uuid = info.uuid().map(ToString::to_string).unwrap_or_default();
        let suspended = info.flags().contains(DmFlags::DM_SUSPEND);
        Ok(Some(ActivePool { uuid, usage, behaviour: behaviour::parse(&status).ok(), suspended }))
    }

    /// Names of all active thin pools.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn pools(&self) -> Result<Vec<String>, DeviceError> {
        let mut pools = Vec::new();
        for (name, _) in self.devices()? {
            if self.is_pool(&name)? {
                pools.push(name);
            }
        }
        Ok(pools)
    }

    fn is_pool(&self, name: &str) -> Result<bool, DeviceError> {
        let targets = self.targets(name, DmFlags::DM_STATUS_TABLE)?;
        Ok(matches!(targets.as_ref().map(|(_, t)| &t[..]), Some([(_, _, kind, _)]) if kind == "thin-pool"))
    }

    /// Whether the I/O of a device stands still.
    ///
    /// # Errors
    /// If the kernel refuses; a device that is not there does not stand still.
    pub fn stands_still(&self, name: &str) -> Result<bool, DeviceError> {
        match self.dm.device_info(&DevId::Name(dm_name(name)?)) {
            // One without a table was half made.
            Ok(info) => Ok(info.flags().contains(DmFlags::DM_SUSPEND | DmFlags::DM_ACTIVE_PRESENT)),
            Err(error) if errno(&error) == Some(Errno::ENXIO) => Ok(false),
            Err(error) => Err(refused(&format!("looking at {name}"), &error)),
        }
    }

    /// Which of a pool and what it stands on stand still, the lowest first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn still(&self, pool: &str) -> Result<Vec<String>, DeviceError> {
        let mut still = Vec::new();
        for name in self.below(pool)? {
            if self.stands_still(&name)? {
                still.push(name);
            }
        }
        Ok(still)
    }

    /// Has whatever of a pool, and of what it stands on, stands still go on, as it was: a table that was loaded for it and not
    /// put to use is dropped, since whoever has loaded it may not have written down that it is so. Returns what went on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn go_on(&self, pool: &str) -> Result<Vec<String>, DeviceError> {
        let still = self.still(pool)?;
        for name in &still {
            self.dm
                .table_clear(&DevId::Name(dm_name(name)?))
                .map_err(|e| refused(&format!("dropping the new table of {name}"), &e))?;
            ioctl::resume(&self.control, name).map_err(|e| said(&format!("resuming {name}"), e))?;
        }
        Ok(still)
    }

    /// The active thin devices of a pool.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn thins(&self, pool: &str) -> Result<Vec<ActiveThin>, DeviceError> {
        let devices = self.devices()?;
        let Some((_, number)) = devices.iter().find(|(name, _)| name == pool) else { return Ok(Vec::new()) };
        let mut thins = Vec::new();
        for (name, _) in &devices {
            let Some((info, targets)) = self.targets(name, DmFlags::DM_STATUS_TABLE)? else { continue };
            let is_of_it =
                |thin: table::Thin| (thin.pool.major, thin.pool.minor) == (number.major, number.minor);
            if table::parse_thin(&targets).is_ok_and(is_of_it) {
                thins.push(ActiveThin { name: name.clone(), open: info.open_count().unsigned_abs() });
            }
        }
        Ok(thins)
    }

    /// Removes a device that nobody has open.
    ///
    /// # Errors
    /// If somebody has, or the kernel refuses for another reason.
    pub fn remove(&self, name: &str) -> Result<(), DeviceError> {
        match ioctl::remove(&self.control, name) {
            Ok(()) | Err(Errno::ENXIO) => {
                // Links that udev has made it removes itself; ours, nobody else does.
                let _not_ours = std::fs::remove_file(format!("/dev/mapper/{name}"));
                Ok(())
            }
            Err(error) => Err(said(&format!("removing {name}"), error)),
        }
    }

    /// What a device stands on, as far as it is device-mapper's, the lowest first; the device itself is the last.
    fn below(&self, name: &str) -> Result<Vec<String>, DeviceError> {
        let devices = self.devices()?;
        let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
        self.descend(name, &devices, &mut seen, &mut found)?;
        Ok(found)
    }

    fn descend(
        &self,
        name: &str,
        devices: &[(String, Device)],
        seen: &mut BTreeSet<String>,
        found: &mut Vec<String>,
    ) -> Result<(), DeviceError> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let below = match self.dm.table_deps(&DevId::Name(dm_name(name)?), DmOptions::default()) {
            Ok(below) => below,
            Err(error) if errno(&error) == Some(Errno::ENXIO) => return Ok(()),
            Err(error) => return Err(refused(&format!("looking what {name} stands on"), &error)),
        };
        for device in below {
            if let Some((name, _)) = devices.iter().find(|(_, number)| *number == device) {
                self.descend(name, devices, seen, found)?;
            }
        }
        found.push(name.to_owned());
        Ok(())
    }

    fn devices(&self) -> Result<Vec<(String, Device)>, DeviceError> {
        let devices = self.dm.list_devices().map_err(|e| refused("listing devices", &e))?;
        Ok(devices.into_iter().map(|(name, device, _)| (name.to_string(), device)).collect())
    }

    fn targets(
        &self,
        name: &str,
        flags: DmFlags,
    ) -> Result<Option<(devicemapper::DeviceInfo, Vec<Target>)>, DeviceError> {
        let options = DmOptions::default().set_flags(flags | DmFlags::DM_NOFLUSH);
        match self.dm.table_status(&DevId::Name(dm_name(name)?), options) {
            Ok(found) => Ok(Some(found)),
            Err(error) if errno(&error) == Some(Errno::ENXIO) => Ok(None),
            Err(error) => Err(refused(&format!("looking at {name}"), &error)),
        }
    }
}

fn dm_name(name: &str) -> Result<&DmName, DeviceError> {
    DmName::new(name).map_err(|e| refused(name, &e))
}
