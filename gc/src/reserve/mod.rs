//! What the pool has promised to disks that are there, and whether it can promise more: by tenant, and in all.
//!
//! ```text
//!   expected ──────────────►│ what a disk is expected to have written in the end, once for each lease
//!   written  ──────►│       │ what it has written, as it was last seen
//!                   └───────┴── reserved: promised, and still to be written
//! ```
//!
//! A disk counts from before its intent is written until it is given back: what is on it by then is in use in the pool until it is
//! gone, and nothing is expected of it any more. Sums are kept as leases come and go, so that a decision takes the same time
//! however many there are.

mod history;
mod policy;
mod quota;

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap, hash_map::Entry},
};

use cowshed_leases::{Lease, LeaseId, Tenant};

pub use history::History;
pub use policy::{Asked, Policy, Refusal};
pub use quota::{Quota, Quotas, Whose};

use crate::evict::Bytes;

/// What a lease is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub tenant: Tenant,
    /// What its disk is expected to write.
    pub expected: Bytes,
}

impl Claim {
    /// What is due to the lease; `None` if it is not held, or no VM's: spares and what VMs share are written by nobody.
    pub fn of(lease: &Lease) -> Option<Self> {
        let is_due = lease.vm.is_vm() && lease.is_held();
        is_due.then(|| Self { tenant: lease.spec.tenant.clone(), expected: Bytes(lease.expects) })
    }
}

/// A lease that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    claim: Claim,
    /// What it has written; `None` if nobody has looked.
    written: Option<Bytes>,
}

impl Held {
    fn has_written(&self) -> Bytes {
        self.written.unwrap_or_default()
    }

    /// What it may still write.
    fn reserved(&self) -> Bytes {
        self.claim.expected.less(self.has_written())
    }

    /// What its tenant has by it.
    fn uses(&self) -> Bytes {
        self.claim.expected.max(self.has_written())
    }
}

/// What a tenant has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Leases that are held, or being made.
    pub leases: u64,
    /// What their disks have written, or are expected to, whichever is more.
    pub bytes: Bytes,
}

/// All that was promised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserve {
    held: HashMap<LeaseId, Held>,
    /// Of all of them, what they may still write.
    reserved: Bytes,
    tenants: HashMap<Tenant, Has>,
}

/// What a tenant has, and by which leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Has {
    sum: Use,
    /// What each of its leases uses; of equal ones the first id is the last here.
    each: BTreeSet<(Bytes, Reverse<LeaseId>)>,
}

impl Reserve {
    /// The lease has this claim from now on, or none. Returns what it has written, if it had one and somebody has looked.
    pub fn set(&mut self, id: &LeaseId, claim: Option<Claim>) -> Option<Bytes> {
        let written = match self.held.remove(id) {
            Some(held) => {
                self.subtract(id, &held);
                held.written
            }
            None => None,
        };
        if let Some(claim) = claim {
            let held = Held { claim, written };
            self.add(id, &held);
            self.held.insert(id.clone(), held);
        }
        written
    }

    /// The lease's disk has written so much by now. Nothing if it does not count any more.
    pub fn wrote(&mut self, id: &LeaseId, written: Bytes) {
        let Entry::Occupied(mut entry) = self.held.entry(id.clone()) else { return };
        let before = entry.get().clone();
        entry.get_mut().written = Some(written);
        let now = entry.get().clone();
        self.subtract(id, &before);
        self.add(id, &now);
    }

    /// What is promised, and not written yet.
    pub fn reserved(&self) -> Bytes {
        self.reserved
    }

    /// What the tenant has.
    pub fn of(&self, tenant: &Tenant) -> Use {
        self.tenants.get(tenant).map(|has| has.sum).unwrap_or_default()
    }

    /// What counts.
    pub fn leases(&self) -> impl Iterator<Item = &LeaseId> {
        self.held.keys()
    }

    /// The tenant's lease that has, or is to have, most.
    pub fn largest(&self, tenant: &Tenant) -> Option<(&LeaseId, Bytes)> {
        let (uses, Reverse(id)) = self.tenants.get(tenant)?.each.last()?;
        Some((id, *uses))
    }

    /// What the lease takes of what is promised, and of what its tenant has; nothing if it does not count.
    fn part(&self, id: Option<&LeaseId>) -> Option<&Held> {
        id.and_then(|id| self.held.get(id))
    }

    fn add(&mut self, id: &LeaseId, held: &Held) {
        self.reserved = self.reserved.plus(held.reserved());
        let Has { sum, each } = self.tenants.entry(held.claim.tenant.clone()).or_default();
        sum.leases += 1;
        sum.bytes = sum.bytes.plus(held.uses());
        each.insert((held.uses(), Reverse(id.clone())));
    }

    fn subtract(&mut self, id: &LeaseId, held: &Held) {
        self.reserved = self.reserved.less(held.reserved());
        if let Some(Has { sum, each }) = self.tenants.get_mut(&held.claim.tenant) {
            sum.leases = sum.leases.saturating_sub(1);
            sum.bytes = sum.bytes.less(held.uses());
            each.remove(&(held.uses(), Reverse(id.clone())));
            if sum.leases == 0 {
                self.tenants.remove(&held.claim.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests;
