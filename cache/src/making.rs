//! Which leases this process is making now. One that is being prepared and is not among them was left half made.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cowshed_leases::LeaseId;

/// Leases that are being made, and by how many: what is shared may have several makers. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Making(Arc<Mutex<BTreeMap<LeaseId, usize>>>);

impl Making {
    /// From before the lease's intent until its maker has let go of it.
    pub fn begin(&self, id: LeaseId) -> Maker {
        *self.lock().entry(id.clone()).or_default() += 1;
        Maker { making: self.clone(), id }
    }

    /// Those of now.
    pub fn now(&self) -> BTreeSet<LeaseId> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<LeaseId, usize>> {
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
        let mut making = self.making.lock();
        match making.get_mut(&self.id) {
            Some(makers) if *makers > 1 => *makers -= 1,
            _ => drop(making.remove(&self.id)),
        }
    }
}
