//! The kernel's side: thin devices and their pool. The authority for what exists; asked, never cached across an effect.

mod audit;
pub mod behaviour;
mod dm;
mod events;
mod format;
mod ioctl;
pub mod stack;
pub mod table;

use std::{collections::BTreeSet, fmt, path::Path};

use thiserror::Error as ThisError;

pub use audit::superblock_time;
pub use dm::DeviceMapper;
pub use events::Events;
pub(crate) use format::{Filesystem, Tools};
pub use table::{PoolMode, PoolUsage};

use crate::{
    size::Bytes,
    tree::{SnapshotId, ThinId},
};

/// Names of devices begin so, and their uuids (in capitals): what a udev rule and an operator know them by.
pub const PREFIX: &str = "cowshed-";

/// What to do with a pool that has stopped; a clause.
pub const REPAIR: &str = "see the kernel's log; stop its VMs, then the service (`systemctl stop cowshed.socket cowshed.service`), and run \
                          `cowshed pool repair`, which keeps a copy of the pool's metadata and mends them offline (thin_check, \
                          lvconvert --repair); then start the service, and `cowshed audit`";

/// Names of devices that are being trimmed end so.
const TRIM: &str = ".trim";

/// The name of a snapshot's device, and its uuid; made here and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName(String);

impl DeviceName {
    /// `store_id` tells this store's devices from those of any other, `id` is never used again.
    pub fn new(store_id: &str, id: SnapshotId) -> Self {
        Self(format!("{PREFIX}{store_id}-{}", id.0))
    }

    /// The snapshot of a name that [`Self::new`] made with this store id.
    pub fn parse(name: &str, store_id: &str) -> Option<SnapshotId> {
        let id = name.strip_prefix(PREFIX)?.strip_prefix(store_id)?.strip_prefix('-')?.parse().ok()?;
        Some(SnapshotId(id)).filter(|id| Self::new(store_id, *id).0 == name)
    }

    /// As device-mapper has it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The uuid of this device.
    pub fn uuid(&self) -> String {
        self.0.to_ascii_uppercase()
    }

    /// What the same thin device is called while it is trimmed: nobody knows that name, so nobody opens it.
    pub(crate) fn while_trimmed(&self) -> Self {
        Self(format!("{}{TRIM}", self.0))
    }

    /// The same, of a name that [`Self::while_trimmed`] made with this store id.
    pub(crate) fn parse_while_trimmed(name: &str, store_id: &str) -> Option<Self> {
        let id = Self::parse(name.strip_suffix(TRIM)?, store_id)?;
        Some(Self::new(store_id, id).while_trimmed())
    }

    /// Where it can be opened.
    pub fn path(&self) -> String {
        format!("/dev/mapper/{}", self.0)
    }

    /// Whether its node is there: it is active, as far as nobody has removed the device by hand.
    pub(crate) fn is_linked(&self) -> bool {
        Path::new(&self.path()).exists()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a device can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It can.
    ReadWrite,
    /// The kernel refuses writes.
    ReadOnly,
}

/// A thin device that is to be active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activation {
    /// Its name.
    pub name: DeviceName,
    /// Its thin id.
    pub thin: ThinId,
    /// Its size.
    pub bytes: Bytes,
    /// Whether it can be written.
    pub access: Access,
}

/// What became of a deactivation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deactivated {
    /// There is no such device (any more).
    Gone,
    /// Somebody has it open.
    InUse,
}

/// An active device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// How often it is open, mounted or held.
    pub open: u32,
    /// Whether its I/O stands still.
    pub suspended: bool,
    /// Bytes of the blocks that it maps, shared ones too; `None` if it has no table yet: it was half made.
    pub mapped: Option<u64>,
}

impl Live {
    /// Whether it is to be resumed. Without a table there is nothing to resume; who activates it loads one.
    pub(crate) fn stands_still(self) -> bool {
        self.suspended && self.mapped.is_some()
    }
}

