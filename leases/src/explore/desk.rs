//! The real book. Every different one has a number here, and each question about it is put to it only once.

use std::collections::HashMap;

use super::{
    asks::{NO_LEASE, Return, Wish},
    flaws::BookFlaw,
    view::View,
};
use crate::{
    Acquisition, Book, BookError, Change, DeviceIdentity, DeviceNumber, Failure, Grace, Grant, Lease,
    LeaseId, Moment, ScratchGrant, Seen, Stored, Ttl,
    book::tests::{IMAGE, at, grant, id, spec, stored, ttl, vm},
};

/// Time goes on in steps of so many seconds.
const STEP_SECONDS: u64 = 10;
/// VM 0's leases last so many steps; VM 1's until they are released.
pub(super) const TTL_STEPS: u8 = 1;
/// So many steps a lease is kept that has expired.
pub(super) const EXPIRED_GRACE_STEPS: u8 = 1;
/// So many steps of a new boot a lease of an earlier one is kept.
pub(super) const BOOT_GRACE_STEPS: u8 = 2;

/// Room for the devices of a run.
const NUMBERS_PER_BOOT: u32 = 16;

/// The host's own clock. The wall's is left out: nothing is decided by it, and it jumps in the test against the oracle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Clock {
    pub(super) boot: u8,
    pub(super) up: u8,
}

/// A question to the book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    /// With this lease, if one is to be made, and with the one after it, if two are.
    Acquire(Wish, u8),
    Keep(Wish, u8),
    /// Nobody has looked at its device.
    Renew(u8),
    Grant {
        lease: u8,
        device: u8,
        image: u8,
        /// The device of its scratch disk.
        scratch: Option<u8>,
    },
    Fail(u8),
    Release(Return),
    Suspect,
    GiveUpOn(u8),
    Remove(u8),
    /// With this lease, if it was not used before.
    IntendSpare(u8),
    /// This lease, whose device was just looked at, as a spare.
    HandOut {
        wish: Wish,
        lease: u8,
        device: u8,
    },
    /// The same without a wish.
    Adopt {
        lease: u8,
        device: u8,
    },
    DropSpare(u8),
    /// The service starts: what is written down is loaded.
    Load,
}

/// What the book says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    /// An acquire makes this lease, or gets this spare.
    New(u8),
    /// An acquire has found this lease.
    Existing(u8),
    Done,
    Refused,
}

pub(super) struct Desk {
    books: Vec<(Book, View)>,
    numbers: HashMap<View, u32>,
    answers: HashMap<(u32, Op, Clock), (u32, Answer)>,
    flaw: Option<BookFlaw>,
}

impl Desk {
    pub(super) fn new(flaw: Option<BookFlaw>) -> Self {
        let empty = (Book::default(), View::of(&Book::default()));
        let numbers = HashMap::from([(empty.1.clone(), 0)]);
        Self { books: vec![empty], numbers, answers: HashMap::new(), flaw }
    }

    pub(super) fn view(&self, book: u32) -> &View {
        &self.books[book as usize].1
    }

    pub(super) fn lease(&self, book: u32, lease: u8) -> Option<&Lease> {
        self.books[book as usize].0.get(&id(lease.into()))
    }

    /// The lease whose device this one shares.
    pub(super) fn shared_by(&self, book: u32, lease: u8) -> Option<u8> {
        self.view(book).get(lease)?.shares
    }

    /// By how many leases it is shared, as the book counts them.
    pub(super) fn sharers(&self, book: u32, lease: u8) -> usize {
        self.books[book as usize].0.sharers(&id(lease.into()))
    }

    pub(super) fn books(&self) -> usize {
        self.books.len()
    }

    /// Books that differ in nothing but revisions have one number: what the book decides never depends on which
    /// revision something has, until there are thousands to be forgotten.
    ///
    /// Fails if it cannot be loaded as it is written down.
    fn number(&mut self, book: Book) -> Result<u32, String> {
        let view = View::of(&book);
        if let Some(known) = self.numbers.get(&view) {
            return Ok(*known);
        }
        loaded(stored(&book))?;
        let number = self.books.len() as u32;
        self.numbers.insert(view.clone(), number);
        self.books.push((book, view));
        Ok(number)
    }

