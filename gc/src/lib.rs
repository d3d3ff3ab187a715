//! What may be reclaimed, in which order, and why: inventory in, plan out.
//!
//! Pure. The plan touches only what has a record that says it is ours; the rest is reported. A device that is open, or
//! of which the kernel did not tell, is waited for. Recovery after a crash is this plan's first pass.

mod audit;
pub mod evict;
pub mod reserve;

use std::{collections::BTreeSet, fmt};

use cowshed_leases::LeaseId;

pub use audit::{Finding, Held, Remedy, Sight, Subject, audit};

/// What there is, from the ledger, containerd and the kernel. Taken in this order, so that a lease that was granted
/// while the inventory was taken is not mistaken for an orphan: containerd first, the ledger last.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// Leases in the ledger that are being released, with their devices.
    pub releasing: Vec<(LeaseId, DeviceUse)>,
    /// Leases in the ledger that nobody has renewed and whose grace is over, with their devices.
    pub overdue: Vec<(LeaseId, DeviceUse)>,
    /// Leases in the ledger that are held or being prepared, the overdue ones among them.
    pub held: BTreeSet<LeaseId>,
    /// Pulls in the ledger that no running task owns: by the name of their containerd lease.
    pub abandoned_pulls: Vec<String>,
    /// Pulls in the ledger that are under way.
    pub running_pulls: BTreeSet<String>,
    /// containerd leases that carry our label.
    pub containerd_leases: Vec<String>,
    /// Active snapshots whose key is of our form.
    pub snapshots: Vec<String>,
}

/// What the kernel says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceUse {
    /// There is none (any more).
    Absent,
    /// There, and nobody has it open.
    Closed,
    /// Opened, mounted or held by other devices so many times.
    Open(u32),
    /// Its maker is still at work, so that it may appear yet.
    BeingMade,
    /// It came up a moment ago: its VM may come back for it yet.
    JustActive,
    /// The kernel or containerd could not be asked.
    Unknown(String),
}

impl DeviceUse {
    /// Why a disk with such a device cannot be removed now; `None` if it can.
    pub fn hinders(&self) -> Option<WaitReason> {
        match self {
            Self::Absent | Self::Closed => None,
            Self::Open(n) => Some(WaitReason::Open(*n)),
            Self::BeingMade => Some(WaitReason::BeingMade),
            Self::JustActive => Some(WaitReason::JustActive),
            Self::Unknown(why) => Some(WaitReason::Unknown(why.clone())),
        }
    }
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Remove the lease's snapshot and containerd lease, then its record.
    Reclaim(LeaseId),
    /// Release the lease: nobody has renewed it, and nobody has its device open.
    GiveUpOn(LeaseId),
    /// Leave it for the next pass.
    Wait(LeaseId, WaitReason),
    /// Delete the containerd lease of a pull that nobody is doing any more, then its record.
    EndPull(String),
    /// Say that it is there, and leave it alone.
    Report(Foreign),
}

/// Why a released disk is still there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// The device is open, mounted or held.
    Open(u32),
    /// It is not finished.
    BeingMade,
    /// Its device came up a moment ago.
    JustActive,
    /// It is not known whether it is.
    Unknown(String),
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(1) => f.write_str("the device is open"),
            Self::Open(n) => write!(f, "the device is open {n} times"),
            Self::BeingMade => f.write_str("the disk is still being made"),
            Self::JustActive => {
                f.write_str("the device came up a moment ago, and its VM may come back for it")
            }
            Self::Unknown(why) => write!(f, "it cannot be told whether the device is open: {why}"),
        }
    }
}

/// A thing that looks like ours and has no record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Foreign {
    /// A containerd lease with our label.
    ContainerdLease(String),
    /// An active snapshot with a key of our form.
    Snapshot(String),
}

impl Foreign {
    /// All kinds.
    pub const KINDS: [&str; 2] = ["lease", "snapshot"];

    /// Which of them it is.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::ContainerdLease(_) => "lease",
            Self::Snapshot(_) => "snapshot",
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContainerdLease(id) => write!(f, "containerd lease {id}"),
            Self::Snapshot(key) => write!(f, "snapshot {key}"),
        }
    }
}

/// Decides what to do now.
pub fn plan(inventory: &Inventory) -> Vec<Step> {
    let releasing = inventory.releasing.iter().map(|(id, device)| match device.hinders() {
        None => Step::Reclaim(id.clone()),
        Some(why) => Step::Wait(id.clone(), why),
    });
    let overdue = inventory.overdue.iter().map(|(id, device)| match device.hinders() {
        None => Step::GiveUpOn(id.clone()),
        Some(why) => Step::Wait(id.clone(), why),
    });
    let pulls = inventory.abandoned_pulls.iter().cloned().map(Step::EndPull);
    releasing.chain(overdue).chain(pulls).chain(foreign(inventory).into_iter().map(Step::Report)).collect()
}

