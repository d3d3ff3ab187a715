//! Deletes what was removed: deactivated when nobody has it open, never by force; at its own pace, behind the makings.

use std::{
    cmp::Reverse,
    collections::HashMap,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use crate::{
    device::{Deactivated, PoolUsage},
    error::{Code, Error},
    snapshotter::{Health, Inner, now},
    tree::{Change, Snapshot, SnapshotId},
    trim::{Trim, Trims},
};

/// At most so many are deactivated at a time: each waits for the kernel, and they can wait together.
const BATCH: usize = 16;
/// The same beside makings, which wait for the kernel too.
const BATCH_BESIDE: usize = 2;
/// How long one step gives way to makings and removals at the most: about as long as one takes on a slow host.
const GIVE_WAY: Duration = Duration::from_millis(150);
/// Beside them it rests, after each batch, for so many times as long as that has taken.
const REST: u32 = 3;
/// From twice as many that wait on, it gives way and rests for half as long and does twice as much, and so on.
const CROWD: usize = 128;
/// When more wait, none is trimmed before it is deleted: who releases that many waits for the room.
const TRIMMED: usize = 16;
/// In a pool with less than this percentage of its space left there is no giving way: VMs would see errors first.
const SHORT: u64 = 10;
const NO_MANNERS: u32 = 1024;
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// What counts itself is compared with the pool so often.
const RECOUNT: Duration = Duration::from_secs(600);

/// Snapshots that could not be deleted yet, since somebody has them open or it failed, and when to look again.
type Held = HashMap<SnapshotId, (Instant, Duration)>;

/// Runs until another one takes over.
pub(crate) async fn run(inner: Arc<Inner>) {
    let (mut held, mut trims) = (Held::new(), Trims::default());
    let mut counted = Instant::now();
    while !inner.is_retired() {
        let all_written = write_abandoned(&inner).await;
        let lively = inner.traffic.is_lively();
        let serving = *inner.health.read().unwrap_or_else(PoisonError::into_inner) == Health::Serving;
        if serving {
            inner.expire_heirs().await;
        }
        let backlog = inner.store.read(|tree| tree.removing().count());
        let is_short = backlog > 0 && serving && pool_is_short(&inner).await;
        let haste = haste(backlog, is_short);
        let count = batch_size(lively, haste);
        let trim = inner.settings.trim.filter(|_| !is_short && backlog <= TRIMMED);
        trims.settle(trim.is_some());
        let batch = if serving { due(&inner, &mut held, &trims, count) } else { Vec::new() };
        if batch.is_empty() {
            let next = held.values().map(|(at, _)| at.saturating_duration_since(Instant::now())).min();
            let longest = if all_written { LONGEST_RETRY } else { FIRST_RETRY };
            let pause = next.unwrap_or(longest).clamp(Duration::from_millis(10), longest);
            tokio::select! {
                () = inner.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        } else {
            let worked = reclaim(&inner, batch, &mut held, (&mut trims, trim), GIVE_WAY / haste).await;
            rest(&inner, worked * REST / haste).await;
        }
        if serving && counted.elapsed() > RECOUNT {
            counted = Instant::now();
            recount(&inner).await;
        }
    }
}

/// How many times less it gives way and rests, and how many times more it does at once beside makings.
fn haste(backlog: usize, is_short: bool) -> u32 {
    if is_short { NO_MANNERS } else { u32::try_from(backlog / CROWD).unwrap_or(u32::MAX).max(1) }
}

fn batch_size(lively: bool, haste: u32) -> usize {
    if lively { BATCH_BESIDE.saturating_mul(haste as usize).min(BATCH) } else { BATCH }
}

/// Whether the pool has next to no room left, for data or for metadata.
fn is_short(usage: &PoolUsage) -> bool {
    let short = |used: u64, total: u64| total.saturating_sub(used) < total / 100 * SHORT;
    short(usage.data_used, usage.data_total) || short(usage.metadata_used, usage.metadata_total)
}

pub(crate) async fn pool_is_short(inner: &Inner) -> bool {
    let facts = inner.on_pool(|pool| pool.facts()).await;
    facts.is_ok_and(|facts| is_short(&facts.usage))
}

/// Marks as removed what was given up while the store could not be written; says whether nothing of it is left.
async fn write_abandoned(inner: &Inner) -> bool {
    let ids = inner.abandoned().clone();
    if ids.is_empty() {
        return true;
    }
    // Children first, which have the higher ids: each is decided on what the ones before have left.
    let mut in_order: Vec<_> = ids.clone().into_iter().collect();
    in_order.sort_by_key(|(id, _)| Reverse(*id));
    let marked = inner.store.write(move |batch| {
        for (id, traces) in in_order {
            let changes = batch.state().give_up(id, traces, now());
            changes.into_iter().for_each(|change| batch.change(change));
        }
        Ok::<_, Error>(())
    });
    match marked.await {
        Ok(()) => {
            inner.abandoned().retain(|id, _| !ids.contains_key(id));
            true
        }
        Err(error) => {
            tracing::debug!(count = ids.len(), %error, "what was given up cannot be written down yet");
            false
        }
    }
}

async fn recount(inner: &Inner) {
    match inner.on_pool(|pool| pool.creations()).await {
        Ok(made) => inner.know_creations(made),
        Err(error) => tracing::warn!(%error, "the pool's count of snapshots ever made cannot be read"),
    }
}

/// The next ones that can be tried.
fn due(inner: &Inner, held: &mut Held, trims: &Trims, count: usize) -> Vec<Snapshot> {
    let now = Instant::now();
    // Kept while the tree is read: what is marked just now is in there before it is in the tree.
    let busy = inner.busy.counts();
    inner.store.read(|tree| {
        held.retain(|id, _| tree.get(*id).is_some());
        let removed = tree.removing().filter(|s| !busy.contains_key(&s.id) && !trims.waits(s.id));
        longest_due(removed, held, now, count).into_iter().cloned().collect()
    })
}

/// Those never tried first: the ones that somebody keeps open must not keep the others waiting. Else as they were removed, and of
/// those that were removed at once children first, which have the higher ids: what a snapshot shares with what is still there cannot
/// be trimmed.
fn longest_due<'a>(
    removed: impl Iterator<Item = &'a Snapshot>,
    held: &Held,
    now: Instant,
    count: usize,
) -> Vec<&'a Snapshot> {
    let tried = |s: &&Snapshot| held.get(&s.id).map(|(at, _)| *at);
    let mut due: Vec<&Snapshot> = removed.filter(|s| tried(s).is_none_or(|at| at <= now)).collect();
    due.sort_by_key(|s| (tried(s), s.updated, Reverse(s.id)));
    due.truncate(count);
    due
}

