//! What the pool has promised, shared by who acquires, who releases and who looks; decided by `cowshed_gc::reserve`.
//!
//! Sums follow the ledger's records as writes are decided: a lease counts when its intent is decided, and no more when its release
//! is. Who is on the way to an intent has a [`Ticket`] under the id that the lease will have, so that it counts once.
//!
//! What disks of before the start have written is in use in the pool, and until somebody has looked it would be reserved a second time:
//! where it counts nothing is promised before that look.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cowshed_gc::{
    evict::Bytes,
    reserve::{Asked, Claim, History, Policy, Refusal, Reserve, Use},
};
use cowshed_leases::{Book, Change, Lease, LeaseId, Tenant};
use tokio::{sync::watch, time::Instant};

use crate::error::{Error, Reason, Result};

/// So long the first look at what disks have written is waited for.
const FIRST_LOOK: Duration = Duration::from_secs(5);
/// Who was not promised anything for lack of it may ask again so soon.
const AGAIN: Duration = Duration::from_secs(1);

/// All that was promised, and what disks were seen to write. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Promises(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
    /// Whether it is known what the disks of before the start have written.
    known: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Inner {
    reserve: Reserve,
    history: History,
}

impl Promises {
    /// To all leases of the book.
    pub(crate) fn of(book: &Book) -> Self {
        let this = Self::default();
        let mut inner = this.lock();
        for lease in book.after(None) {
            let _nothing_known = inner.reserve.set(&lease.id, Claim::of(lease));
        }
        let has_none = inner.reserve.leases().next().is_none();
        drop(inner);
        if has_none {
            this.set_known();
        }
        this
    }

    /// Promises the lease of this id its room, if that can be.
    ///
    /// # Errors
    /// What stands against it.
    pub(crate) fn promise(&self, policy: &Policy, id: LeaseId, asked: &Asked<'_>) -> Result<Ticket, Refusal> {
        let mut inner = self.lock();
        policy.admit(&inner.reserve, asked)?;
        let _nothing_known = inner.reserve.set(&id, Some(asked.claim.clone()));
        drop(inner);
        Ok(Ticket { promises: self.clone(), id, is_kept: false })
    }

    /// Whether that could be promised now.
    ///
    /// # Errors
    /// What stands against it.
    pub fn would(&self, policy: &Policy, asked: &Asked<'_>) -> Result<(), Refusal> {
        policy.admit(&self.lock().reserve, asked)
    }

    /// What a disk that a tenant has of the image is expected to write.
    pub fn expects(&self, policy: &Policy, tenant: &Tenant, image: &str) -> Bytes {
        let learnt = if policy.learns { self.lock().history.expects(tenant, image) } else { None };
        learnt.unwrap_or(policy.expected)
    }

    /// The disk of this lease has gone, and had written so much. What only shares its image's blocks tells nothing of it.
    pub(crate) fn learn(&self, policy: &Policy, lease: &Lease, written: Bytes) {
        if lease.shares.is_some() {
            return;
        }
        // One of before there were promises was expected to write as much as any other.
        let expected = if lease.expects == 0 { policy.expected } else { Bytes(lease.expects) };
        self.lock().history.learn(&lease.spec.tenant, &lease.spec.image, expected, written);
    }

    /// Some time has gone by: what was learnt comes a part nearer to what is expected of a disk of which nothing is known.
    pub(crate) fn fade(&self, policy: &Policy) {
        self.lock().history.fade(policy.expected);
    }

