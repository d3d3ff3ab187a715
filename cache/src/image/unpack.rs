//! Unpacks layers into the configured snapshotter, each on the one below: the result is the same committed snapshots under
//! the same chain ids as with containerd's own clients.
//!
//! ```text
//!  Prepare ─► mount, apply, compare the digest, write back, unmount (layer, here) ─► the blob is stored? ─► Commit
//!         └─► or containerd's Diff service, if the configuration says so, or what is to be mounted is no block device
//! ```

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_client::types::Descriptor as ContainerdDescriptor;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use super::{
    Cache, Class, Digest, SPARE_THREADS, Shared, Unpacker, access, gate::Gate, manifest::Descriptor,
    memory::Account, store::Store, tap::Outlet, waits::Waits,
};
use crate::{
    containerd::{CallError, Mount},
    error::{Error, Reason, Result},
    layer::{self, Bounds, Detached, Inflated, LayerError, MountPoint, Stop},
    stages::Laps,
};

/// How often it is looked whether time counts.
const TICK: Duration = Duration::from_secs(1);

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
    /// Where its bytes come from.
    pub(super) bytes: &'a Outlet,
}

/// A layer that is being inflated.
pub(super) struct Inflating {
    inflated: Inflated,
    stop: StopWhenDropped,
    /// Whether it is its turn to be applied.
    turn: watch::Sender<bool>,
    /// How long it has been in line for memory since then.
    in_line: Arc<Waits>,
}

/// Nobody may be left to wait for the threads.
struct StopWhenDropped(Stop);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Inflating {
    /// Begins ahead of its turn, if there is a thread to spare.
    pub(super) fn begin_ahead(store: &Store<'_>, blob: &Descriptor, bytes: &Outlet) -> Option<Self> {
        let threads = &store.shared.spare_threads;
        if threads.available_permits() <= kept_from(store.gate.own_class()) {
            return None;
        }
        let spare = threads.clone().try_acquire_owned().ok()?;
        Self::begin(store, blob, bytes, Some(spare))
    }

    /// Begins, unless containerd is to unpack.
    fn begin(
        store: &Store<'_>,
        blob: &Descriptor,
        bytes: &Outlet,
        spare: Option<OwnedSemaphorePermit>,
    ) -> Option<Self> {
        let shared = store.shared;
        if shared.limits.unpacker != Unpacker::Cowshed {
            return None;
        }
        let (stop, turn) = (Stop::default(), watch::Sender::new(false));
        let account = Account::new(&shared.memory, store.gate, bytes.arrival(), turn.subscribe());
        let in_line = account.in_line();
        let (work, inflated) = layer::inflate(shared.limits.layer.inflated(), &stop, Box::new(account));
        let flow = bytes.flow(&shared.containerd, blob.digest.as_str());
        // Its receiver is told if it cannot be made, as if it had ended.
        let _made = thread("inflate", move || {
            work(Box::new(flow));
            drop(spare);
        });
        Some(Self { inflated, stop: StopWhenDropped(stop), turn, in_line })
    }
}

/// Spare threads that pulls of a class leave to those of higher ones: who gives way keeps those that it has.
fn kept_from(class: Class) -> usize {
    match class {
        Class::Background => SPARE_THREADS,
        Class::Normal => SPARE_THREADS / 2,
        Class::Urgent => 0,
    }
}

/// A thread of its own: it may wait for a registry, and must not keep those of the runtime from whoever needs them.
fn thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<oneshot::Receiver<T>> {
    let (sender, receiver) = oneshot::channel();
    let span = tracing::Span::current();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Nobody may wait for it any more.
        let _told = sender.send(span.in_scope(work));
    })?;
    Ok(receiver)
}

