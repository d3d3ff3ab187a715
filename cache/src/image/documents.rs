//! What documents in containerd's content store say, each read once, and nothing read that is too large for one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Digest, Platform, Shared,
    facts::Facts,
    manifest::{self, DOCUMENT_MAX_BYTES, DOCUMENTS_MAX, Descriptor, Document, MANIFESTS},
};
use crate::error::Result;

/// What is remembered takes about so many bytes at the most: some thousand images, and their indexes.
const REMEMBERED_BYTES: usize = 32 << 20;

/// What a blob says.
#[derive(Debug)]
pub(super) enum Said {
    /// It is an index of these. Of a media type, only whether it may be an index's is kept.
    Index(Vec<Descriptor>),
    /// It is the manifest of this image, whose configuration is there.
    Image(Arc<Facts>),
    /// It is neither: a layer perhaps.
    Nothing,
}

impl Said {
    fn index(mut entries: Vec<Descriptor>) -> Self {
        for entry in &mut entries {
            entry.media_type = if entry.may_be_index() { String::new() } else { MANIFESTS[0].to_owned() };
        }
        entries.shrink_to_fit();
        Self::Index(entries)
    }

    /// The memory that it takes, in bytes, rather too much than too little.
    fn weight(&self) -> usize {
        // With names of platforms that are as long as they may be, and a digest's string.
        const ENTRY: usize = 512;
        const LAYER: usize = 128;
        // A string of one byte takes so many times what it counts for there.
        const PROCESS: usize = 12;
        match self {
            Self::Index(entries) => ENTRY + entries.len() * ENTRY,
            Self::Image(facts) => 2 * ENTRY + facts.chain.len() * LAYER + facts.process.bytes() * PROCESS,
            Self::Nothing => ENTRY,
        }
    }
}

/// What blobs say that were read: follows from their digests alone. That one is not there is not remembered.
#[derive(Debug, Default)]
pub(super) struct Documents(Mutex<Remembered>);

#[derive(Debug, Default)]
struct Remembered {
    said: HashMap<Digest, Arc<Said>>,
    bytes: usize,
}

impl Documents {
    fn get(&self, digest: &Digest) -> Option<Arc<Said>> {
        self.remembered().said.get(digest).cloned()
    }

    fn note(&self, digest: Digest, said: Arc<Said>) {
        let weight = said.weight();
        let mut remembered = self.remembered();
        if remembered.bytes + weight > REMEMBERED_BYTES {
            *remembered = Remembered::default();
        }
        if remembered.said.insert(digest, said).is_none() {
            remembered.bytes += weight;
        }
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A blob that is to be read.
enum Blob {
    Absent,
    /// No document is so large.
    Large,
    Document(Vec<u8>),
}

impl Shared {
    /// Reads, or remembers, what a blob says. `None` if it is not in the content store, or is a manifest whose configuration is
    /// not. What is remembered may have gone meanwhile.
    pub(super) async fn said(&self, digest: &Digest) -> Result<Option<Arc<Said>>> {
        if let Some(said) = self.documents.get(digest) {
            return Ok(Some(said));
        }
        let said = self.read(digest).await?.map(Arc::new);
        if let Some(said) = &said {
            self.documents.note(digest.clone(), said.clone());
        }
        Ok(said)
    }

    async fn read(&self, digest: &Digest) -> Result<Option<Said>> {
        let bytes = match self.blob_in_store(digest).await? {
            Blob::Absent => return Ok(None),
            Blob::Large => return Ok(Some(Said::Nothing)),
            Blob::Document(bytes) => bytes,
        };
        let manifest = match manifest::parse(&bytes) {
            Ok((_, Document::Index(entries))) => return Ok(Some(Said::index(entries))),
            Ok((_, Document::Manifest(manifest))) => manifest,
            Err(_) => return Ok(Some(Said::Nothing)),
        };
        let config = match self.blob_in_store(&manifest.config.digest).await? {
            Blob::Absent => return Ok(None),
            Blob::Large => return Ok(Some(Said::Nothing)),
            Blob::Document(bytes) => manifest::parse_config(&bytes, &manifest).ok(),
        };
        let facts = config.and_then(|config| Facts::of(digest.clone(), &manifest, &config));
        Ok(Some(facts.map_or(Said::Nothing, |facts| Said::Image(Arc::new(facts)))))
    }

    async fn blob_in_store(&self, digest: &Digest) -> Result<Blob> {
        let found = self.containerd.blob(digest.as_str()).await.map_err(|e| self.containerd.explain(e))?;
        match found {
            None => Ok(Blob::Absent),
            Some((size, _)) if size > DOCUMENT_MAX_BYTES as u64 => Ok(Blob::Large),
            Some(_) => Ok(self.document_in_store(digest).await?.map_or(Blob::Absent, Blob::Document)),
        }
    }

    /// The manifest that an Acquire for `platform` takes of `target`, if it and what leads to it are here.
    pub(super) async fn picked(&self, target: &Digest, platform: &Platform) -> Result<Option<Digest>> {
        let mut digest = target.clone();
        for _ in 0..DOCUMENTS_MAX {
            let Some(said) = self.said(&digest).await? else { return Ok(None) };
            let Said::Index(entries) = &*said else { return Ok(Some(digest)) };
            let Ok(entry) = manifest::pick(entries, platform) else { return Ok(None) };
            digest = entry.digest.clone();
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_remembered_has_bounds() {
        let documents = Documents::default();
        let digest = |n: usize| Digest::of(&n.to_ne_bytes());
        let entry =
            Descriptor { media_type: "x".repeat(1 << 10), digest: digest(0), size: 1, platform: None };
        for n in 0..200 {
            let said = Arc::new(Said::index(vec![entry.clone(); 1_000]));
            let Said::Index(entries) = &*said else { unreachable!() };
            assert!(!entries[0].may_be_index() && entries[0].media_type.len() < 100, "{n}");
            documents.note(digest(n), said.clone());
            assert!(Arc::ptr_eq(&documents.get(&digest(n)).unwrap(), &said), "{n}");
            let (weight, remembered) = (said.weight(), documents.remembered());
            assert_eq!(remembered.bytes, remembered.said.len() * weight, "{n}");
            assert!(remembered.bytes <= REMEMBERED_BYTES, "{n}");
            drop(remembered);
            // Again is not more.
            documents.note(digest(n), said);
        }
    }
}
