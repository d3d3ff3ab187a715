//! The real book. Every different one has a number here, and each question about it is put to it only once.

use std::collections::HashMap;

use super::view::View;
use crate::{
    Acquisition, Ask, Book, BookError, Change, Failure, Generation, Grace, Grant, Lease, LeaseId, Moment,
    Release, RequestId, State, Ttl,
    book::tests::{at, grant, id, spec, stored, ttl, vm},
};

/// Time goes on in steps of so many seconds.
const STEP_SECONDS: u64 = 10;
/// VM 0's leases last so many steps; VM 1's until they are released.
pub(super) const TTL_STEPS: u8 = 1;
/// So many steps a lease is kept that has expired.
pub(super) const EXPIRED_GRACE_STEPS: u8 = 1;
/// So many steps of a new boot a lease of an earlier one is kept.
pub(super) const BOOT_GRACE_STEPS: u8 = 2;

/// The host's own clock. The wall's is left out: nothing is decided by it, and it jumps in the test against the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Clock {
    pub(super) boot: u8,
    pub(super) up: u8,
}

/// What an acquire asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Wish {
    pub(super) vm: u8,
    pub(super) fresh: bool,
    /// With the request id of this VM's acquires.
    pub(super) named: bool,
}

impl Wish {
    /// Of which image. VM 1 wants its fresh disks of another one.
    pub(super) fn image(self) -> u8 {
        self.vm + u8::from(self.vm == 1 && self.fresh)
    }

    fn ask(self) -> Ask {
        Ask {
            vm: vm(self.vm),
            spec: spec(self.image()),
            ttl: (self.vm == 0).then(|| steps(TTL_STEPS)),
            fresh: self.fresh,
            request: self.named.then(|| request("acquire", self.vm)),
            share: None,
        }
    }
}

/// What a release gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Return {
    pub(super) vm: u8,
    pub(super) which: Which,
    /// With the request id of this VM's releases.
    pub(super) named: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Which {
    /// Whatever the VM has.
    Any,
    /// Only this lease.
    Lease(u8),
    /// Only the generation of this lease.
    Generation(u8),
}

/// A question to the book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    /// With this lease, if one is to be made.
    Acquire(Wish, u8),
    Keep(Wish, u8),
    Renew(u8),
    Grant {
        lease: u8,
        device: u8,
        image: u8,
    },
    Fail(u8),
    Release(Return),
    Suspect,
    GiveUpOn(u8),
    Remove(u8),
    /// The service starts: what is written down is loaded.
    Load,
}

/// What the book says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// An acquire makes this lease.
    New(u8),
    /// An acquire has found this lease.
    Existing(u8),
    Done,
    Refused,
}

/// What is wrong with the desk on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BookFlaw {
    /// A grant asks nobody whether the lease was released.
    GrantsWhatWasReleased,
    /// Which requests were answered is not loaded.
    ForgetsRequests,
    /// The greatest generation is not written down, but that of the leases that are there.
    ForgetsGenerations,
}

pub(super) struct Desk {
    books: Vec<(Book, View)>,
    numbers: HashMap<View, u32>,
    answers: HashMap<(u32, Op, Clock), (u32, Answer)>,
    flaw: Option<BookFlaw>,
}

impl Desk {
    pub(super) fn new(flaw: Option<BookFlaw>) -> Self {
        let mut desk = Self { books: Vec::new(), numbers: HashMap::new(), answers: HashMap::new(), flaw };
        desk.number(Book::default());
        desk
    }

    pub(super) fn view(&self, book: u32) -> &View {
        &self.books[book as usize].1
    }

    pub(super) fn lease(&self, book: u32, lease: u8) -> Option<&Lease> {
        self.books[book as usize].0.get(&id(lease.into()))
    }

    pub(super) fn books(&self) -> usize {
        self.books.len()
    }

    /// Books that differ in nothing but revisions have one number: what the book decides never depends on which
    /// revision something has, until there are thousands to be forgotten.
    fn number(&mut self, book: Book) -> u32 {
        let view = View::of(&book);
        *self.numbers.entry(view).or_insert_with_key(|view| {
            self.books.push((book, view.clone()));
            self.books.len() as u32 - 1
        })
    }

    /// The book after the question, and its answer. Fails if it is no step that a book may take.
    pub(super) fn ask(&mut self, book: u32, op: Op, now: Clock) -> Result<(u32, Answer), String> {
        if let Some(known) = self.answers.get(&(book, op, now)) {
            return Ok(*known);
        }
        let before = &self.books[book as usize].0;
        let (after, answer) = self.decide(before, op, &moment(now))?;
        let after = match after {
            None => book,
            Some(after) => {
                allowed(before, &after)?;
                self.number(after)
            }
        };
        self.answers.insert((book, op, now), (after, answer));
        Ok((after, answer))
    }

