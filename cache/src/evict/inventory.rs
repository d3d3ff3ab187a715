//! Takes stock: asks the kernel, containerd, and last the ledger, who needs what.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    num::NonZeroU64,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use cowshed_gc::evict::{Bytes, Kind, Pool, Room};
use cowshed_leases::{Lease, LeaseId};
use cowshed_pool::device::REPAIR;
use futures_util::{StreamExt as _, stream};
use tokio::time::Instant;

use super::{
    Evictor, Growing,
    grow::nothing_free,
    occupancy::{Seen, Wanted},
};
use crate::{
    containerd::SnapshotRecord,
    error::{Error, Reason, Result},
    image::ImageRef,
    kernel::{PoolMode, PoolUsage},
    reclaim::ABREAST,
};

/// So long it counts what a disk had.
const DISK_FRESH: Duration = Duration::from_secs(60);
/// Without a block's size, what comes back of metadata is counted as if blocks were dm-thin's largest.
const LARGEST_BLOCK: NonZeroU64 = NonZeroU64::MIN.saturating_add((1 << 30) - 1);

/// Sizes of snapshots. Those of layers do not change.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    layers: Mutex<HashMap<(String, Option<SystemTime>), u64>>,
    disks: Mutex<HashMap<String, (Instant, u64)>>,
}

/// The pool's room in use, and in all.
pub(super) fn used(usage: &PoolUsage) -> Room {
    Room { data: Bytes(usage.data_used), metadata: Bytes(usage.metadata_used) }
}

pub(super) fn total(usage: &PoolUsage) -> Room {
    Room { data: Bytes(usage.data_total), metadata: Bytes(usage.metadata_total) }
}

impl Evictor {
    /// How full the pool is now, and what of that is to come back.
    ///
    /// # Errors
    /// If the kernel does not tell, or the pool does not write: nothing can be deleted from it.
    pub(super) async fn pool(&self) -> Result<(Pool, PoolUsage)> {
        let usage = self.kernel.pool().await.map_err(|e| Error::new(Reason::NotReady, e.to_string()))?;
        match usage.mode {
            PoolMode::ReadWrite | PoolMode::OutOfDataSpace => {}
            PoolMode::ReadOnly | PoolMode::NeedsCheck | PoolMode::Failed => {
                let message = format!(
                    "the thin pool {} does not write (its state is {}), so nothing comes back from it: {REPAIR}",
                    usage.name, usage.mode
                );
                return Err(Error::new(Reason::PoolUnusable, message).with("pool", &usage.name));
            }
        }
        let (total, used) = (total(&usage), used(&usage));
        let is_pressing = |kind| {
            let emergency = self.policy.limits(kind).marks.emergency().of(total.of(kind));
            let is_out = usage.mode == PoolMode::OutOfDataSpace && kind == Kind::Data;
            is_out || used.of(kind) >= emergency
        };
        let (mut returning, now) = (self.returning(), self.elapsed());
        let _all = returning.look(used, now);
        let returning = returning.reliable(is_pressing, now);
        Ok((Pool { total, used, returning }, usage))
    }

    /// Everything that there is, and who needs it; of what VMs have on their disks, only what is known.
    pub(super) async fn take_stock(&self, growing: Growing) -> Result<(Seen, Wanted)> {
        let (pool, usage) = self.pool().await?;
        let (ledger, catalogue) = (&self.keeper.ledger, &self.keeper.catalogue);
        let group = match growing {
            Growing::IfItCan => self.grower.group().await.unwrap_or_else(|error| {
                tracing::debug!(%error, "nothing of the volume group is taken for free");
                nothing_free()
            }),
            // LVM2 may hang: nobody waits for what is not used.
            Growing::Not => nothing_free(),
        };
        let spares = ledger.gather(|lease| lease.is_spare().then(|| lease.clone()));
        let closed = self.closed(&spares).await;
        let mut snapshots = self.survey.snapshots().await?;
        if self.learn_layers(&snapshots).await? {
            // That took its time.
            snapshots = self.survey.snapshots().await?;
        }
        self.learn_disks(spares.iter().map(|spare| spare.id.snapshot_key()).collect()).await;
        let blobs = self.survey.blobs().await?;
        let records = catalogue.records().await?;
        let ours = ledger.gather(|lease| Some(lease.id.snapshot_key())).into_iter().collect();
        let held = self.survey.held(&ours).await?;
        let sizes = self.known_sizes(&snapshots);
        let block = NonZeroU64::new(usage.block_bytes).unwrap_or(LARGEST_BLOCK);
        let snapshotter = self.survey.snapshotter().to_owned();
        let is_pulled = |name: &String| ImageRef::parse(name).is_ok_and(|image| catalogue.is_pulled(&image));
        let is_wished = |name: &String| self.keeper.wishes.contains(name);
        let names = records.iter().map(|record| &record.name);
        let pulled = names.filter(|name| is_pulled(name) || is_wished(name)).cloned().collect();
        let wanted = self.wanted(pulled);
        let seen = Seen { pool, group, block, snapshotter, snapshots, sizes, blobs, records, held, closed };
        Ok((seen, wanted))
    }

