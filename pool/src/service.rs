//! containerd's Snapshots API (`containerd.services.snapshots.v1`), as a proxy plugin serves it.

use std::{collections::BTreeMap, iter, pin::Pin, sync::Arc};

use containerd_client::{services::v1::snapshots as api, types::Mount as ApiMount};
use futures_util::Stream;
use prost::Message as _;
use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use crate::{
    error::{Code, Error},
    filter::Filters,
    snapshotter::{Mount, timed},
    standing::Standing,
    tree::{Kind, Snapshot, UnixNanos},
};

#[allow(missing_docs, clippy::all, unused_qualifications, unreachable_pub)]
mod generated {
    tonic::include_proto!("containerd.services.snapshots.v1.Snapshots");
}

use generated::snapshots_server::Snapshots;
pub use generated::snapshots_server::SnapshotsServer;

/// A List's answer comes in messages of so many snapshots at the most,
const PAGE: usize = 100;
/// and of so many bytes, or one snapshot: labels can be an image's annotations, and containerd takes 16 MiB.
const PAGE_BYTES: usize = 1 << 20;

/// Says of a snapshot, by the key that containerd has given it, whether somebody holds it still.
pub type IsHeld = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// The API of a snapshotter.
#[derive(Clone)]
pub struct Api(Standing, IsHeld);

impl Api {
    /// Serves `snapshotter`, and does not let containerd remove what is held: a containerd whose own store was lost takes
    /// all that it does not know for garbage.
    pub fn guarded(snapshotter: Standing, is_held: IsHeld) -> Self {
        Self(snapshotter, is_held)
    }

    async fn make(
        &self,
        operation: &str,
        key: String,
        parent: String,
        kind: Kind,
        labels: Labels,
    ) -> Result<Vec<ApiMount>, Status> {
        let labels = labels.into_iter().collect();
        let making = async { self.0.answering()?.make(key, parent, kind, labels).await };
        Ok(mounts(self.timed(operation, making).await?))
    }

    async fn timed<T>(
        &self,
        operation: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        timed(self.0.metrics(), operation, work).await
    }
}

/// `google.protobuf.Empty`, as prost has it.
pub(crate) type Empty = ();
type Labels = std::collections::HashMap<String, String>;
type Reply<T> = Result<Response<T>, Status>;

