//! Learns what disks have written: of those that VMs have, now and then; of each that goes, for the last time.
//!
//! The kernel tells how much a thin device maps, what it shares with its image included. What a disk has from the start is the same
//! for all of one image, and learnt once. Blocks of the image that a guest has overwritten do not count: the kernel does not tell
//! them from others.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cowshed_gc::{evict::Bytes, reserve::Policy};
use cowshed_leases::{Lease, LeaseId};
use tokio::sync::watch;

use crate::{
    containerd::Containerd,
    error::Result,
    evict::Survey,
    kernel::Devices,
    ledger::Ledger,
    usage::meter::{Belows, Origin},
};

/// So many devices are looked at by one thread, one after the other.
const CHUNK: usize = 64;
/// A disk that goes does not wait for longer than that to be looked at.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// After the start it is looked again so soon, until it is known what disks have.
const AGAIN: Duration = Duration::from_secs(1);
/// So often what was learnt counts a little less.
const FADES: Duration = Duration::from_secs(3600);

/// Tells what a snapshot has besides its parent's; the seam where tests put a fake.
#[async_trait::async_trait]
pub trait Usage: Send + Sync {
    /// In bytes; `None` if there is no such snapshot.
    ///
    /// # Errors
    /// If it cannot be told now.
    async fn usage(&self, snapshot: &str) -> Result<Option<u64>>;
}

#[async_trait::async_trait]
impl Usage for Containerd {
    async fn usage(&self, snapshot: &str) -> Result<Option<u64>> {
        Survey::usage(self, snapshot).await
    }
}

/// Who learns it.
pub struct Writes {
    ledger: Ledger,
    kernel: Devices,
    usage: Arc<dyn Usage>,
    limits: Arc<Policy>,
    /// What disks map from the start.
    belows: Mutex<Belows>,
}

/// A disk that somebody writes to.
struct Disk {
    id: LeaseId,
    device: String,
    origin: Origin,
}

impl Disk {
    fn of(lease: &Lease) -> Option<Self> {
        let origin = Origin::of(lease).filter(|_| lease.vm.is_vm())?;
        Some(Self { id: lease.id.clone(), device: lease.own_device()?.dm_name.clone(), origin })
    }
}

impl Writes {
    /// By these; `limits` say what is done with it.
    pub fn new(ledger: Ledger, kernel: Devices, usage: Arc<dyn Usage>, limits: Arc<Policy>) -> Self {
        Self { ledger, kernel, usage, limits, belows: Mutex::default() }
    }

