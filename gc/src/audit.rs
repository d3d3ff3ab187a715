//! Where the ledger, containerd and the kernel do not agree, and what is to be done about it.
//!
//! By the order of trust: the ledger says who holds a disk, containerd which snapshots exist, the kernel what the devices
//! are. What is held is mended if nothing can be lost by that. What is not provably ours is reported, never touched.

use std::{collections::BTreeSet, fmt};

use cowshed_leases::{LeaseId, VmId};

use crate::{Foreign, Inventory, Step, WaitReason, plan};

/// A lease that is held, and its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The lease.
    pub id: LeaseId,
    /// Its VM.
    pub vm: VmId,
    /// What the kernel says of its device.
    pub device: Sight,
}

/// What the kernel says of a device that was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// It is what was granted.
    Right,
    /// It is not there.
    Absent,
    /// It is another one, in these words.
    Wrong(String),
    /// It could not be asked.
    Unknown(String),
}

/// A disagreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub subject: Subject,
    /// What is wrong.
    pub problem: String,
    /// What is done about it.
    pub remedy: Remedy,
}

/// What a finding is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A lease of the ledger's.
    Lease(LeaseId),
    /// A pull, by its containerd lease.
    Pull(String),
    /// Something without a record.
    Foreign(Foreign),
}

/// What is done about a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The containerd lease is made again and holds the snapshot.
    HoldAgain(LeaseId),
    /// The snapshotter is asked to activate the device.
    Activate(LeaseId),
    /// The reclaimer does it.
    Reclaim,
    /// Nothing can be done but what this says.
    Advice(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lease(id) => write!(f, "lease {id}"),
            Self::Pull(lease) => write!(f, "pull {lease}"),
            Self::Foreign(what) => what.fmt(f),
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HoldAgain(_) => f.write_str("the containerd lease is made again"),
            Self::Activate(_) => f.write_str("the snapshotter is asked to activate the device"),
            Self::Reclaim => f.write_str("the reclaimer clears it away"),
            Self::Advice(what) => f.write_str(what),
        }
    }
}

/// Every disagreement. The inventory is of everything; `held` are the leases that are granted or suspect, looked at after
/// containerd was.
pub fn audit(inventory: &Inventory, held: &[Held]) -> Vec<Finding> {
    let leases: BTreeSet<&str> = inventory.containerd_leases.iter().map(String::as_str).collect();
    let snapshots: BTreeSet<&str> = inventory.snapshots.iter().map(String::as_str).collect();
    let of_held = held.iter().filter_map(|held| {
        let key = held.id.snapshot_key();
        let (problem, remedy) = judge(held, leases.contains(key.as_str()), snapshots.contains(key.as_str()))?;
        Some(Finding { subject: Subject::Lease(held.id.clone()), problem, remedy })
    });
    of_held.chain(plan(inventory).into_iter().filter_map(of_step)).collect()
}

const SPARE: &str = "it is a spare, and will be given up instead of handed out";

/// The worst that is wrong with a lease that is held.
fn judge(held: &Held, leased: bool, snapshot: bool) -> Option<(String, Remedy)> {
    let Held { id, vm, device } = held;
    if !snapshot {
        let (there, advice) = match device {
            Sight::Right => {
                ("is there", "put containerd's store back if it was replaced, or copy what is needed")
            }
            _ => ("is gone as well", "what was on it is lost"),
        };
        return Some((
            format!("VM {vm} holds it, containerd does not know its snapshot, the device {there}"),
            Remedy::Advice(if vm.is_spare() {
                SPARE.to_owned()
            } else {
                format!("{advice}; then release it")
            }),
        ));
    }
    if !leased {
        let problem = format!("VM {vm} holds it, and nothing in containerd holds its snapshot");
        return Some((problem, Remedy::HoldAgain(id.clone())));
    }
    match device {
        Sight::Right => None,
        Sight::Absent => {
            Some((format!("VM {vm} holds it, and its device is not active"), Remedy::Activate(id.clone())))
        }
        Sight::Wrong(what) => Some((
            format!("VM {vm} holds it, and its device is not what was granted: {what}"),
            Remedy::Advice(if vm.is_spare() {
                SPARE.to_owned()
            } else {
                "look at it before it is used; then release it and acquire again".to_owned()
            }),
        )),
        Sight::Unknown(why) => Some((
            format!("it cannot be told what its device is: {why}"),
            Remedy::Advice("audit again when the kernel answers".to_owned()),
        )),
    }
}