/// What the pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolFacts {
    /// How full, and whether it works.
    pub usage: PoolUsage,
    /// Uuid of its device: tells it from another pool of the same name.
    pub uuid: String,
}

/// What the kernel has told of a pool since it was activated: that it is low on space, and each change of its mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolEvents {
    /// How many times it has told something.
    pub count: u32,
    /// What its mode is now.
    pub mode: PoolMode,
}

impl PoolEvents {
    /// A pool just activated.
    pub(crate) const NONE: Self = Self { count: 0, mode: PoolMode::ReadWrite };

    /// Whether it has been writing all the time since: to stop and to go on are two events, low space is one.
    pub(crate) fn has_written_since(self, begun: Self) -> bool {
        let writes = |events: Self| events.mode == PoolMode::ReadWrite;
        writes(begun) && writes(self) && self.count.wrapping_sub(begun.count) < 2
    }
}

/// Why device-mapper, or a helper, did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum DeviceError {
    /// The pool has this thin id already.
    #[error("thin id {} is in the pool already", .0.0)]
    ThinExists(ThinId),
    /// The pool does not have this thin id.
    #[error("thin id {} is not in the pool", .0.0)]
    ThinMissing(ThinId),
    /// The pool is not there, or not one.
    #[error("{0}")]
    NoPool(String),
    /// The pool is there and does not write.
    #[error("the thin pool {name} is in mode {mode}: {advice}")]
    PoolStopped {
        /// Its name.
        name: String,
        /// Its mode.
        mode: PoolMode,
        /// What to do.
        advice: &'static str,
    },
    /// The pool does not take orders, and has not carried out this one.
    #[error("the thin pool {name} is read-only or has failed: {advice}")]
    PoolRefuses {
        /// Its name.
        name: String,
        /// What to do.
        advice: &'static str,
    },
    /// The kernel refused.
    #[error("device-mapper, {what}: {error}")]
    Refused {
        /// What was asked.
        what: String,
        /// Its answer.
        error: String,
    },
    /// Not all of what was written to a device is on the disk.
    #[error("flushing {path}: {error}")]
    NotFlushed {
        /// Where it can be opened.
        path: String,
        /// What the kernel said.
        error: String,
    },
    /// A program failed.
    #[error("{0}")]
    Helper(String),
}

impl DeviceError {
    /// Whether a creation that was answered so may have made a thin device that is ours.
    pub(crate) fn may_have_made(&self) -> bool {
        !matches!(
            self,
            Self::ThinExists(_) | Self::ThinMissing(_) | Self::NoPool(_) | Self::PoolRefuses { .. }
        )
    }
}

