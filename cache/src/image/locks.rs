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

use super::gate::{ClaimId, Gate};

/// How long one waits for others that are not its kin.
const PATIENCE: Duration = Duration::from_secs(60);

/// A turn at a thing; it ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    among_all: Option<Held>,
    _among_kin: Held,
}

impl Turn {
    /// Whether somebody else is at the same thing.
    pub(super) fn is_beside_another(&self) -> bool {
        self.among_all.is_none()
    }
}

/// A name's lock, and the gates of who has it or waits for it, in the order in which they get it.
#[derive(Debug, Default)]
struct Named {
    lock: Arc<AsyncMutex<()>>,
    queue: Mutex<Vec<Arc<Gate>>>,
}

impl Named {
    /// Who is before `last`.
    fn before(&self, last: &Arc<Gate>) -> Vec<Arc<Gate>> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.iter().take_while(|gate| !Arc::ptr_eq(gate, last)).cloned().collect()
    }
}

/// A place in the queue; it is left when this is dropped.
#[derive(Debug)]
struct Place {
    named: Arc<Named>,
    gate: Option<Arc<Gate>>,
}

impl Place {
    fn take(named: Arc<Named>, gate: Option<&Arc<Gate>>) -> Self {
        if let Some(gate) = gate {
            named.queue.lock().unwrap_or_else(PoisonError::into_inner).push(gate.clone());
        }
        Self { named, gate: gate.cloned() }
    }

    /// Waits until those before have gone. While it waits, they are as urgent as it is.
    async fn wait(&self) -> OwnedMutexGuard<()> {
        let locking = self.named.lock.clone().lock_owned();
        let Some(gate) = &self.gate else { return locking.await };
        tokio::pin!(locking);
        let mut loans = Loans { id: ClaimId::new(), to: Vec::new() };
        loop {
            let changed = gate.changed();
            for before in self.named.before(gate) {
                before.lend(loans.id, gate);
                loans.note(before);
            }
            tokio::select! {
                guard = &mut locking => return guard,
                () = changed => {}
            }
        }
    }
}

/// What was lent to others; taken back when this is dropped.
struct Loans {
    id: ClaimId,
    to: Vec<Arc<Gate>>,
}

impl Loans {
    fn note(&mut self, gate: Arc<Gate>) {
        if !self.to.iter().any(|other| Arc::ptr_eq(other, &gate)) {
            self.to.push(gate);
        }
    }
}

impl Drop for Loans {
    fn drop(&mut self) {
        self.to.iter().for_each(|gate| gate.leave(self.id));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(gate) = &self.gate else { return };
        let mut queue = self.named.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = queue.iter().position(|other| Arc::ptr_eq(other, gate)) {
            queue.remove(at);
        }
    }
}

/// A lock that is held.
#[derive(Debug)]
struct Held {
    _guard: OwnedMutexGuard<()>,
    _place: Place,
}

/// Locks by name. A name that nobody holds or waits for takes no room for long.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<String, Weak<Named>>>);

impl Locks {
    /// Waits for the turn of `kin` at `thing`. Whoever has it, or comes before, does not give way meanwhile to those to whom
    /// the pull of `gate` does not.
    pub(super) async fn turn(&self, thing: &str, kin: &str, gate: Option<&Arc<Gate>>) -> Turn {
        self.turn_within(PATIENCE, thing, kin, gate).await
    }

    async fn turn_within(
        &self,
        patience: Duration,
        thing: &str,
        kin: &str,
        gate: Option<&Arc<Gate>>,
    ) -> Turn {
        let among_kin = self.lock(format!("{thing} by {kin}"), gate).await;
        let among_all = tokio::time::timeout(patience, self.lock(thing.to_owned(), gate)).await.ok();
        Turn { among_all, _among_kin: among_kin }
    }

    async fn lock(&self, name: String, gate: Option<&Arc<Gate>>) -> Held {
        let named = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match locks.get(&name).and_then(Weak::upgrade) {
                Some(named) => named,
                None => {
                    locks.retain(|_, named| named.strong_count() > 0);
                    let named = Arc::new(Named::default());
                    locks.insert(name, Arc::downgrade(&named));
                    named
                }
            }
        };
        let place = Place::take(named, gate);
        Held { _guard: place.wait().await, _place: place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_exclude_themselves_only() {
        let locks = Arc::new(Locks::default());
        let held = locks.lock("a".into(), None).await;
        let _other = locks.lock("b".into(), None).await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { drop(locks.lock("a".into(), None).await) }
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
        let first = locks.turn_within(LONG, "a", "r1", None).await;
        assert!(!first.is_beside_another());
        let stranger = locks.turn_within(Duration::ZERO, "a", "r2", None).await;
        assert!(stranger.is_beside_another());
        let waiting = |kin: &'static str| {
            let locks = locks.clone();
            tokio::spawn(async move {
                locks.turn_within(Duration::ZERO, "a", kin, None).await.is_beside_another()
            })
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
