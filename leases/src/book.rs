//! The book of leases: decides what an acquire, a grant, a release and a removal may change.
//!
//! Every decision returns the [`Change`] to write down; the book itself moves with [`Book::apply`], which gives back
//! the change that undoes it. A writer thus decides a batch, makes it durable, and takes it back if that failed.

use std::collections::{BTreeMap, HashMap};

use thiserror::Error;

use crate::{Generation, Grant, Lease, LeaseId, Spec, State, UnixMicros, VmId};

/// All leases of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Book {
    leases: BTreeMap<LeaseId, Lease>,
    /// The lease that each VM holds or waits for (never one that is Releasing).
    held: HashMap<VmId, LeaseId>,
    /// Whose each granted device is, by device-mapper name, until the lease is gone.
    devices: HashMap<String, LeaseId>,
    /// The greatest generation that was ever given out.
    last_generation: u64,
}

/// What to write down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The lease is now this.
    Put(Box<Lease>),
    /// The lease is gone.
    Delete(LeaseId),
}

/// What an acquire comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acquisition {
    /// The VM gets this new lease, to be prepared.
    New(Box<Lease>),
    /// The VM has, or is being made, this lease of the same spec.
    Existing(Box<Lease>),
}

/// How a spec differs from that of the lease that the VM holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Field of the spec.
    pub field: &'static str,
    /// Its value in the lease.
    pub held: String,
    /// Its value in the request.
    pub asked: String,
}

/// A move that is not legal.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BookError {
    /// The VM holds a lease of another spec.
    #[error("VM {vm} holds lease {lease} with another spec")]
    Conflict {
        /// The VM.
        vm: VmId,
        /// What it holds.
        lease: LeaseId,
        /// Every field that differs; at least one.
        differences: Vec<Difference>,
    },
    /// The lease is not, or no longer, in the state that the move starts from.
    #[error("lease {0} is not being prepared any more")]
    NotPreparing(LeaseId),
    /// The lease may be held still, so it cannot be forgotten.
    #[error("lease {0} is held: only a released lease can be removed")]
    NotReleasing(LeaseId),
    /// The device is that of another lease.
    #[error("device {device} of lease {asked} is that of lease {owner}")]
    DeviceTaken {
        /// Its device-mapper name.
        device: String,
        /// Whose it is.
        owner: LeaseId,
        /// Who was to get it.
        asked: LeaseId,
    },
    /// The same random id came twice, or a stored id is used again.
    #[error("lease {0} exists already")]
    Reused(LeaseId),
}

impl Book {
    /// A book with what was written down. Fails if two leases claim one VM or one device.
    pub fn load(leases: impl IntoIterator<Item = Lease>, last_generation: u64) -> Result<Self, String> {
        let mut book = Self { last_generation, ..Self::default() };
        for lease in leases {
            if let (false, Some(other)) = (is_releasing(&lease), book.held.get(&lease.vm)) {
                return Err(format!("VM {} is held by both lease {other} and lease {}", lease.vm, lease.id));
            }
            if let Some(other) = lease.grant().and_then(|grant| book.devices.get(&grant.device.dm_name)) {
                return Err(format!("lease {other} and lease {} have the same device", lease.id));
            }
            if lease.generation.0 > last_generation {
                return Err(format!("lease {} has a generation that was never given out", lease.id));
            }
            book.apply(Change::Put(Box::new(lease)));
        }
        Ok(book)
    }

    /// The greatest generation that was ever given out.
    pub fn last_generation(&self) -> u64 {
        self.last_generation
    }

    /// One lease.
    pub fn get(&self, id: &LeaseId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// The lease that the VM holds or waits for; if none, its latest one that is being reclaimed.
    pub fn of_vm(&self, vm: &VmId) -> Option<&Lease> {
        match self.held.get(vm) {
            Some(id) => self.leases.get(id),
            None => self.leases.values().filter(|lease| lease.vm == *vm).max_by_key(|lease| lease.generation),
        }
    }

    /// All leases after `after` (from the first if `None`), by id.
    pub fn after(&self, after: Option<&LeaseId>) -> impl Iterator<Item = &Lease> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.leases.range::<LeaseId, _>((from, Bound::Unbounded)).map(|(_, lease)| lease)
    }

