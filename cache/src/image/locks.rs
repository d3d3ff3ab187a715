//! One worker at a time for each named thing, whichever pull it belongs to, as long as none is held up by a stranger.
//!
//! Images of different tenants share blobs and layers, so that the one who has a thing may have reasons to take its time
//! that the next in line must not suffer from: a registry of its own that sends a byte a second, a layer made to unpack
//! for half an hour. Hence two queues. Among kin, who would come by the thing in the same way and be no faster, all
//! wait as long as it takes; the first of each kin waits for the others [`PATIENCE`] at the most and then works alone.
//! So a thing is made once in ordinary times, and once per kin at the worst.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// How long one waits for others that are not its kin.
const PATIENCE: Duration = Duration::from_secs(60);

/// A turn at a thing; it ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    among_all: Option<OwnedMutexGuard<()>>,
    _among_kin: OwnedMutexGuard<()>,
}

impl Turn {
    /// Whether somebody else is at the same thing.
    pub(super) fn is_beside_another(&self) -> bool {
        self.among_all.is_none()
    }
}

/// Locks by name. A name that nobody holds or waits for takes no room for long.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<String, Weak<AsyncMutex<()>>>>);

impl Locks {
    /// Waits for the turn of `kin` at `thing`.
    pub(super) async fn turn(&self, thing: &str, kin: &str) -> Turn {
        self.turn_within(PATIENCE, thing, kin).await
    }

    async fn turn_within(&self, patience: Duration, thing: &str, kin: &str) -> Turn {
        let among_kin = self.lock(format!("{thing} by {kin}")).await;
        let among_all = tokio::time::timeout(patience, self.lock(thing.to_owned())).await.ok();
        Turn { among_all, _among_kin: among_kin }
    }

    async fn lock(&self, name: String) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match locks.get(&name).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    locks.retain(|_, lock| lock.strong_count() > 0);
                    let lock = Arc::new(AsyncMutex::new(()));
                    locks.insert(name, Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_exclude_themselves_only() {
        let locks = Arc::new(Locks::default());
        let held = locks.lock("a".into()).await;
        let _other = locks.lock("b".into()).await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { drop(locks.lock("a".into()).await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        assert!(waiting.await.is_ok());
    }

    #[tokio::test]
    async fn strangers_are_waited_for_with_patience_and_kin_without_end() {
        const LONG: Duration = Duration::from_secs(600);
        let locks = Arc::new(Locks::default());
        let first = locks.turn_within(LONG, "a", "r1").await;
        assert!(!first.is_beside_another());
        let stranger = locks.turn_within(Duration::ZERO, "a", "r2").await;
        assert!(stranger.is_beside_another());
        let waiting = |kin: &'static str| {
            let locks = locks.clone();
            tokio::spawn(async move { locks.turn_within(Duration::ZERO, "a", kin).await.is_beside_another() })
        };
        let (one, two) = (waiting("r1"), waiting("r2"));
        tokio::task::yield_now().await;
        assert!(!one.is_finished() && !two.is_finished());
        drop(stranger);
        assert!(two.await.unwrap_or_default(), "the first one is still at it");
        drop(first);
        assert!(!one.await.unwrap_or(true), "nobody is");
    }
}