/// Each step gives way for a moment; returns how long the rest of it took.
async fn reclaim(
    inner: &Arc<Inner>,
    batch: Vec<Snapshot>,
    held: &mut Held,
    (trims, trim): (&mut Trims, Option<Trim>),
    patience: Duration,
) -> Duration {
    let begun = Instant::now();
    let mut waited = give_way(inner, patience).await;
    let deactivated = join_all(batch.iter().map(|snapshot| async {
        let name = inner.name(snapshot.id);
        // Nobody activates it any more once it is Removing, but one who began before may be at it.
        let _alone = inner.device_lock(snapshot.id).lock().await;
        inner
            .on_pool(move |pool| {
                let active = pool.look(&name)?.and_then(|live| live.mapped);
                // One that was killed may have left that.
                let became = match pool.deactivate(&name.while_trimmed())? {
                    Deactivated::Gone => pool.deactivate(&name)?,
                    Deactivated::InUse => Deactivated::InUse,
                };
                Ok((became, active))
            })
            .await
    }))
    .await;
    let (mut gone, mut freed, mut told, mut removed) = (Vec::new(), 0, false, Vec::new());
    for (snapshot, outcome) in batch.into_iter().zip(deactivated) {
        let id = snapshot.id;
        let deleted = match outcome {
            Ok((Deactivated::Gone, active)) => {
                let mapped = trims.mapped(&snapshot, active);
                if let Some(trim) = trim
                    && trims.takes(inner, trim, &snapshot, mapped)
                {
                    continue;
                }
                waited += give_way(inner, patience).await;
                let thin = snapshot.thin;
                let deleted = inner.on_pool(move |pool| pool.delete(thin)).await;
                deleted.map(|()| mapped.unwrap_or(0))
            }
            Ok((Deactivated::InUse, _)) => {
                try_later(held, id);
                continue;
            }
            Err(error) => Err(error),
        };
        match deleted {
            Ok(bytes) => {
                gone.push(id);
                removed.push(snapshot.updated);
                freed += bytes;
            }
            Err(error) => {
                // A pool that has stopped has the same answer for all of them.
                let stopped = error.code == Code::FailedPrecondition;
                if stopped && std::mem::replace(&mut told, true) {
                    tracing::debug!(snapshot = id.0, %error, "a removed snapshot is still there");
                } else {
                    tracing::warn!(snapshot = id.0, %error, "a removed snapshot is still there; trying again");
                }
                try_later(held, id);
            }
        }
    }
    if gone.is_empty() {
        return Duration::ZERO;
    }
    inner.active_origins().retain(|id, _| !gone.contains(id));
    inner.torn().retain(|id| !gone.contains(id));
    inner.unpacking().retain(|id, _| !gone.contains(id));
    trims.forget(&gone);
    let deletions = gone.iter().copied().map(Change::Delete).collect();
    match inner.write(move |_| Ok((deletions, ()))).await {
        Ok(()) => {
            inner.metrics.deleted(freed);
            removed.into_iter().for_each(|since| inner.metrics.reclaimed(since, now()));
        }
        Err(error) => {
            tracing::warn!(%error, "deleted snapshots could not be struck off the store; trying again");
            gone.into_iter().for_each(|id| try_later(held, id));
        }
    }
    begun.elapsed().saturating_sub(waited)
}

