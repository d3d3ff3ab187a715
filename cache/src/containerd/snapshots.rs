//! containerd's snapshots, in the configured snapshotter.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UsageRequest, ViewSnapshotRequest,
    snapshots_client::SnapshotsClient,
};
use cowshed_leases::Scratch;
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};

use super::{CallError, Containerd};

type Client = SnapshotsClient<Channel>;
/// A call under way.
type Sent<T> = BoxFuture<'static, Result<Response<T>, Status>>;

/// How a snapshot is mounted; for a block snapshotter, `source` is its device.
pub type Mount = containerd_client::types::Mount;

/// Snapshots and the leases that hold them: the part of containerd that acquire and release need, and the seam where
/// tests put a fake.
#[async_trait::async_trait]
pub trait Snapshots: Send + Sync {
    /// Makes a lease without expiry. Succeeds if it is there.
    async fn create_lease(&self, id: &str, labels: HashMap<String, String>) -> Result<(), CallError>;
    /// Deletes a lease and so all that it alone holds; with `sync` waits for the collection. Succeeds if not there.
    async fn delete_lease(&self, id: &str, sync: bool) -> Result<(), CallError>;
    /// Ids of the leases that carry our label.
    async fn our_leases(&self) -> Result<Vec<String>, CallError>;
    /// Makes a writable snapshot of `parent`, held by `lease`.
    async fn prepare(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError>;
    /// Makes a read-only snapshot of `parent`, held by `lease`.
    async fn view(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError>;
    /// Makes an empty writable snapshot, held by `lease`. Only Cowshed's own snapshotter heeds what is asked for.
    async fn empty(&self, lease: &str, key: &str, scratch: Scratch) -> Result<Vec<Mount>, CallError>;
    /// How the snapshot `key` is mounted.
    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, CallError>;
    /// Removes the snapshot `key`'s record; its device goes at containerd's next collection. Succeeds if not there.
    async fn remove(&self, key: &str) -> Result<(), CallError>;
    /// Keys of the active snapshots and views that begin with `prefix`.
    async fn keys(&self, prefix: &str) -> Result<Vec<String>, CallError>;
    /// Lets the containerd lease `lease` hold the snapshot `key`, which is there.
    async fn hold(&self, lease: &str, key: &str) -> Result<(), CallError>;
    /// Has containerd compare its snapshots with the snapshotter's, and remove what it does not know.
    async fn sweep(&self) -> Result<(), CallError>;
    /// What a failed call means to a caller of Cowshed.
    fn explain(&self, error: CallError) -> crate::error::Error;
}

/// The label that every containerd lease of Cowshed's carries.
pub const LEASE_LABEL: &str = "cowshed.io/lease";

/// What has this label is not collected, whatever its value.
const GC_ROOT: &str = "containerd.io/gc.root";
/// Cowshed's snapshotter's labels for a snapshot without a parent: its size in bytes, and "raw" for no filesystem.
const SIZE: &str = "containerd.io/snapshot/cowshed.size";
const FORMAT: &str = "containerd.io/snapshot/cowshed.format";

/// A snapshot, as containerd lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Its name; of an active one, its key.
    pub name: String,
    /// The one that it stands on.
    pub parent: Option<String>,
    /// Whether it is a layer: others are active, or views.
    pub committed: bool,
    /// When it was made; tells it from an earlier one of its name.
    pub created_at: Option<SystemTime>,
    /// What it holds, and what holds it.
    pub labels: HashMap<String, String>,
}

impl From<Info> for SnapshotRecord {
    fn from(info: Info) -> Self {
        Self {
            committed: info.kind() == Kind::Committed,
            name: info.name,
            parent: Some(info.parent).filter(|parent| !parent.is_empty()),
            created_at: info.created_at.and_then(|at| SystemTime::try_from(at).ok()),
            labels: info.labels,
        }
    }
}

/// Held by itself as well: a lease is deleted by hand more easily than a snapshot is removed.
fn kept(key: &str) -> HashMap<String, String> {
    HashMap::from([(GC_ROOT.to_owned(), key.to_owned())])
}

impl Containerd {
    fn snapshots(&self) -> Client {
        SnapshotsClient::new(self.channel.clone()).max_decoding_message_size(super::MAX_MESSAGE_BYTES)
    }