/// Unpacks `layer` unless it is there; its snapshot is held by the store's lease.
pub(super) async fn unpack(store: &Store<'_>, layer: &Layer<'_>, ahead: Option<Inflating>) -> Result<Cache> {
    let (shared, lease) = (store.shared, store.lease);
    // The same bytes take everybody equally long, and each try is bounded by the unpack timeout. Other bytes that claim to
    // be the same layer are strangers: they may need all of that time and come to nothing. Working beside them does no
    // harm: each has a snapshot of its own until it is committed. Those who pull from another registry are strangers as
    // well: their bytes may not come.
    let thing = format!("unpack {}", layer.chain_id);
    let kin = format!("{} from {}", layer.blob.digest, store.image.registry());
    store.pass().await?;
    let _turn = store.brake.or(shared.locks.turn(&thing, &kin, Some(store.gate))).await?;
    // Nobody had it when the pull began. If somebody has by now, Prepare says so: to ask for each layer is a call too many.
    let mut has_other = false;
    let mut ahead = ahead;
    loop {
        let begun = Instant::now();
        let key = format!("extract-{} {}", uuid::Uuid::new_v4().simple(), layer.chain_id);
        let applied = apply(store, &key, layer, ahead, has_other).await;
        if let Ok(Applied::Committed { in_line }) = applied {
            shared.observer.layer_unpacked(begun.elapsed().saturating_sub(in_line));
            return Ok(Cache::Miss);
        }
        let removed = crate::containerd::Snapshots::remove(&*shared.containerd, &key).await;
        let error = match applied {
            // It was seen to be the same.
            Ok(Applied::Same) if is_held(shared, lease, layer.chain_id).await? => return Ok(Cache::Hit),
            // Another client's unpacking of the same layer may have come first.
            _ if store.brake.or(take(store, layer)).await.flatten().unwrap_or(false) => {
                return Ok(Cache::Hit);
            }
            Ok(Applied::Found(untouched)) if !has_other => {
                store.brake.check(())?;
                has_other = true;
                ahead = untouched;
                continue;
            }
            Ok(_) => Error::new(
                Reason::NotReady,
                format!("layer {} was removed just now; repeat", layer.blob.digest),
            ),
            Err(error) => error,
        };
        if let Err(second) = removed {
            return Err(
                error.context(format!("(and the unfinished snapshot {key:?} stays in containerd: {second})"))
            );
        }
        // Too much of it, or what nobody has: at once, if nobody else could have served something else.
        if error.reason() == Reason::ImageUnsupported && store.source.endpoints() == 1 {
            return Err(error);
        }
        // What had arrived may turn out to be wrong, and come again from somewhere else.
        if !store.brake.or(layer.bytes.stored()).await? || !layer.bytes.take_spoiled() {
            return Err(error);
        }
        tracing::warn!(%error, "what had arrived was not the layer; it is unpacked anew");
        ahead = None;
    }
}

/// Whether the layer is unpacked, who asks for it may have it, and it is held from now on.
async fn take(store: &Store<'_>, layer: &Layer<'_>) -> Result<bool> {
    let is_theirs = is_theirs(store, layer.chain_id, layer.blob).await?;
    Ok(is_theirs && is_held(store.shared, store.lease, layer.chain_id).await?)
}

/// Whether there is such a snapshot, and who asks for the blob that it is made of may have it.
pub(super) async fn is_theirs(store: &Store<'_>, chain_id: &Digest, blob: &Descriptor) -> Result<bool> {
    match store.shared.snapshot_labels(chain_id).await? {
        Some(labels) => store.asker().may_take(&labels, &blob.digest, blob.size).await,
        None => Ok(false),
    }
}

/// What has come of unpacking a layer.
enum Applied {
    /// After so long in line for memory.
    Committed { in_line: Duration },
    /// There was one by then, and this one is the same.
    Same,
    /// There was one before, and nothing was done.
    Found(Option<Inflating>),
}

/// Whether the layer is unpacked, and from now on held.
pub(super) async fn is_held(shared: &Shared, lease: &str, chain_id: &Digest) -> Result<bool> {
    let containerd = &shared.containerd;
    if !shared.has_snapshot(chain_id).await? {
        return Ok(false);
    }
    containerd.hold_snapshot(lease, chain_id.as_str()).await.map_err(|e| containerd.explain(e))?;
    shared.has_snapshot(chain_id).await
}

