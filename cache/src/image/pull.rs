//! One pull: resolve, fetch and unpack side by side, label, and write the image record last.
//!
//! Everything is made under one containerd lease, which the ledger knows before it exists; when the pull ends, the
//! image record holds what the lease held, or, if it failed, nothing does and containerd collects it.

use std::{collections::HashMap, sync::PoisonError};

use containerd_client::types::Descriptor as ContainerdDescriptor;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::oneshot;

use super::{
    Cache, Digest, ImageRef, LayerStage, Platform, ResolvedImage, Shared,
    digest::chain_ids,
    facts::Facts,
    manifest::{self, DOCUMENT_MAX_BYTES, Document, ImageConfig, Manifest},
    progress::Board,
    store::Store,
    unpack::{Layer, unpack},
};
use crate::{
    containerd::LEASE_LABEL,
    error::{Error, Reason, Result},
};

/// Pulls under the journal and a containerd lease of its own.
pub(super) async fn run(
    shared: &Shared,
    image: &ImageRef,
    platform: &Platform,
    board: &Board,
) -> Result<(ResolvedImage, Cache)> {
    let source = shared.registries.source(image)?;
    let lease = format!("cowshed-pull-{}", uuid::Uuid::new_v4().simple());
    let running = Running::begin(shared, lease.clone());
    shared.journal.begin(&lease, &image.to_string()).await?;
    let labels = HashMap::from([(LEASE_LABEL.to_owned(), "pull".to_owned())]);
    let outcome = match shared.containerd.create_lease(&lease, labels).await {
        Ok(()) => {
            let store = Store { shared, lease: &lease, image, source: &source };
            pull(&store, platform, board).await
        }
        Err(error) => Err(shared.containerd.explain(error)),
    };
    // If this fails, the reclaimer finds the lease in the journal and nobody running it.
    match shared.containerd.delete_lease(&lease, outcome.is_err()).await {
        Ok(()) => shared.journal.end(&lease).await?,
        Err(error) => tracing::warn!(lease, %error, "the pull's containerd lease is deleted later"),
    }
    drop(running);
    outcome
}

/// What was found at the registry, or in the content store if the registry does not answer.
struct Resolved {
    /// What the name points to first, the chosen manifest last.
    documents: Vec<Stored>,
    manifest_digest: Digest,
    manifest: Manifest,
}

async fn pull(store: &Store<'_>, platform: &Platform, board: &Board) -> Result<(ResolvedImage, Cache)> {
    let resolved = resolve(store, platform).await?;
    let mut cache = Cache::Hit;
    // Documents are held from here on; their labels hold nothing before the blobs are there, and need not: the lease does.
    for Stored { digest, bytes, labels, .. } in &resolved.documents {
        cache = either(cache, store.put(digest, bytes.clone(), labels.clone()).await?);
    }
    let manifest = &resolved.manifest;
    let fetched = store.fetch(&manifest.config, HashMap::new(), |_| ()).await?;
    let config = read_config(store, manifest, platform).await?;
    board.layers(manifest.layers.iter().map(|layer| (layer.digest.clone(), layer.size)));
    cache = either(cache, fetched);
    cache = either(cache, layers(store, manifest, &config, board).await?);
    let image = record(store, &resolved, &config).await?;
    board.done();
    Ok((image, cache))
}

/// A document, and the labels that keep what it refers to.
struct Stored {
    digest: Digest,
    media_type: String,
    bytes: Vec<u8>,
    labels: HashMap<String, String>,
}

/// Name to manifest.
async fn resolve(store: &Store<'_>, platform: &Platform) -> Result<Resolved> {
    let (bytes, mut digest) = top(store).await?;
    let mut documents = Vec::new();
    let mut bytes = bytes;
    for _ in 0..3 {
        let (media_type, parsed) = manifest::parse(&bytes)?;
        match parsed {
            Document::Manifest(manifest) => {
                let labels = manifest_labels(&manifest);
                documents.push(Stored { digest: digest.clone(), media_type, bytes, labels });
                return Ok(Resolved { documents, manifest_digest: digest, manifest });
            }
            Document::Index(entries) => {
                let (position, entry) = manifest::pick(&entries, platform)?;
                let label = format!("containerd.io/gc.ref.content.m.{position}");
                let labels = HashMap::from([(label, entry.digest.to_string())]);
                documents.push(Stored { digest, media_type, bytes, labels });
                digest = entry.digest.clone();
                bytes = document(store, &digest).await?;
            }
        }
    }
    Err(manifest::unsupported("its indexes are nested more than two deep".to_owned()))
}

/// What the image's name points to now. If the registry does not answer and containerd knows the image, what it knows.
async fn top(store: &Store<'_>) -> Result<(Vec<u8>, Digest)> {
    let refused = match store.source.document(None, &manifest::ACCEPTED).await {
        Ok(found) => return bounded(found),
        Err(error) => error,
    };
    if refused.reason() != Reason::RegistryUnavailable {
        return Err(refused);
    }
    let containerd = &store.shared.containerd;
    let record = containerd.image(&store.image.to_string()).await.map_err(|e| containerd.explain(e))?;
    let Some(digest) = record.and_then(|record| record.target.digest.parse::<Digest>().ok()) else {
        return Err(refused);
    };
    match store.shared.document_in_store(&digest).await? {
        Some(bytes) => {
            tracing::warn!(error = %refused, "the registry does not answer; going on with what containerd has");
            Ok((bytes, digest))
        }
        None => Err(refused),
    }
}

