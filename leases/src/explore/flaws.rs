//! What is wrong on purpose: with the service, or with the book that it asks.

use std::sync::Arc;

use super::desk::{Answer, Clock, Op, interrupted, moment};
use crate::{
    Book, Change, Grant, Lease, LeaseId, Moment, Revision, State, Stored, Suspicion, Term, Tombstone,
    UnixMicros, VmId, book::tests::id,
};

/// What is wrong with the service on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    Book(BookFlaw),
    /// Who removes a device does not ask once more whether it is open.
    RemovesOpenDevices,
    /// The reclaimer does not ask whether somebody is at work.
    RemovesWhatIsBeingMade,
    /// The reclaimer strikes a lease off before it clears it away.
    StrikesOffFirst,
    /// The reclaimer gives up on what is open.
    GivesUpOnOpenDevices,
    /// The reclaimer gives up on what has just become Suspect.
    GivesUpEarly,
    /// The snapshot is made before containerd's lease.
    PreparesUnleased,
    /// An acquire that has found a lease does not ask whether it is still there.
    AnswersWhatItFound,
    /// Success is said before it is written down.
    AnswersBeforeItWrites,
    /// What a crash has left half made is left so.
    LeavesHalfMade,
    /// Of what is shared only.
    LeavesSharedHalfMade,
    /// Of spares only.
    LeavesSparesHalfMade,
    /// The reclaimer is not told who makes a spare.
    ForgetsWhoMakesSpares,
    /// Who has chosen a spare has it. The book is not asked.
    HandsOutUnasked,
    /// A spare is adopted as a launcher renews its lease, so whoever has got it meanwhile has it renewed.
    RenewsWhatItAdopts,
    /// Nobody asks whether what was shared is open, neither when it is looked at nor when it is removed.
    TakesWhatIsSharedForClosed,
    /// What is to be shared is made as a VM's own disk is.
    SharesWhatCanBeWritten,
    /// A device gets the name of one that is gone.
    UsesNamesAgain,
}

/// What is wrong with the book on purpose, and with who would not come to ask it otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BookFlaw {
    /// A grant asks nobody whether the lease was released.
    GrantsWhatWasReleased,
    /// Which requests were answered is not loaded.
    ForgetsRequests,
    /// The greatest generation is not written down, but that of the leases that are there.
    ForgetsGenerations,
    /// What is shared is granted as soon as it is there. Its making is not waited for.
    GrantsWhatIsNotSharedYet,
    /// What others share is removed. The reclaimer does not ask whether somebody does.
    RemovesWhatIsShared,
    /// What nobody shares any more is not released.
    KeepsWhatNobodyShares,
    /// Whose acquire fails takes what it shares with it.
    ReleasesWhatOthersShare,
    /// What is a VM's already is handed out as a spare.
    HandsOutTwice,
    /// What is no longer wanted is handed out, while it is reclaimed.
    HandsOutWhatWasDropped,
    /// What was a spare in an earlier boot is one in this.
    HandsOutOfAnEarlierBoot,
    /// Of which image a spare is does not matter.
    HandsOutAnotherImage,
    /// What is handed out keeps the generation that it had as a spare.
    HandsOutAnOldGeneration,
    /// What a VM gives back is a spare again.
    TakesBackAsSpare,
    /// Whoever has it, what is dropped is released.
    DropsWhatWasHandedOut,
    /// A spare is adopted without its device as it is now.
    AdoptsUnseen,
    /// Who renews a spare need not have looked at it.
    RenewsUnseen,
    /// A spare that cannot be made is kept until somebody has seen why.
    KeepsSparesThatFailed,
    /// A spare of an earlier boot is doubtful.
    SuspectsSpares,
}

