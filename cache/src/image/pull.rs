//! One pull: resolve, fetch and unpack side by side, label, and write the image record last.
//!
//! Everything is made under one containerd lease, which the ledger knows before it exists; when the pull ends, the
//! image record holds what the lease held, or, if it failed, nothing does and containerd collects it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use containerd_client::types::Descriptor as ContainerdDescriptor;
use futures_util::{StreamExt as _, stream};

use super::{
    Access, Cache, Digest, ImageRef, LayerStage, Platform, PullLimits, PullPolicy, ResolvedImage, Shared,
    access::Owners,
    brake::Brake,
    digest::chain_ids,
    facts::Facts,
    flight::caught,
    gate::Gate,
    labels::{self, Labels},
    manifest::{self, DOCUMENT_MAX_BYTES, DOCUMENTS_MAX, Descriptor, Document, ImageConfig, Manifest},
    progress::Board,
    store::Store,
    tap::{Outlet, Tap, tap},
    unpack::{Inflating, Layer, is_held, is_theirs, too_large_for, unpack},
    verify::Target,
    window::Window,
};
use crate::{
    containerd::LEASE_LABEL,
    error::{Error, Reason, Result},
    registry::{Kind, Source},
};

/// What is to be pulled, for whom.
pub(super) struct Errand<'a> {
    pub(super) image: &'a ImageRef,
    pub(super) platform: &'a Platform,
    pub(super) access: &'a Access,
    /// Where it gives way to others.
    pub(super) gate: &'a Arc<Gate>,
}

/// Pulls under the journal and a containerd lease of its own, unless everything is there.
pub(super) async fn run(
    shared: &Shared,
    errand: &Errand<'_>,
    board: &Board,
) -> Result<(ResolvedImage, Cache)> {
    let Errand { image, platform, access, gate } = *errand;
    gate.pass().await?;
    let source = shared.registries.source(image, access.credential.as_ref()).await?;
    let asker = Asker { shared, image, source: &source, access };
    let Top { bytes, digest, not_refreshed } = asker.top().await?;
    if let Some(error) = &not_refreshed {
        tracing::warn!(%error, "the registry does not answer; going on with what containerd has");
        board.not_refreshed(error);
    }
    let (media_type, document) = manifest::parse(&bytes)?;
    let target =
        Target { digest: &digest, media_type: &media_type, size: bytes.len() as u64, is_here: false };
    shared.expect_signed(image, target, manifest::in_index(&document, platform).as_ref(), access).await?;
    shared.verify(image, target).await?;
    if let Some((found, manifest)) = complete(&asker, platform, &digest).await? {
        board.was_here(sizes(&manifest));
        if !shared.standing.has(&found) {
            shared.stands(&found, platform).await;
        }
        return Ok((found, Cache::Hit));
    }
    let lease = format!("cowshed-pull-{}", uuid::Uuid::new_v4().simple());
    let running = Running::begin(shared, lease.clone());
    shared.journal.begin(&lease, &image.to_string()).await?;
    let labels = HashMap::from([(LEASE_LABEL.to_owned(), "pull".to_owned())]);
    let outcome = match shared.containerd.create_lease(&lease, labels).await {
        Ok(()) => {
            let (unpacked, brake) = (Owners::default(), Brake::default());
            let store = Store {
                shared,
                lease: &lease,
                image,
                source: &source,
                access,
                unpacked,
                applied: Mutex::default(),
                brake,
                gate,
            };
            // What it has made is cleared away below, also if it panics.
            caught(Box::pin(pull(&store, bytes, digest, platform, board))).await
        }
        Err(error) => Err(shared.containerd.explain(error)),
    };
    // Beside each other: somebody may wait for the image.
    let stands = async {
        if let Ok((image, _)) = &outcome {
            shared.stands(image, platform).await;
        }
    };
    tokio::join!(stands, end(shared, &lease, outcome.is_err()));
    drop(running);
    outcome
}

