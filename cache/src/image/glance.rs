//! What is there, as it was a moment ago, for questions that nobody waits for containerd for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::{Access, Digest, ImageRef, Images, Platform, access::Owner};

/// Events that come together are one look.
const TOGETHER: Duration = Duration::from_secs(1);
/// The longest time from one look to the next.
const LOOK: Duration = Duration::from_secs(60);

/// How far an image is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Glance {
    /// Unpacked: this manifest.
    Unpacked(Digest),
    /// Being pulled, with so many bytes still to be fetched, if that is known.
    Pulled(Option<u64>),
    /// Nothing of it is known that this asker may know.
    Nothing,
}

/// Images that are unpacked, for the host's platform.
#[derive(Debug, Default)]
pub(super) struct Standing(Mutex<HashMap<ImageRef, (Digest, Option<Owner>)>>);

impl Images {
    /// How far the image is there, without asking anybody.
    pub fn glance(&self, image: &ImageRef, platform: &Platform, access: &Access) -> Glance {
        let shared = &self.0;
        if let Some(known) = shared.known.peek(image, platform, &access.tenant) {
            return Glance::Unpacked(known.manifest.clone());
        }
        let standing = shared.standing.0.lock().unwrap_or_else(PoisonError::into_inner);
        match standing.get(image).filter(|_| *platform == Platform::host()) {
            Some((manifest, owner)) if owner.as_ref().is_none_or(|owner| owner.is(&access.tenant)) => {
                Glance::Unpacked(manifest.clone())
            }
            _ => match shared.flights.missing(image, platform, access) {
                Some(missing) => Glance::Pulled(missing),
                None => Glance::Nothing,
            },
        }
    }

    /// Looks at all images when something has changed, for ever.
    pub(super) async fn keep_looking(&self, changed: Arc<Notify>) {
        loop {
            if let Err(error) = self.look_around().await {
                tracing::debug!(%error, "which images are there cannot be learnt now");
            }
            // Late or not: it is time.
            let _late = tokio::time::timeout(LOOK, changed.notified()).await;
            tokio::time::sleep(TOGETHER).await;
        }
    }

    async fn look_around(&self) -> crate::error::Result<()> {
        let shared = &self.0;
        let mut standing = HashMap::new();
        let records = shared.containerd.list_images().await.map_err(|e| shared.containerd.explain(e))?;
        for record in records {
            let (Ok(name), Ok(target)) = (ImageRef::parse(&record.name), record.target.digest.parse()) else {
                continue;
            };
            // One that cannot be read is not there.
            let Ok(Some(facts)) = shared.facts(&target, &Platform::host()).await else { continue };
            if let Some(labels) = shared.snapshot_labels(&facts.chain_id).await? {
                let owners =
                    [Owner::of(&labels), shared.owner(&target).await?, shared.owner(&facts.manifest).await?];
                standing.insert(name, (facts.manifest.clone(), owners.into_iter().flatten().next()));
            }
        }
        *shared.standing.0.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        Ok(())
    }
}
