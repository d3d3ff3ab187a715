//! Which snapshots somebody is at work on: the reclaimer leaves them alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::tree::SnapshotId;

/// Snapshots that are being made or made something of, and those whose removal is not written down yet, with how many
/// are at it. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Busy(Arc<Mutex<HashMap<SnapshotId, usize>>>);

/// Somebody is at work on these until it is dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    busy: Busy,
    ids: Vec<SnapshotId>,
}

impl Busy {
    pub(crate) fn hold(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Hold {
        let hold = Hold { busy: self.clone(), ids: ids.into_iter().collect() };
        let mut counts = self.counts();
        hold.ids.iter().for_each(|id| *counts.entry(*id).or_default() += 1);
        drop(counts);
        hold
    }

    /// As it is now, and stays as long as what is returned is kept.
    pub(crate) fn counts(&self) -> MutexGuard<'_, HashMap<SnapshotId, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    pub(crate) fn ids(&self) -> &[SnapshotId] {
        &self.ids
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut counts = self.busy.counts();
        for id in &self.ids {
            if let Some(count) = counts.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(id);
                }
            }
        }
    }
}