/// Lets go of the pull's containerd lease. Whatever of it fails changes nothing about the pull: the reclaimer finds the
/// lease in the journal and nobody running it.
async fn end(shared: &Shared, lease: &str, collect: bool) {
    let ended = match shared.containerd.delete_lease(lease, collect).await {
        Ok(()) => shared.journal.end(lease).await,
        Err(error) => Err(shared.containerd.explain(error)),
    };
    if let Err(error) = ended {
        tracing::warn!(lease, %error, "the pull's containerd lease is ended later");
    }
}

/// The image, if its record says what the registry says and nothing of it is missing.
async fn complete(
    asker: &Asker<'_>,
    platform: &Platform,
    target: &Digest,
) -> Result<Option<(ResolvedImage, Manifest)>> {
    let Asker { shared, image, .. } = *asker;
    let containerd = &shared.containerd;
    let record = shared.record(image).await?;
    let Some(record) = record.filter(|record| record.target.digest == target.as_str()) else {
        return Ok(None);
    };
    let Some(facts) = shared.facts(target, platform).await? else { return Ok(None) };
    let Some(top) = shared.snapshot_labels(&facts.chain_id).await? else { return Ok(None) };
    if !asker.permits_image(target, &facts, &top).await? {
        return Ok(None);
    }
    let Some((_, manifest)) = shared.stored_manifest(target, platform).await? else { return Ok(None) };
    let blob =
        |digest: String| async move { containerd.blob(&digest).await.map_err(|e| containerd.explain(e)) };
    // Without this label containerd may collect the unpacked layers.
    let holds = labels::of_config(containerd.snapshotter(), &facts.chain_id);
    match blob(manifest.config.digest.to_string()).await? {
        Some((_, present)) if labels::missing(&present, holds).is_empty() => {}
        _ => return Ok(None),
    }
    for layer in manifest.layers.iter().filter(|_| shared.limits.keep_layers) {
        if blob(layer.digest.to_string()).await?.is_none() {
            return Ok(None);
        }
    }
    Ok(Some((facts.resolved(image.clone(), target.clone(), record.created_at), manifest)))
}

/// What was found at the registry, or in the content store if the registry does not answer.
struct Resolved {
    /// What the name points to first, the chosen manifest last.
    documents: Vec<Stored>,
    manifest_digest: Digest,
    manifest: Manifest,
}

/// A document, and the labels that keep what it refers to.
struct Stored {
    digest: Digest,
    media_type: String,
    bytes: Vec<u8>,
    labels: Labels,
}

async fn pull(
    store: &Store<'_>,
    bytes: Vec<u8>,
    digest: Digest,
    platform: &Platform,
    board: &Board,
) -> Result<(ResolvedImage, Cache)> {
    let resolved = resolve(store, bytes, digest, platform).await?;
    let manifest = &resolved.manifest;
    // Documents are held from here on; their labels hold nothing before the blobs are there, and need not: the lease does.
    let documents = async {
        let mut cache = Cache::Hit;
        for Stored { digest, bytes, labels, .. } in &resolved.documents {
            cache = either(cache, store.put(digest, bytes, labels.clone()).await?);
        }
        Ok::<_, Error>(cache)
    };
    let config = store.fetch(&manifest.config, Labels::new(), None, |_| ());
    // Neither is dropped half done if the other fails.
    let (documents, config) = tokio::join!(documents, config);
    let mut cache = either(documents?, config?);
    let config = read_config(store, manifest, platform).await?;
    board.layers(sizes(manifest));
    cache = either(cache, layers(store, manifest, &config, board).await?);
    let image = record(store, &resolved, &config).await?;
    board.done();
    label_applied(store);
    Ok((image, cache))
}