/// `has_other`: there is a snapshot of this name that who asks may not take for it.
async fn apply(
    store: &Store<'_>,
    key: &str,
    layer: &Layer<'_>,
    ahead: Option<Inflating>,
    has_other: bool,
) -> Result<Applied> {
    let (shared, lease) = (store.shared, store.lease);
    let containerd = &shared.containerd;
    let parent = layer.parent.map(Digest::as_str).unwrap_or_default();
    // With this label containerd makes none if there is one of that name.
    let reference = ("containerd.io/snapshot.ref".to_owned(), layer.chain_id.to_string());
    let labels = HashMap::from_iter((!has_other).then_some(reference));
    let mut clock = Laps::start();
    let mounts = match containerd.prepare_snapshot(lease, key, parent, labels.clone()).await {
        Ok(mounts) => mounts,
        Err(error) if error.is_already_exists() => return Ok(Applied::Found(ahead)),
        Err(error) => return Err(containerd.explain(error)),
    };
    let prepared = clock.lap();
    let ahead = ahead.or_else(|| Inflating::begin(store, layer.blob, layer.bytes, None));
    let point = mount_point(&mounts);
    let in_line = ahead.as_ref().map(|ahead| ahead.in_line.clone()).unwrap_or_default();
    let applied = match (ahead, point) {
        (Some(ahead), Some(point)) => apply_here(store, layer, point, ahead).await?,
        (ahead, _) => {
            drop(ahead);
            if !store.brake.or(layer.bytes.stored()).await? {
                return Err(not_fetched(layer));
            }
            let _at_work = store.gate.work();
            apply_there(shared, layer, mounts).await?
        }
    };
    let applying = clock.lap();
    if applied != layer.diff_id.as_str() {
        let message = format!(
            "layer {} unpacks to {applied}, its configuration says {}: the image is damaged, build and push it again",
            layer.blob.digest, layer.diff_id
        );
        return Err(Error::new(Reason::ImageCorrupt, message).with("digest", &layer.blob.digest));
    }
    // Before its digest is verified it is nobody's layer, whatever it unpacks to.
    if !store.brake.or(layer.bytes.stored()).await? {
        return Err(not_fetched(layer));
    }
    let waited = clock.lap();
    let owner = store.owner_of_unpacked(&layer.blob.digest, layer.parent).await?;
    let labels = access::labels_of_unpacked(owner.as_ref(), &layer.blob.digest).chain(labels).collect();
    match containerd.commit_snapshot(lease, layer.chain_id.as_str(), key, labels).await {
        Ok(()) => store.unpacked.note(layer.chain_id, owner),
        Err(error) if error.is_already_exists() => return Ok(Applied::Same),
        Err(error) => return Err(containerd.explain(error)),
    }
    let (committed, in_line) = (clock.lap(), in_line.total());
    tracing::debug!(
        digest = %layer.blob.digest, ?prepared, ?applying, ?in_line, ?waited, ?committed, "a layer was unpacked"
    );
    Ok(Applied::Committed { in_line })
}