    /// Decides an acquire. `id` is fresh and is used if a lease is to be made.
    pub fn acquire(
        &self,
        vm: &VmId,
        spec: &Spec,
        id: LeaseId,
        now: UnixMicros,
    ) -> Result<Acquisition, BookError> {
        if let Some(held) = self.held.get(vm).and_then(|id| self.leases.get(id)) {
            let differences = differences(&held.spec, spec);
            if differences.is_empty() {
                return Ok(Acquisition::Existing(Box::new(held.clone())));
            }
            return Err(BookError::Conflict { vm: vm.clone(), lease: held.id.clone(), differences });
        }
        if self.leases.contains_key(&id) {
            return Err(BookError::Reused(id));
        }
        Ok(Acquisition::New(Box::new(Lease {
            id,
            vm: vm.clone(),
            generation: Generation(self.last_generation + 1),
            spec: spec.clone(),
            created_at: now,
            state: State::Preparing,
        })))
    }

    /// Preparing → Granted. Not if it was released meanwhile, nor if the device is still another lease's.
    pub fn grant(&self, id: &LeaseId, grant: Grant) -> Result<Change, BookError> {
        if let Some(owner) = self.devices.get(&grant.device.dm_name).filter(|owner| *owner != id) {
            let (owner, asked) = (owner.clone(), id.clone());
            return Err(BookError::DeviceTaken { device: grant.device.dm_name, owner, asked });
        }
        match self.leases.get(id) {
            Some(lease) if lease.state == State::Preparing => {
                Ok(Change::Put(Box::new(Lease { state: State::Granted(Box::new(grant)), ..lease.clone() })))
            }
            _ => Err(BookError::NotPreparing(id.clone())),
        }
    }

    /// Preparing or Granted → Releasing. `None` if there is nothing to do.
    pub fn release(&self, id: &LeaseId, now: UnixMicros) -> Option<Change> {
        let lease = self.leases.get(id)?;
        let grant = match &lease.state {
            State::Preparing => None,
            State::Granted(grant) => Some(grant.clone()),
            State::Releasing { .. } => return None,
        };
        let state = State::Releasing { grant, since: now };
        Some(Change::Put(Box::new(Lease { state, ..lease.clone() })))
    }

    /// Releasing → gone. `None` if it is gone already.
    pub fn remove(&self, id: &LeaseId) -> Result<Option<Change>, BookError> {
        match self.leases.get(id) {
            None => Ok(None),
            Some(lease) if is_releasing(lease) => Ok(Some(Change::Delete(id.clone()))),
            Some(_) => Err(BookError::NotReleasing(id.clone())),
        }
    }

    /// Makes the change, and returns the one that takes it back. The greatest generation stays: one that was lost is
    /// not used again.
    pub fn apply(&mut self, change: Change) -> Change {
        let (id, now) = match change {
            Change::Put(lease) => (lease.id.clone(), Some(*lease)),
            Change::Delete(id) => (id, None),
        };
        let before = self.leases.remove(&id);
        if let Some(before) = &before
            && self.held.get(&before.vm) == Some(&id)
        {
            self.held.remove(&before.vm);
        }
        if let Some(grant) = before.as_ref().and_then(Lease::grant) {
            self.devices.remove(&grant.device.dm_name);
        }
        if let Some(lease) = now {
            self.last_generation = self.last_generation.max(lease.generation.0);
            if !is_releasing(&lease) {
                self.held.insert(lease.vm.clone(), id.clone());
            }
            if let Some(grant) = lease.grant() {
                self.devices.insert(grant.device.dm_name.clone(), id.clone());
            }
            self.leases.insert(id.clone(), lease);
        }
        match before {
            Some(lease) => Change::Put(Box::new(lease)),
            None => Change::Delete(id),
        }
    }
}

fn is_releasing(lease: &Lease) -> bool {
    matches!(lease.state, State::Releasing { .. })
}

fn differences(held: &Spec, asked: &Spec) -> Vec<Difference> {
    let fields = [("image", &held.image, &asked.image), ("platform", &held.platform, &asked.platform)];
    fields
        .into_iter()
        .filter(|(_, held, asked)| held != asked)
        .map(|(field, held, asked)| Difference { field, held: held.clone(), asked: asked.clone() })
        .collect()
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
