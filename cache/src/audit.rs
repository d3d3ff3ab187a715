//! Compares ledger, containerd and kernel, and mends what can be mended; what is found is judged in `gc`.

use std::time::Duration;

use cowshed_gc::{Finding, Held, Inventory, Remedy, Sight, audit};
use cowshed_leases::{Lease, LeaseId};

use crate::{
    containerd::CallError,
    error::Result,
    kernel::KernelError,
    reclaim::{Look, Reclaimer, our_label},
};

/// Between two looks: what is found by both was not just on its way.
const BETWEEN: Duration = Duration::from_millis(200);

/// How much is done about what is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// It is told.
    Nothing,
    /// What keeps a disk from being collected is mended.
    Holds,
    /// All that can be.
    Everything,
}

/// A finding, and what became of its remedy.
#[derive(Clone, Debug)]
pub struct Audited {
    /// What was found.
    pub finding: Finding,
    /// Whether it was mended; `None`: it was not tried.
    pub mended: Option<Result<(), String>>,
}

impl Reclaimer {
    /// Looks twice, and does what `repair` says about what was found both times.
    ///
    /// # Errors
    /// If containerd cannot be asked.
    pub async fn audit(&self, repair: Repair) -> Result<Vec<Audited>> {
        let first = self.findings(repair).await?;
        if first.is_empty() {
            return Ok(Vec::new());
        }
        tokio::time::sleep(BETWEEN).await;
        let again = self.findings(repair).await?;
        let mut audited = Vec::new();
        // It may have got worse meanwhile: it is the same thing that counts.
        let known = |finding: &Finding| first.iter().any(|before| before.subject == finding.subject);
        for finding in again.into_iter().filter(known) {
            let mended = self.mend(&finding, repair).await;
            audited.push(Audited { finding, mended });
        }
        Ok(audited)
    }

    /// Mends what keeps disks from being collected, and says so.
    pub(crate) async fn mend_holds(&self) {
        match self.audit(Repair::Holds).await {
            Ok(audited) => {
                for Audited { finding: Finding { subject, problem, remedy }, mended } in audited {
                    match mended {
                        Some(Ok(())) => tracing::warn!(%subject, problem, "mended: {remedy}"),
                        Some(Err(error)) => tracing::warn!(%subject, problem, error, "cannot be mended yet"),
                        None => tracing::debug!(%subject, problem, "found: {remedy}"),
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "nothing can be compared now"),
        }
    }

    async fn findings(&self, repair: Repair) -> Result<Vec<Finding>> {
        // containerd before the ledger: what was granted in between is found once, and not again.
        let compared = self.look_at_containerd().await.map_err(|e| self.snapshots.explain(e))?;
        let inventory = match repair {
            // Of what is to be reclaimed it would be told a second time.
            Repair::Holds => Inventory {
                containerd_leases: compared.leases,
                snapshots: compared.snapshots,
                ..Inventory::default()
            },
            Repair::Nothing | Repair::Everything => self.inventory_with(Some(compared), Look::Only).await,
        };
        let leases: Vec<Lease> = self.ledger.read(|book| {
            // What one of them shares has a lease of its own.
            let has_disk = |lease: &&Lease| lease.is_held() && lease.own_device().is_some();
            book.after(None).filter(has_disk).cloned().collect()
        });
        let mut held = Vec::new();
        for lease in leases {
            // Who only mends holds need not open every disk for that.
            let device = if repair == Repair::Holds { Sight::Right } else { self.sight(&lease).await };
            held.push(Held { id: lease.id, vm: lease.vm, device });
        }
        let mut findings = audit(&inventory, &held);
        if repair == Repair::Holds {
            findings.retain(|finding| matches!(finding.remedy, Remedy::HoldAgain(_)));
        }
        Ok(findings)
    }

    async fn sight(&self, lease: &Lease) -> Sight {
        let Some(device) = lease.own_device() else { return Sight::Absent };
        match self.kernel.inspect(&device.path).await {
            Ok(now) => match device.differs_from(&now) {
                None => Sight::Right,
                Some((what, was, is)) => Sight::Wrong(format!("{what} was {was:?} and is {is:?}")),
            },
            Err(KernelError::Missing(_)) => Sight::Absent,
            Err(error @ KernelError::NotThin { .. }) => Sight::Wrong(error.to_string()),
            Err(error) => Sight::Unknown(error.to_string()),
        }
    }

    async fn mend(&self, finding: &Finding, repair: Repair) -> Option<Result<(), String>> {
        match (&finding.remedy, repair) {
            (Remedy::HoldAgain(id), Repair::Holds | Repair::Everything) => {
                Some(self.hold_again(id).await.map_err(|e| e.to_string()))
            }
            (Remedy::Activate(id), Repair::Everything) => Some(self.activate(id).await),
            (Remedy::Reclaim, Repair::Everything) => {
                // That takes its time, and may have to wait.
                self.wake.now();
                None
            }
            (Remedy::HoldAgain(_) | Remedy::Activate(_) | Remedy::Reclaim | Remedy::Advice(_), _) => None,
        }
    }

    /// Has the snapshotter activate the device, if it does that when it is asked for mounts.
    async fn activate(&self, id: &LeaseId) -> Result<(), String> {
        self.snapshots.mounts(&id.snapshot_key()).await.map_err(|e| e.to_string())?;
        let lease = self.ledger.read(|book| book.get(id).cloned()).ok_or("it is gone")?;
        match self.sight(&lease).await {
            Sight::Right => Ok(()),
            _ => Err("the snapshotter has not activated it: restart that".to_owned()),
        }
    }

    async fn hold_again(&self, id: &LeaseId) -> Result<(), CallError> {
        let key = id.snapshot_key();
        let is_held = || self.ledger.read(|book| book.get(id).is_some_and(Lease::is_held));
        self.snapshots.create_lease(&key, our_label(id)).await?;
        if is_held() {
            self.snapshots.hold(&key, &key).await?;
        }
        if is_held() {
            return Ok(());
        }
        // Released meanwhile, and perhaps struck off: nobody else would delete it.
        self.snapshots.delete_lease(&key, false).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::fakes::{start, wish, world};

    use super::*;

    #[tokio::test]
    async fn a_containerd_lease_that_somebody_deleted_is_made_again() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
        assert!(process.reclaimer.audit(Repair::Nothing).await.unwrap().is_empty());
        world.state.lock().unwrap().leases.clear();
        let found = process.reclaimer.audit(Repair::Nothing).await.unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].finding.remedy, Remedy::HoldAgain(lease.id.clone()));
        assert!(found[0].mended.is_none());
        assert!(world.look(|s| s.leases.is_empty()), "a look has changed something");
        process.reclaimer.mend_holds().await;
        process.audit(&world, "after it was mended");
        assert!(process.reclaimer.audit(Repair::Nothing).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_has_no_record_is_left_alone_by_every_repair() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let stray = LeaseId::from_random(7).snapshot_key();
        {
            let mut state = world.state.lock().unwrap();
            state.leases.insert(stray.clone());
            state.snapshots.insert(stray.clone(), "snap-77".into());
            state.devices.insert("snap-77".into(), 0);
        }
        let found = process.reclaimer.audit(Repair::Everything).await.unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.iter().all(|audited| audited.mended.is_none()));
        assert!(world.look(|s| s.leases.contains(&stray) && s.snapshots.contains_key(&stray)));
    }
}