/// A block device with a filesystem, which is all that can be mounted here.
fn mount_point(mounts: &[Mount]) -> Option<MountPoint> {
    match mounts {
        [Mount { r#type, source, options, .. }] if source.starts_with("/dev/") => {
            Some(MountPoint { kind: r#type.clone(), source: source.clone(), options: options.clone() })
        }
        _ => None,
    }
}

/// Applies it in a thread of this process. Returns its digest.
async fn apply_here(
    store: &Store<'_>,
    layer: &Layer<'_>,
    point: MountPoint,
    Inflating { inflated, stop, turn, in_line }: Inflating,
) -> Result<String> {
    let limits = &store.shared.limits;
    let expected = layer.diff_id.clone();
    let size = layer.blob.size;
    let (bounds, stopped) = (limits.layer, stop.0.clone());
    let is_plain = layer.blob.media_type.ends_with(".tar");
    turn.send_replace(true);
    let work = thread("apply", move || {
        let least = if is_plain { size } else { 0 };
        fill(&point, inflated, least, bounds, &expected, &stopped)
    });
    let mut work = work.map_err(|error| {
        Error::new(Reason::NotReady, format!("no thread can be made to unpack a layer: {error}; repeat"))
    })?;
    let outcome = tokio::select! {
        outcome = &mut work => outcome,
        // Its thread has come to an end before the snapshot is removed.
        why = ended(store, layer, &in_line, limits.unpack_timeout) => {
            stop.0.stop();
            drop(turn);
            match (work.await, why) {
                (Ok((Err(LayerError::Stopped), _)), error) => return Err(error),
                (outcome, _) => outcome,
            }
        }
    };
    match outcome {
        Ok((Ok(applied), _)) => Ok(applied.to_string()),
        Ok((Err(error), disk)) => Err(refused_here(layer, &error, disk)),
        Err(_) => {
            let message = format!("unpacking layer {} panicked; the log says more", layer.blob.digest);
            Err(Error::new(Reason::InternalError, message))
        }
    }
}

/// Ends when the layer should: the pull has failed elsewhere, or was given up, or it takes too long though its bytes are there.
async fn ended(store: &Store<'_>, layer: &Layer<'_>, in_line: &Waits, limit: Duration) -> Error {
    let late = async {
        layer.bytes.stored().await;
        had_time(store.gate, in_line, limit).await
    };
    match store.brake.or(late).await.flatten() {
        Err(stopped) => stopped,
        Ok(()) => {
            let message = format!(
                "layer {} was not unpacked within {} s ([containerd] unpack_timeout_seconds)",
                layer.blob.digest,
                limit.as_secs()
            );
            Error::new(Reason::ContainerdTimeout, message).with("digest", &layer.blob.digest)
        }
    }
}

/// Waits until a layer has had so much time, in which its pull gave way to nobody, and it was not in line for memory.
async fn had_time(gate: &Gate, in_line: &Waits, limit: Duration) -> Result<()> {
    // In line, it needs no registry either.
    let _at_work = gate.work();
    let mut left = limit;
    while !left.is_zero() {
        gate.pass().await?;
        let (tick, before) = (left.min(TICK), in_line.total());
        tokio::time::sleep(tick).await;
        left = left.saturating_sub(tick.saturating_sub(in_line.total() - before));
    }
    Ok(())
}

/// Mounts, applies, compares, writes back, unmounts. Returns also how many bytes the disk has.
fn fill(
    point: &MountPoint,
    inflated: Inflated,
    least: u64,
    bounds: Bounds,
    expected: &Digest,
    stop: &Stop,
) -> (Result<Digest, LayerError>, u64) {
    let mount = match Detached::mount(point) {
        Ok(mount) => mount,
        Err(error) => return (Err(error), 0),
    };
    let mut disk = 0;
    let filled = (|| {
        disk = mount.size()?;
        if least > disk {
            return Err(LayerError::Full);
        }
        let applied = layer::apply(mount.root(stop)?, inflated, bounds)?.finish()?;
        // What is thrown away need not be written.
        if applied == *expected {
            mount.unmount()?;
        }
        Ok(applied)
    })();
    (filled, disk)
}

fn refused_here(layer: &Layer<'_>, error: &LayerError, disk: u64) -> Error {
    let digest = &layer.blob.digest;
    let (reason, message) = match error {
        LayerError::Full => return too_large(digest, Some(disk)),
        LayerError::Damaged(_) => (
            Reason::ImageCorrupt,
            format!("layer {digest} cannot be unpacked: {error}; build and push the image again"),
        ),
        LayerError::Refused(_) => (Reason::ImageUnsupported, format!("layer {digest} is refused: {error}")),
        LayerError::Source(_) | LayerError::Stopped => {
            (Reason::ContainerdUnavailable, format!("layer {digest}: {error}; repeat"))
        }
        LayerError::Filesystem { .. } => (
            Reason::ContainerdError,
            format!("layer {digest} cannot be unpacked: {error}; the kernel's log may say why"),
        ),
    };
    Error::new(reason, message).with("digest", digest)
}

/// The fetching has failed, and says why itself.
fn not_fetched(layer: &Layer<'_>) -> Error {
    let message = format!("layer {} was not fetched; repeat", layer.blob.digest);
    Error::new(Reason::RegistryUnavailable, message).with("digest", &layer.blob.digest)
}

fn too_large(digest: &Digest, disk: Option<u64>) -> Error {
    let what = format!("layer {digest} does not fit: the unpacked image is larger than");
    too_large_for(&what, disk.filter(|bytes| *bytes > 0), disk).with("digest", digest)
}

/// `what` does not fit into the snapshotter's disks, of `disk` bytes; in larger ones than `needed` bytes it may.
pub(super) fn too_large_for(what: &str, needed: Option<u64>, disk: Option<u64>) -> Error {
    let sizes = match (needed, disk.filter(|bytes| *bytes > 0)) {
        // The filesystem's own part of the disk is not in it.
        (Some(needed), Some(bytes)) => format!(
            ", which have {} MiB; try \"{}GiB\"",
            bytes >> 20,
            (needed.max(bytes) >> 30).saturating_add(1).next_power_of_two().max(2)
        ),
        _ => String::new(),
    };
    let message = format!(
        "{what} the snapshotter's disks{sizes}; make them larger ([snapshotter] base_size; of containerd's devmapper: \
         base_image_size)"
    );
    Error::new(Reason::ImageUnsupported, message)
}

/// Has containerd apply it.
async fn apply_there(shared: &Shared, layer: &Layer<'_>, mounts: Vec<Mount>) -> Result<String> {
    let descriptor = ContainerdDescriptor {
        media_type: for_containerd(&layer.blob.media_type).to_owned(),
        digest: layer.blob.digest.to_string(),
        size: i64::try_from(layer.blob.size).unwrap_or(i64::MAX),
        ..Default::default()
    };
    let applied = shared.containerd.apply(descriptor, mounts, shared.limits.unpack_timeout).await;
    applied.map_err(|error| refused_there(shared, layer, error))
}

/// containerd's differ may not know Docker's name of a tar in zstd; OCI's it knows.
fn for_containerd(media_type: &str) -> &str {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => "application/vnd.oci.image.layer.v1.tar+zstd",
        other => other,
    }
}

fn refused_there(shared: &Shared, layer: &Layer<'_>, error: CallError) -> Error {
    let text = error.message().to_ascii_lowercase();
    let digest = &layer.blob.digest;
    // Within an apply, "no space" is the snapshot's own filesystem.
    if text.contains("no space left on device") {
        return too_large(digest, None);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::image::gate::{Terms, Traffic};

    #[tokio::test(start_paused = true)]
    async fn time_in_line_and_time_of_others_is_not_a_layers_own() {
        const LIMIT: Duration = Duration::from_secs(10);
        const OTHERS: Duration = Duration::from_secs(1000);
        let (traffic, in_line) = (Traffic::default(), Waits::default());
        let job = Terms { class: Class::Normal, ..Terms::LAUNCHER };
        let (gate, _) = Gate::new(&traffic, &job);
        let begun = tokio::time::Instant::now();
        let others = async {
            tokio::time::sleep(LIMIT / 2).await;
            let waits = in_line.begin();
            tokio::time::sleep(OTHERS).await;
            drop(waits);
            let (launcher, _) = Gate::new(&traffic, &Terms::LAUNCHER);
            tokio::time::sleep(OTHERS).await;
            launcher.end();
        };
        let (had, ()) = tokio::join!(had_time(&gate, &in_line, LIMIT), others);
        had.unwrap();
        let own = begun.elapsed() - 2 * OTHERS;
        // Whether others come first is looked at once a tick.
        assert!((LIMIT - TICK..=LIMIT + TICK).contains(&own), "{own:?}");
    }
}
