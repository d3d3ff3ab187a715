//! What is wrong on purpose: with the service, or with the book that it asks.

use super::desk::{Answer, Op};
use crate::{Book, Change, Lease, LeaseId, Revision, State, Stored, Tombstone, UnixMicros, book::tests::id};

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
}

impl BookFlaw {
    /// Makes of what the book has decided what it would decide with the flaw.
    pub(super) fn spoil(self, book: &Book, op: Op, decided: &mut (Answer, Vec<Change>)) {
        match (self, op) {
            (Self::GrantsWhatWasReleased, Op::Grant { lease, .. }) => {
                grant_anyway(book, book.get(&id(lease.into())), op, decided);
            }
            (Self::GrantsWhatIsNotSharedYet, Op::Grant { lease, .. }) => {
                let lease = book.get(&id(lease.into())).filter(|lease| lease.state == State::Preparing);
                grant_anyway(book, lease, op, decided);
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

fn grant_anyway(book: &Book, lease: Option<&Lease>, op: Op, decided: &mut (Answer, Vec<Change>)) {
    if let (Some(lease), Some(grant), Answer::Refused) = (lease, op.grant(), decided.0) {
        let (state, revision) = (State::Granted(Box::new(grant)), book.last_revision().next());
        *decided = (Answer::Done, vec![Change::Put(Box::new(Lease { state, revision, ..lease.clone() }))]);
    }
}

fn is_of_what_others_share(change: &Change, asked: &LeaseId) -> bool {
    matches!(change, Change::Put(lease) if lease.vm.is_image() && lease.id != *asked)
}

fn released(lease: &Lease, revision: Revision) -> Change {
    let grant = lease.grant().cloned().map(Box::new);
    let state = State::Releasing { grant, since: UnixMicros(0), abandoned: false };
    Change::Put(Box::new(Lease { state, revision, ..lease.clone() }))
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