fn of_step(step: Step) -> Option<Finding> {
    let finding = |subject, problem: String, remedy| Some(Finding { subject, problem, remedy });
    match step {
        Step::Reclaim(id) => finding(Subject::Lease(id), "it is released".to_owned(), Remedy::Reclaim),
        Step::GiveUpOn(id) => finding(Subject::Lease(id), "its grace is over".to_owned(), Remedy::Reclaim),
        Step::Wait(id, why @ (WaitReason::BeingMade | WaitReason::JustActive)) => {
            finding(Subject::Lease(id), why.to_string(), Remedy::Reclaim)
        }
        Step::Wait(id, why) => {
            let advice = "close the device: stop the VM, or unmount the disk".to_owned();
            finding(
                Subject::Lease(id),
                format!("nobody wants it any more, but {why}"),
                Remedy::Advice(advice),
            )
        }
        Step::EndPull(lease) => {
            finding(Subject::Pull(lease), "nobody is doing it".to_owned(), Remedy::Reclaim)
        }
        Step::Report(what) => {
            let advice =
                "it is in no record of ours: left alone; delete it by hand if nobody needs it".to_owned();
            finding(Subject::Foreign(what), "looks like ours".to_owned(), Remedy::Advice(advice))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::DeviceUse;

    fn id(n: u8) -> LeaseId {
        LeaseId::from_random(u128::from(n))
    }

    fn held(n: u8, device: Sight) -> Held {
        Held { id: id(n), vm: format!("vm-{n}").parse().unwrap(), device }
    }

    #[test]
    fn what_is_held_is_mended_where_nothing_can_be_lost() {
        // Sight, containerd lease, snapshot, words of the problem, kind of the remedy.
        let table = [
            (Sight::Right, true, true, None),
            (Sight::Right, false, true, Some(("nothing in containerd holds", Remedy::HoldAgain(id(1))))),
            (Sight::Absent, true, true, Some(("is not active", Remedy::Activate(id(1))))),
            (Sight::Absent, false, true, Some(("nothing in containerd holds", Remedy::HoldAgain(id(1))))),
        ];
        for (device, leased, snapshot, expected) in table {
            let key = id(1).snapshot_key();
            let inventory = Inventory {
                held: [id(1)].into(),
                containerd_leases: leased.then(|| key.clone()).into_iter().collect(),
                snapshots: snapshot.then_some(key).into_iter().collect(),
                ..Inventory::default()
            };
            let found = audit(&inventory, &[held(1, device.clone())]);
            match expected {
                None => assert_eq!(found, [], "{device:?}"),
                Some((words, remedy)) => {
                    assert_eq!(found.len(), 1, "{found:?}");
                    assert!(
                        found[0].problem.contains(words) && found[0].problem.contains("vm-1"),
                        "{found:?}"
                    );
                    assert_eq!(found[0].remedy, remedy);
                }
            }
        }
    }

    #[test]
    fn what_is_lost_wrong_or_not_ours_is_only_reported() {
        let (lost, kept, wrong, blind) = (id(1), id(2), id(3), id(4));
        let known = [wrong.snapshot_key(), blind.snapshot_key()];
        let inventory = Inventory {
            held: [lost, kept, wrong, blind].into(),
            releasing: vec![(id(5), DeviceUse::Closed), (id(6), DeviceUse::Open(1))],
            abandoned_pulls: vec!["cowshed-pull-1".into()],
            containerd_leases: known.iter().cloned().chain(["cowshed-vm-x".to_owned()]).collect(),
            snapshots: known.to_vec(),
            ..Inventory::default()
        };
        let leases = [
            held(1, Sight::Absent),
            held(2, Sight::Right),
            held(3, Sight::Wrong("thin_id was 1 and is 2".into())),
            held(4, Sight::Unknown("EMFILE".into())),
        ];
        let found = audit(&inventory, &leases);
        let words = [
            "gone as well",
            "the device is there",
            "thin_id was 1",
            "EMFILE",
            "it is released",
            "the device is open",
            "nobody is doing it",
            "looks like ours",
        ];
        assert_eq!(found.len(), words.len(), "{found:?}");
        for (finding, words) in found.iter().zip(words) {
            assert!(finding.problem.contains(words), "{finding:?}: not {words}");
            let is_ours = matches!(finding.subject, Subject::Lease(_) | Subject::Pull(_));
            let touches = !matches!(finding.remedy, Remedy::Advice(_));
            assert!(is_ours || !touches, "{finding:?}");
        }
        assert!(found[..4].iter().all(|finding| matches!(finding.remedy, Remedy::Advice(_))));
    }
}