fn foreign(inventory: &Inventory) -> BTreeSet<Foreign> {
    let recorded = |name: &str| {
        LeaseId::from_snapshot_key(name).is_some_and(|id| {
            inventory.held.contains(&id) || inventory.releasing.iter().any(|(releasing, _)| *releasing == id)
        })
    };
    let pull =
        |name: &String| inventory.running_pulls.contains(name) || inventory.abandoned_pulls.contains(name);
    let leases = inventory.containerd_leases.iter().filter(|name| !recorded(name) && !pull(name));
    let snapshots = inventory.snapshots.iter().filter(|key| !recorded(key));
    leases.cloned().map(Foreign::ContainerdLease).chain(snapshots.cloned().map(Foreign::Snapshot)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> LeaseId {
        LeaseId::from_random(u128::from(n))
    }

    #[test]
    fn closed_and_absent_devices_are_reclaimed_open_and_unknown_ones_waited_for() {
        let inventory = Inventory {
            releasing: vec![
                (id(1), DeviceUse::Closed),
                (id(2), DeviceUse::Absent),
                (id(3), DeviceUse::Open(2)),
                (id(4), DeviceUse::Unknown("EIO".into())),
                (id(5), DeviceUse::BeingMade),
            ],
            overdue: vec![(id(6), DeviceUse::Closed), (id(7), DeviceUse::Open(1))],
            held: [id(6), id(7)].into(),
            abandoned_pulls: vec!["cowshed-pull-1".into()],
            ..Inventory::default()
        };
        let steps = plan(&inventory);
        assert_eq!(
            steps,
            [
                Step::Reclaim(id(1)),
                Step::Reclaim(id(2)),
                Step::Wait(id(3), WaitReason::Open(2)),
                Step::Wait(id(4), WaitReason::Unknown("EIO".into())),
                Step::Wait(id(5), WaitReason::BeingMade),
                Step::GiveUpOn(id(6)),
                Step::Wait(id(7), WaitReason::Open(1)),
                Step::EndPull("cowshed-pull-1".into()),
            ]
        );
    }

    #[test]
    fn what_has_no_record_is_reported_once_and_nothing_else() {
        let inventory = Inventory {
            held: [id(1)].into(),
            releasing: vec![(id(2), DeviceUse::Closed)],
            running_pulls: ["cowshed-pull-a".to_owned()].into(),
            containerd_leases: vec![
                id(1).snapshot_key(),
                id(9).snapshot_key(),
                "cowshed-pull-a".into(),
                "x".into(),
            ],
            snapshots: vec![id(2).snapshot_key(), id(8).snapshot_key()],
            ..Inventory::default()
        };
        let reports: Vec<_> = plan(&inventory).into_iter().filter(|s| matches!(s, Step::Report(_))).collect();
        assert_eq!(
            reports,
            [
                Step::Report(Foreign::ContainerdLease(id(9).snapshot_key())),
                Step::Report(Foreign::ContainerdLease("x".into())),
                Step::Report(Foreign::Snapshot(id(8).snapshot_key())),
            ]
        );
    }

    fn device() -> impl Strategy<Value = DeviceUse> {
        prop_oneof![
            Just(DeviceUse::Absent),
            Just(DeviceUse::Closed),
            (1..9u32).prop_map(DeviceUse::Open),
            Just(DeviceUse::BeingMade),
            Just(DeviceUse::JustActive),
            Just(DeviceUse::Unknown("?".into()))
        ]
    }

    proptest! {
        #[test]
        fn a_plan_never_touches_what_is_held_open_or_not_ours(
            releasing in prop::collection::btree_map(0..20u8, device(), 0..10),
            held in prop::collection::btree_set(20..40u8, 0..10),
            seen in prop::collection::vec(0..60u8, 0..30),
        ) {
            let inventory = Inventory {
                releasing: releasing.iter().map(|(n, d)| (id(*n), d.clone())).collect(),
                held: held.iter().map(|n| id(*n)).collect(),
                containerd_leases: seen.iter().map(|n| id(*n).snapshot_key()).collect(),
                snapshots: seen.iter().map(|n| id(*n).snapshot_key()).collect(),
                ..Inventory::default()
            };
            let steps = plan(&inventory);
            for step in &steps {
                if let Step::Reclaim(lease) = step {
                    let device = inventory.releasing.iter().find(|(r, _)| r == lease).map(|(_, d)| d);
                    prop_assert!(matches!(device, Some(DeviceUse::Absent | DeviceUse::Closed)));
                }
            }
            let decided = steps.iter().filter(|s| matches!(s, Step::Reclaim(_) | Step::Wait(..))).count();
            prop_assert_eq!(decided, releasing.len(), "every released lease is decided about");
        }
    }
}
