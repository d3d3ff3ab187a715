//! Who makes a disk now, and who waits: so many at a time, in turn by tenant, and of each by image; nobody waits in a line that is
//! too long, or for what would come too late.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use crate::{
    error::{Error, Reason, Result},
    flights::Callers,
};

/// How long a disk is thought to take before one was made; nobody is refused for it.
const FIRST_GUESS: Duration = Duration::from_millis(100);

/// Whose turn it is among: a tenant, and its image.
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
    /// Never with one of which nobody waits.
    tenants: BTreeMap<String, Tenant>,
    /// Who was let in last.
    last: Option<Lane>,
    /// How long a disk takes, once one was made.
    takes: Option<Duration>,
}

/// Those of a tenant who wait.
#[derive(Debug)]
struct Tenant {
    /// Never with an empty queue.
    images: BTreeMap<String, VecDeque<Waiter>>,
    /// The image of which one was let in last.
    last: Option<String>,
}

#[derive(Debug)]
struct Waiter {
    turn: oneshot::Sender<Seat>,
    callers: Callers,
}

/// May make a disk until it is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Seat {
    crowd: Crowd,
    begun: Instant,
    /// How long the disk took that was made.
    took: Option<Duration>,
}

impl Crowd {
    /// So many make disks at a time, and so many wait.
    pub fn new(at_once: usize, waiting_max: usize) -> Self {
        let state = State { seated: 0, tenants: BTreeMap::new(), last: None, takes: None };
        Self(Arc::new(Inner { at_once: at_once.max(1), waiting_max, state: Mutex::new(state) }))
    }

    /// Waits for a turn; says whether it had to. `None`: there are no callers any more.
    ///
    /// # Errors
    /// At once, if too many wait already, or the disk would not be there by `until`: with the time after which it is worth
    /// another try.
    pub(crate) async fn enter(
        &self,
        lane: Lane,
        callers: Callers,
        until: Option<Instant>,
    ) -> Result<Option<(Seat, bool)>> {
        let turn = {
            let mut state = self.state();
            if state.seated < self.0.at_once && state.tenants.is_empty() {
                state.seated += 1;
                state.last = Some(lane);
                return Ok(Some((self.seat(), false)));
            }
            if self.admit(&state, &lane, until).is_err() {
                // Nobody is refused for those who have left.
                state.forget_who_left();
                self.admit(&state, &lane, until)?;
            }
            let (turn, seat) = oneshot::channel();
            state.queue(lane).push_back(Waiter { turn, callers });
            seat
        };
        Ok(turn.await.ok().map(|seat| (seat, true)))
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        let state = self.state();
        state.tenants.values().flat_map(|t| t.images.values().flatten()).filter(|w| w.is_here()).count()
    }

    /// What [`Self::enter`] would refuse whoever comes now with, however long he waits.
    pub(crate) fn is_full(&self) -> Option<Error> {
        let waiting = self.waiting();
        let state = self.state();
        let has_seat = state.seated < self.0.at_once && state.tenants.is_empty();
        if has_seat { None } else { self.has_place(waiting, &state).err() }
    }

    fn has_place(&self, waiting: usize, state: &State) -> Result<()> {
        if waiting < self.0.waiting_max {
            return Ok(());
        }
        let after = self.after(waiting, state.takes.unwrap_or(FIRST_GUESS));
        Err(refused(waiting, after, "more than [leases] waiting_max allows"))
    }

    /// Whether one more may wait.
    fn admit(&self, state: &State, lane: &Lane, until: Option<Instant>) -> Result<()> {
        let waiting: usize = state.tenants.values().map(Tenant::waiting).sum();
        self.has_place(waiting, state)?;
        let (Some(takes), Some(until)) = (state.takes, until) else { return Ok(()) };
        let (left, after) =
            (until.saturating_duration_since(Instant::now()), self.after(state.ahead(lane), takes));
        // Whose time is over has left, and others who have come later have that flight.
        if left.is_zero() || after <= left {
            return Ok(());
        }
        let why =
            format!("and this one would not be there within the {:.1} s that are left", left.as_secs_f64());
        Err(refused(waiting, after, &why))
    }

