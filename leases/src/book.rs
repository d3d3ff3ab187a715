//! The book: all leases, what became of recent ones, and which requests were answered. Moves are decided in `moves`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{Generation, Lease, LeaseId, Request, RequestId, Revision, VmId};

/// All leases, in memory. A value: what is decided on it comes out as [`Change`]s, which are written down and applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Book {
    leases: BTreeMap<LeaseId, Arc<Lease>>,
    /// The lease that each VM holds or waits for.
    held: HashMap<VmId, LeaseId>,
    /// Each VM's failed lease that nobody has seen.
    failed: HashMap<VmId, LeaseId>,
    /// Whose each granted device is, by device-mapper name, until the lease is gone.
    devices: HashMap<String, LeaseId>,
    /// How many leases share what each of these has.
    sharers: HashMap<LeaseId, usize>,
    /// The leases by their last change.
    changed: BTreeMap<Revision, LeaseId>,
    /// Leases that are gone, by when they went.
    gone: BTreeMap<Revision, Tombstone>,
    /// What was forgotten of those: nothing after this revision.
    horizon: Revision,
    requests: BTreeMap<RequestId, Request>,
    /// The requests by when they were answered.
    answered: BTreeMap<Revision, RequestId>,
    /// The greatest generation that was ever given out.
    last_generation: u64,
    /// The greatest revision that was ever given out.
    last_revision: Revision,
}

/// A lease that is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// Which.
    pub id: LeaseId,
    /// Whose it was.
    pub vm: VmId,
    /// Which of the VM's.
    pub generation: Generation,
    /// Of its going.
    pub revision: Revision,
}

/// What to write down. To make one twice is to make it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The lease is now this.
    Put(Arc<Lease>),
    /// The lease is gone.
    Delete(Tombstone),
    /// That it has gone, in this revision, is forgotten.
    Expunge(Revision),
    /// The request was answered so; `None`: that is forgotten.
    Request(RequestId, Option<Request>),
    /// Takes a first Put back.
    Unmake(LeaseId),
    /// Takes a Delete back.
    Undelete(Arc<Lease>, Revision),
    /// Takes an Expunge back.
    Bury(Tombstone),
}

/// What was written down.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "as in the book")]
pub struct Stored {
    pub leases: Vec<Lease>,
    pub gone: Vec<Tombstone>,
    pub requests: Vec<(RequestId, Request)>,
    pub horizon: Revision,
    pub last_generation: u64,
    pub last_revision: Revision,
}

impl Book {
    /// A book with what was written down. Fails if that does not fit together: two leases that hold one VM or have one
    /// device, a generation or revision that was never given out, or one that was given out twice.
    pub fn load(stored: Stored) -> Result<Self, String> {
        let mut book = Self {
            last_generation: stored.last_generation,
            last_revision: stored.last_revision,
            horizon: stored.horizon,
            ..Self::default()
        };
        for lease in stored.leases {
            book.expect_fit(&lease)?;
            book.apply(Change::Put(Arc::new(lease)));
        }
        if let Some(lost) = book.sharers.keys().find(|id| !book.leases.contains_key(id)) {
            return Err(format!("a lease shares the device of lease {lost}, which is not there"));
        }
        for tombstone in stored.gone {
            if tombstone.revision > stored.last_revision {
                return Err(format!(
                    "lease {} has gone in a revision that was never given out",
                    tombstone.id
                ));
            }
            book.gone.insert(tombstone.revision, tombstone);
        }
        for (id, request) in stored.requests {
            book.apply(Change::Request(id, Some(request)));
        }
        Ok(book)
    }

    fn expect_fit(&self, lease: &Lease) -> Result<(), String> {
        let id = &lease.id;
        if let (true, Some(other)) = (lease.is_held(), self.held.get(&lease.vm)) {
            return Err(format!("VM {} is held by both lease {other} and lease {id}", lease.vm));
        }
        if let Some(other) = lease.own_device().and_then(|device| self.devices.get(&device.dm_name)) {
            return Err(format!("lease {other} and lease {id} have the same device"));
        }
        if lease.generation.0 > self.last_generation {
            return Err(format!("lease {id} has a generation that was never given out"));
        }
        if lease.revision > self.last_revision {
            return Err(format!("lease {id} has a revision that was never given out"));
        }
        if let Some(other) = self.changed.get(&lease.revision) {
            return Err(format!("lease {other} and lease {id} have the same revision"));
        }
        Ok(())
    }