/// The seam to the kernel; tests put a fake here. Calls block: milliseconds, and longer if the pool is suspended.
pub trait Pool: Send + Sync {
    /// Looks at the pool.
    fn facts(&self) -> Result<PoolFacts, DeviceError>;
    /// What the kernel has told of the pool.
    fn events(&self) -> Result<PoolEvents, DeviceError>;
    /// Makes an empty thin device.
    fn create_thin(&self, thin: ThinId) -> Result<(), DeviceError>;
    /// Makes a snapshot of `origin`, which is inactive, closed or suspended.
    fn create_snap(&self, thin: ThinId, origin: ThinId) -> Result<(), DeviceError>;
    /// Deletes a thin device that is not active. Succeeds if it is not there.
    fn delete(&self, thin: ThinId) -> Result<(), DeviceError>;
    /// Makes a device that can be opened at its path when this returns. Succeeds if it is there.
    fn activate(&self, activation: &Activation) -> Result<(), DeviceError>;
    /// Removes a device that nobody has open.
    fn deactivate(&self, name: &DeviceName) -> Result<Deactivated, DeviceError>;
    /// Makes all that was written to a device durable.
    fn flush(&self, name: &DeviceName) -> Result<(), DeviceError>;
    /// Whether what is discarded of a device is discarded on the disk below the pool as well.
    fn passes_discards(&self) -> Result<bool, DeviceError>;
    /// Has a device forget a range of its bytes: of blocks that are in it as a whole, those that it alone maps are free then.
    fn discard(&self, name: &DeviceName, from: u64, bytes: u64) -> Result<(), DeviceError>;
    /// Stops a device's I/O, with what is mounted of it flushed and frozen.
    fn suspend(&self, name: &DeviceName) -> Result<(), DeviceError>;
    /// Lets it go on.
    fn resume(&self, name: &DeviceName) -> Result<(), DeviceError>;
    /// Looks at a device; `None` if there is none.
    fn look(&self, name: &DeviceName) -> Result<Option<Live>, DeviceError>;
    /// Names of all devices that begin with [`PREFIX`].
    fn names(&self) -> Result<BTreeSet<String>, DeviceError>;
    /// All thin ids of the pool. Starts a process: for start-up and audits.
    fn thin_ids(&self) -> Result<BTreeSet<ThinId>, DeviceError>;
    /// What thin_check has against the pool's metadata; `None` if nothing. Starts a process.
    fn damage(&self) -> Result<Option<String>, DeviceError>;
    /// How many snapshots were ever made in the pool, as its superblock counts them.
    fn creations(&self) -> Result<u32, DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::{DeviceName, PoolEvents, PoolMode, SnapshotId};

    #[test]
    fn names_say_what_they_are_of() {
        let name = DeviceName::new("5ab", SnapshotId(7));
        assert_eq!(DeviceName::parse(name.as_str(), "5ab"), Some(SnapshotId(7)));
        let trimmed = name.while_trimmed();
        assert_eq!(DeviceName::parse(trimmed.as_str(), "5ab"), None, "{trimmed}");
        assert_eq!(DeviceName::parse_while_trimmed(trimmed.as_str(), "5ab"), Some(trimmed.clone()));
        for other in
            [name.as_str(), "cowshed-other-7.trim", "cowshed-5ab-.trim", "cowshed-5ab-07.trim", ".trim"]
        {
            assert_eq!(DeviceName::parse_while_trimmed(other, "5ab"), None, "{other}");
        }
    }

    #[test]
    fn a_pool_that_stopped_and_went_on_has_told_two_events() {
        let writing = |count| PoolEvents { count, mode: PoolMode::ReadWrite };
        let cases = [
            ("nothing was told", writing(7), writing(7), true),
            ("low space", writing(7), writing(8), true),
            ("it stopped and went on", writing(7), writing(9), false),
            ("low space, across the counter's end", writing(u32::MAX), writing(0), true),
            ("it stopped and went on, across the counter's end", writing(u32::MAX), writing(1), false),
            // The pool is another one, or was activated anew: nobody knows what happened before.
            ("a count that has gone back", writing(7), writing(6), false),
            ("one event since it was activated", PoolEvents::NONE, writing(1), true),
            ("two events since it was activated", PoolEvents::NONE, writing(2), false),
        ];
        for (what, begun, now, writes) in cases {
            assert_eq!(now.has_written_since(begun), writes, "{what}");
        }
    }

    #[test]
    fn a_pool_that_does_not_write_then_or_now_has_not_written_all_the_time() {
        let others = [PoolMode::ReadOnly, PoolMode::OutOfDataSpace, PoolMode::NeedsCheck, PoolMode::Failed];
        for mode in others {
            for told in [0, 1] {
                let writing = |count| PoolEvents { count, mode: PoolMode::ReadWrite };
                let not = |count| PoolEvents { count, mode };
                assert!(!not(7 + told).has_written_since(writing(7)), "{mode} now, {told} told");
                assert!(!writing(7 + told).has_written_since(not(7)), "{mode} then, {told} told");
                assert!(!not(7 + told).has_written_since(not(7)), "{mode} all the time, {told} told");
            }
        }
    }
}
