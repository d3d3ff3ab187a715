//! Deletes what was removed: deactivated when nobody has it open, never by force; at its own pace, behind the makings.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::future::join_all;

use crate::{
    device::Deactivated,
    error::Result,
    snapshotter::{Health, Inner},
    tree::{Change, Snapshot, SnapshotId},
};

/// At most so many are deactivated at a time: each waits for the kernel, and they can wait together.
const BATCH: usize = 16;
/// How long one deletion gives way to makings at the most.
const GIVE_WAY: Duration = Duration::from_millis(40);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// What counts itself is compared with the pool so often.
const RECOUNT: Duration = Duration::from_secs(600);

/// Snapshots that somebody has open, and when to look again.
type Held = HashMap<SnapshotId, (Instant, Duration)>;

/// Runs for ever.
pub(crate) async fn run(inner: Arc<Inner>) {
    let mut held = Held::new();
    let mut counted = Instant::now();
    loop {
        let serving = *inner.health.read().unwrap_or_else(PoisonError::into_inner) == Health::Serving;
        let batch = if serving { due(&inner, &mut held) } else { Vec::new() };
        if batch.is_empty() {
            let next = held.values().map(|(at, _)| at.saturating_duration_since(Instant::now())).min();
            let pause = next.unwrap_or(LONGEST_RETRY).max(Duration::from_millis(10));
            tokio::select! {
                () = inner.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        } else {
            reclaim(&inner, batch, &mut held).await;
        }
        if serving && counted.elapsed() > RECOUNT {
            counted = Instant::now();
            recount(&inner).await;
        }
    }
}

async fn recount(inner: &Inner) {
    match inner.on_pool(|pool| pool.creations()).await {
        Ok(made) => {
            inner.creations.store(made, Ordering::Relaxed);
            inner.metrics.creations(made);
        }
        Err(error) => tracing::warn!(%error, "the pool's count of snapshots ever made cannot be read"),
    }
}

/// The next ones that can be tried.
fn due(inner: &Inner, held: &mut Held) -> Vec<Snapshot> {
    let now = Instant::now();
    let making = inner.making();
    inner.store.read(|tree| {
        held.retain(|id, _| tree.get(*id).is_some());
        let removed = tree.removing().filter(|s| !making.contains(&s.id));
        removed.filter(|s| held.get(&s.id).is_none_or(|(at, _)| *at <= now)).take(BATCH).cloned().collect()
    })
}

async fn reclaim(inner: &Inner, batch: Vec<Snapshot>, held: &mut Held) {
    let deactivated = join_all(batch.iter().map(|snapshot| {
        let name = inner.name(snapshot.id);
        inner.on_pool(move |pool| {
            let mapped = pool.look(&name)?.map(|live| live.mapped);
            Ok((pool.deactivate(&name)?, mapped))
        })
    }))
    .await;
    let mut gone = Vec::new();
    for (snapshot, outcome) in batch.into_iter().zip(deactivated) {
        let id = snapshot.id;
        let deleted = match outcome {
            Ok((Deactivated::Gone, mapped)) => {
                give_way(inner).await;
                delete(inner, &snapshot, mapped).await
            }
            Ok((Deactivated::InUse, _)) => {
                try_later(held, id);
                continue;
            }
            Err(error) => Err(error),
        };
        match deleted {
            Ok(()) => gone.push(id),
            Err(error) => {
                tracing::warn!(snapshot = id.0, %error, "a removed snapshot is still there; trying again");
                try_later(held, id);
            }
        }
    }
    if gone.is_empty() {
        return;
    }
    inner.active_origins().retain(|id, _| !gone.contains(id));
    let deletions = gone.into_iter().map(Change::Delete).collect();
    if let Err(error) = inner.write(move |_| Ok((deletions, ()))).await {
        tracing::warn!(%error, "deleted snapshots could not be struck off the store; trying again");
        tokio::time::sleep(FIRST_RETRY).await;
    }
}

async fn delete(inner: &Inner, snapshot: &Snapshot, mapped: Option<u64>) -> Result<()> {
    let thin = snapshot.thin;
    inner.on_pool(move |pool| pool.delete(thin)).await?;
    inner.metrics.deleted(mapped.unwrap_or(0));
    Ok(())
}

fn try_later(held: &mut Held, id: SnapshotId) {
    let before = held.get(&id).map(|(_, pause)| *pause);
    let pause = before.map_or(FIRST_RETRY, |pause| (pause * 2).min(LONGEST_RETRY));
    held.insert(id, (Instant::now() + pause, pause));
}

/// Waits for the makings under way, for a moment.
async fn give_way(inner: &Inner) {
    let until = Instant::now() + GIVE_WAY;
    while inner.under_way.load(Ordering::Relaxed) > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
