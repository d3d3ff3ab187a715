//! What tells one block device from every other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A kernel device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A thin device as the kernel described it when it was granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Absolute path of its node.
    pub path: String,
    /// Its number.
    pub number: DeviceNumber,
    /// Its device-mapper name.
    pub dm_name: String,
    /// Its device-mapper uuid, if the snapshotter gives it one.
    pub dm_uuid: Option<String>,
    /// Its id within the thin pool.
    pub thin_id: u32,
    /// The pool's device.
    pub pool: DeviceNumber,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// Whether the kernel refuses every write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// The devices of a lease as they are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What its VM boots from.
    pub root: DeviceIdentity,
    /// Its scratch device, if it has one.
    pub scratch: Option<DeviceIdentity>,
}

impl DeviceIdentity {
    /// What makes `self`, as recorded, another device than `now`: name, recorded, found. The device numbers do not
    /// count, for they change when a device is activated again.
    pub fn differs_from(&self, now: &Self) -> Option<(&'static str, String, String)> {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        if self.dm_name != now.dm_name {
            return Some(("dm_name", self.dm_name.clone(), now.dm_name.clone()));
        }
        if self.dm_uuid != now.dm_uuid {
            return Some(("dm_uuid", text(&self.dm_uuid), text(&now.dm_uuid)));
        }
        if self.thin_id != now.thin_id {
            return Some(("thin_id", self.thin_id.to_string(), now.thin_id.to_string()));
        }
        if self.size_bytes != now.size_bytes {
            return Some(("size_bytes", self.size_bytes.to_string(), now.size_bytes.to_string()));
        }
        if self.read_only != now.read_only {
            return Some(("read_only", self.read_only.to_string(), now.read_only.to_string()));
        }
        None
    }
}
