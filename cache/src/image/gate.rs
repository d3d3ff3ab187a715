//! Who comes first: launchers' pulls before prefetch jobs' pulls, and those by their class.
//!
//! Each pull has a gate. It passes it before each part that it takes from a registry and before each layer that it unpacks,
//! and waits there while a pull of a higher class is under way. Nobody waits for one who waits there:
//!
//! | who comes | what becomes of the one who is there |
//! |---|---|
//! | a launcher, for the same image | its pull is a launcher's from now on: what it has fetched counts |
//! | any pull, to a blob or layer that it is at | it goes on, as one of that class |
//! | nobody any more: its jobs were cancelled | it ends |

use std::{
    num::NonZeroU64,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use crate::error::{Error, Reason, Result};

/// How urgent a pull is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// While nothing else is pulled.
    Background,
    /// While no launcher waits.
    #[default]
    Normal,
    /// As a launcher's.
    Urgent,
}

const CLASSES: usize = 3;

/// Bytes a second, for all pulls of a job.
#[derive(Debug)]
pub struct Budget {
    bytes_per_second: NonZeroU64,
    /// When what was taken so far may have come.
    free_at: Mutex<Option<Instant>>,
}

impl Budget {
    /// So many.
    pub fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, free_at: Mutex::default() }
    }

    /// Takes them; says when it goes on.
    fn take(&self, bytes: u64, now: Instant) -> Instant {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = free_at.map_or(now, |at| at.max(now));
        // A manifest may say anything, and a rate may be one byte a second: bounded, so that no clock overflows.
        let took = Duration::from_secs_f64((bytes as f64 / self.bytes_per_second.get() as f64).min(1e6));
        *free_at.insert(begun + took)
    }
}

/// How a pull is begun, or joined.
#[derive(Clone, Debug)]
pub struct Terms {
    /// How urgent it is.
    pub class: Class,
    /// What it may take; `None`: all that there is.
    pub budget: Option<Arc<Budget>>,
    /// Whether it goes on if nobody waits for it any more.
    pub stays: bool,
}

impl Terms {
    /// A launcher's.
    pub const LAUNCHER: Self = Self { class: Class::Urgent, budget: None, stays: true };
}

/// Pulls under way, by class. Clones count the same.
#[derive(Clone, Debug)]
pub(super) struct Traffic(Arc<watch::Sender<[usize; CLASSES]>>);

impl Default for Traffic {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new([0; CLASSES])))
    }
}

impl Traffic {
    fn count(&self, class: Class, change: isize) {
        self.0.send_modify(|counts| {
            let count = &mut counts[class as usize];
            *count = count.saturating_add_signed(change);
        });
    }
}

/// Whether a pull of this class goes on beside these.
fn is_open(class: Class, under_way: &[usize; CLASSES]) -> bool {
    under_way[class as usize + 1..].iter().all(|count| *count == 0)
}

#[derive(Clone, Debug)]
struct State {
    class: Class,
    budget: Option<Arc<Budget>>,
    stays: bool,
    /// How many wait for it that may leave.
    waiting: usize,
    /// Nobody wants it any more.
    given_up: bool,
    /// It is not under way any more.
    ended: bool,
}

/// A pull's.
#[derive(Debug)]
pub(super) struct Gate {
    traffic: Traffic,
    state: watch::Sender<State>,
}

impl Gate {
    pub(super) fn new(traffic: &Traffic, terms: &Terms) -> Arc<Self> {
        let Terms { class, budget, stays } = terms.clone();
        traffic.count(class, 1);
        let state =
            State { class, budget, stays, waiting: usize::from(!stays), given_up: false, ended: false };
        Arc::new(Self { traffic: traffic.clone(), state: watch::Sender::new(state) })
    }

    /// Somebody else wants the same. False: it has been given up, and has to be begun anew.
    pub(super) fn join(&self, terms: &Terms) -> bool {
        self.change(|state| {
            if state.given_up {
                return;
            }
            state.waiting += usize::from(!terms.stays);
            state.stays |= terms.stays;
            // Who may take more has the say.
            if terms.class > state.class || terms.class == state.class && terms.budget.is_none() {
                state.budget.clone_from(&terms.budget);
            }
            state.class = state.class.max(terms.class);
        });
        !self.state.borrow().given_up
    }

    /// One who has begun or joined it, and may leave, does.
    pub(super) fn leave(&self) {
        self.change(|state| {
            state.waiting = state.waiting.saturating_sub(1);
            state.given_up |= state.waiting == 0 && !state.stays;
        });
    }

