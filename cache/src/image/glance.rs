//! What is there, as it was a moment ago, for questions that nobody waits for containerd for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::sync::Notify;

use super::{Access, Digest, ImageRef, Images, Platform, ResolvedImage, Shared, access::Owner};

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

/// Images that are unpacked, for the host's platform: by their names their manifests, and whose they are.
type Unpacked = HashMap<ImageRef, (Digest, Option<Owner>)>;

/// What was unpacked at the last look, and what has come since then.
#[derive(Debug, Default)]
pub(super) struct Standing(Mutex<Stand>);

#[derive(Debug, Default)]
struct Stand {
    images: Unpacked,
    /// What has come since the latest look was begun, which may not have seen it.
    noted: Unpacked,
}

impl Standing {
    fn get(&self, image: &ImageRef) -> Option<(Digest, Option<Owner>)> {
        self.stand().images.get(image).cloned()
    }

    /// Whether it was unpacked before.
    pub(super) fn has(&self, image: &ResolvedImage) -> bool {
        self.get(&image.name).is_some_and(|(manifest, _)| manifest == image.manifest)
    }

    /// Unpacked by us, just now.
    fn note(&self, image: &ImageRef, what: (Digest, Option<Owner>)) {
        let mut stand = self.stand();
        stand.images.insert(image.clone(), what.clone());
        stand.noted.insert(image.clone(), what);
    }

    /// To be called before a look.
    fn begin(&self) {
        self.stand().noted.clear();
    }

    /// What a look has found.
    fn found(&self, mut images: Unpacked) {
        let mut stand = self.stand();
        images.extend(std::mem::take(&mut stand.noted));
        stand.images = images;
    }

    fn stand(&self) -> MutexGuard<'_, Stand> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Images {
    /// How far the image is there, without asking anybody.
    pub fn glance(&self, image: &ImageRef, platform: &Platform, access: &Access) -> Glance {
        let shared = &self.0;
        if let Some(known) = shared.known.peek(image, platform, &access.tenant) {
            return Glance::Unpacked(known.manifest.clone());
        }
        match shared.standing.get(image).filter(|_| *platform == Platform::host()) {
            Some((manifest, owner)) if owner.as_ref().is_none_or(|owner| owner.is(&access.tenant)) => {
                Glance::Unpacked(manifest)
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
        shared.standing.begin();
        let mut standing = HashMap::new();
        let records = shared.containerd.list_images().await.map_err(|e| shared.containerd.explain(e))?;
        for record in records {
            let (Ok(name), Ok(target)) = (ImageRef::parse(&record.name), record.target.digest.parse()) else {
                continue;
            };
            // One that cannot be read is not there.
            let Ok(Some(facts)) = shared.facts(&target, &Platform::host()).await else { continue };
            if let Some(owner) = shared.owner_if_unpacked(&target, &facts.manifest, &facts.chain_id).await? {
                standing.insert(name, (facts.manifest.clone(), owner));
            }
        }
        shared.standing.found(standing);
        Ok(())
    }
}

impl Shared {
    /// An image was just pulled, or found unpacked when it was to be: nobody has to wait for the next look to be told so. What
    /// fails here, that look finds.
    pub(super) async fn stands(&self, image: &ResolvedImage, platform: &Platform) {
        // Nothing would be forgotten again.
        if *platform != Platform::host() || !self.follows.load(Ordering::SeqCst) {
            return;
        }
        match self.owner_if_unpacked(&image.target, &image.manifest, &image.chain_id).await {
            Ok(Some(owner)) => self.standing.note(&image.name, (image.manifest.clone(), owner)),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "whose it is that was pulled cannot be learnt now"),
        }
    }

    /// Whose it is, if it is unpacked.
    async fn owner_if_unpacked(
        &self,
        target: &Digest,
        manifest: &Digest,
        chain_id: &Digest,
    ) -> crate::error::Result<Option<Option<Owner>>> {
        let Some(labels) = self.snapshot_labels(chain_id).await? else { return Ok(None) };
        let owners = [Owner::of(&labels), self.owner(target).await?, self.owner(manifest).await?];
        Ok(Some(owners.into_iter().flatten().next()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::image;

    #[test]
    fn what_has_come_while_it_was_looked_is_not_forgotten_for_it() {
        let (standing, image) = (Standing::default(), image());
        let what = (image.manifest.clone(), None);
        standing.begin();
        standing.note(&image.name, what.clone());
        assert_eq!(standing.get(&image.name), Some(what.clone()), "at once");
        assert!(standing.has(&image));
        assert!(!standing.has(&ResolvedImage { manifest: Digest::of(b"another"), ..image.clone() }));
        // That look was begun before, and has not seen it.
        standing.found(Unpacked::new());
        assert_eq!(standing.get(&image.name), Some(what));
        // The next one has the last word.
        standing.begin();
        standing.found(Unpacked::new());
        assert_eq!(standing.get(&image.name), None);
    }
}
