//! Single flight: one pull per image and platform, however many callers ask; of the highest class of them.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use futures_util::{FutureExt as _, future};
use tokio::sync::{oneshot, watch};
use tracing::Instrument as _;

use super::{
    Access, Cache, ImageRef, Platform, Progress, ResolvedImage, Shared, about,
    gate::{ClaimId, Gate, Terms},
    progress::Board,
    pull,
};
use crate::error::{Error, Reason, Result};

type Outcome = Result<(ResolvedImage, Cache)>;
type Key = (ImageRef, Platform, Access);

/// A pull that this caller has begun or joined. Dropping it does not stop the pull.
#[derive(Clone, Debug)]
pub struct Pull {
    progress: watch::Receiver<Progress>,
    outcome: future::Shared<oneshot::Receiver<Outcome>>,
    gate: Arc<Gate>,
}

/// Keeps a pull going that goes on only as long as somebody waits for it.
#[derive(Debug)]
pub struct Interest {
    gate: Arc<Gate>,
    claim: ClaimId,
}

impl Drop for Interest {
    fn drop(&mut self) {
        self.gate.leave(self.claim);
    }
}

impl Pull {
    /// How far it is; closed when it has ended.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Whether it gives way to a pull of a higher class at the moment.
    pub fn gives_way(&self) -> bool {
        !self.gate.is_open()
    }

    /// Waits for its end.
    pub async fn outcome(self) -> Outcome {
        self.outcome.await.unwrap_or_else(|_| {
            // Its task is gone: the runtime has dropped it.
            Err(Error::new(
                Reason::Stopping,
                "the pull was broken off, as by a stop of the service; pull again",
            ))
        })
    }
}

/// Pulls under way. The lock is held for look-ups only, never across an await.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<Key, Pull>>);

impl Flights {
    pub(super) fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many bytes a pull still has to fetch, if it knows; `None`: there is no such pull.
    pub(super) fn missing(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Option<Option<u64>> {
        let key = (image.clone(), platform.clone(), access.clone());
        let flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(flights.get(&key)?.progress.borrow().missing())
    }

    /// Whether the image is being pulled, for whatever platform.
    pub(super) fn has(&self, image: &ImageRef) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().any(|(of, _, _)| of == image)
    }
}

pub(super) fn join(
    shared: &Arc<Shared>,
    image: &ImageRef,
    platform: &Platform,
    access: &Access,
    terms: &Terms,
) -> (Pull, Interest) {
    let key = (image.clone(), platform.clone(), access.clone());
    // Let go of before the task is made: a runtime that shuts down drops the task there and then, and its landing takes
    // the lock again.
    let mut flights = shared.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
    let joined = flights.get(&key).and_then(|pull| Some((pull.clone(), pull.gate.join(terms)?)));
    if let Some((pull, claim)) = joined {
        let gate = pull.gate.clone();
        return (pull, Interest { gate, claim });
    }
    let (board, progress) = Board::new();
    let (sender, outcome) = oneshot::channel();
    let (gate, claim) = Gate::new(&shared.traffic, terms);
    let pull = Pull { progress, outcome: outcome.shared(), gate: gate.clone() };
    // One that was given up clears up behind itself, beside this one.
    flights.insert(key.clone(), pull.clone());
    drop(flights);
    shared.observer.started();
    let span = tracing::info_span!("pull", %image, %platform, tenant = %access.tenant);
    let interest = Interest { gate: gate.clone(), claim };
    let landing = Landing { shared: shared.clone(), key, gate };
    tokio::spawn(fly(landing, board, sender).instrument(span));
    (pull, interest)
}

async fn fly(landing: Landing, board: Board, sender: oneshot::Sender<Outcome>) {
    let begun = Instant::now();
    let shared = landing.shared.clone();
    let (image, platform, access) = landing.key.clone();
    let errand = pull::Errand { image: &image, platform: &platform, access: &access, gate: &landing.gate };
    let outcome = tokio::select! {
        outcome = caught(Box::pin(pull::run(&shared, &errand, &board))) => outcome,
        never = landing.gate.take_pulse() => match never {},
    };
    let outcome = outcome.map_err(|error| about(&image, error));
    let took = begun.elapsed();
    shared.observer.finished(&outcome.as_ref().map(|(_, cache)| *cache).map_err(Clone::clone), took);
    match &outcome {
        Ok((image, cache)) => {
            tracing::info!(cache = cache.as_str(), manifest = %image.manifest, seconds = took.as_secs_f64(), "pulled");
        }
        Err(error) => tracing::warn!(reason = error.reason().as_str(), %error, "not pulled"),
    }
    // Off the map first: whoever comes now begins anew.
    drop(landing);
    let _everyone_left = sender.send(outcome);
    drop(board);
}

/// What `work` comes to. A panic, which is logged as such, is a failure like any other: whoever waits learns of it, and
/// what was made is cleared away. Nothing that outlives the work is left in between by it: locks are held for look-ups.
pub(super) async fn caught<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
        let message =
            "the pull has run into a defect of cowshed's, its log says where; pull again, and report it";
        Err(Error::new(Reason::InternalError, message))
    })
}

/// Takes the pull off the map, also if its task is dropped.
struct Landing {
    shared: Arc<Shared>,
    key: Key,
    gate: Arc<Gate>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut flights = self.shared.flights.0.lock().unwrap_or_else(PoisonError::into_inner);
        if flights.get(&self.key).is_some_and(|pull| Arc::ptr_eq(&pull.gate, &self.gate)) {
            flights.remove(&self.key);
        }
        drop(flights);
        self.gate.end();
        self.shared.observer.ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[allow(clippy::panic, reason = "it is what is tested")]
    async fn a_panic_is_an_internal_error() {
        let panicked = caught::<()>(async { panic!("on purpose") }).await;
        assert_eq!(panicked.map_err(|error| error.reason()), Err(Reason::InternalError));
        assert!(matches!(caught(async { Ok(1) }).await, Ok(1)));
    }
}