    /// The pull of another gate waits for what this one is at.
    pub(super) fn hasten(&self, waiting: &Self) {
        let (class, is_bounded) = {
            let waiting = waiting.state.borrow();
            (waiting.class, waiting.budget.is_some())
        };
        let is_slower = |state: &State| {
            state.class < class || state.class == class && state.budget.is_some() && !is_bounded
        };
        // Looked at first: each change wakes who waits at the gate.
        if !is_slower(&self.state.borrow()) {
            return;
        }
        self.change(|state| {
            state.class = state.class.max(class);
            state.budget = None;
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(|state| {
            let before = state.class;
            change(state);
            if state.class != before && !state.ended {
                self.traffic.count(state.class, 1);
                self.traffic.count(before, -1);
            }
        });
    }

    pub(super) fn class(&self) -> Class {
        self.state.borrow().class
    }

    /// The pull is not under way any more. To be called once.
    pub(super) fn end(&self) {
        self.state.send_modify(|state| {
            state.ended = true;
            self.traffic.count(state.class, -1);
        });
    }

    /// Told of each change of the class, and of more.
    pub(super) fn changed(&self) -> impl Future<Output = ()> + use<> {
        let mut changes = self.state.subscribe();
        async move {
            // The sender goes with the pull.
            let _gone = changes.changed().await;
        }
    }

    /// Whether it goes on at once.
    pub(super) fn is_open(&self) -> bool {
        let class = self.class();
        is_open(class, &self.traffic.0.borrow())
    }

    /// Waits until it may go on.
    ///
    /// # Errors
    /// If nobody wants it any more.
    pub(super) async fn pass(&self) -> Result<()> {
        let (mut state, mut traffic) = (self.state.subscribe(), self.traffic.0.subscribe());
        loop {
            let State { class, given_up, .. } = *state.borrow_and_update();
            if given_up {
                return Err(given_up_on());
            }
            if is_open(class, &traffic.borrow_and_update()) {
                return Ok(());
            }
            tokio::select! {
                changed = state.changed() => changed.map_err(|_| given_up_on())?,
                changed = traffic.changed() => changed.map_err(|_| given_up_on())?,
            }
        }
    }

    /// Takes so many bytes, and waits until it may take more.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub(super) async fn spend(&self, bytes: u64) -> Result<()> {
        let mut state = self.state.subscribe();
        let budget = state.borrow_and_update().budget.clone();
        let Some(budget) = budget else { return Ok(()) };
        let until = budget.take(bytes, Instant::now());
        loop {
            let now = state.borrow_and_update().clone();
            if now.given_up {
                return Err(given_up_on());
            }
            if now.budget.is_none() {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                changed = state.changed() => changed.map_err(|_| given_up_on())?,
            }
        }
    }
}

fn given_up_on() -> Error {
    Error::new(Reason::PrefetchCancelled, "the pull was given up: the job that it was for was cancelled")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(class: Class) -> Terms {
        Terms { class, budget: None, stays: class == Class::Urgent }
    }

    async fn passes(gate: &Gate) -> bool {
        tokio::time::timeout(Duration::from_secs(1), gate.pass()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_whom() {
        use Class::{Background, Normal, Urgent};
        let all = [Background, Normal, Urgent];
        for one in all {
            for other in all {
                let traffic = Traffic::default();
                let (gate, beside) = (Gate::new(&traffic, &terms(one)), Gate::new(&traffic, &terms(other)));
                assert_eq!(passes(&gate).await, one >= other, "{one:?} beside {other:?}");
                assert_eq!(gate.is_open(), one >= other);
                beside.end();
                assert!(passes(&gate).await);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_launcher_takes_over_and_one_who_waits_is_hastened() {
        let traffic = Traffic::default();
        let budget = Some(Arc::new(Budget::new(NonZeroU64::MIN)));
        let job = Terms { class: Class::Background, budget, stays: false };
        let (joined, hastened) = (Gate::new(&traffic, &job), Gate::new(&traffic, &job));
        let launcher = Gate::new(&traffic, &Terms::LAUNCHER);
        assert!(!passes(&joined).await && !passes(&hastened).await);
        assert!(joined.join(&Terms::LAUNCHER));
        hastened.hasten(&launcher);
        launcher.end();
        for gate in [&joined, &hastened] {
            assert!(passes(gate).await);
            let begun = Instant::now();
            assert!(gate.spend(1 << 40).await.is_ok());
            assert_eq!(begun.elapsed(), Duration::ZERO, "the job's budget holds still");
        }
        // The one goes on without its job, the other does not.
        joined.leave();
        hastened.leave();
        assert!(passes(&joined).await && joined.pass().await.is_ok());
        assert!(hastened.pass().await.is_err());
        assert!(!hastened.join(&Terms::LAUNCHER), "it has been given up");
        joined.end();
        hastened.end();
        hastened.hasten(&launcher);
        assert_eq!(*traffic.0.borrow(), [0; CLASSES], "nobody is under way");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_of_two_jobs_goes_on_for_the_second() {
        let gate = Gate::new(&Traffic::default(), &terms(Class::Background));
        assert!(gate.join(&terms(Class::Normal)));
        assert_eq!(gate.class(), Class::Normal);
        gate.leave();
        assert!(gate.pass().await.is_ok());
        gate.leave();
        assert_eq!(gate.pass().await.map_err(|e| e.reason()), Err(Reason::PrefetchCancelled));
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_is_shared_and_kept() {
        let budget = Arc::new(Budget::new(NonZeroU64::new(1000).unwrap_or(NonZeroU64::MIN)));
        let traffic = Traffic::default();
        let terms = Terms { class: Class::Background, budget: Some(budget), stays: false };
        let (one, two) = (Gate::new(&traffic, &terms), Gate::new(&traffic, &terms));
        let begun = Instant::now();
        let spend = async |gate: &Gate| {
            for _ in 0..10 {
                assert!(gate.spend(500).await.is_ok());
            }
        };
        tokio::join!(spend(&one), spend(&two));
        let took = begun.elapsed();
        assert!((Duration::from_millis(9900)..Duration::from_millis(10_100)).contains(&took), "{took:?}");
        // What was not taken is not saved up.
        tokio::time::sleep(Duration::from_secs(100)).await;
        let begun = Instant::now();
        assert!(one.spend(2000).await.is_ok());
        assert_eq!(begun.elapsed().as_secs(), 2);
        // A cancelled job does not sleep on.
        let (_spent, ()) = tokio::join!(async { assert!(one.spend(1 << 40).await.is_err()) }, async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            one.leave();
        });
        assert_eq!(begun.elapsed().as_secs(), 3);
    }
}
