//! What containerd has, asked whole; the seam where tests put a fake.

use std::collections::{BTreeSet, HashMap};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::holds::Labels;
use crate::{
    containerd::{CallError, Containerd, Held, SnapshotRecord},
    error::Result,
    reclaim::ABREAST,
};

/// What takes room in containerd, besides its image records.
#[async_trait::async_trait]
pub trait Survey: Send + Sync {
    /// The snapshotter's name, by which labels name it.
    fn snapshotter(&self) -> &str;
    /// All snapshots.
    async fn snapshots(&self) -> Result<Vec<SnapshotRecord>>;
    /// The labels of all blobs, by digest.
    async fn blobs(&self) -> Result<HashMap<String, Labels>>;
    /// What containerd's leases hold, but for those of these names.
    async fn held(&self, but: &BTreeSet<String>) -> Result<Vec<Held>>;
    /// What a snapshot has besides its parent's, in bytes; `None` if it has gone.
    async fn usage(&self, snapshot: &str) -> Result<Option<u64>>;
}

#[async_trait::async_trait]
impl Survey for Containerd {
    fn snapshotter(&self) -> &str {
        Self::snapshotter(self)
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.list_snapshots().await.map_err(|e| self.explain(e))
    }

    async fn blobs(&self) -> Result<HashMap<String, Labels>> {
        Self::blobs(self).await.map_err(|e| self.explain(e))
    }

    async fn held(&self, but: &BTreeSet<String>) -> Result<Vec<Held>> {
        let all = async {
            let leases = self.all_leases().await?;
            let others = leases.into_iter().map(|lease| lease.id).filter(|id| !but.contains(id));
            let held = stream::iter(others).map(|lease| async move { self.held_by(&lease).await });
            let held: Vec<Vec<Held>> = held.buffer_unordered(ABREAST).try_collect().await?;
            Ok::<_, CallError>(held.concat())
        };
        all.await.map_err(|e| self.explain(e))
    }

    async fn usage(&self, snapshot: &str) -> Result<Option<u64>> {
        self.snapshot_usage(snapshot).await.map_err(|e| self.explain(e))
    }
}