    /// The book after the question, and its answer. Fails if it is no step that a book may take.
    pub(super) fn ask(&mut self, book: u32, op: Op, now: Clock) -> Result<(u32, Answer), String> {
        if let Some(known) = self.answers.get(&(book, op, now)) {
            return Ok(*known);
        }
        let before = &self.books[book as usize].0;
        let (after, answer) = self.decide(before, op, now)?;
        let after = match after {
            None => book,
            Some(after) => {
                allowed(before, &after)?;
                self.number(after)?
            }
        };
        self.answers.insert((book, op, now), (after, answer));
        Ok((after, answer))
    }

    /// The book afterwards, if it is another one.
    fn decide(&self, book: &Book, op: Op, clock: Clock) -> Result<(Option<Book>, Answer), String> {
        if op == Op::Load {
            return Ok((Some(self.loaded(book)?), Answer::Done));
        }
        let mistaken = self.flaw.and_then(|flaw| flaw.mistake(book, op, &moment(clock)));
        let mut decided = decided(mistaken.as_ref().unwrap_or(book), op, clock);
        if let Some(flaw) = self.flaw {
            flaw.spoil(book, op, clock, &mut decided);
        }
        let (answer, changes) = decided;
        let mut after = None;
        for change in changes {
            after.get_or_insert_with(|| book.clone()).apply(change);
        }
        Ok((after, answer))
    }

    fn loaded(&self, book: &Book) -> Result<Book, String> {
        let mut stored = stored(book);
        if let Some(flaw) = self.flaw {
            flaw.forget(&mut stored, book);
        }
        loaded(stored)
    }
}

/// What the book itself decides.
fn decided(book: &Book, op: Op, clock: Clock) -> (Answer, Vec<Change>) {
    let now = &moment(clock);
    match op {
        Op::Acquire(wish, next) => acquire(book, wish, next, now),
        Op::Keep(wish, n) => done(book.keep(&wish.ask(id(n.into())), &id(n.into()), None, now)),
        Op::Renew(n) => done(book.renew(&id(n.into()), None, None, now)),
        Op::Grant { lease, .. } => match op.grant(book, clock) {
            Some(grant) => done(book.grant(&id(lease.into()), grant, now)),
            None => (Answer::Refused, Vec::new()),
        },
        Op::Fail(n) => changed(book.fail(&id(n.into()), interrupted(), now)),
        Op::Release(back) => done(book.release(&back.release(), now)),
        Op::Suspect => changed(book.suspect(grace(), now)),
        Op::GiveUpOn(n) => changed(book.give_up_on(&id(n.into()), now)),
        Op::Remove(n) => book.remove(&id(n.into()), now).map_or((Answer::Refused, Vec::new()), changed),
        Op::IntendSpare(n) => done(book.intend_spare(id(n.into()), spec(0), now)),
        Op::HandOut { wish, lease, device } => {
            let ask = wish.ask_for(lease, seen(device, clock));
            acquired(book.acquire(&ask, id(NO_LEASE), now))
        }
        Op::Adopt { lease, device } => done(book.adopt_spare(&id(lease.into()), &seen(device, clock), now)),
        Op::DropSpare(n) => changed(book.drop_spare(&id(n.into()), now)),
        Op::Load => (Answer::Done, Vec::new()),
    }
}

fn loaded(stored: Stored) -> Result<Book, String> {
    Book::load(stored).map_err(|error| format!("what is written down cannot be loaded: {error}"))
}

impl Op {
    /// What it is to be granted, if it is a grant.
    pub(super) fn grant(self, book: &Book, clock: Clock) -> Option<Grant> {
        let Self::Grant { lease, device, image, scratch } = self else { return None };
        let is_spare = book.get(&id(lease.into())).is_some_and(|lease| lease.vm.is_spare());
        let boot = if is_spare { clock.boot } else { 0 };
        let scratch = scratch
            .map(|device| ScratchGrant { device: grant(device.into()).device, filesystem: "ext4".into() });
        let image_digest = format!("sha256:{image}");
        Some(Grant { device: numbered(device, boot), image_digest, scratch, ..grant(device.into()) })
    }
}

