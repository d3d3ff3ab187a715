//! Learns what disks have written: of those that VMs have, now and then; of each that goes, for the last time.
//!
//! The kernel tells how much a thin device maps, what it shares with its image included. What a disk has from the start is the same
//! for all of one image, and learnt once. Blocks of the image that a guest has overwritten do not count: the kernel does not tell
//! them from others.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cowshed_gc::{evict::Bytes, reserve::Policy};
use cowshed_leases::{Lease, LeaseId};
use tokio::sync::watch;

use crate::{
    containerd::Containerd,
    evict::Survey,
    kernel::Devices,
    ledger::Ledger,
    usage::meter::{Belows, Origin},
};

/// So many devices are looked at by one thread, one after the other.
const CHUNK: usize = 64;
/// A disk that goes does not wait for longer than that to be looked at.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// So often what was learnt counts a little less.
const FADES: Duration = Duration::from_secs(3600);

/// Tells what a snapshot has besides its parent's; the seam where tests put a fake.
#[async_trait::async_trait]
pub trait Usage: Send + Sync {
    /// In bytes; `None` if it cannot be told now.
    async fn usage(&self, snapshot: &str) -> Option<u64>;
}

#[async_trait::async_trait]
impl Usage for Containerd {
    async fn usage(&self, snapshot: &str) -> Option<u64> {
        Survey::usage(self, snapshot).await.ok().flatten()
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
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                _ = stopped.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Looks at all disks that VMs have.
    pub(crate) async fn look(&self) {
        let held = |lease: &&Lease| lease.is_held();
        let disks: Vec<Disk> =
            self.ledger.read(|book| book.after(None).filter(held).filter_map(Disk::of).collect());
        let mut written = Vec::with_capacity(disks.len());
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
                if let Some(own) = self.own(disk, mapped).await {
                    written.push((disk.id.clone(), own));
                }
            }
        }
        // What is in use is then no less than what is told to have been written.
        if let Err(error) = self.kernel.pool().await {
            tracing::debug!(%error, "what disks have written does not count yet");
            return;
        }
        self.ledger.promises().wrote(&written);
    }

    /// What a disk that is about to go, and that nobody has open, has written; `None` if that is not to be learnt, or cannot be told
    /// in time.
    pub(crate) async fn of(&self, lease: &Lease) -> Option<Bytes> {
        let disk = Disk::of(lease).filter(|_| self.limits.learns)?;
        let looking = async {
            let mapped = self.kernel.mapped(vec![disk.device.clone()]).await.ok()?;
            self.own(&disk, mapped.first().copied().flatten()?).await
        };
        tokio::time::timeout(LAST_LOOK, looking).await.ok().flatten()
    }

    /// The lease's disk has gone, and had written so much.
    pub(crate) fn learn(&self, lease: &Lease, written: Bytes) {
        self.ledger.promises().learn(&self.limits, lease, written);
    }

    /// What this disk, which maps `mapped`, has besides what it had from the start, at the least.
    async fn own(&self, disk: &Disk, mapped: u64) -> Option<Bytes> {
        if self.belows().wants(&disk.origin)
            && let Some(own) = self.usage.usage(&disk.id.snapshot_key()).await
        {
            // What was written meanwhile is not to be taken for the disk's own.
            let after = self.kernel.mapped(vec![disk.device.clone()]).await.ok()?;
            let after = after.first().copied().flatten()?;
            self.belows().learn(disk.origin.clone(), mapped.max(after), own);
        }
        self.belows().own(&disk.origin, mapped).map(Bytes)
    }

    fn belows(&self) -> MutexGuard<'_, Belows> {
        self.belows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
