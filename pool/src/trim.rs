//! Has the disk below the pool forget what a removed snapshot has had, before it is deleted.
//!
//! dm-thin discards nothing of a thin device that is deleted: its blocks are free in the pool, and as good as written for an
//! SSD or a sparse file below. What is discarded *of* a thin device it passes on, block by block, if no other device maps it.
//!
//! It is done when the snapshot is marked as removed for good, and its device is gone, which the kernel refuses as long as
//! somebody has it open: under a name that nobody knows, for as long as that takes. So a crash in between leaves a snapshot that
//! is deleted in the end anyway.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use crate::{
    device::{Access, Activation, DeviceName},
    error::Result,
    reclaim::{give_way, is_crowded, pool_is_short},
    size::Bytes,
    snapshotter::Inner,
    tree::{Snapshot, SnapshotId, State},
};

/// How removed snapshots are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// At most so many bytes a second.
    pub rate: Bytes,
}

/// So much of a device is discarded at a time, or one of the pool's blocks if they are larger: the pool's one worker does it block
/// by block, and what VMs write to new blocks waits behind it …
const STEP: u64 = 8 << 20;
/// … and up to so many times as much where nothing is mapped: a disk can be far larger than what was written to it.
const HOLES: u64 = 16;
/// What has less of its own is deleted as it is, in bytes …
const LEAST: u64 = 16 << 20;
/// … as is what has less than this part of its own: mappings that it shares are copied to be removed, for nothing.
const PART: u64 = 16;
/// One is not trimmed for longer; what is left of it is deleted as it is.
const LONGEST: Duration = Duration::from_secs(600);
/// How often it is seen to it meanwhile that the pool has room.
const LOOK: Duration = Duration::from_secs(1);
/// How long each step gives way to makings and removals at the most.
const PATIENCE: Duration = Duration::from_millis(150);

/// What is trimmed, one at a time, beside the deletion of all others.
#[derive(Debug, Default)]
pub(crate) struct Trims {
    /// What those map that are not active any more, and not deleted yet.
    mapped: HashMap<SnapshotId, u64>,
    under_way: Option<(SnapshotId, JoinHandle<()>)>,
    waiting: HashSet<SnapshotId>,
    done: HashSet<SnapshotId>,
}

impl Trims {
    /// Whether it waits until another one has been trimmed.
    pub(crate) fn waits(&self, id: SnapshotId) -> bool {
        self.waiting.contains(&id)
    }

    /// To be called before each batch: the next one's turn has come, or nobody's if none is to be trimmed now.
    pub(crate) fn settle(&mut self, trims: bool) {
        if let Some((id, _)) = self.under_way.take_if(|(_, task)| task.is_finished()) {
            self.done.insert(id);
            self.waiting.clear();
        }
        if !trims {
            self.waiting.clear();
        }
    }

    /// How much a removed snapshot maps, of which `active` is known if it was active just now.
    pub(crate) fn mapped(&mut self, snapshot: &Snapshot, active: Option<u64>) -> Option<u64> {
        if let Some(active) = active {
            self.mapped.insert(snapshot.id, active);
        }
        self.mapped.get(&snapshot.id).copied().or(snapshot.mapped)
    }