/// Spares containerd's other clients from inflating the layers to learn their digests. Each label is a transaction of
/// containerd's, and nobody has to wait for these: without them all works as well.
fn label_applied(store: &Store<'_>) {
    let applied = std::mem::take(&mut *store.applied.lock().unwrap_or_else(PoisonError::into_inner));
    if applied.is_empty() || !store.shared.limits.keep_layers {
        return;
    }
    let containerd = store.shared.containerd.clone();
    tokio::spawn(async move {
        for (blob, diff_id) in applied {
            // It may be gone already.
            if let Err(error) = containerd.label_blob(blob.as_str(), labels::of_applied(&diff_id)).await {
                tracing::debug!(%blob, %error, "what the layer is when it is inflated is not written down");
            }
        }
    });
}

/// From what the name points to, to the manifest.
async fn resolve(
    store: &Store<'_>,
    mut bytes: Vec<u8>,
    mut digest: Digest,
    platform: &Platform,
) -> Result<Resolved> {
    let mut documents = Vec::new();
    for _ in 0..DOCUMENTS_MAX {
        let (media_type, parsed) = manifest::parse(&bytes)?;
        match parsed {
            Document::Manifest(manifest) => {
                let labels = labels::of_manifest(&manifest, store.shared.limits.keep_layers);
                documents.push(Stored { digest: digest.clone(), media_type, bytes, labels });
                return Ok(Resolved { documents, manifest_digest: digest, manifest });
            }
            Document::Index(entries) => {
                let next = manifest::pick(&entries, platform)?.digest.clone();
                documents.push(Stored { digest, media_type, bytes, labels: labels::of_index(&entries) });
                bytes = store.asker().document(&next).await?;
                digest = next;
            }
        }
    }
    Err(manifest::unsupported(format!("its indexes are nested more than {} deep", DOCUMENTS_MAX - 1)))
}

/// What the image's name points to.
struct Top {
    bytes: Vec<u8>,
    digest: Digest,
    /// Why it is not the registry that says so.
    not_refreshed: Option<Error>,
}

/// Who asks whom for which image.
pub(super) struct Asker<'a> {
    pub(super) shared: &'a Shared,
    pub(super) image: &'a ImageRef,
    pub(super) source: &'a Source,
    pub(super) access: &'a Access,
}

impl Asker<'_> {
    /// What the image's name points to now. If the registry does not answer and containerd knows the image, what it knows.
    async fn top(&self) -> Result<Top> {
        let Self { shared, image, source, access } = self;
        if let Some(pinned) = image.digest() {
            return Ok(Top { bytes: self.document(&pinned).await?, digest: pinned, not_refreshed: None });
        }
        let refused = match source.document(None, &manifest::ACCEPTED, DOCUMENT_MAX_BYTES).await {
            Ok((bytes, digest)) => {
                self.found_accessible(&digest).await?;
                return Ok(Top { bytes, digest, not_refreshed: None });
            }
            Err(error) => error,
        };
        if refused.reason() != Reason::RegistryUnavailable || access.policy == PullPolicy::Always {
            return Err(refused);
        }
        let record = shared.record(image).await?;
        let digest = record.and_then(|record| record.target.digest.parse::<Digest>().ok());
        let Some(digest) = digest else { return Err(refused) };
        if shared.is_foreign(&digest, access).await? {
            return Err(refused);
        }
        match shared.document_in_store(&digest).await? {
            Some(bytes) => Ok(Top { bytes, digest, not_refreshed: Some(refused) }),
            None => Err(refused),
        }
    }

    async fn document(&self, digest: &Digest) -> Result<Vec<u8>> {
        if let Some(bytes) = self.shared.document_in_store(digest).await? {
            self.expect_access(Kind::Manifest, digest).await?;
            return Ok(bytes);
        }
        Ok(self.source.document(Some(digest), &manifest::ACCEPTED, DOCUMENT_MAX_BYTES).await?.0)
    }
}

