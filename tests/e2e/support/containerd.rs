//! containerd, asked directly: to start a `ctr` takes an emulated host about a second, and the tests ask often. Where
//! it matters that `ctr` itself understands what it finds, a test starts it.

use std::{collections::BTreeSet, path::Path};

use containerd_client::services::v1::{
    DeleteImageRequest, ListContentRequest, ListImagesRequest, ListRequest, ListStatusesRequest,
    content_client::ContentClient, images_client::ImagesClient, leases_client::LeasesClient, snapshots::Kind,
    version_client::VersionClient,
};
use futures_util::TryStreamExt as _;
use tonic::{Code, Request, transport::Channel};

use super::{
    Outcome,
    api::block_on,
    cow::snapshotter,
    cowshed,
    snapshots::{CONTAINERD, Snapshots, request_in},
};

/// The namespace that Cowshed uses unless it is told otherwise.
const NAMESPACE: &str = "default";

/// A snapshot: its key or name, and "Active", "View" or "Committed" as `ctr` has it.
pub(crate) type Snapshot = (String, &'static str);

async fn channel() -> Outcome<Channel> {
    Ok(cowshed::channel(Path::new(CONTAINERD)).await?)
}

fn request<T>(message: T) -> Request<T> {
    request_in(NAMESPACE, message)
}

/// Whether it answers; its version.
pub(crate) fn version() -> Outcome<String> {
    block_on(async {
        let reply = VersionClient::new(channel().await?).version(request(())).await?;
        Ok(reply.into_inner().version)
    })
}

/// Ids of its leases.
pub(crate) fn leases() -> Outcome<Vec<String>> {
    block_on(async {
        let listed = LeasesClient::new(channel().await?).list(request(ListRequest::default())).await?;
        Ok(listed.into_inner().leases.into_iter().map(|lease| lease.id).collect())
    })
}

/// Names of its images.
pub(crate) fn images() -> Outcome<BTreeSet<String>> {
    block_on(async {
        let listed = ImagesClient::new(channel().await?).list(request(ListImagesRequest::default())).await?;
        Ok(listed.into_inner().images.into_iter().map(|image| image.name).collect())
    })
}

/// Removes an image's name, and waits for the collection of what only it held. One that is not there is no error.
pub(crate) fn remove_image(name: &str) -> Outcome {
    block_on(async {
        let message = DeleteImageRequest { name: name.to_owned(), sync: true, ..Default::default() };
        match ImagesClient::new(channel().await?).delete(request(message)).await {
            Err(status) if status.code() != Code::NotFound => Err(status.into()),
            _ => Ok(()),
        }
    })
}

/// Digests of its blobs.
pub(crate) fn blobs() -> Outcome<Vec<String>> {
    block_on(async {
        let client = ContentClient::new(channel().await?);
        let pages = { client }.list(request(ListContentRequest::default())).await?.into_inner();
        let pages: Vec<_> = pages.try_collect().await?;
        Ok(pages.into_iter().flat_map(|page| page.info).map(|info| info.digest).collect())
    })
}

/// References of the writes that have begun and are not over.
pub(crate) fn writes() -> Outcome<Vec<String>> {
    block_on(async {
        let message = request(ListStatusesRequest::default());
        let listed = ContentClient::new(channel().await?).list_statuses(message).await?;
        Ok(listed.into_inner().statuses.into_iter().map(|status| status.r#ref).collect())
    })
}

/// The snapshots of a snapshotter.
pub(crate) fn snapshots(snapshotter: &str) -> Outcome<Vec<Snapshot>> {
    block_on(async {
        let listed = Snapshots::new(channel().await?, snapshotter, NAMESPACE).list().await?;
        let described = listed.into_iter().map(|info| {
            let kind = kind(info.kind());
            (info.name, kind)
        });
        Ok(described.collect())
    })
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Active => "Active",
        Kind::View => "View",
        Kind::Committed => "Committed",
        Kind::Unknown => "Unknown",
    }
}

/// Has it collect what nothing holds.
pub(crate) fn collect() -> Outcome {
    block_on(async { Ok(Snapshots::new(channel().await?, snapshotter(), NAMESPACE).collect().await?) })
}
