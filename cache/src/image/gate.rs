//! Who comes first: launchers' pulls before prefetch jobs' pulls, and those by their class.
//!
//! Each pull has a gate. It passes it before each part that it takes from a registry, each layer that it unpacks, and each part
//! of one that it inflates, and waits there while a pull of a higher class is under way. Nobody waits for one who waits there:
//!
//! | who comes | what becomes of the one who is there |
//! |---|---|
//! | a launcher, for the same image | its pull is a launcher's from now on: what it has fetched counts |
//! | any pull, to a blob or layer that it is at | it goes on, as that one would, until that one has its turn |
//! | nobody any more: its jobs were cancelled | it ends |
//!
//! A pull that does hardly anything but wait for its registry holds up nobody, for a while (`pace.rs`).

use std::{
    convert::Infallible,
    num::NonZeroU64,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use super::{
    pace::{BEAT, Pulse},
    waits::Waits,
};
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

    fn larger<'a>(self: &'a Arc<Self>, other: &'a Arc<Self>) -> &'a Arc<Self> {
        if other.bytes_per_second > self.bytes_per_second { other } else { self }
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

/// Names a claim for as long as there is the pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClaimId(u64);

impl ClaimId {
    pub(super) fn new() -> Self {
        Self(NEXT_CLAIM.fetch_add(1, Ordering::Relaxed))
    }
}

static NEXT_CLAIM: AtomicU64 = AtomicU64::new(0);

/// Somebody's claim on a pull: it goes on as its most urgent one says.
#[derive(Clone, Debug)]
struct Claim {
    id: ClaimId,
    terms: Terms,
    /// Of one who waits for something that the pull is at, and does not need the pull itself.
    is_lent: bool,
}

#[derive(Clone, Debug)]
struct State {
    claims: Vec<Claim>,
    /// Nobody wants it any more.
    given_up: bool,
    /// It is not under way any more.
    ended: bool,
    /// It gets hardly anything.
    is_slow: bool,
}

impl State {
    /// The class below which others wait for it, if they do.
    fn holds_up(&self) -> Option<Class> {
        (!self.ended && !self.is_slow).then(|| self.class())
    }

    fn class(&self) -> Class {
        self.claims.iter().map(|claim| claim.terms.class).max().unwrap_or(Class::Background)
    }

    fn own_class(&self) -> Class {
        let own = self.claims.iter().filter(|claim| !claim.is_lent);
        own.map(|claim| claim.terms.class).max().unwrap_or(Class::Background)
    }

    /// The largest of the most urgent.
    fn budget(&self) -> Option<Arc<Budget>> {
        let class = self.class();
        let mut budgets =
            self.claims.iter().filter(|c| c.terms.class == class).map(|c| c.terms.budget.as_ref());
        let first = budgets.next()??;
        budgets.try_fold(first, |most, next| next.map(|next| most.larger(next))).cloned()
    }
}

/// A pull's.
#[derive(Debug)]
pub(super) struct Gate {
    traffic: Traffic,
    state: watch::Sender<State>,
    /// How many bytes its downloads have brought.
    fetched: AtomicU64,
    /// At how many things it is for which it needs no registry.
    at_work: AtomicUsize,
    /// For how long its downloads have waited for its budget.
    on_budget: Waits,
}

/// A pull is at something for which it needs no registry, until this is dropped.
#[derive(Debug)]
pub(super) struct AtWork<'a>(&'a AtomicUsize);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gate {
    /// Of a pull that is begun on these terms.
    pub(super) fn new(traffic: &Traffic, terms: &Terms) -> (Arc<Self>, ClaimId) {
        let id = ClaimId::new();
        let claim = Claim { id, terms: terms.clone(), is_lent: false };
        traffic.count(terms.class, 1);
        let state = State { claims: vec![claim], given_up: false, ended: false, is_slow: false };
        let gate = Self {
            traffic: traffic.clone(),
            state: watch::Sender::new(state),
            fetched: AtomicU64::new(0),
            at_work: AtomicUsize::new(0),
            on_budget: Waits::default(),
        };
        (Arc::new(gate), id)
    }

    /// It is at something for which it needs no registry.
    pub(super) fn work(&self) -> AtWork<'_> {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(&self.at_work)
    }

    /// Sees to it that the pull holds up nobody while it gets hardly anything.
    pub(super) async fn take_pulse(&self) -> Infallible {
        let (mut pulse, mut on_budget) = (Pulse::default(), Duration::ZERO);
        loop {
            tokio::time::sleep(BEAT).await;
            // Its budget is more of a hindrance than its registry.
            let before = std::mem::replace(&mut on_budget, self.on_budget.total());
            let keeps_to_budget = on_budget - before >= BEAT / 2;
            let is_at_work = self.at_work.load(Ordering::Relaxed) > 0;
            let is_excused = is_at_work || keeps_to_budget || !self.is_open();
            let is_slow = pulse.beat(self.fetched.load(Ordering::Relaxed), is_excused);
            // Each change wakes who waits at the gate.
            if self.state.borrow().is_slow != is_slow {
                self.change(|state| state.is_slow = is_slow);
            }
        }
    }

    /// Somebody else wants the same. `None`: it has been given up, and has to be begun anew.
    pub(super) fn join(&self, terms: &Terms) -> Option<ClaimId> {
        let id = ClaimId::new();
        let mut joined = None;
        self.change(|state| {
            if !state.given_up {
                state.claims.push(Claim { id, terms: terms.clone(), is_lent: false });
                joined = Some(id);
            }
        });
        joined
    }

    /// The pull of another gate waits for what this one is at. Told again when that one's terms have changed.
    pub(super) fn lend(&self, id: ClaimId, waiting: &Self) {
        let terms = {
            let waiting = waiting.state.borrow();
            Terms { class: waiting.class(), budget: waiting.budget(), stays: false }
        };
        let is_known = |claim: &Claim| {
            let same_budget = match (&claim.terms.budget, &terms.budget) {
                (None, None) => true,
                (Some(one), Some(other)) => Arc::ptr_eq(one, other),
                _ => false,
            };
            claim.id == id && claim.terms.class == terms.class && same_budget
        };
        // Looked at first: each change wakes who waits at the gate.
        if self.state.borrow().claims.iter().any(is_known) {
            return;
        }
        self.change(|state| {
            state.claims.retain(|claim| claim.id != id);
            state.claims.push(Claim { id, terms, is_lent: true });
        });
    }

    /// Takes a claim back. Of one whose terms say that it stays, nothing happens.
    pub(super) fn leave(&self, id: ClaimId) {
        self.change(|state| {
            state.claims.retain(|claim| claim.id != id || claim.terms.stays);
            state.given_up |= state.claims.iter().all(|claim| claim.is_lent);
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(|state| {
            let before = state.holds_up();
            change(state);
            let now = state.holds_up();
            if now != before {
                now.inspect(|class| self.traffic.count(*class, 1));
                before.inspect(|class| self.traffic.count(*class, -1));
            }
        });
    }

    /// Before whom it goes.
    fn class(&self) -> Class {
        self.state.borrow().class()
    }

    /// Without what is lent to it: what it takes for its class it may have for longer than the loan.
    pub(super) fn own_class(&self) -> Class {
        self.state.borrow().own_class()
    }

    /// The pull is not under way any more.
    pub(super) fn end(&self) {
        self.change(|state| state.ended = true);
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
        self.wait(true).await
    }

    /// Waits until it has to give way.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub(super) async fn closes(&self) -> Result<()> {
        self.wait(false).await
    }

    /// Until it is open, or is not.
    async fn wait(&self, until_open: bool) -> Result<()> {
        let (mut state, mut traffic) = (self.state.subscribe(), self.traffic.0.subscribe());
        loop {
            let class = {
                let state = state.borrow_and_update();
                if state.given_up {
                    return Err(given_up_on());
                }
                state.class()
            };
            if is_open(class, &traffic.borrow_and_update()) == until_open {
                return Ok(());
            }
            tokio::select! {
                changed = state.changed() => changed.map_err(|_| given_up_on())?,
                changed = traffic.changed() => changed.map_err(|_| given_up_on())?,
            }
        }
    }

    /// So many bytes have come: takes them, and waits until it may take more, by its budget. 0 bytes: only waits.
    ///
    /// # Errors
    /// As [`Self::pass`].
    pub(super) async fn spend(&self, bytes: u64) -> Result<()> {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
        let mut state = self.state.subscribe();
        let budget = state.borrow_and_update().budget();
        let Some(budget) = budget else { return Ok(()) };
        let until = budget.take(bytes, Instant::now());
        let _waits = self.on_budget.begin();
        loop {
            {
                let now = state.borrow_and_update();
                if now.given_up {
                    return Err(given_up_on());
                }
                // On other terms it goes on at once.
                if now.budget().is_none_or(|now| !Arc::ptr_eq(&now, &budget)) {
                    return Ok(());
                }
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
        tokio::time::timeout(Duration::from_secs(1), gate.pass()).await.is_ok_and(|passed| passed.is_ok())
    }

    fn budget(bytes_per_second: u64) -> Option<Arc<Budget>> {
        NonZeroU64::new(bytes_per_second).map(Budget::new).map(Arc::new)
    }

    /// How many seconds it takes to take so many bytes.
    async fn seconds(gate: &Gate, bytes: u64) -> u64 {
        let begun = Instant::now();
        assert!(gate.spend(bytes).await.is_ok());
        begun.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_whom() {
        use Class::{Background, Normal, Urgent};
        let all = [Background, Normal, Urgent];
        for one in all {
            for other in all {
                let traffic = Traffic::default();
                let ((gate, _), (beside, _)) =
                    (Gate::new(&traffic, &terms(one)), Gate::new(&traffic, &terms(other)));
                assert_eq!(passes(&gate).await, one >= other, "{one:?} beside {other:?}");
                assert_eq!(gate.is_open(), one >= other);
                beside.end();
                assert!(passes(&gate).await);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_launcher_takes_over_for_good_and_one_who_waits_lends_for_a_while() {
        let traffic = Traffic::default();
        let job = || Terms { class: Class::Background, budget: budget(1), stays: false };
        let ((joined, job_of_joined), (lent, job_of_lent)) =
            (Gate::new(&traffic, &job()), Gate::new(&traffic, &job()));
        let (launcher, _) = Gate::new(&traffic, &Terms::LAUNCHER);
        assert!(!passes(&joined).await && !passes(&lent).await);
        assert!(joined.join(&Terms::LAUNCHER).is_some());
        let loan = ClaimId(u64::MAX);
        lent.lend(loan, &launcher);
        assert_eq!((joined.own_class(), lent.own_class()), (Class::Urgent, Class::Background));
        for gate in [&joined, &lent] {
            assert!(passes(gate).await);
            let closes = tokio::time::timeout(Duration::from_secs(1), gate.closes()).await;
            assert!(closes.is_err(), "it gives way to nobody");
            assert_eq!(seconds(gate, 1 << 40).await, 0, "the job's budget holds still");
        }
        // Each loan is one, however often it is told.
        lent.lend(loan, &launcher);
        lent.leave(loan);
        assert!(lent.closes().await.is_ok());
        launcher.end();
        assert!(!passes(&lent).await, "the other one is a launcher's now");
        joined.leave(job_of_joined);
        assert!(passes(&joined).await, "a launcher's goes on without its job");
        joined.end();
        assert!(passes(&lent).await);
        assert_eq!(seconds(&lent, 7).await, 7, "its budget is back");
        lent.leave(job_of_lent);
        assert!(lent.pass().await.is_err());
        assert_eq!(lent.join(&Terms::LAUNCHER), None, "it has been given up");
        lent.end();
        lent.lend(loan, &launcher);
        assert_eq!(*traffic.0.borrow(), [0; CLASSES], "nobody is under way");
    }

    #[tokio::test(start_paused = true)]
    async fn a_launcher_that_gets_hardly_anything_holds_up_nobody_for_long() {
        let traffic = Traffic::default();
        let ((launcher, _), (job, _)) =
            (Gate::new(&traffic, &Terms::LAUNCHER), Gate::new(&traffic, &terms(Class::Background)));
        // For how many seconds the job is held up, and then not, while the launcher gets so many bytes a second.
        let held_up_and_free = async |rate: u64| {
            let (mut held_up, mut free) = (0, 0);
            while free == 0 || !job.is_open() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert!(launcher.spend(rate).await.is_ok());
                *if job.is_open() { &mut free } else { &mut held_up } += 1;
                if held_up == 300 {
                    break;
                }
            }
            while job.is_open() {
                tokio::time::sleep(Duration::from_secs(1)).await;
                free += 1;
            }
            (held_up, free)
        };
        let looks = async {
            // Between the beats.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let (held_up, free) = held_up_and_free(1 << 10).await;
            assert!((19..=21).contains(&held_up) && (99..=101).contains(&free), "{held_up} {free}");
            assert_eq!(held_up_and_free(1 << 20).await, (300, 0), "it is fast");
            let working = launcher.work();
            assert_eq!(held_up_and_free(0).await, (300, 0), "it has something else to do");
            drop(working);
            assert!(held_up_and_free(0).await.1 > 0);
        };
        tokio::select! {
            () = looks => {}
            never = launcher.take_pulse() => match never {},
        }
        launcher.end();
        launcher.end();
        job.end();
        assert_eq!(*traffic.0.borrow(), [0; CLASSES], "nobody is under way");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_is_slow_by_its_registry_and_not_by_its_budget() {
        // Bytes a second that its budget and its registry let through, and whether it is slow.
        let table = [
            (1, 1 << 30, false),
            (100 << 10, 1 << 30, false),
            (100 << 10, 110 << 10, false),
            (1 << 20, 10 << 10, true),
            (1 << 30, 10 << 10, true),
        ];
        for (own, registrys, is_slow) in table {
            let traffic = Traffic::default();
            let job = Terms { class: Class::Normal, budget: budget(own), stays: false };
            let ((gate, _), (below, _)) =
                (Gate::new(&traffic, &job), Gate::new(&traffic, &terms(Class::Background)));
            let fetches = async {
                loop {
                    tokio::time::sleep(Duration::from_secs_f64((16 << 10) as f64 / registrys as f64)).await;
                    assert!(gate.spend(16 << 10).await.is_ok());
                }
            };
            let was_open = tokio::select! {
                opens = tokio::time::timeout(Duration::from_secs(300), below.pass()) => opens.is_ok(),
                never = gate.take_pulse() => match never {},
                () = fetches => false,
            };
            assert_eq!(was_open, is_slow, "{own} {registrys}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_of_two_jobs_goes_on_for_the_second_as_that_one_says() {
        let (gate, first) = Gate::new(&Traffic::default(), &terms(Class::Normal));
        let job = Terms { class: Class::Background, budget: budget(10), stays: false };
        let second = gate.join(&job).unwrap_or(first);
        assert_eq!((gate.class(), seconds(&gate, 100).await), (Class::Normal, 0));
        gate.leave(first);
        assert_eq!((gate.class(), seconds(&gate, 100).await), (Class::Background, 10));
        // Of two budgets the larger one counts, also for who has begun to wait.
        let (waited, third) = tokio::join!(seconds(&gate, 1000), async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            gate.join(&Terms { budget: budget(100), ..job.clone() }).unwrap_or(first)
        });
        assert_eq!((waited, seconds(&gate, 100).await), (1, 1));
        gate.leave(second);
        // One who waits without being interested keeps nothing going.
        let (other, _) = Gate::new(&Traffic::default(), &Terms::LAUNCHER);
        gate.lend(ClaimId(u64::MAX), &other);
        gate.leave(third);
        assert_eq!(gate.pass().await.map_err(|e| e.reason()), Err(Reason::PrefetchCancelled));
    }

    #[tokio::test(start_paused = true)]
    async fn a_budget_is_shared_and_kept() {
        let terms = Terms { class: Class::Background, budget: budget(1000), stays: false };
        let traffic = Traffic::default();
        let ((one, claim), (two, _)) = (Gate::new(&traffic, &terms), Gate::new(&traffic, &terms));
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
        assert_eq!(seconds(&one, 2000).await, 2);
        assert_eq!(seconds(&one, 0).await, 0, "nothing is owed");
        // A cancelled job does not sleep on.
        let begun = Instant::now();
        let (_spent, ()) = tokio::join!(async { assert!(one.spend(1 << 40).await.is_err()) }, async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            one.leave(claim);
        });
        assert_eq!(begun.elapsed().as_secs(), 1);
    }
}
