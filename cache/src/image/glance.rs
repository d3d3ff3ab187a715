//! What is there, as it was a moment ago, for questions that nobody waits for containerd for.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    Access, Digest, ImageRef, Images, Platform, ResolvedImage, Shared, access::Owner, facts::Facts,
    labels::Labels,
};

/// Events that come together are one look.
const TOGETHER: Duration = Duration::from_secs(1);
/// The longest time from one look to the next.
const LOOK: Duration = Duration::from_secs(60);

/// How far an image is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Glance {
    /// Unpacked: this manifest.
    Unpacked(Digest),
    /// Being pulled, or here and not unpacked, with so many bytes still to be fetched, if that is known.
    Partial(Option<u64>),
    /// Nothing of it is known that this asker may know.
    Nothing,
}

/// Images that are unpacked, for the host's platform: by their names their manifests, and whose they are.
type Unpacked = HashMap<ImageRef, (Digest, Option<Owner>)>;

/// Images whose manifest is here, and which are not unpacked: how many bytes of them would have to be fetched, and whose they are.
type Partial = HashMap<ImageRef, (u64, Option<Owner>)>;

/// What was unpacked at the last look, and what has come since then.
#[derive(Debug, Default)]
pub(super) struct Standing(Mutex<Stand>);

#[derive(Debug, Default)]
struct Stand {
    images: Unpacked,
    /// What else was there.
    partial: Partial,
    /// What has come since the latest look was begun, which may not have seen it.
    noted: Unpacked,
}

impl Standing {
    fn get(&self, image: &ImageRef) -> Option<(Digest, Option<Owner>)> {
        self.stand().images.get(image).cloned()
    }

    fn get_partial(&self, image: &ImageRef) -> Option<(u64, Option<Owner>)> {
        self.stand().partial.get(image).cloned()
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
    fn found(&self, mut images: Unpacked, partial: Partial) {
        let mut stand = self.stand();
        images.extend(std::mem::take(&mut stand.noted));
        stand.images = images;
        stand.partial = partial;
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
        let is_host = *platform == Platform::host();
        let may_know = |owner: &Option<Owner>| owner.as_ref().is_none_or(|owner| owner.is(&access.tenant));
        let unpacked = shared.standing.get(image).filter(|(_, owner)| is_host && may_know(owner));
        if let Some((manifest, _)) = unpacked {
            return Glance::Unpacked(manifest);
        }
        if let Some(missing) = shared.flights.missing(image, platform, access) {
            return Glance::Partial(missing);
        }
        match shared.standing.get_partial(image).filter(|(_, owner)| is_host && may_know(owner)) {
            Some((missing, _)) => Glance::Partial(Some(missing)),
            None => Glance::Nothing,
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
        let (mut unpacked, mut rest) = (Unpacked::new(), Vec::new());
        let records = shared.containerd.list_images().await.map_err(|e| shared.containerd.explain(e))?;
        for record in records {
            let (Ok(name), Ok(target)) = (ImageRef::parse(&record.name), record.target.digest.parse()) else {
                continue;
            };
            // One that cannot be read is not there.
            let Ok(Some(facts)) = shared.facts(&target, &Platform::host()).await else { continue };
            match shared.owner_if_unpacked(&target, &facts.manifest, &facts.chain_id).await? {
                Some(owner) => drop(unpacked.insert(name, (facts.manifest.clone(), owner))),
                None => rest.push((name, target, facts)),
            }
        }
        let partial = shared.partial(rest).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "how much of images is there cannot be learnt now");
            Partial::new()
        });
        shared.standing.found(unpacked, partial);
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

    /// How much of each of these, which are not unpacked, is there all the same.
    async fn partial(&self, images: Vec<(ImageRef, Digest, Arc<Facts>)>) -> crate::error::Result<Partial> {
        let mut partial = Partial::new();
        if images.is_empty() {
            return Ok(partial);
        }
        let blobs = self.containerd.blobs().await.map_err(|e| self.containerd.explain(e))?;
        for (name, target, facts) in images {
            let owners = [self.owner(&target).await?, self.owner(&facts.manifest).await?];
            let owner = owners.into_iter().flatten().next();
            // Of what is another's nobody is told that it is there.
            let is_for_it = |labels: &Labels| Owner::of(labels).is_none_or(|of| Some(of) == owner);
            let mut unpacked = 0;
            for chain_id in &facts.chain {
                match self.snapshot_labels(chain_id).await? {
                    Some(labels) if is_for_it(&labels) => unpacked += 1,
                    _ => break,
                }
            }
            let is_here = |blob: &Digest| blobs.get(blob.as_str()).is_some_and(is_for_it);
            partial.insert(name, (to_be_fetched(&facts.blobs, unpacked, is_here), owner));
        }
        Ok(partial)
    }
}

/// Bytes of the layers that are neither unpacked, as so many of the lowest are, nor here; of each blob once.
fn to_be_fetched(blobs: &[(Digest, u64)], unpacked: usize, is_here: impl Fn(&Digest) -> bool) -> u64 {
    let missing: BTreeMap<&Digest, u64> = blobs
        .iter()
        .skip(unpacked)
        .filter(|(blob, _)| !is_here(blob))
        .map(|(blob, size)| (blob, *size))
        .collect();
    missing.into_values().fold(0, u64::saturating_add)
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
        standing.found(Unpacked::new(), Partial::from([(image.name.clone(), (7, None))]));
        assert_eq!(standing.get(&image.name), Some(what));
        // The next one has the last word.
        standing.begin();
        standing.found(Unpacked::new(), Partial::from([(image.name.clone(), (7, None))]));
        assert_eq!(standing.get(&image.name), None);
        assert_eq!(standing.get_partial(&image.name), Some((7, None)));
        standing.found(Unpacked::new(), Partial::new());
        assert_eq!(standing.get_partial(&image.name), None);
    }

    #[test]
    fn what_is_neither_unpacked_nor_here_is_to_be_fetched() {
        let [a, b, c] = ["a", "b", "c"].map(|text| Digest::of(text.as_bytes()));
        let blobs = [(a.clone(), 1), (b.clone(), 10), (c.clone(), 100), (b.clone(), 10)];
        let none = |_: &Digest| false;
        assert_eq!(to_be_fetched(&blobs, 0, none), 111, "a layer that is there twice is fetched once");
        assert_eq!(to_be_fetched(&blobs, 1, none), 110);
        assert_eq!(to_be_fetched(&blobs, 1, |blob| *blob == b), 100);
        assert_eq!(to_be_fetched(&blobs, 4, none), 0);
        assert_eq!(to_be_fetched(&[(a, u64::MAX), (c, 1)], 0, none), u64::MAX);
    }
}