    /// The book afterwards, if it is another one.
    fn decide(&self, book: &Book, op: Op, now: &Moment) -> Result<(Option<Book>, Answer), String> {
        if op == Op::Load {
            return Ok((Some(self.loaded(book)?), Answer::Done));
        }
        let (answer, changes) = match op {
            Op::Acquire(wish, fresh) => match book.acquire(&wish.ask(), id(fresh.into()), now) {
                Ok(Acquisition::New { lease, changes }) => (Answer::New(number_of(&lease.id)), changes),
                Ok(Acquisition::Existing(lease)) => (Answer::Existing(number_of(&lease.id)), Vec::new()),
                Err(_) => (Answer::Refused, Vec::new()),
            },
            Op::Keep(wish, n) => done(book.keep(&wish.ask(), &id(n.into()), None, now)),
            Op::Renew(n) => done(book.renew(&id(n.into()), None, None, now)),
            Op::Grant { lease, device, image } => {
                let grant = Grant { image_digest: format!("sha256:{image}"), ..grant(device.into()) };
                self.granted(book, &id(lease.into()), grant, now)
            }
            Op::Fail(n) => changed(book.fail(&id(n.into()), interrupted(), now)),
            Op::Release(back) => done(book.release(&back.release(), now)),
            Op::Suspect => changed(book.suspect(grace(), now)),
            Op::GiveUpOn(n) => changed(book.give_up_on(&id(n.into()), now)),
            Op::Remove(n) => book.remove(&id(n.into()), now).map_or((Answer::Refused, Vec::new()), changed),
            Op::Load => (Answer::Done, Vec::new()),
        };
        let mut after = None;
        for change in changes {
            after.get_or_insert_with(|| book.clone()).apply(change);
        }
        Ok((after, answer))
    }

    fn granted(&self, book: &Book, id: &LeaseId, grant: Grant, now: &Moment) -> (Answer, Vec<Change>) {
        let decided = book.grant(id, grant.clone(), now);
        match (self.flaw, book.get(id)) {
            (Some(BookFlaw::GrantsWhatWasReleased), Some(lease)) if decided.is_err() => {
                let (state, revision) = (State::Granted(Box::new(grant)), book.last_revision().next());
                changed(vec![Change::Put(Box::new(Lease { state, revision, ..lease.clone() }))])
            }
            _ => done(decided),
        }
    }

    fn loaded(&self, book: &Book) -> Result<Book, String> {
        let mut stored = stored(book);
        match self.flaw {
            Some(BookFlaw::ForgetsRequests) => stored.requests.clear(),
            Some(BookFlaw::ForgetsGenerations) => {
                stored.last_generation = book.after(None).map(|lease| lease.generation.0).max().unwrap_or(0);
            }
            _ => {}
        }
        Book::load(stored).map_err(|error| format!("what is written down cannot be loaded: {error}"))
    }
}

impl Return {
    fn release(self) -> Release {
        Release {
            vm: vm(self.vm),
            lease: if let Which::Lease(n) = self.which { Some(id(n.into())) } else { None },
            generation: if let Which::Generation(n) = self.which { Some(generation_of(n)) } else { None },
            request: self.named.then(|| request("release", self.vm)),
            abandon: false,
        }
    }
}

/// What holds of every step of every book.
fn allowed(before: &Book, after: &Book) -> Result<(), String> {
    if after.last_revision() < before.last_revision() {
        return Err("a revision can be given out again".into());
    }
    for lease in after.after(None) {
        let then = before.get(&lease.id);
        if lease.is_held() && then.is_some_and(|then| !then.is_held()) {
            return Err(format!("lease {} is held again", number_of(&lease.id)));
        }
        // Leases are numbered in the order in which they were made.
        if lease.generation != generation_of(number_of(&lease.id)) {
            return Err(format!("generation {} was given out before", lease.generation.0));
        }
        if then != Some(lease) && lease.revision <= before.last_revision() {
            return Err(format!("the revision of lease {} is not a new one", number_of(&lease.id)));
        }
    }
    watched(before, after)
}

/// Who knew the book before, and is told what has changed since, knows the book as it is.
fn watched(before: &Book, after: &Book) -> Result<(), String> {
    let since = before.last_revision();
    let mut known: HashMap<&LeaseId, &Lease> = before.after(None).map(|lease| (&lease.id, lease)).collect();
    known.extend(after.changed_after(since).map(|lease| (&lease.id, lease)));
    for gone in after.gone_after(since) {
        known.remove(&gone.id);
    }
    let same = known.len() == after.after(None).count()
        && after.after(None).all(|lease| known.get(&lease.id) == Some(&lease));
    if same && after.remembers(since) { Ok(()) } else { Err("a watcher is not told of a change".into()) }
}

fn changed(changes: Vec<Change>) -> (Answer, Vec<Change>) {
    (Answer::Done, changes)
}

fn done<T>(decided: Result<(T, Vec<Change>), BookError>) -> (Answer, Vec<Change>) {
    decided.map_or((Answer::Refused, Vec::new()), |(_, changes)| changed(changes))
}

pub(super) fn moment(clock: Clock) -> Moment {
    at(clock.boot, u64::from(clock.up) * STEP_SECONDS)
}

pub(super) fn number_of(id: &LeaseId) -> u8 {
    u8::from_str_radix(id.as_str().trim_start_matches('0'), 16).unwrap_or(0)
}

fn generation_of(lease: u8) -> Generation {
    Generation(u64::from(lease) + 1)
}

fn steps(n: u8) -> Ttl {
    ttl(u64::from(n) * STEP_SECONDS)
}

fn grace() -> Grace {
    Grace { expired: steps(EXPIRED_GRACE_STEPS), boot: steps(BOOT_GRACE_STEPS) }
}

fn interrupted() -> Failure {
    Failure { reason: "INTERRUPTED".into(), message: "the service was stopped".into() }
}

fn request(call: &str, vm: u8) -> RequestId {
    #[allow(clippy::unwrap_used, reason = "a test")]
    format!("{call}-{vm}").parse().unwrap()
}