fn acquire(book: &Book, wish: Wish, next: u8, now: &Moment) -> (Answer, Vec<Change>) {
    let (lease, shared) = fresh(book, wish, next);
    acquired(book.acquire(&wish.ask(shared), lease, now))
}

fn acquired(outcome: Result<Acquisition, BookError>) -> (Answer, Vec<Change>) {
    match outcome {
        Ok(Acquisition::New { lease, changes }) => (Answer::New(number_of(&lease.id)), changes),
        Ok(Acquisition::Existing(lease)) => (Answer::Existing(number_of(&lease.id)), Vec::new()),
        Err(_) => (Answer::Refused, Vec::new()),
    }
}

/// What lease an acquire makes if it makes one, and which one is made just before it if what it shares is not there yet.
fn fresh(book: &Book, wish: Wish, next: u8) -> (LeaseId, LeaseId) {
    let makes_both = wish.shares() && book.held_by(&vm(IMAGE)).is_none();
    let (lease, shared) = if makes_both { (next + 1, next) } else { (next, next + 1) };
    (id(lease.into()), id(shared.into()))
}

/// What holds of every step of every book.
fn allowed(before: &Book, after: &Book) -> Result<(), String> {
    if after.last_revision() < before.last_revision() {
        return Err("a revision can be given out again".into());
    }
    if after.last_generation() < before.last_generation() {
        return Err("a generation can be given out again".into());
    }
    for lease in after.after(None) {
        let then = before.get(&lease.id);
        if lease.is_held() && then.is_some_and(|then| !then.is_held()) {
            return Err(format!("lease {} is held again", number_of(&lease.id)));
        }
        let others = then.filter(|then| then.vm != lease.vm);
        if others.is_some_and(|then| !then.is_spare() || !lease.vm.is_vm()) {
            return Err(format!("lease {} is given from one to another", number_of(&lease.id)));
        }
        let is_new = then.is_none() || others.is_some();
        if is_new && lease.generation.0 <= before.last_generation() {
            return Err(format!("generation {} was given out before", lease.generation.0));
        }
        let sharers = after.after(None).filter(|other| other.shares.as_ref() == Some(&lease.id)).count();
        if after.sharers(&lease.id) != sharers {
            return Err(format!("the sharers of lease {} are miscounted", number_of(&lease.id)));
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

/// The device with the numbers that it has in this boot.
fn numbered(device: u8, boot: u8) -> DeviceIdentity {
    let minor = u32::from(device) + NUMBERS_PER_BOOT * u32::from(boot);
    DeviceIdentity { number: DeviceNumber { major: 253, minor }, ..grant(device.into()).device }
}

/// The boot that the number is of.
pub(super) fn boot_of(number: DeviceNumber) -> u8 {
    (number.minor / NUMBERS_PER_BOOT) as u8
}

/// What somebody has seen who has looked at the device.
fn seen(device: u8, clock: Clock) -> Seen {
    Seen { root: numbered(device, clock.boot), scratch: None }
}

fn changed(changes: Vec<Change>) -> (Answer, Vec<Change>) {
    (Answer::Done, changes)
}

pub(super) fn done<T>(decided: Result<(T, Vec<Change>), BookError>) -> (Answer, Vec<Change>) {
    decided.map_or((Answer::Refused, Vec::new()), |(_, changes)| changed(changes))
}

pub(super) fn moment(clock: Clock) -> Moment {
    at(clock.boot, u64::from(clock.up) * STEP_SECONDS)
}

pub(super) fn number_of(id: &LeaseId) -> u8 {
    u8::from_str_radix(id.as_str().trim_start_matches('0'), 16).unwrap_or(0)
}

pub(super) fn steps(n: u8) -> Ttl {
    ttl(u64::from(n) * STEP_SECONDS)
}

fn grace() -> Grace {
    Grace { expired: steps(EXPIRED_GRACE_STEPS), boot: steps(BOOT_GRACE_STEPS) }
}

pub(super) fn interrupted() -> Failure {
    Failure { reason: "INTERRUPTED".into(), message: "the service was stopped".into() }
}