fn try_later(held: &mut Held, id: SnapshotId) {
    let before = held.get(&id).map(|(_, pause)| *pause);
    let pause = before.map_or(FIRST_RETRY, |pause| (pause * 2).min(LONGEST_RETRY));
    held.insert(id, (Instant::now() + pause, pause));
}

/// Whether more wait than are trimmed.
pub(crate) fn is_crowded(inner: &Inner) -> bool {
    inner.store.read(|tree| tree.removing().count()) > TRIMMED
}

/// Waits for the makings and removals under way; returns how long.
pub(crate) async fn give_way(inner: &Inner, patience: Duration) -> Duration {
    wait_while(patience, || inner.traffic.is_in_the_way()).await
}

/// Leaves the pool to others, if there are any.
async fn rest(inner: &Inner, time: Duration) {
    wait_while(time, || inner.traffic.is_lively()).await;
}

async fn wait_while(limit: Duration, condition: impl Fn() -> bool) -> Duration {
    let begun = Instant::now();
    while condition() && begun.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    begun.elapsed()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        crash_tests::{make, with_pool},
        device::PoolMode,
        fake::Reclaimed,
        tree::{Kind, UnixNanos, tests::snapshot},
    };

    #[test]
    fn a_pool_is_short_with_less_than_a_tenth_of_its_data_or_metadata_left() {
        let cases = [
            ("empty", 0, 0, false),
            ("a tenth of both", 900, 9000, false),
            ("less of data", 901, 0, true),
            ("less of metadata", 0, 9001, true),
            ("full", 1000, 10000, true),
        ];
        for (what, data_used, metadata_used, short) in cases {
            let usage = PoolUsage {
                name: String::new(),
                data_used,
                data_total: 1000,
                metadata_used,
                metadata_total: 10000,
                block_bytes: 1,
                mode: PoolMode::ReadWrite,
                zeroing: true,
            };
            assert_eq!(is_short(&usage), short, "{what}");
        }
    }

    #[test]
    fn the_more_waits_and_the_less_room_is_left_the_less_it_gives_way() {
        let one_look = Duration::from_millis(1);
        let cases = [
            (1, BATCH_BESIDE, GIVE_WAY),
            (2 * CROWD - 1, BATCH_BESIDE, GIVE_WAY),
            (2 * CROWD, 2 * BATCH_BESIDE, GIVE_WAY / 2),
            (100 * CROWD, BATCH, GIVE_WAY / 100),
        ];
        for (backlog, count, patience) in cases {
            let haste = haste(backlog, false);
            assert_eq!((batch_size(true, haste), GIVE_WAY / haste), (count, patience), "{backlog} wait");
            assert_eq!(batch_size(false, haste), BATCH, "{backlog} wait, and nobody is there");
        }
        // Whatever waits: not even as long as one look takes, and as good as no rest.
        for backlog in [1, 100 * CROWD] {
            let haste = haste(backlog, true);
            assert_eq!(batch_size(true, haste), BATCH);
            assert!(GIVE_WAY / haste < one_look && one_look * REST / haste < one_look / 100);
        }
    }

    /// How many it takes at once while somebody makes a snapshot.
    fn batch_beside_a_making(data_used_percent: u64) -> usize {
        with_pool(async |s, pool| {
            pool.set_data_used_percent(data_used_percent);
            for n in 0..BATCH {
                make(&s, &n.to_string(), "", Kind::Active, &[]).await.unwrap();
            }
            let before = pool.reclaimed().len();
            let _making = s.0.traffic.making();
            // It looks at the pool before it takes a batch: by then all wait.
            let held = pool.hold();
            (0..BATCH).for_each(|n| s.remove(&n.to_string()).unwrap());
            while !s.0.busy.counts().is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(held);
            // A batch is deactivated before the first of it is deleted.
            loop {
                let done = pool.reclaimed().split_off(before);
                if let Some(batch) = done.iter().position(|one| *one == Reclaimed::Deleted) {
                    return batch;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    }

    #[test]
    fn with_next_to_no_room_left_a_backlog_goes_at_full_speed_beside_makings() {
        assert_eq!(batch_beside_a_making(89), BATCH_BESIDE);
        assert_eq!(batch_beside_a_making(91), BATCH);
    }

    #[test]
    fn what_somebody_keeps_open_keeps_no_other_waiting() {
        let removed: Vec<Snapshot> = (1..=5).map(|id| snapshot(id, "", Kind::Active)).collect();
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let at = |id, at| (SnapshotId(id), (at, second));
        // 1 and 2 were open, and are due again; 3 is not due yet.
        let held = Held::from([at(1, now), at(2, now - second), at(3, now + second)]);
        let next = |count| -> Vec<u64> {
            longest_due(removed.iter(), &held, now, count).into_iter().map(|s| s.id.0).collect()
        };
        assert_eq!(next(2), [5, 4]);
        assert_eq!(next(9), [5, 4, 2, 1]);
    }

    #[test]
    fn what_was_removed_first_goes_first_and_children_before_their_parents() {
        let removed: Vec<Snapshot> = [(1, 7), (2, 7), (3, 8), (4, 6)]
            .map(|(id, at)| Snapshot { updated: UnixNanos(at), ..snapshot(id, "", Kind::Active) })
            .into();
        let order = longest_due(removed.iter(), &Held::new(), Instant::now(), 9);
        assert_eq!(order.into_iter().map(|s| s.id.0).collect::<Vec<_>>(), [4, 2, 1, 3]);
    }
}
