//! The image records of containerd, for whoever decides which of them stay.

use std::collections::BTreeSet;

use super::{
    Digest, ImageInfo, ImageRef, Images, Platform, Shared, documents::Said, manifest::DOCUMENTS_MAX,
};
use crate::{containerd::ImageRecord, error::Result, keeping::Catalogue};

#[async_trait::async_trait]
impl Catalogue for Images {
    async fn find(&self, image: &ImageRef, platform: &Platform) -> Result<Option<ImageInfo>> {
        match self.0.record(image).await? {
            Some(record) => self.0.info(record, platform).await.map(|(info, _)| Some(info)),
            None => Ok(None),
        }
    }

    async fn records(&self) -> Result<Vec<ImageRecord>> {
        self.0.containerd.list_images().await.map_err(|e| self.0.containerd.explain(e))
    }

    async fn manifests(&self, target: &str) -> Result<BTreeSet<String>> {
        let Ok(target) = target.parse::<Digest>() else { return Ok(BTreeSet::new()) };
        self.0.led_to(&target).await
    }

    fn is_pulled(&self, image: &ImageRef) -> bool {
        self.0.flights.has(image)
    }

    async fn remove(&self, record: &ImageRecord, collect: bool) -> Result<bool> {
        let removed = self.0.containerd.remove_image(record, collect).await;
        self.0.known.forget(Some(&record.name));
        removed.map_err(|e| self.0.containerd.explain(e))
    }
}

impl Shared {
    /// The digests of `target` and of all that it leads to, as far as its documents are, or were, in the content store.
    pub(super) async fn led_to(&self, target: &Digest) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::from([target.to_string()]);
        let mut indexes = vec![target.clone()];
        for _ in 0..DOCUMENTS_MAX {
            let mut below = Vec::new();
            for index in indexes {
                let Some(said) = self.said(&index).await? else { continue };
                let Said::Index(entries) = &*said else { continue };
                for entry in entries {
                    if all.insert(entry.digest.to_string()) && entry.may_be_index() {
                        below.push(entry.digest.clone());
                    }
                }
            }
            indexes = below;
        }
        Ok(all)
    }
}
