//! Unpacks layers into the configured snapshotter, each on the one below, as containerd's own clients do: the result
//! is the same committed snapshots under the same chain ids.

use std::{collections::HashMap, time::Instant};

use containerd_client::types::Descriptor as ContainerdDescriptor;

use super::{Cache, Digest, Shared, labels, manifest::Descriptor, store::Store};
use crate::{
    containerd::{CallError, Mount},
    error::{Error, Reason, Result},
};

/// One layer to unpack.
pub(super) struct Layer<'a> {
    /// As it is fetched.
    pub(super) blob: &'a Descriptor,
    /// Of its uncompressed bytes.
    pub(super) diff_id: &'a Digest,
    /// Of it and all below.
    pub(super) chain_id: &'a Digest,
    /// Chain id of the layer below; `None` for the lowest.
    pub(super) parent: Option<&'a Digest>,
}

/// Unpacks `layer` unless it is there; its snapshot is held by the store's lease.
pub(super) async fn unpack(store: &Store<'_>, layer: &Layer<'_>) -> Result<Cache> {
    let (shared, lease) = (store.shared, store.lease);
    // The same bytes take everybody equally long, and each try is bounded by the unpack timeout. Other bytes that claim to
    // be the same layer are strangers: they may need all of that time and come to nothing. Working beside them does no
    // harm: each has a snapshot of its own until it is committed.
    let thing = format!("unpack {}", layer.chain_id);
    let _turn = store.brake.or(shared.locks.turn(&thing, layer.blob.digest.as_str())).await?;
    if is_held(shared, lease, layer.chain_id).await? {
        return Ok(Cache::Hit);
    }
    let begun = Instant::now();
    let key = format!("extract-{} {}", uuid::Uuid::new_v4().simple(), layer.chain_id);
    match apply(shared, lease, &key, layer).await {
        Ok(()) => {
            // Only now: until it was applied, it was but what the image's configuration claims.
            store.label(&layer.blob.digest, labels::of_applied(layer.diff_id)).await?;
            shared.observer.layer_unpacked(begun.elapsed());
            Ok(Cache::Miss)
        }
        Err(error) => {
            let removed = crate::containerd::Snapshots::remove(&*shared.containerd, &key).await;
            // Another client's unpacking of the same layer may have come first.
            if is_held(shared, lease, layer.chain_id).await.unwrap_or(false) {
                return Ok(Cache::Hit);
            }
            Err(match removed {
                Ok(()) => error,
                Err(second) => error
                    .context(format!("(and the unfinished snapshot {key:?} stays in containerd: {second})")),
            })
        }
    }
}

/// Whether the layer is unpacked, and from now on held.
async fn is_held(shared: &Shared, lease: &str, chain_id: &Digest) -> Result<bool> {
    let containerd = &shared.containerd;
    if !shared.has_snapshot(chain_id).await? {
        return Ok(false);
    }
    containerd.hold_snapshot(lease, chain_id.as_str()).await.map_err(|e| containerd.explain(e))?;
    shared.has_snapshot(chain_id).await
}

async fn apply(shared: &Shared, lease: &str, key: &str, layer: &Layer<'_>) -> Result<()> {
    let containerd = &shared.containerd;
    let parent = layer.parent.map(Digest::as_str).unwrap_or_default();
    let labels = HashMap::from([("containerd.io/snapshot.ref".to_owned(), layer.chain_id.to_string())]);
    let prepared = containerd.prepare_snapshot(lease, key, parent, labels.clone()).await;
    let mounts = prepared.map_err(|e| containerd.explain(e))?;
    let applied = apply_diff(shared, layer, mounts).await?;
    if applied != layer.diff_id.as_str() {
        let message = format!(
            "layer {} unpacks to {applied}, its configuration says {}: the image is damaged, build and push it again",
            layer.blob.digest, layer.diff_id
        );
        return Err(Error::new(Reason::ImageCorrupt, message).with("digest", &layer.blob.digest));
    }
    let committed = containerd.commit_snapshot(lease, layer.chain_id.as_str(), key, labels).await;
    committed.map_err(|e| containerd.explain(e))
}

async fn apply_diff(shared: &Shared, layer: &Layer<'_>, mounts: Vec<Mount>) -> Result<String> {
    let descriptor = ContainerdDescriptor {
        media_type: layer.blob.media_type.clone(),
        digest: layer.blob.digest.to_string(),
        size: i64::try_from(layer.blob.size).unwrap_or(i64::MAX),
        ..Default::default()
    };
    let applied = shared.containerd.apply(descriptor, mounts, shared.limits.unpack_timeout).await;
    applied.map_err(|error| refused(shared, layer, error))
}

fn refused(shared: &Shared, layer: &Layer<'_>, error: CallError) -> Error {
    let text = error.message().to_ascii_lowercase();
    let digest = &layer.blob.digest;
    // Within an apply, "no space" is the snapshot's own filesystem.
    if text.contains("no space left on device") {
        let message = format!(
            "layer {digest} does not fit: the unpacked image is larger than the snapshotter's disks; make them larger \
             ([snapshotter] base_size; of containerd's devmapper: base_image_size)"
        );
        return Error::new(Reason::ImageUnsupported, message).with("digest", digest);
    }
    let damaged = [
        "unexpected eof",
        "gzip: invalid",
        "invalid checksum",
        "invalid tar header",
        "magic number mismatch",
    ];
    if damaged.iter().any(|sign| text.contains(sign)) {
        let message =
            format!("layer {digest} cannot be unpacked: {}; build and push the image again", error.message());
        return Error::new(Reason::ImageCorrupt, message).with("digest", digest);
    }
    shared.containerd.explain(error).context(format!("layer {digest}"))
}