    /// Whether one that is removed, and not active, is trimmed from now on, or will be: it is not to be deleted yet.
    pub(crate) fn takes(
        &mut self,
        inner: &Arc<Inner>,
        trim: Trim,
        snapshot: &Snapshot,
        mapped: Option<u64>,
    ) -> bool {
        let below = inner.store.read(|tree| match tree.below(snapshot) {
            Some(below) => below.mapped,
            // A blank that is not there has nothing in common with it; a parent that has gone had.
            None => snapshot.parent.is_none().then_some(0),
        });
        let (Some(mapped), Some(below)) = (mapped, below) else { return false };
        let id = snapshot.id;
        // By the kernel it is inactive; by the record nobody can want it any more.
        let is_removed = snapshot.state == State::Removing;
        if !is_removed || self.done.contains(&id) || !is_worth_it(mapped, below) {
            return false;
        }
        if self.under_way.is_some() {
            self.waiting.insert(id);
            return true;
        }
        let (inner, hold, snapshot) = (inner.clone(), inner.busy.hold([id]), snapshot.clone());
        let own = mapped - below;
        let task = tokio::spawn(async move {
            match trim_now(&inner, trim, &snapshot, mapped).await {
                Ok(bytes) => {
                    let bytes = bytes.min(own);
                    inner.metrics.trimmed(bytes);
                    tracing::debug!(snapshot = id.0, bytes, "a removed snapshot was trimmed");
                }
                Err(error) => {
                    tracing::warn!(snapshot = id.0, %error, "a removed snapshot was not trimmed to its end");
                }
            }
            drop(hold);
            inner.wake.notify_one();
        });
        self.under_way = Some((id, task));
        true
    }

    /// These are deleted.
    pub(crate) fn forget(&mut self, gone: &[SnapshotId]) {
        self.mapped.retain(|id, _| !gone.contains(id));
        self.done.retain(|id| !gone.contains(id));
    }
}

/// Whether a snapshot that maps so many bytes, on one that maps so many, is trimmed.
fn is_worth_it(mapped: u64, below: u64) -> bool {
    let own = mapped.saturating_sub(below);
    own >= LEAST && own >= mapped / PART
}

/// How long it rests after so many bytes in so long.
fn rest(bytes: u64, took: Duration, rate: Bytes) -> Duration {
    let due = Duration::try_from_secs_f64(bytes as f64 / rate.0.max(1) as f64).unwrap_or(Duration::MAX);
    due.saturating_sub(took)
}

/// How much is discarded at a time in a pool of such blocks: whole ones, for parts of them are passed over.
fn shortest_step(block: u64) -> u64 {
    (STEP / block.max(1) * block).max(block)
}

async fn trim_now(inner: &Inner, trim: Trim, snapshot: &Snapshot, mapped: u64) -> Result<u64> {
    let (passes, facts) = inner.on_pool(|pool| Ok((pool.passes_discards()?, pool.facts()?))).await?;
    // Those that wait need the room, and it comes back without this as well.
    if !passes || is_crowded(inner) {
        return Ok(0);
    }
    let name = inner.name(snapshot.id).while_trimmed();
    let (thin, bytes) = (snapshot.thin, snapshot.bytes);
    let activation = Activation { name: name.clone(), thin, bytes, access: Access::ReadWrite };
    inner.on_pool(move |pool| pool.activate(&activation)).await?;
    let step = shortest_step(facts.usage.block_bytes);
    let discarded = discard(inner, trim, &name, (bytes, mapped), step).await;
    // Whatever has come of it: what is active cannot be deleted. If somebody has it open for a moment, as udevd may, it is let go
    // of before it is deleted.
    inner.on_pool(move |pool| pool.deactivate(&name)).await?;
    discarded
}

