//! containerd's Snapshots API, as another client of it uses it. Shared by the programs here that do.

use std::collections::HashMap;

use containerd_client::services::v1::{
    CreateRequest, DeleteRequest,
    leases_client::LeasesClient,
    snapshots::{
        CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
        RemoveSnapshotRequest, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
};
use tonic::{Request, Status, metadata::MetadataValue, transport::Channel};

/// containerd's socket.
pub(crate) const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// A client of one snapshotter, in a namespace of its own. What it makes is held against containerd's collection.
#[derive(Clone)]
pub(crate) struct Snapshots {
    channel: Channel,
    snapshotter: String,
    namespace: &'static str,
}

/// How it is mounted.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    /// The device.
    pub(crate) path: String,
    /// As for mount(8).
    #[allow(dead_code, reason = "not every program that shares this looks at them")]
    pub(crate) options: Vec<String>,
}

impl Snapshots {
    /// Over a connection to containerd.
    pub(crate) fn new(channel: Channel, snapshotter: &str, namespace: &'static str) -> Self {
        Self { channel, snapshotter: snapshotter.to_owned(), namespace }
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        request_in(self.namespace, message)
    }

    pub(crate) async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Mounted, Status> {
        let message = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: held(labels),
        };
        first(self.client().prepare(self.request(message)).await?.into_inner().mounts)
    }

    pub(crate) async fn view(&self, key: &str, parent: &str) -> Result<Mounted, Status> {
        let message = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: held(&[]),
        };
        first(self.client().view(self.request(message)).await?.into_inner().mounts)
    }

    #[allow(dead_code, reason = "not every program that shares this asks for it")]
    pub(crate) async fn mounts(&self, key: &str) -> Result<Mounted, Status> {
        let message = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        first(self.client().mounts(self.request(message)).await?.into_inner().mounts)
    }

    pub(crate) async fn commit(&self, name: &str, key: &str, labels: &[(&str, &str)]) -> Result<(), Status> {
        let message = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: held(labels),
        };
        self.client().commit(self.request(message)).await.map(drop)
    }

    pub(crate) async fn remove(&self, key: &str) -> Result<(), Status> {
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        self.client().remove(self.request(message)).await.map(drop)
    }

    /// containerd collects its garbage; without a process, unlike `ctr`.
    #[allow(dead_code, reason = "not every program that shares this asks for it")]
    pub(crate) async fn collect(&self) -> Result<(), Status> {
        let mut leases = LeasesClient::new(self.channel.clone());
        let id = "collect".to_owned();
        let made = leases.create(self.request(CreateRequest { id: id.clone(), ..Default::default() })).await;
        if let Err(status) = made
            && status.code() != tonic::Code::AlreadyExists
        {
            return Err(status);
        }
        leases.delete(self.request(DeleteRequest { id, sync: true })).await.map(drop)
    }

    pub(crate) async fn list(&self) -> Result<Vec<Info>, Status> {
        let message = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters: Vec::new() };
        let mut stream = self.client().list(self.request(message)).await?.into_inner();
        let mut all = Vec::new();
        while let Some(page) = stream.message().await? {
            all.extend(page.info);
        }
        Ok(all)
    }
}

/// A call of containerd's in one of its namespaces.
pub(crate) fn request_in<T>(namespace: &'static str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(namespace));
    request
}

fn held(labels: &[(&str, &str)]) -> HashMap<String, String> {
    let root = [("containerd.io/gc.root", "2026-01-01T00:00:00Z")];
    root.iter().chain(labels).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn first(mounts: Vec<containerd_client::types::Mount>) -> Result<Mounted, Status> {
    let mount =
        mounts.into_iter().next().ok_or_else(|| Status::internal("there is no mount in the reply"))?;
    Ok(Mounted { path: mount.source, options: mount.options })
}
