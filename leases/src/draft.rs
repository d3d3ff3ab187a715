//! What a decision comes to, before it is written down: leases, tombstones and answers, each with a revision of its own.

use std::sync::Arc;

use crate::{
    Ask, Book, Change, Generation, Kind, Lease, LeaseId, Moment, Request, RequestId, Revision, Seen, Share,
    Spec, State, Term, Tombstone, Ttl, VmId,
};

/// So many answered requests are remembered, the latest ones.
const REQUESTS_KEPT: usize = 10_000;
/// So many leases that have gone are remembered, the latest ones.
const TOMBSTONES_KEPT: usize = 10_000;

/// Changes in the making, each with a revision of its own.
pub(crate) struct Draft<'a> {
    book: &'a Book,
    revision: Revision,
    generation: u64,
    pub(crate) changes: Vec<Change>,
}

impl<'a> Draft<'a> {
    pub(crate) fn on(book: &'a Book) -> Self {
        let (revision, generation) = (book.last_revision(), book.last_generation());
        Self { book, revision, generation, changes: Vec::new() }
    }

    pub(crate) fn next(&mut self) -> Revision {
        self.revision = self.revision.next();
        self.revision
    }

    /// A lease that is to be made.
    pub(crate) fn intend(
        &mut self,
        id: LeaseId,
        vm: VmId,
        (spec, ttl, expects): (Spec, Option<Ttl>, u64),
        shares: Option<LeaseId>,
        now: &Moment,
    ) -> Lease {
        self.generation += 1;
        let lease = Lease {
            id,
            vm,
            generation: Generation(self.generation),
            spec,
            created_at: now.wall,
            term: Term { ttl, boot: now.boot, until: None },
            revision: Revision::default(),
            shares,
            expects,
            state: State::Preparing,
        };
        self.put(&lease, State::Preparing)
    }

    /// A spare becomes the VM's, with its devices as they are now.
    pub(crate) fn hand_out(&mut self, spare: &Lease, ask: &Ask, seen: &Seen, now: &Moment) -> Option<Lease> {
        let mut grant = Box::new(spare.grant()?.clone());
        self.generation += 1;
        grant.device = seen.root.clone();
        grant.at = now.wall;
        let lease = Lease {
            vm: ask.vm.clone(),
            generation: Generation(self.generation),
            spec: ask.spec.clone(),
            created_at: now.wall,
            term: Term { ttl: ask.ttl, boot: now.boot, until: None }.begun(now),
            expects: ask.expects,
            ..spare.clone()
        };
        Some(self.put(&lease, State::Granted(grant)))
    }

    /// The lease of what is to be shared: the one that there is, or a new one.
    pub(crate) fn share(&mut self, share: &Share, spec: &Spec, now: &Moment) -> LeaseId {
        if let Some(held) = self.book.held_by(&share.image) {
            return held.id.clone();
        }
        let (id, spec) = (share.fresh.clone(), Spec { scratch: None, ..spec.clone() });
        self.intend(id, share.image.clone(), (spec, None, 0), None, now).id
    }

    /// `user` shares nothing any more. Who was the last to share something has it released.
    pub(crate) fn unshare(&mut self, user: &Lease, now: &Moment) {
        let Some(shared) = user.shares.as_ref().and_then(|id| self.book.get(id)) else { return };
        if shared.is_held() && self.book.sharers(&shared.id) == 1 {
            self.release(shared, false, now);
        }
    }

    pub(crate) fn put(&mut self, lease: &Lease, state: State) -> Lease {
        let lease = Lease { state, revision: self.next(), ..lease.clone() };
        self.changes.push(Change::Put(Arc::new(lease.clone())));
        lease
    }

    pub(crate) fn delete(&mut self, lease: &Lease, now: &Moment) {
        self.unshare(lease, now);
        self.bury(lease);
    }

    pub(crate) fn bury(&mut self, lease: &Lease) {
        let tombstone = Tombstone {
            id: lease.id.clone(),
            vm: lease.vm.clone(),
            generation: lease.generation,
            revision: self.next(),
        };
        self.changes.push(Change::Delete(tombstone));
        let (oldest, count) = self.book.tombstones();
        if let Some(oldest) = oldest.filter(|_| count >= TOMBSTONES_KEPT) {
            self.changes.push(Change::Expunge(oldest));
        }
    }

    pub(crate) fn answer(&mut self, id: Option<&RequestId>, kind: Kind, vm: &VmId, lease: Option<&LeaseId>) {
        let Some(id) = id else { return };
        let request = Request { kind, vm: vm.clone(), lease: lease.cloned(), revision: self.next() };
        self.changes.push(Change::Request(id.clone(), Some(request)));
        let (oldest, count) = self.book.requests();
        if let Some(oldest) = oldest.filter(|oldest| count >= REQUESTS_KEPT && *oldest != id) {
            self.changes.push(Change::Request(oldest.clone(), None));
        }
    }

    /// Failed → gone, or to be cleared away first.
    pub(crate) fn see(&mut self, lease: &Lease, now: &Moment) {
        match &lease.state {
            State::Failed { cleared: true, .. } => self.delete(lease, now),
            State::Failed { cleared: false, .. } => drop(self.release(lease, false, now)),
            _ => {}
        }
    }

    pub(crate) fn release(&mut self, lease: &Lease, abandoned: bool, now: &Moment) -> Lease {
        let grant = lease.grant().cloned().map(Box::new);
        self.put(lease, State::Releasing { grant, since: now.wall, abandoned })
    }
}