    fn wanted(&self, pulled: HashSet<String>) -> Wanted {
        let (ledger, spares) = (&self.keeper.ledger, &self.keeper.spares);
        let (in_hand, spares_kept) = (spares.in_hand(), spares.wanted());
        // What has come for an image meanwhile is seen when that is to go.
        let leases = ledger.gather(|lease| Some(lease.clone()));
        Wanted {
            leases,
            marks: ledger.read_all(|_, marks| marks.clone()),
            jobs: ledger.read_jobs(Clone::clone),
            now: self.keeper.clock.now(),
            in_hand,
            spares_kept,
            pulled,
            prefetched_for: self.settings.prefetched_for,
        }
    }

    /// Those whose devices are there, and nobody has open.
    pub(super) async fn closed(&self, spares: &[Lease]) -> BTreeSet<LeaseId> {
        let look = |spare: &Lease| {
            let (id, device) = (spare.id.clone(), spare.own_device().map(|device| device.dm_name.clone()));
            async move {
                let open = self.kernel.open_count(&device?).await;
                matches!(open, Ok(Some(0))).then_some(id)
            }
        };
        let looks: Vec<_> = spares.iter().map(look).collect();
        stream::iter(looks).buffer_unordered(ABREAST).filter_map(std::future::ready).collect().await
    }

    /// Learns the sizes of layers that are not known; says whether there were any.
    async fn learn_layers(&self, snapshots: &[SnapshotRecord]) -> Result<bool> {
        let unknown: Vec<&SnapshotRecord> = {
            let mut known = self.sizes.layers.lock().unwrap_or_else(PoisonError::into_inner);
            let there: HashSet<_> = snapshots.iter().map(key).collect();
            known.retain(|layer, _| there.contains(layer));
            snapshots.iter().filter(|s| s.committed && !known.contains_key(&key(s))).collect()
        };
        let asked: Vec<_> = unknown
            .iter()
            .map(|layer| async move { (key(layer), self.survey.usage(&layer.name).await) })
            .collect();
        let mut answers = stream::iter(asked).buffer_unordered(ABREAST);
        while let Some((layer, usage)) = answers.next().await {
            // One that has gone meanwhile has nothing.
            if let Some(bytes) = usage? {
                self.sizes.layers.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, bytes);
            }
        }
        Ok(!unknown.is_empty())
    }

    /// Learns what VMs have on their disks, which is for advice only, as far as that is learnt in this time.
    pub(super) async fn learn_of_vms(&self, seen: &mut Seen, wanted: &Wanted, limit: Duration) {
        let keys = wanted.leases.iter().map(|lease| lease.id.snapshot_key()).collect();
        let _in_time = tokio::time::timeout(limit, self.learn_disks(keys)).await;
        seen.sizes = self.known_sizes(&seen.snapshots);
    }

    /// Learns what disks have by now. What cannot be learnt counts for nothing.
    async fn learn_disks(&self, keys: Vec<String>) {
        let due: Vec<String> = {
            let mut known = self.sizes.disks.lock().unwrap_or_else(PoisonError::into_inner);
            known.retain(|_, (at, _)| at.elapsed() < DISK_FRESH);
            keys.into_iter().filter(|key| !known.contains_key(key)).collect()
        };
        let asked: Vec<_> =
            due.into_iter().map(|key| async move { (self.survey.usage(&key).await, key) }).collect();
        let mut answers = stream::iter(asked).buffer_unordered(ABREAST);
        while let Some((usage, key)) = answers.next().await {
            if let Ok(Some(bytes)) = usage {
                let mut known = self.sizes.disks.lock().unwrap_or_else(PoisonError::into_inner);
                known.insert(key, (Instant::now(), bytes));
            }
        }
    }

    fn known_sizes(&self, snapshots: &[SnapshotRecord]) -> HashMap<String, u64> {
        let layers = self.sizes.layers.lock().unwrap_or_else(PoisonError::into_inner);
        let disks = self.sizes.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let size = |snapshot: &SnapshotRecord| {
            let bytes = if snapshot.committed {
                layers.get(&key(snapshot)).copied()
            } else {
                disks.get(&snapshot.name).map(|(_, bytes)| *bytes)
            };
            Some((snapshot.name.clone(), bytes?))
        };
        snapshots.iter().filter_map(size).collect()
    }
}

fn key(snapshot: &SnapshotRecord) -> (String, Option<SystemTime>) {
    (snapshot.name.clone(), snapshot.created_at)
}