impl BookFlaw {
    /// What the book takes itself for with the flaw, if that is something else.
    pub(super) fn mistake(self, book: &Book, op: Op, now: &Moment) -> Option<Book> {
        let Op::HandOut { wish, lease, .. } = op else { return None };
        let lease = book.get(&id(lease.into()))?;
        let mut grant = lease.grant()?.clone();
        let is_of_boot = lease.term.boot == now.boot;
        let is_taken_for_ready = match self {
            Self::HandsOutTwice => lease.vm.is_vm() && lease.is_held(),
            Self::HandsOutWhatWasDropped => lease.vm.is_spare() && !lease.is_held() && is_of_boot,
            Self::HandsOutOfAnEarlierBoot => lease.is_spare() && !is_of_boot,
            Self::HandsOutAnotherImage => {
                grant.image_digest = format!("sha256:{}", wish.image());
                lease.is_ready_spare(now)
            }
            _ => false,
        };
        is_taken_for_ready.then(|| {
            let mut book = book.clone();
            book.apply(Change::Put(Arc::new(ready(lease, grant, now))));
            book
        })
    }

    /// Makes of what the book has decided what it would decide with the flaw.
    pub(super) fn spoil(self, book: &Book, op: Op, clock: Clock, decided: &mut (Answer, Vec<Change>)) {
        match (self, op) {
            (Self::GrantsWhatWasReleased, Op::Grant { lease, .. }) => {
                grant_anyway(book, book.get(&id(lease.into())), (op, clock), decided);
            }
            (Self::GrantsWhatIsNotSharedYet, Op::Grant { lease, .. }) => {
                let lease = book.get(&id(lease.into())).filter(|lease| lease.state == State::Preparing);
                grant_anyway(book, lease, (op, clock), decided);
            }
            (Self::RemovesWhatIsShared, Op::Remove(lease)) => {
                let lease = book.get(&id(lease.into())).filter(|lease| book.sharers(&lease.id) > 0);
                decided.1.extend(lease.map(|lease| gone(lease, book.last_revision().next())));
            }
            (Self::KeepsWhatNobodyShares, Op::Remove(asked) | Op::Fail(asked)) => {
                let asked = id(asked.into());
                decided.1.retain(|change| !is_of_what_others_share(change, &asked));
            }
            (Self::ReleasesWhatOthersShare, Op::Fail(lease)) => {
                let lease = book.get(&id(lease.into())).filter(|lease| lease.state == State::Preparing);
                let shared = lease.and_then(|lease| book.get(lease.shares.as_ref()?));
                let shared = shared.filter(|shared| shared.is_held());
                decided.1.extend(shared.map(|shared| released(shared, revision_after(book, &decided.1))));
            }
            _ => self.spoil_spares(book, op, clock, decided),
        }
    }

    fn spoil_spares(self, book: &Book, op: Op, clock: Clock, decided: &mut (Answer, Vec<Change>)) {
        let puts = decided.1.iter_mut().filter_map(|change| match change {
            Change::Put(lease) => Some(Arc::make_mut(lease)),
            _ => None,
        });
        match (self, op) {
            (Self::HandsOutAnOldGeneration, Op::HandOut { lease, .. }) => {
                let spare = book.get(&id(lease.into()));
                puts.zip(spare).for_each(|(lease, spare)| lease.generation = spare.generation);
            }
            (Self::TakesBackAsSpare, Op::Release(_)) => {
                let granted = puts.filter_map(|lease| Some((lease.grant()?.clone(), lease)));
                granted.for_each(|(grant, lease)| *lease = ready(lease, grant, &moment(clock)));
            }
            (Self::DropsWhatWasHandedOut, Op::DropSpare(lease)) => {
                let lease = book.get(&id(lease.into())).filter(|lease| lease.vm.is_vm() && lease.is_held());
                decided.1.extend(lease.map(|lease| released(lease, book.last_revision().next())));
            }
            (Self::AdoptsUnseen, Op::Adopt { lease, .. }) if decided.0 == Answer::Done => {
                let spare = book.get(&id(lease.into()));
                let spare =
                    spare.and_then(|lease| Some(ready(lease, lease.grant()?.clone(), &moment(clock))));
                puts.zip(spare)
                    .for_each(|(lease, spare)| *lease = Lease { revision: lease.revision, ..spare });
            }
            (Self::RenewsUnseen, Op::Renew(lease)) => {
                let (now, revision) = (moment(clock), book.last_revision().next());
                let unseen = |lease: &&Lease| lease.is_spare() && !lease.is_ready_spare(&now);
                let spare = book.get(&id(lease.into())).filter(unseen);
                let spare = spare.and_then(|lease| Some(ready(lease, lease.grant()?.clone(), &now)));
                let put = |lease| Change::Put(Arc::new(Lease { revision, ..lease }));
                decided.1.extend(spare.map(put));
            }
            (Self::KeepsSparesThatFailed, Op::Fail(_)) => {
                let failed = State::Failed { failure: interrupted(), since: UnixMicros(0), cleared: false };
                puts.filter(|lease| lease.vm.is_spare()).for_each(|lease| lease.state = failed.clone());
            }
            (Self::SuspectsSpares, Op::Suspect) => {
                let now = moment(clock);
                let doubtful = |lease: &&Lease| lease.is_spare() && !lease.is_ready_spare(&now);
                if let Some(lease) = book.after(None).find(doubtful) {
                    decided.1.push(suspected(lease, &now, revision_after(book, &decided.1)));
                }
            }
            _ => {}
        }
    }

