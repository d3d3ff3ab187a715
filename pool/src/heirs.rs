//! Heirs: snapshots made ahead of need of what will be asked for again in a moment, so that a Prepare is one write of the
//! store, and nobody waits for the kernel.
//!
//! A layer that was just committed is the next layer's parent, or its image's first disk's; what two disks were made of
//! within a minute, a third will be. Each has one heir at the most, which goes when nobody has come for it, and at a start.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    error::{Code, Error, Result},
    make::CREATIONS,
    snapshotter::{Inner, Mount, now},
    tree::{HeirPlan, Kind, Snapshot, SnapshotId, State, UnixNanos, Wish},
};

/// So long nobody has to come for an heir until it goes; and so long a snapshot's first child is remembered.
const KEPT: Duration = Duration::from_secs(60);
/// From as many that are remembered on, those are forgotten that are too old.
const MANY: usize = 256;

/// What is under way, and what has been asked for.
#[derive(Debug, Default)]
pub(crate) struct Heirs {
    making: Mutex<HashMap<SnapshotId, Arc<Turn>>>,
    asked: Mutex<HashMap<SnapshotId, Instant>>,
}

/// The making of one heir: locked until it is over.
#[derive(Debug, Default)]
struct Turn {
    over: Arc<tokio::sync::Mutex<()>>,
    /// Whether somebody waits for it already; all others had better make their own.
    awaited: AtomicBool,
}

/// The making of an heir, until it is over in whatever way.
struct MakingOne {
    inner: Arc<Inner>,
    of: SnapshotId,
}

impl Drop for MakingOne {
    fn drop(&mut self) {
        self.inner.heirs.making().remove(&self.of);
    }
}

impl Heirs {
    fn making(&self) -> MutexGuard<'_, HashMap<SnapshotId, Arc<Turn>>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a child was made; says whether another one was, not long ago.
    fn has_another(&self, of: SnapshotId) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() >= MANY {
            asked.retain(|_, at| at.elapsed() < KEPT);
        }
        asked.insert(of, Instant::now()).is_some_and(|before| before.elapsed() < KEPT)
    }

    /// Whether none is being made.
    #[cfg(test)]
    pub(crate) fn are_quiet(&self) -> bool {
        self.making().is_empty()
    }
}

impl Inner {
    /// Makes another heir of what a disk was made of, if that is asked for more often than once. Not while others wait: they
    /// had to wait for it too.
    pub(crate) fn heir_beside(self: &Arc<Self>, key: &str) {
        let of = self.store.read(|tree| {
            let made = tree.ready(key).ok().filter(|s| !s.layer && s.kind == Kind::Active)?;
            let parent = tree.get(made.parent?)?;
            Some(parent.id).filter(|_| parent.bytes == made.bytes)
        });
        if let Some(of) = of
            && self.heirs.has_another(of)
            && !self.traffic.is_making()
        {
            self.heir_later(of);
        }
    }

    /// Makes an heir of what was just committed, or is asked for again and again.
    pub(crate) fn heir_later(self: &Arc<Self>, of: SnapshotId) {
        if self.settings.heirs == 0 || self.creations.load(Ordering::Relaxed) >= CREATIONS / 2 {
            return;
        }
        let turn = Arc::new(Turn::default());
        // Before anybody can ask for it; nobody else has it yet.
        let Ok(under_way) = turn.over.clone().try_lock_owned() else { return };
        let mut making = self.heirs.making();
        if making.contains_key(&of) {
            return;
        }
        making.insert(of, turn);
        drop(making);
        let making = MakingOne { inner: self.clone(), of };
        tokio::spawn(async move {
            if let Err(error) = making.inner.make_heir(of).await {
                tracing::debug!(of = of.0, %error, "no heir was made");
            }
            drop(making);
            drop(under_way);
        });
    }

    async fn make_heir(&self, of: SnapshotId) -> Result<()> {
        self.pool()?;
        let (busy, most) = (self.busy.clone(), self.settings.heirs);
        let intent = self
            .write(move |tree| {
                let Some((plan, changes)) = tree.make_heir(of, most, now()) else {
                    return Ok((Vec::new(), None));
                };
                let hold = busy.hold([plan.new.id, plan.origin.id]);
                Ok((changes, Some((plan, hold))))
            })
            .await?;
        let Some((HeirPlan { new, origin }, _hold)) = intent else { return Ok(()) };
        let id = new.id;
        let made = match self.effect(&new, Some(&origin)).await {
            Ok(_) => self.write(move |tree| Ok((vec![tree.confirm(id)?], ()))).await.map_err(Into::into),
            Err(failed) => Err(failed),
        };
        match made {
            Ok(()) => Ok(()),
            Err(failed) => Err(self.give_up(id, failed).await),
        }
    }

    /// Waits for the heir that is being made of the wish's parent, if it will do and nobody else does.
    pub(crate) async fn await_heir(&self, wish: &Wish) {
        let Some(parent) = self.store.read(|tree| tree.wants_heir_of(wish)) else { return };
        let Some(turn) = self.heirs.making().get(&parent).cloned() else { return };
        if !turn.awaited.swap(true, Ordering::Relaxed) {
            drop(turn.over.lock().await);
        }
    }

    /// How an heir is mounted that was given away, and is written down so.
    pub(crate) async fn inherit(&self, heir: &Snapshot, is_wanted: &impl Fn() -> bool) -> Result<Mount> {
        self.ensure_active(heir.id).await?;
        let mount = self.mount_of(heir).await?;
        if heir.layer {
            self.traffic.layer();
            let events = self.on_pool(|pool| pool.events()).await?;
            self.unpacking().insert(heir.id, events);
        }
        if is_wanted() { Ok(mount) } else { Err(Error::new(Code::Cancelled, "its caller has gone away")) }
    }

    /// Removes the heirs that nobody has come for.
    pub(crate) async fn expire_heirs(&self) {
        let kept = i64::try_from(KEPT.as_nanos()).unwrap_or(i64::MAX);
        let then = UnixNanos(now().0.saturating_sub(kept));
        let is_old = |s: &Snapshot| s.state == State::Ready && s.created < then;
        if !self.store.read(|tree| tree.heirs().any(is_old)) {
            return;
        }
        if let Err(error) = self.write(move |tree| Ok((tree.old_heirs(then, now()), ()))).await {
            tracing::debug!(%error, "heirs that nobody has come for stay");
        }
    }
}