    /// How long it takes until a disk is there, with so many ahead of it.
    fn after(&self, ahead: usize, takes: Duration) -> Duration {
        takes.saturating_mul(u32::try_from(ahead / self.0.at_once + 1).unwrap_or(u32::MAX))
    }

    fn seat(&self) -> Seat {
        Seat { crowd: self.clone(), begun: Instant::now(), took: None }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refused(waiting: usize, after: Duration, why: &str) -> Error {
    let message = format!(
        "{waiting} disks are waited for already, {why}: try again in {:.1} s, or take another host",
        after.as_secs_f64()
    );
    Error::new(Reason::Overloaded, message).with("waiting", waiting).retry_after(after)
}

impl State {
    /// Where who comes into the lane waits.
    fn queue(&mut self, (tenant, image): Lane) -> &mut VecDeque<Waiter> {
        let last = self.last.as_ref().filter(|(last, _)| *last == tenant).map(|(_, image)| image.clone());
        let tenant = self.tenants.entry(tenant).or_insert_with(|| Tenant { images: BTreeMap::new(), last });
        tenant.images.entry(image).or_default()
    }

    /// So many at least are let in before who comes into the lane now.
    fn ahead(&self, (tenant, image): &Lane) -> usize {
        let own = self.tenants.get(tenant).map_or(0, |tenant| tenant.ahead(image));
        let others = self.tenants.iter().filter(|(name, _)| *name != tenant);
        own + others.map(|(_, other)| other.waiting().min(own)).sum::<usize>()
    }

    /// The next in line: of the tenant after the one that was let in last, and of its image after the last one.
    fn next(&mut self) -> Option<Waiter> {
        loop {
            let name = following(&self.tenants, self.last.as_ref().map(|(tenant, _)| tenant))?.clone();
            let tenant = self.tenants.get_mut(&name)?;
            let image = following(&tenant.images, tenant.last.as_ref())?.clone();
            let queue = tenant.images.get_mut(&image)?;
            // Who has left does not take the turn of those who have not.
            let next = std::iter::from_fn(|| queue.pop_front()).find(Waiter::is_here);
            if queue.is_empty() {
                tenant.images.remove(&image);
            }
            if next.is_some() {
                tenant.last = Some(image.clone());
            }
            if tenant.images.is_empty() {
                self.tenants.remove(&name);
            }
            if next.is_some() {
                self.last = Some((name, image));
                return next;
            }
        }
    }

    fn forget_who_left(&mut self) {
        self.tenants.retain(|_, tenant| {
            tenant.images.retain(|_, queue| {
                queue.retain(Waiter::is_here);
                !queue.is_empty()
            });
            !tenant.images.is_empty()
        });
    }
}

impl Tenant {
    fn waiting(&self) -> usize {
        self.images.values().map(VecDeque::len).sum()
    }

    /// The same among the tenant's own.
    fn ahead(&self, image: &str) -> usize {
        let own = self.images.get(image).map_or(0, VecDeque::len);
        self.images.values().map(|queue| queue.len().min(own)).sum()
    }
}

impl Waiter {
    fn is_here(&self) -> bool {
        self.callers.are_there() && !self.turn.is_closed()
    }
}

/// The name after `last`, and after the last one the first.
fn following<'a, T>(all: &'a BTreeMap<String, T>, last: Option<&String>) -> Option<&'a String> {
    use std::ops::Bound::{Excluded, Unbounded};
    let after = last.and_then(|last| all.range::<String, _>((Excluded(last), Unbounded)).next());
    after.or_else(|| all.first_key_value()).map(|(name, _)| name)
}