    /// So much has been written by now.
    pub(crate) fn wrote<'a>(&self, written: impl IntoIterator<Item = &'a (LeaseId, Bytes)>) {
        let mut inner = self.lock();
        written.into_iter().for_each(|(id, written)| inner.reserve.wrote(id, *written));
    }

    /// What disks have written is known from now on.
    pub(crate) fn set_known(&self) {
        let _was_not = self.0.known.send_if_modified(|known| !std::mem::replace(known, true));
    }

    /// Whether what disks have written is known.
    pub(crate) fn are_known(&self) -> bool {
        *self.0.known.borrow()
    }

    /// Whether anything can be promised by now; of what is not limited, always.
    ///
    /// # Errors
    /// If it has to be known what disks have written, and is not yet.
    pub fn ready(&self, policy: &Policy) -> Result<()> {
        let Some(percent) = policy.overcommit_percent.filter(|_| !self.are_known()) else { return Ok(()) };
        let message = format!(
            "what the disks that there are have written is not known so soon after the start, so nothing is promised beside them \
             ([admission] overcommit_percent is {percent}); try again in a moment"
        );
        Err(Error::new(Reason::NotReady, message).retry_after(AGAIN))
    }

    /// The same, if need be after a while, by `until` at the latest.
    ///
    /// # Errors
    /// See [`Self::ready`].
    pub(crate) async fn get_ready(&self, policy: &Policy, until: Option<Instant>) -> Result<()> {
        if self.ready(policy).is_err() {
            let limit = Instant::now() + FIRST_LOOK;
            let mut known = self.0.known.subscribe();
            let looking = known.wait_for(|known| *known);
            let _in_time =
                tokio::time::timeout_at(until.map_or(limit, |until| until.min(limit)), looking).await;
        }
        self.ready(policy)
    }

    /// What is promised, and not written yet.
    pub fn reserved(&self) -> Bytes {
        self.lock().reserve.reserved()
    }

    /// What the tenant has.
    pub fn used_by(&self, tenant: &Tenant) -> Use {
        self.lock().reserve.of(tenant)
    }

    /// The tenant's lease with the largest disk.
    pub(crate) fn largest(&self, tenant: &Tenant) -> Option<LeaseId> {
        self.lock().reserve.largest(tenant).map(|(id, _)| id.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A promise that no lease has yet. It is taken back when it is dropped.
#[must_use]
#[derive(Debug)]
pub(crate) struct Ticket {
    promises: Promises,
    id: LeaseId,
    is_kept: bool,
}

impl Ticket {
    /// The lease is in the ledger, which says from now on whether it counts.
    pub(crate) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_kept {
            let _nobody_looked = self.promises.lock().reserve.set(&self.id, None);
        }
    }
}

/// Has the promises follow the records on which is decided, what is taken back included. A copy of those leads nobody.
#[derive(Debug, Default)]
pub(crate) struct Leads(Option<Promises>);

impl Clone for Leads {
    fn clone(&self) -> Self {
        Self(None)
    }
}

impl Leads {
    pub(crate) fn these(promises: &Promises) -> Self {
        Self(Some(promises.clone()))
    }

    /// The book has this change.
    pub(crate) fn changed(&self, book: &Book, id: Option<&LeaseId>) {
        if let (Some(promises), Some(id)) = (&self.0, id) {
            let claim = book.get(id).and_then(Claim::of);
            let _written = promises.lock().reserve.set(id, claim);
        }
    }
}

/// Which lease a change is about.
pub(crate) fn lease_of(change: &Change) -> Option<LeaseId> {
    match change {
        Change::Put(lease) | Change::Undelete(lease, _) => Some(lease.id.clone()),
        Change::Delete(tombstone) => Some(tombstone.id.clone()),
        Change::Unmake(id) => Some(id.clone()),
        Change::Expunge(_) | Change::Request(..) | Change::Bury(_) => None,
    }
}

/// As a caller is told; `vm_of` says whose a lease is.
pub(crate) fn refused(
    refusal: &Refusal,
    policy: &Policy,
    promises: &Promises,
    vm_of: impl Fn(&LeaseId) -> Option<String>,
) -> Error {
    let release = |tenant: &Tenant| match promises.largest(tenant).and_then(|id| vm_of(&id)) {
        Some(vm) => format!("release one, such as that of VM {vm}, which has most"),
        None => "release one".to_owned(),
    };
    match refusal {
        Refusal::Pool { free, reserved, expected, needed } => {
            let percent = policy.overcommit_percent.unwrap_or_default();
            let message = format!(
                "the thin pool has promised what it has: {reserved} are still expected of the disks that there are, {expected} of this \
                 one, and {free} of data are free, where {needed} would have to be ([admission] overcommit_percent is {percent}); \
                 release disks, remove images, or extend it (cowshed pool extend)"
            );
            let error = Error::new(Reason::PoolFull, message).with("reserved_bytes", reserved.0);
            error.with("expected_bytes", expected.0).with("free_bytes", free.0).with("needed_bytes", needed.0)
        }
        Refusal::Leases { whose, tenant, has, limit } => {
            let message = format!(
                "tenant {tenant} has {has} leases, and its quota is {limit} ([[quota]] leases, {whose}); {}, or raise the quota",
                release(tenant)
            );
            Error::new(Reason::QuotaExceeded, message)
                .with("tenant", tenant)
                .with("field", "leases")
                .with("has", has)
                .with("limit", limit)
        }
        Refusal::Bytes { whose, tenant, has, expected, limit } => {
            let message = format!(
                "disks of tenant {tenant} have written, or are expected to, {has}, and {expected} are expected of this one, \
                 and its quota is {limit} ([[quota]] bytes, {whose}); {}, or raise the quota",
                release(tenant)
            );
            Error::new(Reason::QuotaExceeded, message)
                .with("tenant", tenant)
                .with("field", "bytes")
                .with("has", has.0)
                .with("expected", expected.0)
                .with("limit", limit.0)
        }
    }
}

#[cfg(test)]
#[path = "promises_tests.rs"]
mod tests;