    /// Looks so often, until `stopped` changes.
    pub async fn watch(self: Arc<Self>, every: Duration, mut stopped: watch::Receiver<bool>) {
        let mut faded = Instant::now();
        loop {
            self.look().await;
            if faded.elapsed() >= FADES {
                faded = Instant::now();
                self.ledger.promises().fade(&self.limits);
            }
            let pause = if self.ledger.promises().are_known() { every } else { every.min(AGAIN) };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stopped.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Looks at all disks that VMs have.
    pub(crate) async fn look(&self) {
        let all: Vec<(bool, Disk)> = self.ledger.read(|book| {
            let disk = |lease: &Lease| Some((lease.is_held(), Disk::of(lease)?));
            book.after(None).filter_map(disk).collect()
        });
        // What was released is learnt of once more, when it goes.
        self.belows().keep(&all.iter().map(|(_, disk)| disk.origin.clone()).collect::<HashSet<_>>());
        let disks: Vec<Disk> =
            all.into_iter().filter_map(|(is_held, disk)| is_held.then_some(disk)).collect();
        let (mut seen, mut untold) = (Vec::with_capacity(disks.len()), 0);
        for chunk in disks.chunks(CHUNK) {
            let names = chunk.iter().map(|disk| disk.device.clone()).collect();
            let mapped = match self.kernel.mapped(names).await {
                Ok(mapped) => mapped,
                Err(error) => {
                    tracing::debug!(%error, "what disks have written cannot be told now");
                    return;
                }
            };
            for (disk, mapped) in chunk.iter().zip(mapped) {
                let Some(mapped) = mapped else { continue };
                untold += usize::from(self.learn_below(disk, mapped).await.is_err());
                seen.push((disk, mapped));
            }
        }
        // Of some it was learnt meanwhile from others.
        let own = |(disk, mapped): &(&Disk, u64)| Some((disk.id.clone(), self.own(disk, *mapped)?));
        let written: Vec<_> = seen.iter().filter_map(own).collect();
        // What is in use is then no less than what is told to have been written.
        if let Err(error) = self.kernel.pool().await {
            tracing::debug!(%error, "what disks have written does not count yet");
            return;
        }
        let promises = self.ledger.promises();
        promises.wrote(&written);
        // If containerd is not there yet it is no look.
        if untold == 0 || !written.is_empty() {
            promises.set_known();
        }
    }

    /// What a disk that is about to go, and that nobody has open, has written; `None` if that is not to be learnt, or cannot be told
    /// in time.
    pub(crate) async fn of(&self, lease: &Lease) -> Option<Bytes> {
        let disk = Disk::of(lease).filter(|_| self.limits.learns)?;
        let looking = async {
            let mapped = self.mapped(&disk).await?;
            let _untold = self.learn_below(&disk, mapped).await;
            self.own(&disk, mapped)
        };
        tokio::time::timeout(LAST_LOOK, looking).await.ok().flatten()
    }

    /// The lease's disk has gone, and had written so much.
    pub(crate) fn learn(&self, lease: &Lease, written: Bytes) {
        self.ledger.promises().learn(&self.limits, lease, written);
    }

    /// What this disk, which maps `mapped`, has besides what it had from the start, at the least.
    fn own(&self, disk: &Disk, mapped: u64) -> Option<Bytes> {
        self.belows().own(&disk.origin, mapped).map(Bytes)
    }

    /// Learns from this disk, which maps `mapped`, what all of its origin had from the start, if that is not known.
    async fn learn_below(&self, disk: &Disk, mapped: u64) -> Result<()> {
        if self.belows().wants(&disk.origin)
            && let Some(own) = self.usage.usage(&disk.id.snapshot_key()).await?
            // What is written meanwhile may be the disk's own or not: it tells nothing then.
            && self.mapped(disk).await == Some(mapped)
        {
            self.belows().learn(disk.origin.clone(), mapped, own);
        }
        Ok(())
    }

    async fn mapped(&self, disk: &Disk) -> Option<u64> {
        self.kernel.mapped(vec![disk.device.clone()]).await.ok()?.first().copied().flatten()
    }

    fn belows(&self) -> MutexGuard<'_, Belows> {
        self.belows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        acquire::Wish,
        fakes::{back, start, wish, world},
    };

    const MIB: u64 = 1 << 20;

    async fn acquire(process: &crate::fakes::Process_, wish: Wish) -> Lease {
        process.acquirer.acquire(wish).await.unwrap().lease.clone()
    }

    #[tokio::test]
    async fn from_a_disk_that_is_written_meanwhile_nothing_is_learnt() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let lease = acquire(&process, wish("vm-1")).await;
        let tenant = lease.spec.tenant.clone();
        let has = || process.acquirer.ledger.promises().used_by(&tenant).bytes;
        world.state.lock().unwrap().written_by_usage = 5 * MIB;
        process.writes.look().await;
        assert_eq!(has(), Bytes(0));
        world.state.lock().unwrap().written_by_usage = 0;
        process.writes.look().await;
        assert_eq!(has(), Bytes(5 * MIB), "it was taken for the image's");
        // Of its origin it is known now, whoever writes.
        world.state.lock().unwrap().written_by_usage = 5 * MIB;
        acquire(&process, wish("vm-2")).await;
        process.writes.look().await;
        assert_eq!(has(), Bytes(5 * MIB));
    }

    #[tokio::test]
    async fn what_no_disk_is_made_of_is_forgotten() {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let lease = acquire(&process, wish("vm-1")).await;
        let device = lease.own_device().unwrap().dm_name.clone();
        world.state.lock().unwrap().written.insert(device, MIB);
        let origin = Origin::of(&lease).unwrap();
        process.writes.look().await;
        process.acquirer.release(back("vm-1")).await.unwrap();
        process.writes.look().await;
        assert!(!process.writes.belows().wants(&origin), "it is to be learnt of once more");
        process.settle().await;
        process.writes.look().await;
        assert!(process.writes.belows().wants(&origin));
    }
}