impl Seat {
    /// The disk is there; what came to nothing tells nothing of how long one takes.
    pub(crate) fn made(&mut self) {
        self.took = Some(self.begun.elapsed());
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let crowd = &self.crowd;
        let mut state = crowd.state();
        if let Some(took) = self.took {
            state.takes = Some(state.takes.map_or(took, |takes| (takes * 7 + took) / 8));
        }
        let next = state.next();
        if next.is_none() {
            state.seated -= 1;
        }
        drop(state);
        // Who has left just now drops it again, and so lets the next one in.
        if let Some(next) = next {
            let _left = next.turn.send(crowd.seat());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::pin::Pin;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::flights::Caller;

    type Turn<'a> = Pin<Box<dyn Future<Output = Result<Option<(Seat, bool)>>> + 'a>>;

    fn lane(image: &str) -> Lane {
        ("tenant".to_owned(), image.to_owned())
    }

    /// Somebody who waits until the caller is dropped, or for so long.
    fn come(crowd: &Crowd, lane: Lane, patience: Option<Duration>) -> (Turn<'_>, Caller) {
        let callers = Callers::default();
        let caller = callers.one();
        let until = patience.map(|patience| Instant::now() + patience);
        (Box::pin(crowd.enter(lane, callers, until)), caller)
    }

    /// The same, who is in the line by then.
    fn wait(crowd: &Crowd, lane: Lane) -> (Turn<'_>, Caller) {
        let (mut turn, caller) = come(crowd, lane, None);
        assert!(turn.as_mut().now_or_never().is_none(), "let in at once");
        (turn, caller)
    }

    /// Somebody who is let in at once.
    fn sit(crowd: &Crowd, image: &str) -> Seat {
        let (turn, _caller) = come(crowd, lane(image), None);
        let (seat, waited) = turn.now_or_never().unwrap().unwrap().unwrap();
        assert!(!waited);
        seat
    }

    fn refusal(crowd: &Crowd, lane: Lane, patience: Option<Duration>) -> Option<Error> {
        come(crowd, lane, patience).0.now_or_never().map(|refused| refused.unwrap_err())
    }

    /// In which order they are let in.
    fn order(mut seat: Seat, lanes: &[Lane], mut waiting: Vec<(Turn<'_>, Caller)>) -> Vec<Lane> {
        let (mut lanes, mut order) = (lanes.to_vec(), Vec::new());
        while !waiting.is_empty() {
            drop(seat);
            let mut let_in = None;
            for (at, (turn, _)) in waiting.iter_mut().enumerate() {
                if let Some(entered) = turn.as_mut().now_or_never() {
                    assert!(let_in.is_none(), "two at once");
                    let_in = Some((at, entered.unwrap().unwrap()));
                }
            }
            let (at, (next, waited)) = let_in.unwrap();
            assert!(waited);
            drop(waiting.remove(at));
            order.push(lanes.remove(at));
            seat = next;
        }
        order
    }

    #[test]
    fn in_turn_by_image_and_no_more_than_allowed() {
        let crowd = Crowd::new(1, 6);
        let seat = sit(&crowd, "a");
        assert!(crowd.is_full().is_none());
        // A crowd for one image, and then one VM of each of two others.
        let lanes = ["a", "a", "a", "a", "b", "c"].map(lane);
        let waiting = lanes.iter().map(|lane| wait(&crowd, lane.clone())).collect();
        let refused = refusal(&crowd, lane("d"), None).unwrap();
        assert_eq!((refused.reason(), crowd.waiting()), (Reason::Overloaded, 6));
        assert_eq!(crowd.is_full().map(|full| full.reason()), Some(Reason::Overloaded));
        assert!(refused.to_string().contains("try again in"), "{refused}");
        assert_eq!(order(seat, &lanes, waiting), ["b", "c", "a", "a", "a", "a"].map(lane));
        drop(sit(&crowd, "a"));
    }

    #[test]
    fn a_tenant_of_many_images_gets_no_more_turns_than_one_of_one() {
        let crowd = Crowd::new(1, 100);
        let seat = sit(&crowd, "a");
        let of = |tenant: &str, image: usize| (tenant.to_owned(), format!("image-{image:02}"));
        let mut lanes: Vec<Lane> = (0..50).map(|image| of("many", image)).collect();
        lanes.extend([of("one", 0), of("one", 0), of("one", 0)]);
        let waiting = lanes.iter().map(|lane| wait(&crowd, lane.clone())).collect();
        let order = order(seat, &lanes, waiting);
        let ones: Vec<usize> = (0..order.len()).filter(|at| order[*at].0 == "one").collect();
        assert_eq!(ones, [1, 3, 5]);
        let images: Vec<&Lane> = order.iter().filter(|lane| lane.0 == "many").collect();
        assert!(images.is_sorted(), "one of each in turn");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_what_would_come_too_late() {
        let crowd = Crowd::new(2, 100);
        let (second, soon) = (Duration::from_secs(1), Duration::from_millis(10));
        let (mut first, other) = (sit(&crowd, "a"), sit(&crowd, "a"));
        let _waiting: Vec<_> = (0..6).map(|_| wait(&crowd, lane("a"))).collect();
        assert!(refusal(&crowd, lane("a"), Some(soon)).is_none(), "nothing was measured");
        tokio::time::advance(second).await;
        // What comes to nothing says nothing.
        drop(other);
        assert!(refusal(&crowd, lane("a"), Some(soon)).is_none(), "nothing was made");
        first.made();
        drop(first);
        // Two are let in, four wait: two rounds, and one's own.
        let table = [
            (lane("a"), 2900, Some(3)),
            (lane("a"), 3000, None),
            (lane("b"), 900, Some(1)),
            (lane("b"), 1000, None),
        ];
        for (lane, patience, after) in table {
            let refused = refusal(&crowd, lane, Some(Duration::from_millis(patience)));
            assert_eq!(refused.is_some(), after.is_some(), "{patience}");
            let (Some(refused), Some(after)) = (refused, after) else { continue };
            assert_eq!(refused.reason(), Reason::Overloaded);
            assert!(refused.to_string().contains(&format!("try again in {after}.0 s")), "{refused}");
        }
        let over = refusal(&crowd, lane("a"), Some(Duration::ZERO));
        assert!(over.is_none(), "who waits for it has come later");
    }

    #[test]
    fn who_leaves_the_line_holds_up_nobody() {
        let crowd = Crowd::new(1, 2);
        let seat = sit(&crowd, "a");
        let (mut left, caller) = wait(&crowd, lane("a"));
        let (mut stays, _here) = wait(&crowd, lane("b"));
        assert!(refusal(&crowd, lane("c"), None).is_some());
        drop(caller);
        assert_eq!(crowd.waiting(), 1);
        // Its place is another's, and its task is told.
        let (mut comes, _here) = wait(&crowd, lane("a"));
        assert!(left.as_mut().now_or_never().unwrap().unwrap().is_none());
        drop(seat);
        let (seat, waited) = stays.as_mut().now_or_never().unwrap().unwrap().unwrap();
        assert!(waited && comes.as_mut().now_or_never().is_none());
        drop((seat, comes));
        drop(sit(&crowd, "b"));
    }

    #[test]
    fn who_has_left_costs_a_tenant_no_turn() {
        let crowd = Crowd::new(1, 9);
        let seat = sit(&crowd, "a");
        let of = |tenant: &str, image: &str| (tenant.to_owned(), image.to_owned());
        let (_left, caller) = wait(&crowd, of("u", "a"));
        let lanes = [of("u", "b"), of("v", "b")];
        let waiting = lanes.iter().map(|lane| wait(&crowd, lane.clone())).collect();
        drop(caller);
        assert_eq!(order(seat, &lanes, waiting), lanes);
    }
}
