//! Learns what disks have written: of those that VMs have, now and then; of each that goes, for the last time.
//!
//! The kernel tells how much a thin device maps, what it shares with its image included. What a disk has from the start is the same
//! for all of one image, and learnt once. Blocks of the image that a guest has overwritten do not count: the kernel does not tell
//! them from others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::Bytes;
use cowshed_leases::{Lease, LeaseId};
use tokio::sync::watch;

use crate::{containerd::Containerd, evict::Survey, kernel::Devices, ledger::Ledger};

/// So many devices are looked at by one thread, one after the other.
const CHUNK: usize = 64;
/// Of so many kinds of disks it is remembered what they have from the start.
const REMEMBERED: usize = 4096;

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
    /// What disks of a kind map from the start, in bytes.
    bases: Mutex<HashMap<String, u64>>,
}

/// A disk that somebody writes to.
struct Disk {
    id: LeaseId,
    device: String,
    kind: String,
}

impl Disk {
    fn of(lease: &Lease) -> Option<Self> {
        let grant = lease.grant().filter(|_| lease.vm.is_vm())?;
        let device = lease.own_device()?.dm_name.clone();
        let kind = match (&lease.shares, lease.spec.scratch) {
            (Some(_), scratch) => format!("scratch {scratch:?}"),
            (None, _) => grant.image_digest.clone(),
        };
        Some(Self { id: lease.id.clone(), device, kind })
    }
}

impl Writes {
    /// By these.
    pub fn new(ledger: Ledger, kernel: Devices, usage: Arc<dyn Usage>) -> Self {
        Self { ledger, kernel, usage, bases: Mutex::default() }
    }

    /// Looks so often, until `stopped` changes.
    pub async fn watch(self: Arc<Self>, every: Duration, mut stopped: watch::Receiver<bool>) {
        loop {
            self.look().await;
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
                if let Some(base) = self.base(disk, mapped).await {
                    written.push((disk.id.clone(), Bytes(mapped.saturating_sub(base))));
                }
            }
        }
        // What is in use is then no less than what is told to have been written.
        let _in_use = self.kernel.pool().await;
        self.ledger.promises().wrote(&written);
    }

    /// Looks at a disk that is about to go, and that nobody has open.
    pub(crate) async fn learn(&self, lease: &Lease) {
        let Some(disk) = Disk::of(lease) else { return };
        let mapped = self.kernel.mapped(vec![disk.device.clone()]).await;
        let Some(mapped) = mapped.ok().and_then(|mapped| mapped.first().copied().flatten()) else { return };
        if let Some(base) = self.base(&disk, mapped).await {
            let written = Bytes(mapped.saturating_sub(base));
            self.ledger.promises().learn(&lease.spec.image, Bytes(lease.expects), written);
        }
    }

    /// What disks of this kind map from the start, if this one, which maps `mapped`, tells it: not while somebody writes to it.
    async fn base(&self, disk: &Disk, mapped: u64) -> Option<u64> {
        if let Some(base) = self.bases.lock().unwrap_or_else(PoisonError::into_inner).get(&disk.kind) {
            return Some(*base);
        }
        let own = self.usage.usage(&disk.id.snapshot_key()).await?;
        let again = self.kernel.mapped(vec![disk.device.clone()]).await.ok()?;
        if again.first().copied().flatten() != Some(mapped) {
            return None;
        }
        let base = mapped.saturating_sub(own);
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        if bases.len() >= REMEMBERED {
            // They are learnt again.
            bases.clear();
        }
        bases.insert(disk.kind.clone(), base);
        Some(base)
    }
}