async fn document(store: &Store<'_>, digest: &Digest) -> Result<Vec<u8>> {
    if let Some(bytes) = store.shared.document_in_store(digest).await? {
        return Ok(bytes);
    }
    Ok(bounded(store.source.document(Some(digest), &manifest::ACCEPTED).await?)?.0)
}

fn bounded((bytes, digest): (Vec<u8>, Digest)) -> Result<(Vec<u8>, Digest)> {
    if bytes.len() > DOCUMENT_MAX_BYTES {
        return Err(manifest::unsupported(format!("its manifest {digest} has {} bytes", bytes.len())));
    }
    Ok((bytes, digest))
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

/// Fetches layers, several at a time, and unpacks each as soon as it and all below it are there.
async fn layers(
    store: &Store<'_>,
    manifest: &Manifest,
    config: &ImageConfig,
    board: &Board,
) -> Result<Cache> {
    let chain = chain_ids(&config.diff_ids);
    let (arrivals, arrived): (Vec<_>, Vec<_>) =
        manifest.layers.iter().map(|_| oneshot::channel::<()>()).unzip();
    let fetching = stream::iter(arrivals.into_iter().enumerate().map(|(at, arrival)| async move {
        let fetched = fetch_layer(store, manifest, config, board, at).await?;
        let _unpacking_has_failed = arrival.send(());
        Ok::<_, Error>(fetched)
    }));
    let fetching = fetching
        .buffer_unordered(store.shared.limits.concurrent_downloads.max(1))
        .try_fold(Cache::Hit, |all, one| async move { Ok(either(all, one)) });
    let unpacking = async {
        let mut cache = Cache::Hit;
        for (at, arrived) in arrived.into_iter().enumerate() {
            // Dropped only if fetching has failed, which then is the pull's error.
            if arrived.await.is_err() {
                return std::future::pending().await;
            }
            board.stage(at, LayerStage::Unpacking);
            let parent = at.checked_sub(1).map(|below| &chain[below]);
            let (blob, diff_id) = (&manifest.layers[at], &config.diff_ids[at]);
            let layer = Layer { blob, diff_id, chain_id: &chain[at], parent };
            cache = either(cache, unpack(store.shared, store.lease, &layer).await?);
            board.stage(at, LayerStage::Done);
        }
        Ok(cache)
    };
    let (fetched, unpacked) = tokio::try_join!(fetching, unpacking)?;
    Ok(either(fetched, unpacked))
}

async fn fetch_layer(
    store: &Store<'_>,
    manifest: &Manifest,
    config: &ImageConfig,
    board: &Board,
    at: usize,
) -> Result<Cache> {
    let blob = &manifest.layers[at];
    let labels = HashMap::from([
        ("containerd.io/uncompressed".to_owned(), config.diff_ids[at].to_string()),
        (
            format!("containerd.io/distribution.source.{}", store.image.registry()),
            store.image.repository().to_owned(),
        ),
    ]);
    board.stage(at, LayerStage::Fetching);
    let fetched = store.fetch(blob, labels, |bytes| board.bytes(at, bytes)).await?;
    board.stage(at, LayerStage::Fetched);
    Ok(fetched)
}

/// Ties everything to the image's name.
async fn record(store: &Store<'_>, resolved: &Resolved, config: &ImageConfig) -> Result<ResolvedImage> {
    let containerd = &store.shared.containerd;
    let facts = Facts::of(resolved.manifest_digest.clone(), &resolved.manifest, config)
        .ok_or_else(|| manifest::unsupported("it has no layers".to_owned()))?;
    // The configuration, which the manifest holds, holds the unpacked layers.
    let label = format!("containerd.io/gc.ref.snapshot.{}", containerd.snapshotter());
    let labels = HashMap::from([(label, facts.chain_id.to_string())]);
    let labelled = containerd.label_blob(resolved.manifest.config.digest.as_str(), labels).await;
    labelled.map_err(|e| containerd.explain(e))?;
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
    let record = record.map_err(|e| containerd.explain(e))?;
    Ok(facts.resolved(store.image.clone(), digest.clone(), record.created_at))
}

/// What a manifest holds against containerd's collection; the labels' names are containerd's.
fn manifest_labels(manifest: &Manifest) -> HashMap<String, String> {
    let layers = manifest.layers.iter().enumerate();
    let layers =
        layers.map(|(at, layer)| (format!("containerd.io/gc.ref.content.l.{at}"), layer.digest.to_string()));
    let config = ("containerd.io/gc.ref.content.config".to_owned(), manifest.config.digest.to_string());
    layers.chain([config]).collect()
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
