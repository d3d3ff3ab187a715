//! Which leases this process is making now. One that is being prepared and is not among them was left half made.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cowshed_leases::LeaseId;

/// Leases that are being made. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Making(Arc<Mutex<BTreeSet<LeaseId>>>);

impl Making {
    /// From before the lease's intent until its maker has let go of it.
    pub fn begin(&self, id: LeaseId) -> Maker {
        self.lock().insert(id.clone());
        Maker { making: self.clone(), id }
    }

    /// Those of now.
    pub fn now(&self) -> BTreeSet<LeaseId> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<LeaseId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who makes a lease; lets go of it when dropped, also by a panic.
#[must_use]
#[derive(Debug)]
pub struct Maker {
    making: Making,
    id: LeaseId,
}

impl Drop for Maker {
    fn drop(&mut self) {
        self.making.lock().remove(&self.id);
    }
}