    /// The greatest generation that was ever given out.
    pub fn last_generation(&self) -> u64 {
        self.last_generation
    }

    /// The greatest revision that was ever given out.
    pub fn last_revision(&self) -> Revision {
        self.last_revision
    }

    /// One lease.
    pub fn get(&self, id: &LeaseId) -> Option<&Lease> {
        self.leases.get(id).map(Arc::as_ref)
    }

    /// The lease that the VM holds or waits for.
    pub fn held_by(&self, vm: &VmId) -> Option<&Lease> {
        self.held.get(vm).and_then(|id| self.get(id))
    }

    /// The VM's lease that could not be made, if nobody has seen why.
    pub fn failed_of(&self, vm: &VmId) -> Option<&Lease> {
        self.failed.get(vm).and_then(|id| self.get(id))
    }

    /// The lease that the VM holds or waits for; if none, the one that has failed; if none, its latest one that is being
    /// reclaimed.
    pub fn of_vm(&self, vm: &VmId) -> Option<&Lease> {
        let latest = || self.after(None).filter(|lease| lease.vm == *vm).max_by_key(|lease| lease.generation);
        self.held_by(vm).or_else(|| self.failed_of(vm)).or_else(latest)
    }

    /// All leases after `after` (from the first if `None`), by id.
    pub fn after(&self, after: Option<&LeaseId>) -> impl Iterator<Item = &Lease> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.leases.range::<LeaseId, _>((from, Bound::Unbounded)).map(|(_, lease)| &**lease)
    }

    /// Whether all that has gone after `revision` is still known.
    pub fn remembers(&self, revision: Revision) -> bool {
        revision >= self.horizon && revision <= self.last_revision
    }

    /// The greatest revision of all that is in here: unlike the greatest that was given out, it is not lost if it is read
    /// from what is durable.
    pub fn settled(&self) -> Revision {
        let last = |revision: Option<&Revision>| revision.copied().unwrap_or_default();
        last(self.changed.keys().next_back()).max(last(self.gone.keys().next_back())).max(self.horizon)
    }

    /// Leases that have changed after `revision` and are there, the earliest change first. Only the last change of each.
    pub fn changed_after(&self, revision: Revision) -> impl Iterator<Item = &Lease> {
        self.changed.range(revision.next()..).filter_map(|(_, id)| self.get(id))
    }

    /// Leases that have gone after `revision`, the earliest first.
    pub fn gone_after(&self, revision: Revision) -> impl Iterator<Item = &Tombstone> {
        self.gone.range(revision.next()..).map(|(_, tombstone)| tombstone)
    }

    /// What became of the request.
    pub fn request(&self, id: &RequestId) -> Option<&Request> {
        self.requests.get(id)
    }

    /// The request whose answer is the oldest, and how many are known.
    pub(crate) fn requests(&self) -> (Option<&RequestId>, usize) {
        (self.answered.first_key_value().map(|(_, id)| id), self.requests.len())
    }

    /// The request, if any, that made this lease.
    pub(crate) fn request_of(&self, lease: &LeaseId) -> Option<&RequestId> {
        self.requests.iter().find(|(_, request)| request.lease.as_ref() == Some(lease)).map(|(id, _)| id)
    }

    /// The oldest revision in which a lease has gone, and how many such are known.
    pub(crate) fn tombstones(&self) -> (Option<Revision>, usize) {
        (self.gone.first_key_value().map(|(revision, _)| *revision), self.gone.len())
    }

    /// How many leases have failed and were not seen, and the oldest.
    pub(crate) fn failures(&self) -> (Option<&Lease>, usize) {
        let oldest = self.failed.values().filter_map(|id| self.get(id)).min_by_key(|lease| lease.revision);
        (oldest, self.failed.len())
    }

    /// How many leases share the device of this one.
    pub fn sharers(&self, id: &LeaseId) -> usize {
        self.sharers.get(id).copied().unwrap_or_default()
    }

    /// Whose the device is.
    pub(crate) fn owner_of(&self, device: &str) -> Option<&LeaseId> {
        self.devices.get(device)
    }

    /// Makes the change, and returns the one that takes it back. The greatest generation and revision stay: what was lost
    /// is not used again.
    pub fn apply(&mut self, change: Change) -> Change {
        match change {
            Change::Put(lease) => {
                let id = lease.id.clone();
                match self.replace(&id, Some(lease)) {
                    Some(before) => Change::Put(before),
                    None => Change::Unmake(id),
                }
            }
            Change::Delete(tombstone) => {
                let (id, revision) = (tombstone.id.clone(), tombstone.revision);
                self.last_revision = self.last_revision.max(revision);
                let before = self.replace(&id, None);
                self.gone.insert(revision, tombstone);
                match before {
                    Some(lease) => Change::Undelete(lease, revision),
                    None => Change::Unmake(id),
                }
            }
            Change::Undelete(lease, revision) => {
                let id = lease.id.clone();
                self.replace(&id, Some(lease));
                match self.gone.remove(&revision) {
                    Some(tombstone) => Change::Delete(tombstone),
                    None => Change::Unmake(id),
                }
            }
            Change::Unmake(id) => match self.replace(&id, None) {
                Some(lease) => Change::Put(lease),
                None => Change::Unmake(id),
            },
            Change::Expunge(revision) => {
                self.horizon = self.horizon.max(revision);
                match self.gone.remove(&revision) {
                    Some(tombstone) => Change::Bury(tombstone),
                    None => Change::Expunge(revision),
                }
            }
            Change::Bury(tombstone) => {
                let revision = tombstone.revision;
                self.gone.insert(revision, tombstone);
                Change::Expunge(revision)
            }
            Change::Request(id, request) => {
                let before = self.replace_request(&id, request);
                Change::Request(id, before)
            }
        }
    }

    fn replace(&mut self, id: &LeaseId, now: Option<Arc<Lease>>) -> Option<Arc<Lease>> {
        let before = self.leases.remove(id);
        if let Some(before) = &before {
            for index in [&mut self.held, &mut self.failed] {
                if index.get(&before.vm) == Some(id) {
                    index.remove(&before.vm);
                }
            }
            if let Some(device) = before.own_device() {
                self.devices.remove(&device.dm_name);
            }
            if let Some(shared) = &before.shares {
                self.count_sharer(shared, false);
            }
            self.changed.remove(&before.revision);
        }
        if let Some(lease) = now {
            self.last_generation = self.last_generation.max(lease.generation.0);
            self.last_revision = self.last_revision.max(lease.revision);
            if lease.is_held() {
                self.held.insert(lease.vm.clone(), id.clone());
            }
            if matches!(lease.state, crate::State::Failed { .. }) {
                self.failed.insert(lease.vm.clone(), id.clone());
            }
            if let Some(device) = lease.own_device() {
                self.devices.insert(device.dm_name.clone(), id.clone());
            }
            if let Some(shared) = &lease.shares {
                self.count_sharer(shared, true);
            }
            self.changed.insert(lease.revision, id.clone());
            self.leases.insert(id.clone(), lease);
        }
        before
    }

    fn count_sharer(&mut self, shared: &LeaseId, more: bool) {
        let count = self.sharers.entry(shared.clone()).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.sharers.remove(shared);
        }
    }

    fn replace_request(&mut self, id: &RequestId, now: Option<Request>) -> Option<Request> {
        let before = self.requests.remove(id);
        if let Some(before) = &before {
            self.answered.remove(&before.revision);
        }
        if let Some(request) = now {
            self.last_revision = self.last_revision.max(request.revision);
            self.answered.insert(request.revision, id.clone());
            self.requests.insert(id.clone(), request);
        }
        before
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
pub(crate) mod tests;
