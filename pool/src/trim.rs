//! Has the disk below the pool forget what a removed snapshot has had, before it is deleted.
//!
//! dm-thin discards nothing of a thin device that is deleted: its blocks are free in the pool, and as good as written for an
//! SSD or a sparse file below. What is discarded *of* a thin device it passes on, block by block, if no other device maps it.
//!
//! It is done when the snapshot is marked as removed for good, and its device is gone, which the kernel refuses as long as
//! somebody has it open: under a name that nobody knows, for as long as that takes. So a crash in between leaves a snapshot that
//! is deleted in the end anyway.

use std::time::{Duration, Instant};

use crate::{
    device::{Access, Activation, Deactivated, DeviceName},
    error::{Code, Error, Result},
    reclaim::{give_way, is_crowded},
    size::Bytes,
    snapshotter::Inner,
    tree::{Snapshot, State},
};

/// How removed snapshots are discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trim {
    /// At most so many bytes a second.
    pub rate: Bytes,
}

/// So much of a device is discarded at a time: the pool's one worker does it block by block, and what VMs write to new blocks waits
/// behind it.
const STEP: u64 = 8 << 20;
/// What has less of its own is deleted as it is, in bytes …
const LEAST: u64 = 16 << 20;
/// … as is what has less than this part of its own: mappings that it shares are copied to be removed, for nothing.
const PART: u64 = 16;

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

/// Trims one that is removed, not active, and maps so much, if that is worth it. Returns how long it has given way and rested.
/// What fails is told, and fails nothing else.
pub(crate) async fn trim(
    inner: &Inner,
    trim: Trim,
    snapshot: &Snapshot,
    mapped: Option<u64>,
    patience: Duration,
) -> Duration {
    let below = inner.store.read(|tree| match snapshot.parent.and_then(|parent| tree.get(parent)) {
        Some(parent) => parent.mapped,
        None => Some(0),
    });
    let mapped = match (mapped, below) {
        (Some(mapped), Some(below)) if is_worth_it(mapped, below) => mapped,
        _ => return Duration::ZERO,
    };
    let id = snapshot.id.0;
    let mut waited = Duration::ZERO;
    match trim_now(inner, trim, snapshot, mapped, patience, &mut waited).await {
        Ok(bytes) => {
            inner.metrics.trimmed(bytes);
            tracing::debug!(snapshot = id, bytes, ?waited, "a removed snapshot was trimmed");
        }
        Err(error) => tracing::warn!(snapshot = id, %error, "a removed snapshot was not trimmed to its end"),
    }
    waited
}

async fn trim_now(
    inner: &Inner,
    trim: Trim,
    snapshot: &Snapshot,
    mapped: u64,
    patience: Duration,
    waited: &mut Duration,
) -> Result<u64> {
    // By the kernel it is inactive; by the record nobody can want it any more.
    if snapshot.state != State::Removing || !inner.on_pool(|pool| pool.passes_discards()).await? {
        return Ok(0);
    }
    let name = inner.name(snapshot.id).while_trimmed();
    let (thin, bytes) = (snapshot.thin, snapshot.bytes);
    let activation = Activation { name: name.clone(), thin, bytes, access: Access::ReadWrite };
    inner.on_pool(move |pool| pool.activate(&activation)).await?;
    let discarded = discard(inner, trim, &name, bytes, mapped, patience, waited).await;
    // Whatever has come of it: what is active cannot be deleted.
    let closed = inner
        .on_pool(move |pool| match pool.deactivate(&name)? {
            Deactivated::Gone => Ok(None),
            Deactivated::InUse => Ok(Some(name)),
        })
        .await?;
    match closed {
        None => discarded,
        Some(name) => Err(Error::new(Code::FailedPrecondition, format!("somebody has {} open", name.path()))),
    }
}

async fn discard(
    inner: &Inner,
    trim: Trim,
    name: &DeviceName,
    bytes: Bytes,
    mapped: u64,
    patience: Duration,
    waited: &mut Duration,
) -> Result<u64> {
    let (mut from, mut left) = (0, mapped);
    while from < bytes.0 && left > 0 && !inner.is_retired() {
        *waited += give_way(inner, patience).await;
        // Those that wait need the room, and it comes back without this as well.
        if is_crowded(inner) {
            break;
        }
        let (name, count, begun) = (name.clone(), STEP.min(bytes.0 - from), Instant::now());
        let now = inner.on_pool(move |pool| {
            pool.discard(&name, from, count)?;
            Ok(pool.look(&name)?.and_then(|live| live.mapped))
        });
        let now = now.await?.unwrap_or(left);
        let pause = rest(left.saturating_sub(now), begun.elapsed(), trim.rate);
        (from, left) = (from + count, now);
        tokio::time::sleep(pause).await;
        *waited += pause;
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
    fn done_to(mapped: u64, passes: bool) -> Vec<Reclaimed> {
        let directory = tempfile::tempdir().unwrap();
        runtime().block_on(async {
            let pool = FakePool::new();
            pool.set_passes_discards(passes);
            let s = with_disk(&pool, directory.path(), mapped).await;
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
        let trimmed = done_to(100 * MIB, true);
        assert_eq!(trimmed.first(), Some(&Deactivated));
        let [discards @ .., Deactivated, Deleted] = &trimmed[1..] else { unreachable!("{trimmed:?}") };
        assert!(!discards.is_empty() && discards.iter().all(|one| *one == Discarded), "{trimmed:?}");
        assert_eq!(done_to(MIB, true), [Deactivated, Deleted], "it is not worth it");
        assert_eq!(done_to(100 * MIB, false), [Deactivated, Deleted], "the disk below would not be told");
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