    /// What would be read of what is written down.
    pub(super) fn forget(self, stored: &mut Stored, book: &Book) {
        match self {
            Self::ForgetsRequests => stored.requests.clear(),
            Self::ForgetsGenerations => {
                stored.last_generation = book.after(None).map(|lease| lease.generation.0).max().unwrap_or(0);
            }
            _ => {}
        }
    }
}

/// As a spare that can be handed out.
fn ready(lease: &Lease, grant: Grant, now: &Moment) -> Lease {
    let (vm, state) = (VmId::of_spare(&lease.id), State::Granted(Box::new(grant)));
    let term = Term { ttl: None, boot: now.boot, until: None };
    Lease { vm, state, term, ..lease.clone() }
}

fn suspected(lease: &Lease, now: &Moment, revision: Revision) -> Change {
    let grant = Box::new(lease.grant().cloned().unwrap());
    let (why, since) = (Suspicion::EarlierBoot, UnixMicros(0));
    let state = State::Suspect { grant, why, since, boot: now.boot, until: now.up };
    Change::Put(Arc::new(Lease { state, revision, ..lease.clone() }))
}

fn grant_anyway(
    book: &Book,
    lease: Option<&Lease>,
    (op, clock): (Op, Clock),
    decided: &mut (Answer, Vec<Change>),
) {
    if let (Some(lease), Some(grant), Answer::Refused) = (lease, op.grant(book, clock), decided.0) {
        let (state, revision) = (State::Granted(Box::new(grant)), book.last_revision().next());
        *decided = (Answer::Done, vec![Change::Put(Arc::new(Lease { state, revision, ..lease.clone() }))]);
    }
}

fn is_of_what_others_share(change: &Change, asked: &LeaseId) -> bool {
    matches!(change, Change::Put(lease) if lease.vm.is_image() && lease.id != *asked)
}

fn released(lease: &Lease, revision: Revision) -> Change {
    let grant = lease.grant().cloned().map(Box::new);
    let state = State::Releasing { grant, since: UnixMicros(0), abandoned: false };
    Change::Put(Arc::new(Lease { state, revision, ..lease.clone() }))
}

fn gone(lease: &Lease, revision: Revision) -> Change {
    let Lease { id, vm, generation, .. } = lease.clone();
    Change::Delete(Tombstone { id, vm, generation, revision })
}

fn revision_after(book: &Book, changes: &[Change]) -> Revision {
    let mut book = book.clone();
    changes.iter().cloned().for_each(|change| drop(book.apply(change)));
    book.last_revision().next()
}