    /// Makes a call with a containerd that may yet connect to the snapshotter.
    async fn when_connected<M: Clone, T>(
        &self,
        name: &'static str,
        lease: &str,
        message: M,
        send: impl Fn(Client, Request<M>) -> Sent<T>,
    ) -> Result<T, CallError> {
        let patience = Patience::begin();
        loop {
            let request = self.leased(lease, message.clone());
            let answer = self.call(name, send(self.snapshots(), request)).await;
            if let Some(answer) = patience.ends_with(answer).await {
                return answer;
            }
        }
    }

    /// Makes a writable snapshot of `parent` (of nothing if empty), held by `lease`.
    pub async fn prepare_snapshot(
        &self,
        lease: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, CallError> {
        let message = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let sent = self.when_connected("Snapshots.Prepare", lease, message, |mut snapshots, request| {
            async move { snapshots.prepare(request).await }.boxed()
        });
        Ok(sent.await?.mounts)
    }

    /// Makes a read-only snapshot of `parent`, held by `lease`.
    pub async fn view_snapshot(
        &self,
        lease: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, CallError> {
        let message = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let sent = self.when_connected("Snapshots.View", lease, message, |mut snapshots, request| {
            async move { snapshots.view(request).await }.boxed()
        });
        Ok(sent.await?.mounts)
    }

    /// All snapshots.
    pub async fn list_snapshots(&self) -> Result<Vec<SnapshotRecord>, CallError> {
        self.snapshots_that(Vec::new()).await
    }

    async fn snapshots_that(&self, filters: Vec<String>) -> Result<Vec<SnapshotRecord>, CallError> {
        const LIST: &str = "Snapshots.List";
        let message = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters };
        let mut pages = self.call(LIST, self.snapshots().list(self.request(message))).await?;
        let mut all = Vec::new();
        loop {
            let next = async { pages.message().await.map(Response::new) };
            let Some(page) = self.call(LIST, next).await? else { return Ok(all) };
            all.extend(page.info.into_iter().map(SnapshotRecord::from));
        }
    }

    /// The name of a committed snapshot, if there is one.
    pub async fn any_committed(&self) -> Result<Option<String>, CallError> {
        let message = ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: vec!["kind==committed".to_owned()],
        };
        let mut stream = self.call("Snapshots.List", self.snapshots().list(self.request(message))).await?;
        let next = async { stream.message().await.map(Response::new) };
        let page = self.call("Snapshots.List", next).await?;
        Ok(page.and_then(|page| page.info.into_iter().next()).map(|info| info.name))
    }

    /// Turns the active snapshot `key` into the committed one `name`, held by `lease`.
    pub async fn commit_snapshot(
        &self,
        lease: &str,
        name: &str,
        key: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallError> {
        let message = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
        };
        let sent = self.when_connected("Snapshots.Commit", lease, message, |mut snapshots, request| {
            async move { snapshots.commit(request).await }.boxed()
        });
        sent.await
    }