async fn read_config(store: &Store<'_>, manifest: &Manifest, platform: &Platform) -> Result<ImageConfig> {
    let digest = &manifest.config.digest;
    let missing = || {
        let message =
            format!("its configuration {digest} vanished from containerd's content store; pull again");
        Error::new(Reason::ContainerdError, message)
    };
    let bytes = store.shared.document_in_store(digest).await?.ok_or_else(missing)?;
    let config = manifest::parse_config(&bytes, manifest)?;
    if !config.platform.is_same_machine(platform) {
        return Err(manifest::no_platform(platform, &[config.platform.to_string()]));
    }
    Ok(config)
}

/// Layers that are inflated ahead of the one that is applied.
const AHEAD: usize = 2;

/// Fetches layers, several at a time, and unpacks each on the one below while it arrives. If one fails, the others stop,
/// but none is dropped: each clears up first.
async fn layers(
    store: &Store<'_>,
    manifest: &Manifest,
    config: &ImageConfig,
    board: &Board,
) -> Result<Cache> {
    let chain = chain_ids(&config.diff_ids);
    let there = unpacked_already(store, &chain, &manifest.layers).await?;
    // What is unpacked is so by what the configuration says; its layers may still have to be fetched.
    if let Err(too_large) = expect_room(manifest, &store.shared.limits)
        && (there < chain.len() || lacks_layers(store, manifest).await?)
    {
        return Err(too_large);
    }
    let (taps, outlets): (Vec<_>, Vec<_>) = manifest.layers.iter().map(|_| tap(store.room())).unzip();
    let keeps = store.shared.limits.keep_layers;
    let wanted = taps.into_iter().enumerate().filter(|(at, _)| keeps || *at >= there);
    if !keeps {
        (0..there).for_each(|at| board.stage(at, LayerStage::Done));
    }
    let window = &Window::of(chain.len(), there);
    let fetching = stream::iter(wanted.map(|(at, tap)| async move {
        // Whoever stops the pull opens the window.
        window.reach(at).await;
        match Box::pin(fetch_layer(store, manifest, board, at, &tap)).await {
            Ok(fetched) => {
                board.stage(at, if at < there { LayerStage::Done } else { LayerStage::Fetched });
                tap.stored(manifest.layers[at].size);
                window.fetched(at);
                fetched
            }
            Err(error) => {
                store.brake.pull(error);
                Cache::Miss
            }
        }
    }));
    let fetching = fetching
        .buffer_unordered(store.shared.limits.concurrent_downloads.max(1))
        .fold(Cache::Hit, |all, one| async move { either(all, one) });
    let unpacking = unpack_layers(store, manifest, config, board, &chain, outlets, window);
    let (fetched, unpacked) = tokio::join!(fetching, unpacking);
    store.brake.check(either(fetched, unpacked))
}

/// Fails if the layers are more than is allowed. Compressed, an image is no larger than unpacked: what does not fit the disks
/// even so need not be fetched either.
fn expect_room(manifest: &Manifest, limits: &PullLimits) -> Result<()> {
    let compressed = manifest.compressed_bytes();
    let most = limits.image_bytes;
    if compressed > most {
        return Err(manifest::unsupported(format!(
            "its layers have {compressed} bytes compressed, {most} are allowed ([images] image_size_max)"
        )));
    }
    match limits.disk {
        Some(disk) if compressed > disk => {
            let what =
                format!("it does not fit: its layers have {} MiB compressed, more than", compressed >> 20);
            Err(too_large_for(&what, Some(compressed), Some(disk)))
        }
        _ => Ok(()),
    }
}