/// Returns how much is not mapped any more.
async fn discard(
    inner: &Inner,
    trim: Trim,
    name: &DeviceName,
    (bytes, mapped): (Bytes, u64),
    shortest: u64,
) -> Result<u64> {
    let (mut from, mut left, mut step) = (0, mapped, shortest);
    let begun = Instant::now();
    let mut looked = begun;
    while from < bytes.0 && left > 0 && begun.elapsed() < LONGEST && !inner.is_retired() {
        give_way(inner, PATIENCE).await;
        if is_crowded(inner) {
            break;
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if pool_is_short(inner).await {
                break;
            }
        }
        let (name, count, begun) = (name.clone(), step.min(bytes.0 - from), Instant::now());
        let now = inner.on_pool(move |pool| {
            pool.discard(&name, from, count)?;
            Ok(pool.look(&name)?.and_then(|live| live.mapped))
        });
        let now = now.await?.unwrap_or(left);
        let freed = left.saturating_sub(now);
        step = if freed == 0 { (step * 2).min(shortest * HOLES) } else { shortest };
        (from, left) = (from + count, now);
        tokio::time::sleep(rest(freed, begun.elapsed(), trim.rate)).await;
    }
    Ok(mapped.saturating_sub(left))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::{
        crash_tests::{inner, make, quiet, runtime, start, start_inner, until_crash},
        fake::{FakePool, Fuse, Reclaimed},
        snapshotter::Snapshotter,
        tree::Kind,
    };

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_has_hardly_anything_of_its_own_is_not_worth_it() {
        let table = [
            ("nothing", 0, 0, false),
            ("only what its base has", 500, 500, false),
            ("less than its base: it has discarded some of that", 400, 500, false),
            ("less than the least", 515, 500, false),
            ("the least of a small image", 116, 100, true),
            ("the least of a large one", 516, 500, false),
            ("a sixteenth", 535, 500, true),
            ("all", 16, 0, true),
        ];
        for (what, mapped, below, worth) in table {
            assert_eq!(is_worth_it(mapped * MIB, below * MIB), worth, "{what}");
        }
    }

    #[test]
    fn it_rests_for_what_is_left_of_its_time() {
        let second = Duration::from_secs(1);
        assert_eq!(rest(100 * MIB, second / 4, Bytes(200 * MIB)), second / 4);
        assert_eq!(rest(100 * MIB, second, Bytes(200 * MIB)), Duration::ZERO, "it is slower than it may be");
        assert_eq!(rest(0, Duration::ZERO, Bytes(200 * MIB)), Duration::ZERO, "nothing was mapped there");
        assert_eq!(rest(MIB, Duration::ZERO, Bytes(0)), second * 1024 * 1024, "as slow as can be");
    }

    #[test]
    fn whole_blocks_are_discarded() {
        for (block, step) in
            [(64 << 10, STEP), (192 << 10, 42 * (192 << 10)), (STEP, STEP), (1 << 30, 1 << 30)]
        {
            assert_eq!(shortest_step(block), step, "blocks of {block}");
        }
    }

    /// A disk that maps so much, of a base that maps less, on a snapshotter that trims.
    async fn with_disk(pool: &FakePool, directory: &std::path::Path, mapped: u64) -> Snapshotter {
        let mut inner = inner(directory, pool);
        inner.settings.trim = Some(Trim { rate: Bytes(1 << 40) });
        let s = start_inner(Arc::new(inner), pool).await;
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        pool.set_mapped(mapped);
        s
    }

    /// What is done to a removed disk, in order.
    fn done_to(mapped: u64, passes: bool, prepare: impl FnOnce(&FakePool)) -> Vec<Reclaimed> {
        let directory = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let pool = FakePool::new();
            pool.set_passes_discards(passes);
            let s = with_disk(&pool, directory.path(), mapped).await;
            prepare(&pool);
            let before = pool.reclaimed().len();
            s.remove("a").unwrap();
            quiet(&s).await;
            assert!(pool.device_names().is_empty(), "{:?}", pool.device_names());
            pool.reclaimed().split_off(before)
        })
    }

    #[test]
    fn it_is_trimmed_between_its_deactivation_and_its_deletion() {
        use Reclaimed::{Deactivated, Deleted, Discarded};
        let trimmed = done_to(100 * MIB, true, |_| ());
        assert_eq!(trimmed.first(), Some(&Deactivated));
        let [discards @ .., Deactivated, Deleted] = &trimmed[1..] else { unreachable!("{trimmed:?}") };
        assert!(!discards.is_empty() && discards.iter().all(|one| *one == Discarded), "{trimmed:?}");
        assert_eq!(discards.len(), 13, "8 MiB at a time");
        let whole = done_to(100 * MIB, true, |pool| pool.set_block(192 << 10));
        assert_eq!(whole.iter().filter(|one| **one == Discarded).count(), 13, "whole blocks");
        assert_eq!(done_to(MIB, true, |_| ()), [Deactivated, Deleted], "it is not worth it");
        let not_passed = done_to(100 * MIB, false, |_| ());
        assert_eq!(not_passed, [Deactivated, Deleted], "the disk below would not be told");
        let short = done_to(100 * MIB, true, |pool| pool.set_data_used_percent(91));
        assert_eq!(short, [Deactivated, Deleted], "the room is needed");
    }

    #[test]
    fn nobody_waits_for_one_that_is_trimmed() {
        let directory = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let pool = FakePool::new();
            let mut inner = inner(directory.path(), &pool);
            inner.settings.trim = Some(Trim { rate: Bytes(50 * MIB) });
            let s = start_inner(Arc::new(inner), &pool).await;
            for key in ["large", "small"] {
                make(&s, key, "", Kind::Active, &[]).await.unwrap();
            }
            pool.set_mapped(100 * MIB);
            let before = pool.reclaimed().len();
            s.remove("large").unwrap();
            while !pool.reclaimed()[before..].contains(&Reclaimed::Discarded) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // Two seconds for what seems to have been freed, while the small one has nothing of its own.
            pool.set_mapped(MIB);
            let thins = pool.thins().len();
            s.remove("small").unwrap();
            let waiting =
                || s.0.store.read(|tree| tree.removing().map(|s| s.key.clone()).collect::<Vec<_>>());
            while waiting().contains(&"small".to_owned()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert_eq!((pool.thins().len(), waiting()), (thins - 1, vec!["large".to_owned()]));
            quiet(&s).await;
            assert_eq!(pool.thins().len(), thins - 2);
        });
    }

    #[test]
    fn none_of_a_crowd_is_trimmed() {
        let directory = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let pool = FakePool::new();
            let s = with_disk(&pool, directory.path(), 100 * MIB).await;
            let keys: Vec<String> = (0..40).map(|n| n.to_string()).collect();
            for key in &keys {
                make(&s, key, "", Kind::Active, &[]).await.unwrap();
            }
            let before = pool.reclaimed().len();
            let held = pool.hold();
            keys.iter().for_each(|key| s.remove(key).unwrap());
            while !s.0.busy.counts().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(held);
            quiet(&s).await;
            let done = pool.reclaimed().split_off(before);
            // The last ones are no crowd any more.
            let ahead = done.iter().take_while(|one| **one != Reclaimed::Discarded);
            let deleted = ahead.filter(|one| **one == Reclaimed::Deleted).count();
            assert!(
                (20..40).contains(&deleted),
                "{deleted} of 40 were deleted before one was trimmed: {done:?}"
            );
        });
    }

    #[test]
    fn what_is_open_is_not_trimmed() {
        let directory = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let pool = FakePool::new();
            let s = with_disk(&pool, directory.path(), 100 * MIB).await;
            let before = pool.reclaimed().len();
            let device = pool.device_names().into_iter().next_back().unwrap();
            pool.open(&device, 1);
            s.remove("a").unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(pool.reclaimed().len(), before, "{:?}", pool.reclaimed());
            pool.open(&device, 0);
            quiet(&s).await;
            assert!(pool.reclaimed()[before..].contains(&Reclaimed::Discarded));
        });
    }

    #[test]
    fn killed_while_it_trims_it_deletes_after_the_next_start() {
        for n in 0.. {
            let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
            let (path, used) = (directory.path().to_owned(), pool.clone());
            let ended = until_crash(&pool, async move {
                let s = with_disk(&used, &path, 100 * MIB).await;
                used.set_fuse(Fuse::CrashBefore(n));
                s.remove("a").unwrap();
                quiet(&s).await;
            });
            if ended {
                assert!(n > 6, "only {n} effects were seen");
                return;
            }
            pool.set_fuse(Fuse::Whole);
            runtime().block_on(async {
                // That does not trim.
                let s = start(directory.path(), &pool).await;
                // As containerd does, if the removal was not written down.
                s.remove("a").unwrap();
                quiet(&s).await;
                assert!(
                    pool.device_names().is_empty(),
                    "stopped before effect {n}: {:?}",
                    pool.device_names()
                );
                assert_eq!(pool.thins().len(), 1, "stopped before effect {n}: only the blank is left");
            });
        }
    }
}
