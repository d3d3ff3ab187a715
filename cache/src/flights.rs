//! Acquires under way: equal wishes share one, until their VM's disk is released.
//!
//! A release that comes before the intent is written finds nothing in the ledger. It gives the flight up instead: the
//! ledger's writer looks at that before it writes the intent, in one turn with the release. And it takes the flight
//! off the map, so that whoever acquires after it does not get what was acquired before it.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use cowshed_leases::VmId;
use futures_util::{FutureExt as _, future::Shared};
use tokio::sync::oneshot;

/// Whether a wish was released before its intent was written. Clones are of the same wish.
#[derive(Clone, Debug, Default)]
pub struct GivenUp(Arc<AtomicBool>);

impl GivenUp {
    /// It was.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A VM, and its wish in words.
pub(crate) type Key = (VmId, String);

/// Those who wait for a flight. Clones are of the same flight.
#[derive(Clone, Debug, Default)]
pub(crate) struct Callers(Arc<AtomicUsize>);

impl Callers {
    /// One more, until what is returned is dropped.
    pub(crate) fn one(&self) -> Caller {
        self.0.fetch_add(1, Ordering::SeqCst);
        Caller(self.clone())
    }

    /// Whether there is any.
    pub(crate) fn are_there(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

/// Waits for a flight until it is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Caller(Callers);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a flight comes to; an error if it was never started, or has crashed.
pub(crate) struct Arrival<T> {
    outcome: Shared<oneshot::Receiver<T>>,
    _caller: Caller,
}

impl<T: Clone> Future for Arrival<T> {
    type Output = Result<T, oneshot::error::RecvError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.outcome.poll_unpin(context)
    }
}

struct Flight<T> {
    outcome: Shared<oneshot::Receiver<T>>,
    callers: Callers,
    given_up: GivenUp,
}

impl<T> Flight<T> {
    fn arrival(&self) -> Arrival<T> {
        Arrival { outcome: self.outcome.clone(), _caller: self.callers.one() }
    }
}

/// All flights. Clones share them. The lock is held for look-ups only, never across an await.
pub(crate) struct Flights<T>(Arc<Mutex<HashMap<Key, Flight<T>>>>);

impl<T> Clone for Flights<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Clone> Flights<T> {
    /// Joins the flight `key`; if there is none, has one started.
    pub(crate) fn join(&self, key: Key, start: impl FnOnce(Landing<T>)) -> Arrival<T> {
        let (landing, arrival) = {
            let mut flights = self.lock();
            if let Some(flight) = flights.get(&key) {
                return flight.arrival();
            }
            let (sender, receiver) = oneshot::channel();
            let (callers, given_up) = (Callers::default(), GivenUp::default());
            let flight =
                Flight { outcome: receiver.shared(), callers: callers.clone(), given_up: given_up.clone() };
            let arrival = flight.arrival();
            flights.insert(key.clone(), flight);
            (Landing { flights: self.clone(), key, callers, given_up, sender: Some(sender) }, arrival)
        };
        start(landing);
        arrival
    }

    /// Gives up what is under way for the VM: what has no intent yet gets none.
    pub(crate) fn give_up(&self, vm: &VmId) {
        self.lock().retain(|(of, _), flight| {
            let other = of != vm;
            if !other {
                flight.given_up.set();
            }
            other
        });
    }

    /// Lets nobody join any more what is under way for the VM.
    pub(crate) fn close(&self, vm: &VmId) {
        self.lock().retain(|(of, _), _| of != vm);
    }
}

impl<T> Flights<T> {
    /// How many are under way.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Flight<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a flight ends: takes it off the map, also if its task panics or is never run.
pub(crate) struct Landing<T> {
    flights: Flights<T>,
    key: Key,
    callers: Callers,
    given_up: GivenUp,
    sender: Option<oneshot::Sender<T>>,
}

impl<T> Landing<T> {
    /// Whether the flight was given up.
    pub(crate) fn given_up(&self) -> GivenUp {
        self.given_up.clone()
    }

    /// Who waits for it.
    pub(crate) fn callers(&self) -> Callers {
        self.callers.clone()
    }

    /// Whether anybody waits for it.
    pub(crate) fn is_awaited(&self) -> bool {
        self.callers.are_there()
    }

    /// Tells everybody who has joined.
    pub(crate) fn land(mut self, outcome: T) {
        // Off the map first: who finds no flight finds the ledger as this one has left it.
        self.leave();
        if let Some(sender) = self.sender.take() {
            let _everyone_left = sender.send(outcome);
        }
    }

    /// Only this flight: there may be a later one of the same key.
    fn leave(&self) {
        let mut flights = self.flights.lock();
        let own = |flight: &Flight<T>| Arc::ptr_eq(&flight.given_up.0, &self.given_up.0);
        if flights.get(&self.key).is_some_and(own) {
            flights.remove(&self.key);
        }
    }
}

impl<T> Drop for Landing<T> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn key(vm: &str) -> Key {
        (vm.parse().unwrap(), "image".into())
    }

    fn begin(flights: &Flights<u8>, vm: &str) -> (Arrival<u8>, Option<Landing<u8>>) {
        let mut begun = None;
        let arrival = flights.join(key(vm), |landing| begun = Some(landing));
        (arrival, begun)
    }

    #[tokio::test]
    async fn a_flight_is_shared_until_it_lands() {
        let flights = Flights::default();
        let (first, landing) = begin(&flights, "a");
        let (second, joined) = begin(&flights, "a");
        assert!(joined.is_none());
        landing.unwrap().land(1);
        assert_eq!((first.await.unwrap(), second.await.unwrap()), (1, 1));
        let (crashed, landing) = begin(&flights, "a");
        drop(landing.unwrap());
        assert!(crashed.await.is_err());
        assert!(flights.lock().is_empty());
    }

    #[tokio::test]
    async fn it_is_known_whether_anybody_waits() {
        let flights = Flights::default();
        let (first, landing) = begin(&flights, "a");
        let landing = landing.unwrap();
        let (second, _) = begin(&flights, "a");
        drop(first);
        assert!(landing.is_awaited());
        drop(second);
        assert!(!landing.is_awaited());
        let (late, _) = begin(&flights, "a");
        flights.give_up(&key("a").0);
        // Who has begun the next one does not wait for this one.
        let (_other, _next) = begin(&flights, "a");
        assert!(landing.is_awaited(), "by who is to be told that it was given up");
        drop(late);
        assert!(!landing.is_awaited());
    }

    #[tokio::test]
    async fn one_that_was_given_up_is_not_joined_and_does_not_end_the_next() {
        let flights = Flights::default();
        let (old, landing) = begin(&flights, "a");
        let (_other, other) = begin(&flights, "b");
        let landing = landing.unwrap();
        flights.give_up(&key("a").0);
        assert!(landing.given_up().is_set());
        assert!(!other.unwrap().given_up().is_set(), "another VM's");
        let (new, next) = begin(&flights, "a");
        landing.land(1);
        let (joined, none) = begin(&flights, "a");
        assert!(none.is_none(), "the old flight has taken the new one off the map");
        next.unwrap().land(2);
        assert_eq!((old.await.unwrap(), new.await.unwrap(), joined.await.unwrap()), (1, 2, 2));
        let (_, landing) = begin(&flights, "a");
        let landing = landing.unwrap();
        flights.close(&key("a").0);
        assert!(!landing.given_up().is_set());
        assert!(begin(&flights, "a").1.is_some());
    }
}
