//! What an image is, read from the documents in containerd's content store.

use std::{
    sync::{Arc, PoisonError},
    time::SystemTime,
};

use super::{
    Digest, ImageRef, Platform, ProcessConfig, ResolvedImage, Shared,
    digest::chain_ids,
    manifest::{self, DOCUMENT_MAX_BYTES, DOCUMENTS_MAX, Document, ImageConfig, Manifest},
};
use crate::error::Result;

/// So many are remembered; more than a host has images.
const REMEMBERED: usize = 4096;

/// What Acquire needs to know of an image; follows from its digest alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) manifest: Digest,
    pub(super) config: Digest,
    pub(super) config_bytes: u64,
    pub(super) platform: Platform,
    pub(super) chain_id: Digest,
    /// Of every layer, the lowest first.
    pub(super) chain: Vec<Digest>,
    /// And its blob, with its size in bytes.
    pub(super) blobs: Vec<(Digest, u64)>,
    pub(super) process: ProcessConfig,
    pub(super) compressed_bytes: u64,
    pub(super) layers: u32,
}

impl Facts {
    /// `None` for an image without layers, which [`manifest::parse`] has refused.
    pub(super) fn of(digest: Digest, manifest: &Manifest, config: &ImageConfig) -> Option<Self> {
        let chain = chain_ids(&config.diff_ids);
        Some(Self {
            manifest: digest,
            config: manifest.config.digest.clone(),
            config_bytes: manifest.config.size,
            platform: config.platform.clone(),
            chain_id: chain.last()?.clone(),
            chain,
            blobs: manifest.layers.iter().map(|layer| (layer.digest.clone(), layer.size)).collect(),
            process: config.process.clone(),
            compressed_bytes: manifest.compressed_bytes(),
            layers: u32::try_from(manifest.layers.len()).unwrap_or(u32::MAX),
        })
    }

    pub(super) fn resolved(
        &self,
        name: ImageRef,
        target: Digest,
        created_at: Option<SystemTime>,
    ) -> ResolvedImage {
        ResolvedImage {
            name,
            target,
            manifest: self.manifest.clone(),
            platform: self.platform.clone(),
            chain_id: self.chain_id.clone(),
            process: self.process.clone(),
            compressed_bytes: self.compressed_bytes,
            layers: self.layers,
            created_at,
        }
    }
}

impl Shared {
    /// Reads, or remembers, what `target` is for `platform`. `None` if a document is not in the content store, or
    /// there is nothing for the platform: a pull then says what is wrong.
    pub(super) async fn facts(&self, target: &Digest, platform: &Platform) -> Result<Option<Arc<Facts>>> {
        let key = (target.clone(), platform.clone());
        if let Some(facts) = self.facts.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Some(facts.clone()));
        }
        let Some((digest, manifest)) = self.stored_manifest(target, platform).await? else { return Ok(None) };
        let Some(bytes) = self.document_in_store(&manifest.config.digest).await? else { return Ok(None) };
        let Ok(config) = manifest::parse_config(&bytes, &manifest) else { return Ok(None) };
        if !config.platform.is_same_machine(platform) {
            return Ok(None);
        }
        let Some(facts) = Facts::of(digest, &manifest, &config).map(Arc::new) else { return Ok(None) };
        let mut remembered = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(key, facts.clone());
        Ok(Some(facts))
    }

    /// The manifest and the configuration, if they are in the content store.
    pub(super) async fn documents_of(&self, facts: &Facts) -> Result<Option<(Manifest, ImageConfig)>> {
        let manifest = self.document_in_store(&facts.manifest).await?;
        let manifest = manifest.and_then(|bytes| manifest::parse(&bytes).ok());
        let Some((_, Document::Manifest(manifest))) = manifest else { return Ok(None) };
        let config = self.document_in_store(&manifest.config.digest).await?;
        let config = config.and_then(|bytes| manifest::parse_config(&bytes, &manifest).ok());
        Ok(config.map(|config| (manifest, config)))
    }

    /// The manifest for `platform` that `target` is or leads to, if it is in the content store.
    pub(super) async fn stored_manifest(
        &self,
        target: &Digest,
        platform: &Platform,
    ) -> Result<Option<(Digest, Manifest)>> {
        let mut digest = target.clone();
        // An index, perhaps indexes within it, a manifest.
        for _ in 0..DOCUMENTS_MAX {
            let Some(bytes) = self.document_in_store(&digest).await? else { return Ok(None) };
            match manifest::parse(&bytes) {
                Ok((_, Document::Manifest(manifest))) => return Ok(Some((digest, manifest))),
                Ok((_, Document::Index(entries))) => match manifest::pick(&entries, platform) {
                    Ok(entry) => digest = entry.digest.clone(),
                    Err(_) => return Ok(None),
                },
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// A document from the content store, which checked its digest when it was written.
    pub(super) async fn document_in_store(&self, digest: &Digest) -> Result<Option<Vec<u8>>> {
        let read = self.containerd.read_blob(digest.as_str(), DOCUMENT_MAX_BYTES).await;
        read.map_err(|e| self.containerd.explain(e))
    }
}
