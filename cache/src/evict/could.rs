//! What could be made of room for who comes next, as it was a moment ago: for Offer, which must not wait for it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{Room, Trigger};
use tokio::time::Instant;

use super::{Evictor, inventory::total};

/// From this age on it is learnt again, behind the answer; and from that on it does not count.
const FRESH: Duration = Duration::from_secs(5);
const STALE: Duration = Duration::from_secs(60);
/// How long making room is thought to take before some was made.
const FIRST_GUESS: Duration = Duration::from_secs(2);

/// What is known.
#[derive(Debug, Default)]
pub(super) struct State(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    could: Option<(Instant, Room)>,
    /// Since when somebody is at it.
    learning: Option<Instant>,
    /// How long making room takes.
    takes: Option<Duration>,
}

impl Known {
    fn room(&self) -> Option<(Room, Duration)> {
        let (_, room) = self.could.filter(|(at, _)| at.elapsed() < STALE)?;
        Some((room, self.takes.unwrap_or(FIRST_GUESS)))
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room was made in this time.
    pub(super) fn took(&self, took: Duration) {
        let mut known = self.lock();
        known.takes = Some(known.takes.map_or(took, |before| (before * 3 + took) / 4));
    }
}

impl Evictor {
    /// What could be freed, or the pool grow by, for a disk that would be refused otherwise, and how long that takes; `None` if
    /// nothing is removed by itself, or it is not known yet: then it is learnt for whoever asks a moment later.
    pub fn could_free(self: &Arc<Self>) -> Option<(Room, Duration)> {
        if !self.settings.enabled {
            return None;
        }
        let mut known = self.could.lock();
        let age = known.could.map(|(at, _)| at.elapsed());
        // One that has crashed is over.
        let is_learnt = known.learning.is_some_and(|since| since.elapsed() < STALE);
        if age.is_none_or(|age| age >= FRESH) && !is_learnt {
            let this = self.clone();
            let begun = self.tasks.spawn(async move { this.learn_what_could_go().await });
            known.learning = begun.then(Instant::now);
        }
        known.room()
    }

    /// The same, as far as it is known already.
    pub fn known_to_free(&self) -> Option<(Room, Duration)> {
        self.could.lock().room().filter(|_| self.settings.enabled)
    }

    async fn learn_what_could_go(self: Arc<Self>) {
        let all = match self.kernel.pool().await {
            Ok(usage) => self.plan(Trigger::Admission(total(&usage))).await.map(|plan| plan.gives()).ok(),
            Err(_) => None,
        };
        let mut known = self.could.lock();
        known.learning = None;
        known.could = all.map(|room| (Instant::now(), room));
    }
}
