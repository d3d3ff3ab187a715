//! What this process is at: the leases that it is making, and the images that disks are asked of.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cowshed_leases::LeaseId;

/// Leases that are being made: what is shared may have several makers. One that is being prepared and is not among them was left
/// half made.
pub type Making = UnderWay<LeaseId>;
/// Who makes a lease, from before its intent on.
pub type Maker = AtWork<LeaseId>;
/// Names of images that disks are asked of, until there is a lease that says so, or the wish has come to nothing. None of them is
/// to go for the room that is made for such a disk.
pub type Wishes = UnderWay<String>;

/// What somebody is at, and how many are. Clones share it.
#[derive(Clone, Debug)]
pub struct UnderWay<T: Ord + Clone>(Arc<Mutex<BTreeMap<T, usize>>>);

impl<T: Ord + Clone> Default for UnderWay<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Ord + Clone> UnderWay<T> {
    /// Until what is returned is dropped.
    pub fn begin(&self, what: T) -> AtWork<T> {
        *self.lock().entry(what.clone()).or_default() += 1;
        AtWork { all: self.clone(), what }
    }

    /// Those of now.
    pub fn now(&self) -> BTreeSet<T> {
        self.lock().keys().cloned().collect()
    }

    /// Whether somebody is at it now.
    pub fn contains(&self, what: &T) -> bool {
        self.lock().contains_key(what)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<T, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who is at it; lets go of it when dropped, also by a panic.
#[must_use]
#[derive(Debug)]
pub struct AtWork<T: Ord + Clone> {
    all: UnderWay<T>,
    what: T,
}

impl<T: Ord + Clone> Drop for AtWork<T> {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        match all.get_mut(&self.what) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(all.remove(&self.what)),
        }
    }
}
