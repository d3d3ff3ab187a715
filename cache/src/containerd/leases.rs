//! containerd's leases: what holds content and snapshots against its garbage collection.

use std::collections::HashMap;

use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, DeleteRequest, ListRequest, ListResourcesRequest, Resource,
    leases_client::LeasesClient,
};
use tonic::transport::Channel;

use super::{CallError, Containerd};

/// A lease as containerd lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerdLease {
    /// Its id.
    pub id: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
}

/// Something that a lease holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// The blob of this digest, and what its labels lead to.
    Blob(String),
    /// The snapshot of this name in our snapshotter, and those below it.
    Snapshot(String),
}

impl Containerd {
    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone()).max_decoding_message_size(super::MAX_MESSAGE_BYTES)
    }

    /// Makes a lease that does not expire (an expiry has killed live disks elsewhere). Succeeds if it is there.
    pub async fn create_lease(&self, id: &str, labels: HashMap<String, String>) -> Result<(), CallError> {
        let request = self.request(CreateRequest { id: id.to_owned(), labels });
        match self.call("Leases.Create", self.leases().create(request)).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_already_exists() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes a lease; with `sync` a garbage collection is run and waited for. Succeeds if it is not there.
    pub async fn delete_lease(&self, id: &str, sync: bool) -> Result<(), CallError> {
        let request = self.request(DeleteRequest { id: id.to_owned(), sync });
        match self.call("Leases.Delete", self.leases().delete(request)).await {
            Ok(()) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets the lease hold a blob that is there already.
    pub async fn hold_blob(&self, lease: &str, digest: &str) -> Result<(), CallError> {
        self.hold(lease, "content".to_owned(), digest).await
    }

    /// Lets the lease hold a snapshot that is there already.
    pub async fn hold_snapshot(&self, lease: &str, name: &str) -> Result<(), CallError> {
        self.hold(lease, format!("snapshots/{}", self.snapshotter()), name).await
    }

    async fn hold(&self, lease: &str, r#type: String, id: &str) -> Result<(), CallError> {
        let resource = Some(Resource { id: id.to_owned(), r#type });
        let request = self.request(AddResourceRequest { id: lease.to_owned(), resource });
        self.call("Leases.AddResource", self.leases().add_resource(request)).await
    }

    /// All leases that carry the label `label`, with any value.
    pub async fn list_leases(&self, label: &str) -> Result<Vec<ContainerdLease>, CallError> {
        self.leases_that(vec![format!("labels.{label:?}")]).await
    }

    /// All leases, also those of other clients.
    pub async fn all_leases(&self) -> Result<Vec<ContainerdLease>, CallError> {
        self.leases_that(Vec::new()).await
    }

    /// What a lease holds; nothing if it is not there.
    pub async fn held_by(&self, lease: &str) -> Result<Vec<Held>, CallError> {
        let request = self.request(ListResourcesRequest { id: lease.to_owned() });
        let reply = match self.call("Leases.ListResources", self.leases().list_resources(request)).await {
            Ok(reply) => reply,
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let ours = format!("snapshots/{}", self.snapshotter());
        let held = |resource: Resource| match resource.r#type.as_str() {
            "content" => Some(Held::Blob(resource.id)),
            kind if kind == ours => Some(Held::Snapshot(resource.id)),
            _ => None,
        };
        Ok(reply.resources.into_iter().filter_map(held).collect())
    }

    async fn leases_that(&self, filters: Vec<String>) -> Result<Vec<ContainerdLease>, CallError> {
        let request = self.request(ListRequest { filters });
        let reply = self.call("Leases.List", self.leases().list(request)).await?;
        Ok(reply.leases.into_iter().map(|l| ContainerdLease { id: l.id, labels: l.labels }).collect())
    }
}