#[async_trait::async_trait]
impl Snapshots for Api {
    type ListStream = Pin<Box<dyn Stream<Item = Result<api::ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Reply<api::PrepareSnapshotResponse> {
        let r = request.into_inner();
        let mounts = self.make("prepare", r.key, r.parent, Kind::Active, r.labels).await?;
        Ok(Response::new(api::PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<api::ViewSnapshotRequest>) -> Reply<api::ViewSnapshotResponse> {
        let r = request.into_inner();
        let mounts = self.make("view", r.key, r.parent, Kind::View, r.labels).await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Reply<api::MountsResponse> {
        let key = request.into_inner().key;
        let mount = self.timed("mounts", async { self.0.answering()?.mounts(&key).await }).await?;
        Ok(Response::new(api::MountsResponse { mounts: mounts(mount) }))
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Reply<()> {
        let r = request.into_inner();
        let labels = r.labels.into_iter().collect();
        self.timed("commit", async { self.0.answering()?.commit(r.name, r.key, labels).await }).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Reply<()> {
        let key = request.into_inner().key;
        let removing = async {
            if (self.1)(&key) {
                tracing::warn!(key, "containerd was not let remove a snapshot that is held");
                let message = format!("snapshot {key:?} is held by a lease: release that first");
                return Err(Error::new(Code::FailedPrecondition, message));
            }
            self.0.answering()?.remove(&key)
        };
        self.timed("remove", removing).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<api::StatSnapshotRequest>) -> Reply<api::StatSnapshotResponse> {
        let key = request.into_inner().key;
        let (snapshot, parent) = self.timed("stat", async { self.0.answering()?.stat(&key) }).await?;
        Ok(Response::new(api::StatSnapshotResponse { info: Some(info(&snapshot, &parent)) }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Reply<api::UpdateSnapshotResponse> {
        let r = request.into_inner();
        let wanted = r.info.ok_or_else(|| Status::invalid_argument("info: it is missing"))?;
        let paths = r.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let labels: BTreeMap<_, _> = wanted.labels.into_iter().collect();
        let updating = async { self.0.answering()?.update(wanted.name, labels, paths).await };
        let (snapshot, parent) = self.timed("update", updating).await?;
        Ok(Response::new(api::UpdateSnapshotResponse { info: Some(info(&snapshot, &parent)) }))
    }

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Reply<Self::ListStream> {
        let wanted = request.into_inner().filters;
        let listing = async {
            let filters = Filters::parse(&wanted)?;
            Ok(self.0.answering()?.0.store.read(|tree| {
                let all = tree.listed().map(|snapshot| (snapshot, tree.parent_key(snapshot)));
                let matching = all.filter(|(snapshot, parent)| filters.match_snapshot(snapshot, parent));
                matching.map(|(snapshot, parent)| info(snapshot, parent)).collect::<Vec<_>>()
            }))
        };
        let found = self.timed("list", listing).await?;
        Ok(Response::new(Box::pin(futures_util::stream::iter(pages(found).map(Ok)))))
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Reply<api::UsageResponse> {
        let key = request.into_inner().key;
        let bytes = self.timed("usage", async { self.0.answering()?.usage(&key).await }).await?;
        // Which inodes are in use only the filesystem knows, and that may be a guest's.
        Ok(Response::new(api::UsageResponse { size: i64::try_from(bytes).unwrap_or(i64::MAX), inodes: 0 }))
    }

    async fn cleanup(&self, _request: Request<api::CleanupRequest>) -> Reply<()> {
        let waking = async {
            self.0.answering()?.cleanup();
            Ok(())
        };
        self.timed("cleanup", waking).await?;
        Ok(Response::new(()))
    }
}

fn pages(found: Vec<api::Info>) -> impl Iterator<Item = api::ListSnapshotsResponse> + Send {
    let mut rest = found.into_iter().peekable();
    iter::from_fn(move || {
        rest.peek()?;
        let (mut info, mut bytes) = (Vec::new(), 0);
        while let Some(next) = rest.next_if(|next| {
            bytes += next.encoded_len();
            info.is_empty() || info.len() < PAGE && bytes <= PAGE_BYTES
        }) {
            info.push(next);
        }
        Some(api::ListSnapshotsResponse { info })
    })
}

fn mounts(mount: Mount) -> Vec<ApiMount> {
    vec![ApiMount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    }]
}

fn info(snapshot: &Snapshot, parent: &str) -> api::Info {
    let kind = match snapshot.kind {
        Kind::Active => api::Kind::Active,
        Kind::View => api::Kind::View,
        Kind::Committed => api::Kind::Committed,
        Kind::Blank | Kind::Raw | Kind::Grown | Kind::Heir => api::Kind::Unknown,
    };
    api::Info {
        name: snapshot.key.clone(),
        parent: parent.to_owned(),
        kind: kind.into(),
        created_at: Some(timestamp(snapshot.created)),
        updated_at: Some(timestamp(snapshot.updated)),
        labels: snapshot.labels.clone().into_iter().collect(),
    }
}

fn timestamp(at: UnixNanos) -> Timestamp {
    Timestamp {
        seconds: at.0.div_euclid(1_000_000_000),
        nanos: i32::try_from(at.0.rem_euclid(1_000_000_000)).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_in_messages_that_containerd_takes() {
        let infos = |count: usize, label: usize| -> Vec<api::Info> {
            let labels = || iter::once(("note".to_owned(), "x".repeat(label))).collect();
            (0..count)
                .map(|n| api::Info { name: n.to_string(), labels: labels(), ..Default::default() })
                .collect()
        };
        let sizes = |found: Vec<api::Info>| -> Vec<usize> {
            let all = found.clone();
            let pages: Vec<_> = pages(found).map(|page| page.info).collect();
            assert_eq!(pages.concat(), all);
            pages.iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(infos(0, 0)), [0; 0]);
        assert_eq!(sizes(infos(250, 10)), [100, 100, 50]);
        assert_eq!(sizes(infos(5, 400 << 10)), [2, 2, 1]);
        assert_eq!(sizes(infos(3, 2 << 20)), [1, 1, 1]);
    }
}
