//! Who makes a disk now, and who waits: so many at a time, in turn by image and tenant, and nobody waits in a line that is too long.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use crate::error::{Error, Reason, Result};

/// How long a disk is thought to take before one was made.
const FIRST_GUESS: Duration = Duration::from_millis(100);

/// Whose turn it is among: a tenant and an image.
pub(crate) type Lane = (String, String);

/// The disks that are being made, and those who wait to make one. Clones share it.
#[derive(Clone, Debug)]
pub struct Crowd(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// So many at a time.
    at_once: usize,
    /// So many may wait.
    waiting_max: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    seated: usize,
    /// Never with an empty queue.
    lanes: BTreeMap<Lane, VecDeque<oneshot::Sender<Seat>>>,
    /// Who was let in last.
    last: Option<Lane>,
    /// How long a disk takes.
    takes: Duration,
}

/// May make a disk until it is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Seat {
    crowd: Crowd,
    begun: Instant,
}

impl Crowd {
    /// So many make disks at a time, and so many wait.
    pub fn new(at_once: usize, waiting_max: usize) -> Self {
        let state = State { seated: 0, lanes: BTreeMap::new(), last: None, takes: FIRST_GUESS };
        Self(Arc::new(Inner { at_once: at_once.max(1), waiting_max, state: Mutex::new(state) }))
    }

    /// Waits for a turn; says whether it had to.
    ///
    /// # Errors
    /// At once, if too many wait already: with the time after which it is worth another try.
    pub(crate) async fn enter(&self, lane: Lane) -> Result<(Seat, bool)> {
        let turn = {
            let mut state = self.state();
            if state.seated < self.0.at_once && state.lanes.is_empty() {
                state.seated += 1;
                state.last = Some(lane);
                return Ok((self.seat(), false));
            }
            let waiting: usize = state.lanes.values().map(VecDeque::len).sum();
            if waiting >= self.0.waiting_max {
                return Err(self.full(waiting, state.takes));
            }
            let (sender, turn) = oneshot::channel();
            state.lanes.entry(lane).or_default().push_back(sender);
            turn
        };
        let gone = |_| Error::new(Reason::InternalError, "the line for new disks was lost; acquire again");
        Ok((turn.await.map_err(gone)?, true))
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.state().lanes.values().map(VecDeque::len).sum()
    }

    fn full(&self, waiting: usize, takes: Duration) -> Error {
        let rounds = u32::try_from(waiting / self.0.at_once + 1).unwrap_or(u32::MAX);
        let after = takes.saturating_mul(rounds);
        let message = format!(
            "{waiting} disks are waited for already, more than [leases] waiting_max allows: try again in {:.1} s, or take \
             another host",
            after.as_secs_f64()
        );
        Error::new(Reason::Overloaded, message).with("waiting", waiting).retry_after(after)
    }

    fn seat(&self) -> Seat {
        Seat { crowd: self.clone(), begun: Instant::now() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What [`Self::enter`] would refuse with at this moment.
    pub(crate) fn is_full(&self) -> Option<Error> {
        let state = self.state();
        let waiting: usize = state.lanes.values().map(VecDeque::len).sum();
        let has_seat = state.seated < self.0.at_once && state.lanes.is_empty();
        (!has_seat && waiting >= self.0.waiting_max).then(|| self.full(waiting, state.takes))
    }
}

impl State {
    /// The next in line who has not left.
    fn next(&mut self) -> Option<oneshot::Sender<Seat>> {
        loop {
            let next = self.pop()?;
            if !next.is_closed() {
                return Some(next);
            }
        }
    }

    /// The next in line, of the lane after the one that was let in last.
    fn pop(&mut self) -> Option<oneshot::Sender<Seat>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self.last.as_ref().and_then(|last| self.lanes.range((Excluded(last), Unbounded)).next());
        let lane = after.or_else(|| self.lanes.first_key_value())?.0.clone();
        let queue = self.lanes.get_mut(&lane)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            self.lanes.remove(&lane);
        }
        self.last = Some(lane);
        next
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let crowd = &self.crowd;
        let mut state = crowd.state();
        state.takes = (state.takes * 7 + self.begun.elapsed()) / 8;
        let next = state.next();
        if next.is_none() {
            state.seated -= 1;
        }
        drop(state);
        // Who has left just now drops it again, and so lets the next one in.
        if let Some(next) = next {
            let _left = next.send(crowd.seat());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use futures_util::FutureExt as _;

    use super::*;

    fn lane(image: &str) -> Lane {
        ("tenant".to_owned(), image.to_owned())
    }

    #[tokio::test]
    async fn in_turn_by_image_and_no_more_than_allowed() {
        let crowd = Crowd::new(1, 6);
        let (mut seat, waited) = crowd.enter(lane("a")).await.unwrap();
        assert!(!waited && crowd.is_full().is_none());
        // A crowd for one image, and then one VM of each of two others.
        let mut waiting: Vec<_> = ["a", "a", "a", "a", "b", "c"]
            .iter()
            .map(|name| (*name, Box::pin(crowd.enter(lane(name)))))
            .collect();
        for (name, turn) in &mut waiting {
            assert!(turn.as_mut().now_or_never().is_none(), "{name}");
        }
        let refused = crowd.enter(lane("d")).await.unwrap_err();
        assert_eq!(crowd.is_full().map(|full| full.reason()), Some(Reason::Overloaded));
        assert_eq!((refused.reason(), crowd.waiting()), (Reason::Overloaded, 6));
        assert!(refused.to_string().contains("try again in"), "{refused}");
        let mut order = Vec::new();
        while !waiting.is_empty() {
            drop(seat);
            let mut let_in = None;
            for (at, (_, turn)) in waiting.iter_mut().enumerate() {
                if let Some(entered) = turn.as_mut().now_or_never() {
                    assert!(let_in.is_none(), "two at once");
                    let_in = Some((at, entered.unwrap()));
                }
            }
            let (at, (next, waited)) = let_in.unwrap();
            assert!(waited);
            order.push(waiting.remove(at).0);
            seat = next;
        }
        assert_eq!(order, ["b", "c", "a", "a", "a", "a"]);
        drop(seat);
        assert!(!crowd.enter(lane("a")).await.unwrap().1, "nobody is left");
    }

    #[tokio::test]
    async fn who_leaves_the_line_holds_up_nobody() {
        let crowd = Crowd::new(1, 6);
        let (seat, _) = crowd.enter(lane("a")).await.unwrap();
        let mut leaves = Box::pin(crowd.enter(lane("a")));
        let mut stays = Box::pin(crowd.enter(lane("a")));
        assert!(leaves.as_mut().now_or_never().is_none() && stays.as_mut().now_or_never().is_none());
        drop(leaves);
        drop(seat);
        assert!(stays.await.unwrap().1);
        assert!(!crowd.enter(lane("b")).await.unwrap().1, "its seat is free again");
    }
}
