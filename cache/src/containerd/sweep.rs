//! Has containerd compare its snapshots with the snapshotter's, once after a start.
//!
//! A crash inside a Prepare can leave a snapshot that the snapshotter knows and containerd does not. containerd looks for
//! such orphans only in a collection after a removal, which may be long in coming; so one is removed.

use std::collections::HashMap;

use super::{CallError, Containerd, Snapshots};

/// How a sweep's lease and snapshot begin.
const NAME: &str = "cowshed-sweep";

impl Containerd {
    /// Makes a view of any committed snapshot, or an empty one where there is none, and deletes it with a collection.
    ///
    /// # Errors
    /// If containerd cannot be asked. What was made then goes with the next sweep.
    pub async fn sweep(&self) -> Result<(), CallError> {
        // A kill in the middle of an earlier one left its lease.
        for left in self.list_leases(LABEL).await? {
            self.delete_lease(&left.id, true).await?;
        }
        let parent = self.any_committed().await?;
        let lease = format!("{NAME}-{}", uuid::Uuid::new_v4().simple());
        self.create_lease(&lease, HashMap::from([(LABEL.to_owned(), "start".to_owned())])).await?;
        let made = match &parent {
            Some(parent) => self.view_snapshot(&lease, &lease, parent, HashMap::new()).await.map(drop),
            None => self.prepare_snapshot(&lease, &lease, "", HashMap::new()).await.map(drop),
        };
        let removed = Snapshots::delete_lease(self, &lease, true).await;
        match made {
            // It was removed between the two calls: a removal as good as ours.
            Err(error) if error.is_not_found() => removed,
            made => made.and(removed),
        }
    }
}

/// The label of a sweep's lease.
const LABEL: &str = "cowshed.io/sweep";