/// Whether layers that are unpacked are to be fetched all the same.
async fn lacks_layers(store: &Store<'_>, manifest: &Manifest) -> Result<bool> {
    let Shared { containerd, limits, .. } = store.shared;
    for layer in manifest.layers.iter().filter(|_| limits.keep_layers) {
        let there = containerd.blob(layer.digest.as_str()).await.map_err(|e| containerd.explain(e))?;
        if there.is_none() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many layers, from the lowest on, are unpacked, by whatever image; from now on they are held.
async fn unpacked_already(store: &Store<'_>, chain: &[Digest], layers: &[Descriptor]) -> Result<usize> {
    let mut there = 0;
    while there < chain.len() && is_theirs(store, &chain[there], &layers[there]).await? {
        there += 1;
    }
    // The highest one holds those below. If it has gone meanwhile, all are looked at one by one.
    match there.checked_sub(1) {
        Some(highest) if !is_held(store.shared, store.lease, &chain[highest]).await? => Ok(0),
        _ => Ok(there),
    }
}

async fn unpack_layers(
    store: &Store<'_>,
    manifest: &Manifest,
    config: &ImageConfig,
    board: &Board,
    chain: &[Digest],
    outlets: Vec<Outlet>,
    window: &Window,
) -> Cache {
    let begin = |at: usize| Inflating::begin_ahead(store, &manifest.layers[at], &outlets[at]);
    let mut cache = Cache::Hit;
    let mut ahead: HashMap<usize, Option<Inflating>> = HashMap::new();
    for at in window.start()..chain.len() {
        window.unpacking(at);
        board.stage(at, LayerStage::Unpacking);
        for next in at + 1..chain.len().min(at + 1 + AHEAD) {
            ahead.entry(next).or_insert_with(|| begin(next));
        }
        let parent = at.checked_sub(1).map(|below| &chain[below]);
        let (blob, diff_id) = (&manifest.layers[at], &config.diff_ids[at]);
        let layer = Layer { blob, diff_id, chain_id: &chain[at], parent, bytes: &outlets[at] };
        match unpack(store, &layer, ahead.remove(&at).flatten()).await {
            // Only now: until it was applied, it was but what the image's configuration claims.
            Ok(Cache::Miss) => {
                cache = Cache::Miss;
                let mut applied = store.applied.lock().unwrap_or_else(PoisonError::into_inner);
                applied.push((blob.digest.clone(), diff_id.clone()));
            }
            Ok(Cache::Hit) => {}
            Err(error) => {
                store.brake.pull(error.context(format!("layer {} of {}", at + 1, chain.len())));
                break;
            }
        }
        board.stage(at, LayerStage::Done);
    }
    window.open();
    cache
}

async fn fetch_layer(
    store: &Store<'_>,
    manifest: &Manifest,
    board: &Board,
    at: usize,
    tap: &Tap,
) -> Result<Cache> {
    let blob = &manifest.layers[at];
    let progress = |bytes| board.bytes(at, bytes);
    let fetched = store.fetch(blob, labels::of_layer(store.image), Some(tap), progress).await;
    let registry = store.image.registry();
    fetched.map_err(|e| {
        let error = if_foreign(e, blob, registry);
        error.context(format!("layer {} of {}", at + 1, manifest.layers.len()))
    })
}

/// What it means that the registry does not have the layer, if it is a foreign one.
fn if_foreign(error: Error, layer: &Descriptor, registry: &str) -> Error {
    if error.reason() != Reason::ImageNotFound || !layer.is_foreign() {
        return error;
    }
    let Descriptor { digest, media_type, .. } = layer;
    let message = format!(
        "{digest} is a foreign layer ({media_type}), which registry {registry} does not have, and the `urls` of a manifest are \
         not followed: push the image with --allow-nondistributable-artifacts, or use another one"
    );
    Error::new(Reason::ImageNotFound, message).with("digest", digest).with("registry", registry)
}

/// Ties everything to the image's name.
async fn record(store: &Store<'_>, resolved: &Resolved, config: &ImageConfig) -> Result<ResolvedImage> {
    let containerd = &store.shared.containerd;
    let facts = Facts::of(resolved.manifest_digest.clone(), &resolved.manifest, config)
        .ok_or_else(|| manifest::unsupported("it has no layers".to_owned()))?;
    // The configuration, which the manifest holds, holds the unpacked layers.
    store
        .label(&resolved.manifest.config.digest, labels::of_config(containerd.snapshotter(), &facts.chain_id))
        .await?;
    let Stored { digest, media_type, bytes, .. } = resolved
        .documents
        .first()
        .ok_or_else(|| Error::new(Reason::ContainerdError, "it has no manifest".to_owned()))?;
    let target = ContainerdDescriptor {
        media_type: media_type.clone(),
        digest: digest.to_string(),
        size: i64::try_from(bytes.len()).unwrap_or(i64::MAX),
        ..Default::default()
    };
    let record = containerd.put_image(store.lease, &store.image.to_string(), target).await;
    // Who asks now need not wait for containerd's word.
    store.shared.known.forget(Some(&store.image.to_string()));
    let record = record.map_err(|e| containerd.explain(e))?;
    Ok(facts.resolved(store.image.clone(), digest.clone(), record.created_at))
}

fn sizes(manifest: &Manifest) -> impl Iterator<Item = (Digest, u64)> {
    manifest.layers.iter().map(|layer| (layer.digest.clone(), layer.size))
}

fn either(a: Cache, b: Cache) -> Cache {
    if (a, b) == (Cache::Hit, Cache::Hit) { Cache::Hit } else { Cache::Miss }
}

/// Says that a pull is alive for as long as it is.
struct Running<'a> {
    shared: &'a Shared,
    lease: String,
}

impl<'a> Running<'a> {
    fn begin(shared: &'a Shared, lease: String) -> Self {
        shared.running.lock().unwrap_or_else(PoisonError::into_inner).insert(lease.clone());
        Self { shared, lease }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.shared.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.lease);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(media_type: &str, size: u64) -> Descriptor {
        Descriptor { media_type: media_type.to_owned(), digest: Digest::of(b"x"), size, platform: None }
    }

    #[test]
    fn what_is_too_large_is_not_fetched() {
        let (most, disk) = (20 << 20, Some(10 << 20));
        let table = [
            (vec![1, 2], None, None),
            (vec![most, 0], None, None),
            (vec![most, 1], None, Some("20971521 bytes compressed, 20971520 are allowed")),
            (vec![u64::MAX, u64::MAX], disk, Some("image_size_max")),
            (vec![5 << 20, 5 << 20], disk, None),
            (vec![5 << 20, 6 << 20], disk, Some("base_size")),
        ];
        for (sizes, disk, refused) in table {
            let layers = sizes.iter().map(|size| descriptor("l", *size)).collect();
            let manifest = Manifest { config: descriptor("c", 1), layers };
            let limits = PullLimits { image_bytes: most, disk, ..PullLimits::default() };
            let outcome = expect_room(&manifest, &limits);
            assert_eq!(outcome.is_err(), refused.is_some(), "{sizes:?}: {outcome:?}");
            if let (Err(error), Some(says)) = (outcome, refused) {
                assert_eq!(error.reason(), Reason::ImageUnsupported, "{sizes:?}");
                assert!(error.to_string().contains(says), "{sizes:?}: {error}");
            }
        }
    }

    #[test]
    fn why_a_foreign_layer_is_not_there() {
        let foreign = descriptor("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", 1);
        let own = descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", 1);
        let table = [
            (&foreign, Reason::ImageNotFound, true),
            (&foreign, Reason::RegistryUnavailable, false),
            (&own, Reason::ImageNotFound, false),
        ];
        for (layer, reason, is_told) in table {
            let error = if_foreign(Error::new(reason, "no"), layer, "r.example");
            let words = error.to_string();
            assert_eq!(error.reason(), reason);
            assert_eq!(
                words.contains("r.example does not have") && words.contains("`urls`"),
                is_told,
                "{words}"
            );
            assert_eq!(words == "no", !is_told, "{words}");
        }
    }
}