    /// The labels of the snapshot `name`, active or committed, if there is one.
    pub async fn snapshot_labels(&self, name: &str) -> Result<Option<HashMap<String, String>>, CallError> {
        let message = StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        match self.call("Snapshots.Stat", self.snapshots().stat(self.request(message))).await {
            Ok(reply) => Ok(Some(reply.info.map(|info| info.labels).unwrap_or_default())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many bytes the snapshot `name` has besides its parent's, if there is one.
    pub async fn snapshot_usage(&self, name: &str) -> Result<Option<u64>, CallError> {
        let message = UsageRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        match self.call("Snapshots.Usage", self.snapshots().usage(self.request(message))).await {
            Ok(reply) => Ok(Some(u64::try_from(reply.size).unwrap_or_default())),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// containerd 1.7 gives a proxy plugin one second for its first connection, and tries again three seconds later.
const CONNECTS_WITHIN: Duration = Duration::from_secs(6);
const PAUSE: Duration = Duration::from_millis(200);

/// With a containerd that may yet connect to the snapshotter.
struct Patience {
    until: Instant,
}

impl Patience {
    fn begin() -> Self {
        Self { until: Instant::now() + CONNECTS_WITHIN }
    }

    /// What a call has come to; `None`, after a moment, if it is to be made again.
    async fn ends_with<T>(&self, answer: Result<T, CallError>) -> Option<Result<T, CallError>> {
        match answer {
            Err(error) if error.is_without_snapshotter() && Instant::now() < self.until => {
                tracing::debug!(%error, "containerd has not connected to the snapshotter yet");
                tokio::time::sleep(PAUSE).await;
                None
            }
            answer => Some(answer),
        }
    }
}

#[async_trait::async_trait]
impl Snapshots for Containerd {
    async fn create_lease(&self, id: &str, labels: HashMap<String, String>) -> Result<(), CallError> {
        Self::create_lease(self, id, labels).await
    }

    async fn delete_lease(&self, id: &str, sync: bool) -> Result<(), CallError> {
        Self::delete_lease(self, id, sync).await
    }

    async fn our_leases(&self) -> Result<Vec<String>, CallError> {
        Ok(self.list_leases(LEASE_LABEL).await?.into_iter().map(|lease| lease.id).collect())
    }

    async fn prepare(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError> {
        self.prepare_snapshot(lease, key, parent, kept(key)).await
    }

    async fn view(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError> {
        self.view_snapshot(lease, key, parent, kept(key)).await
    }

    async fn empty(&self, lease: &str, key: &str, scratch: Scratch) -> Result<Vec<Mount>, CallError> {
        let mut labels = kept(key);
        labels.insert(SIZE.to_owned(), scratch.size_bytes.to_string());
        if scratch.raw {
            labels.insert(FORMAT.to_owned(), "raw".to_owned());
        }
        self.prepare_snapshot(lease, key, "", labels).await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, CallError> {
        let message = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        Ok(self.call("Snapshots.Mounts", self.snapshots().mounts(self.request(message))).await?.mounts)
    }

    async fn remove(&self, key: &str) -> Result<(), CallError> {
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        match self.call("Snapshots.Remove", self.snapshots().remove(self.request(message))).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn keys(&self, prefix: &str) -> Result<Vec<String>, CallError> {
        let filters = ["active", "view"].map(|kind| format!("kind=={kind},name~=\"^{prefix}\"")).to_vec();
        Ok(self.snapshots_that(filters).await?.into_iter().map(|snapshot| snapshot.name).collect())
    }

    async fn hold(&self, lease: &str, key: &str) -> Result<(), CallError> {
        self.hold_snapshot(lease, key).await
    }

    async fn sweep(&self) -> Result<(), CallError> {
        Self::sweep(self).await
    }

    fn explain(&self, error: CallError) -> crate::error::Error {
        Self::explain(self, error)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    const PREFACE: &str = "connection error: desc = \"error reading server preface: read unix \
                           @->/run/cowshed/snapshotter.sock: use of closed network connection\": unavailable";

    fn failed(code: Code, message: &str) -> CallError {
        CallError::Status { call: "Snapshots.Prepare", status: Box::new(Status::new(code, message)) }
    }

    /// A call that fails so often, as that says: what it comes to, and how often it was made.
    async fn calls(failures: usize, code: Code, message: &str) -> (Result<(), CallError>, usize) {
        let (patience, mut made) = (Patience::begin(), 0);
        loop {
            made += 1;
            let answer = if made <= failures { Err(failed(code, message)) } else { Ok(()) };
            if let Some(answer) = patience.ends_with(answer).await {
                return (answer, made);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshotter_that_containerd_has_not_reached_yet_is_waited_for() {
        let (done, made) = calls(3, Code::Unavailable, PREFACE).await;
        assert!(done.is_ok() && made == 4, "{made}");
        let begun = Instant::now();
        let (refused, made) = calls(usize::MAX, Code::Unavailable, PREFACE).await;
        assert!(refused.is_err_and(|error| error.is_without_snapshotter()));
        assert!(made > 20 && begun.elapsed() >= CONNECTS_WITHIN, "{made} in {:?}", begun.elapsed());
        assert!(begun.elapsed() < CONNECTS_WITHIN * 2, "{:?}", begun.elapsed());
        // What may have been done, and what is refused for another reason.
        for (code, message) in [
            (Code::Unavailable, "error reading from server: EOF"),
            (Code::Unknown, PREFACE),
            (Code::NotFound, "no such snapshot"),
        ] {
            let (refused, made) = calls(1, code, message).await;
            assert!(refused.is_err() && made == 1, "{message}: {made}");
        }
    }
}
