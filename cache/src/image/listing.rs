//! Images as they are listed: of each name, what is here.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Digest, ImageInfo, Images, Platform, Shared, documents::Said, facts::Facts};
use crate::{
    containerd::ImageRecord,
    error::{Error, Result},
};

/// Images that are looked at at a time.
const ABREAST: usize = 8;
/// What attestations are filed under.
const NO_PLATFORM: &str = "unknown/unknown";

impl Images {
    /// All images of the namespace for this platform, by name.
    pub async fn list(&self, platform: &Platform) -> Result<Vec<ImageInfo>> {
        let mut images = Vec::new();
        for record in self.records().await? {
            images.push(self.0.info(record, platform).await?.0);
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// The same, with the room that each takes. Without a platform: once for each that is here, by name and platform; of what
    /// nothing is here of, the host's.
    pub async fn list_on_disk(&self, platform: Option<&Platform>) -> Result<Vec<ImageInfo>> {
        let shared = &self.0;
        let records = self.records().await?;
        let blobs = match platform {
            Some(_) => HashSet::new(),
            None => shared.blobs().await?,
        };
        let blobs = &blobs;
        let rows = |record| async move {
            match platform {
                Some(platform) => shared.info(record, platform).await.map(|row| vec![row]),
                None => shared.infos(record, blobs).await,
            }
        };
        let rows = stream::iter(records).map(rows).buffered(ABREAST);
        let rows: Vec<Vec<(ImageInfo, Option<Arc<Facts>>)>> = rows.try_collect().await?;
        let (mut images, facts): (Vec<_>, Vec<_>) = rows.into_iter().flatten().unzip();
        let unpacked = images.iter().zip(facts).map(|(image, facts)| facts.filter(|_| image.unpacked));
        let sizes = shared.on_disk(&unpacked.collect::<Vec<_>>()).await?;
        for (image, size) in images.iter_mut().zip(sizes) {
            image.on_disk = size;
        }
        images.sort_by(|a, b| (&a.name, &a.platform).cmp(&(&b.name, &b.platform)));
        Ok(images)
    }

    async fn records(&self) -> Result<Vec<ImageRecord>> {
        self.0.containerd.list_images().await.map_err(|e| self.0.containerd.explain(e))
    }
}

impl Shared {
    /// The image for this platform.
    pub(super) async fn info(
        &self,
        record: ImageRecord,
        platform: &Platform,
    ) -> Result<(ImageInfo, Option<Arc<Facts>>)> {
        // A record that we cannot read is listed as it is.
        let facts = match record.target.digest.parse::<Digest>() {
            Ok(target) => self.facts(&target, platform).await.unwrap_or_else(|error| unread(&record, &error)),
            Err(_) => None,
        };
        self.row(&record, platform, facts).await
    }

    /// The image for each platform of which its manifest and its configuration are among the blobs; for the host's if there is
    /// none.
    async fn infos(
        &self,
        record: ImageRecord,
        blobs: &HashSet<String>,
    ) -> Result<Vec<(ImageInfo, Option<Arc<Facts>>)>> {
        let here = match record.target.digest.parse::<Digest>() {
            Ok(target) => {
                let here = self.facts_here(&record, &target, blobs).await;
                here.unwrap_or_else(|error| unread(&record, &error))
            }
            Err(_) => Vec::new(),
        };
        if here.is_empty() {
            return Ok(vec![self.row(&record, &Platform::host(), None).await?]);
        }
        let mut rows = Vec::with_capacity(here.len());
        for facts in here {
            let platform = facts.platform.clone();
            rows.push(self.row(&record, &platform, Some(facts)).await?);
        }
        Ok(rows)
    }

    /// Of each platform the one that an Acquire takes, or, as that is not here, another one. What cannot be read hides no other.
    async fn facts_here(
        &self,
        record: &ImageRecord,
        target: &Digest,
        blobs: &HashSet<String>,
    ) -> Result<Vec<Arc<Facts>>> {
        let mut here: BTreeMap<String, Vec<Arc<Facts>>> = BTreeMap::new();
        for digest in self.led_to(target).await? {
            let Some(digest) = blobs.get(&digest).and_then(|digest| digest.parse::<Digest>().ok()) else {
                continue;
            };
            let said = self.said(&digest).await.unwrap_or_else(|error| unread(record, &error));
            let Some(Said::Image(facts)) = said.as_deref() else { continue };
            let platform = facts.platform.to_string();
            // What is remembered of it may have gone.
            if blobs.contains(facts.config.as_str()) && platform != NO_PLATFORM {
                here.entry(platform).or_default().push(facts.clone());
            }
        }
        let mut once = Vec::with_capacity(here.len());
        for mut facts in here.into_values() {
            if let [first, _, ..] = &facts[..] {
                let taken = self.picked(target, &first.platform).await;
                let taken = taken.unwrap_or_else(|error| unread(record, &error));
                let taken = facts.iter().position(|facts| Some(&facts.manifest) == taken.as_ref());
                facts.swap(0, taken.unwrap_or_default());
            }
            once.extend(facts.into_iter().next());
        }
        Ok(once)
    }

    /// The digests of all blobs.
    async fn blobs(&self) -> Result<HashSet<String>> {
        let blobs = self.containerd.blobs().await.map_err(|e| self.containerd.explain(e))?;
        Ok(blobs.into_keys().collect())
    }

    async fn row(
        &self,
        record: &ImageRecord,
        platform: &Platform,
        facts: Option<Arc<Facts>>,
    ) -> Result<(ImageInfo, Option<Arc<Facts>>)> {
        let unpacked = match &facts {
            Some(facts) => self.has_snapshot(&facts.chain_id).await?,
            None => false,
        };
        let info = ImageInfo {
            name: record.name.clone(),
            target_digest: record.target.digest.clone(),
            manifest_digest: facts.as_ref().map(|f| f.manifest.to_string()),
            platform: facts.as_ref().map_or_else(|| platform.to_string(), |f| f.platform.to_string()),
            compressed_bytes: facts.as_ref().map_or(0, |f| f.compressed_bytes),
            layers: facts.as_ref().map_or(0, |f| f.layers),
            unpacked,
            created_at: record.created_at,
            on_disk: None,
        };
        Ok((info, facts))
    }
}

/// Tells that something of an image cannot be read; it is listed without that.
fn unread<T: Default>(record: &ImageRecord, error: &Error) -> T {
    tracing::warn!(image = %record.name, %error, "not all of an image can be read; it is listed without that");
    T::default()
}

#[cfg(test)]
#[path = "listing_tests.rs"]
mod tests;
