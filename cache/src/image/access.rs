//! Whose images are whose: what a tenant has fetched with credentials of its own is handed to another one only if the
//! registry hands it to that one, too.
//!
//! ```text
//!  fetched with credentials of a request ─► a label on the blob, and on the snapshot made of it, says whose it is
//!  another tenant's request comes upon it ─► HEAD at the same registry, as that tenant ─► yes: for a while, no: refused
//!                                        └─► from another registry: whose word is its operator's; it has to send the bytes
//!  the registry hands it to what the host is ─► nobody's
//! ```
//!
//! It is asked for at every place where what is there would be taken without asking a registry for it: the image that is
//! found unpacked, documents and blobs in the content store, layers that are unpacked already. The labels are written with
//! what they are about, and go with it.

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use cowshed_leases::Tenant;

use super::{
    Digest, ImageRef, Shared, digest::chain_ids, facts::Facts, labels::Labels, pull::Asker, store::Store,
};
use crate::{
    containerd::{CallError, ContentWriter},
    error::{Error, Reason, Result},
    registry::{Credential, Kind},
};

/// So many answers of registries, and owners, are remembered.
const REMEMBERED: usize = 10_000;
/// Of content and of snapshots.
const OWNER_LABEL: &str = "cowshed.dev/owner";
/// Of snapshots: the blob that the layer was.
const BLOB_LABEL: &str = "cowshed.dev/blob";

/// Who asks for an image, and what is asked of its registry. Requests of the same access share a pull.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Access {
    /// Whose VM it is for.
    pub tenant: Tenant,
    /// Who that is to the registry; `None`: what the host is.
    pub credential: Option<Credential>,
    /// What is asked of the registry.
    pub policy: PullPolicy,
}

/// What is asked of the registry; see the API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PullPolicy {
    /// Nothing, if the image is there.
    #[default]
    IfNotPresent,
    /// What a tag means now.
    Always,
    /// Nothing.
    Never,
}

/// Whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// Who has fetched it with credentials of its own.
    tenant: Tenant,
    /// From which registry, host[:port].
    registry: String,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.tenant, self.registry)
    }
}

impl FromStr for Owner {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (tenant, registry) = text.split_once(' ').ok_or(())?;
        Ok(Self { tenant: tenant.parse().map_err(|_| ())?, registry: registry.to_owned() })
    }
}

impl Owner {
    /// As the labels say. One that cannot be read is somebody's whom nobody is.
    pub(super) fn of(labels: &Labels) -> Option<Self> {
        let text = labels.get(OWNER_LABEL).filter(|text| !text.is_empty())?;
        let unknown = || Self { tenant: Tenant::nobody(), registry: String::new() };
        Some(text.parse().unwrap_or_else(|()| unknown()))
    }

    /// Whether it is this one's.
    pub(super) fn is(&self, tenant: &Tenant) -> bool {
        self.tenant == *tenant
    }

    fn label(&self) -> (String, String) {
        (OWNER_LABEL.to_owned(), self.to_string())
    }
}

/// Owners of what is in the content store, as far as they were looked up. Only this service gives owners.
#[derive(Debug, Default)]
pub(super) struct Owners(Mutex<HashMap<Digest, Option<Owner>>>);

impl Owners {
    fn get(&self, digest: &Digest) -> Option<Option<Owner>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(digest).cloned()
    }

    pub(super) fn note(&self, digest: &Digest, owner: Option<Owner>) {
        self.with_room().insert(digest.clone(), owner);
    }

    /// What was read a moment ago. Who has written since knows better.
    fn note_read(&self, digest: &Digest, owner: Option<Owner>) {
        self.with_room().entry(digest.clone()).or_insert(owner);
    }

    fn with_room(&self) -> MutexGuard<'_, HashMap<Digest, Option<Owner>>> {
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if owners.len() >= REMEMBERED {
            owners.clear();
        }
        owners
    }

    fn forget(&self, digest: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(digest);
    }
}

/// Which tenants have lately been found to have access to what, by the repository's name.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<HashMap<(Tenant, String, Digest), Instant>>);

impl Answers {
    fn has(&self, key: &(Tenant, String, Digest), valid_for: Duration) -> bool {
        let answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(key).is_some_and(|answered| answered.elapsed() < valid_for)
    }

    fn note(&self, key: (Tenant, String, Digest)) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= REMEMBERED {
            answers.clear();
        }
        answers.insert(key, Instant::now());
    }
}

impl Shared {
    /// Whose it is that is in the content store. What is not there is nobody's.
    pub(super) async fn owner(&self, digest: &Digest) -> Result<Option<Owner>> {
        if let Some(owner) = self.owners.get(digest) {
            return Ok(owner);
        }
        let found = self.containerd.blob(digest.as_str()).await.map_err(|e| self.containerd.explain(e))?;
        let Some((_, labels)) = found else { return Ok(None) };
        let owner = Owner::of(&labels);
        self.owners.note_read(digest, owner.clone());
        Ok(owner)
    }

    /// For whom it need not be asked whose the image is, if there is anybody; `None` in it: for whomever.
    pub(super) async fn plain_owner(
        &self,
        target: &Digest,
        (facts, top): (&Facts, &Labels),
        access: &Access,
    ) -> Result<Option<Option<Tenant>>> {
        let mut owners = vec![Owner::of(top)];
        for digest in [target, &facts.manifest, &facts.config] {
            owners.push(self.owner(digest).await?);
        }
        let owners: Vec<Owner> = owners.into_iter().flatten().collect();
        Ok(match owners.iter().all(|owner| owner.is(&access.tenant)) {
            true if owners.is_empty() => Some(None),
            true => Some(Some(access.tenant.clone())),
            false => None,
        })
    }

    /// Whether this, which is in the content store, is another tenant's.
    pub(super) async fn is_foreign(&self, digest: &Digest, access: &Access) -> Result<bool> {
        Ok(self.owner(digest).await?.is_some_and(|owner| owner.tenant != access.tenant))
    }

    /// Whether who asks may have the image that is there, unpacked, with these labels of its highest layer.
    pub(super) async fn permits_image(
        &self,
        image: &ImageRef,
        target: &Digest,
        (facts, top): (&Facts, &Labels),
        access: &Access,
    ) -> Result<bool> {
        let mut foreign = is_strangers(top, access);
        for digest in [target, &facts.manifest, &facts.config] {
            foreign |= self.is_foreign(digest, access).await?;
        }
        if !foreign {
            return Ok(true);
        }
        let source = self.registries.source(image, access.credential.as_ref()).await?;
        Asker { shared: self, image, source: &source, access }.permits_image(target, facts, top).await
    }
}

/// Whether the layer with these labels, or one below it, is another tenant's.
fn is_strangers(labels: &Labels, access: &Access) -> bool {
    Owner::of(labels).is_some_and(|owner| owner.tenant != access.tenant)
}

impl Asker<'_> {
    fn key(&self, digest: &Digest) -> (Tenant, String, Digest) {
        let repository = format!("{}/{}", self.image.registry(), self.image.repository());
        (self.access.tenant.clone(), repository, digest.clone())
    }

    /// Whether the registry hands what is in the content store out, under the image's name, to who asks, if it is another
    /// tenant's. False: it has no such thing there.
    ///
    /// # Errors
    /// If it refuses, or cannot be asked.
    pub(super) async fn permits(&self, kind: Kind, digest: &Digest) -> Result<bool> {
        match self.shared.owner(digest).await? {
            Some(owner) => self.permits_of(&owner, kind, digest).await,
            None => Ok(true),
        }
    }

    /// The same of all that an image is made of. An index and a manifest say what they like: whoever has made them need not
    /// have the rest.
    pub(super) async fn permits_image(&self, target: &Digest, facts: &Facts, top: &Labels) -> Result<bool> {
        let config = Kind::Blob(facts.config_bytes);
        for (kind, digest) in
            [(Kind::Manifest, target), (Kind::Manifest, &facts.manifest), (config, &facts.config)]
        {
            if !self.permits(kind, digest).await? {
                return Ok(false);
            }
        }
        if !is_strangers(top, self.access) {
            return Ok(true);
        }
        let Some((manifest, config)) = self.shared.documents_of(facts).await? else { return Ok(false) };
        for (layer, chain_id) in manifest.layers.iter().zip(chain_ids(&config.diff_ids)) {
            let Some(labels) = self.shared.snapshot_labels(&chain_id).await? else { return Ok(false) };
            if !self.may_take(&labels, &layer.digest, layer.size).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn permits_of(&self, owner: &Owner, kind: Kind, digest: &Digest) -> Result<bool> {
        let Self { shared, image, source, access } = self;
        if owner.tenant == access.tenant || shared.answers.has(&self.key(digest), shared.limits.access_check)
        {
            return Ok(true);
        }
        let asked = if owner.registry == image.registry() {
            source.has(kind, digest).await
        } else {
            source.proves(kind, digest).await
        };
        let context =
            || format!("{digest} was pulled by another tenant, and tenant {} needs access", access.tenant);
        let permitted = asked.map_err(|error| error.context(context()))?;
        if permitted {
            self.found_accessible(digest).await?;
        }
        Ok(permitted)
    }

    /// The registry hands it out to who asks.
    pub(super) async fn found_accessible(&self, digest: &Digest) -> Result<()> {
        let Self { shared, access, .. } = self;
        self.shared.answers.note(self.key(digest));
        // What it hands to the host it hands to everybody there.
        if access.credential.is_some() || !shared.is_foreign(digest, access).await? {
            return Ok(());
        }
        let none = Labels::from([(OWNER_LABEL.to_owned(), String::new())]);
        let containerd = &shared.containerd;
        containerd.label_blob(digest.as_str(), none).await.map_err(|e| containerd.explain(e))?;
        shared.owners.note(digest, None);
        Ok(())
    }

    /// Whether a registry sends it to who asks.
    pub(super) async fn expect_proof(&self, kind: Kind, digest: &Digest) -> Result<()> {
        if self.source.proves(kind, digest).await? {
            return Ok(());
        }
        let message = format!("image {}: the registry does not have {digest}", self.image);
        Err(Error::new(Reason::ImageNotFound, message).with("digest", digest))
    }

    /// Of what is in the content store: whether who asks may have it.
    pub(super) async fn expect_access(&self, kind: Kind, digest: &Digest) -> Result<()> {
        if self.permits(kind, digest).await? {
            return Ok(());
        }
        let Self { image, access, .. } = self;
        let message = format!(
            "image {image}: {digest} was pulled by another tenant, and the registry does not have it under this name for \
             tenant {}; pass credentials that may pull it",
            access.tenant
        );
        Err(Error::new(Reason::RegistryDenied, message).with("digest", digest).with("tenant", &access.tenant))
    }

    /// Whether the layer that is unpacked, with these labels, may be taken for this blob without unpacking that. What was made
    /// of another blob, and is another tenant's, may not: that it is the same is only what the image's configuration says.
    pub(super) async fn may_take(&self, labels: &Labels, blob: &Digest, size: u64) -> Result<bool> {
        let Some(owner) = Owner::of(labels).filter(|owner| owner.tenant != self.access.tenant) else {
            return Ok(true);
        };
        if labels.get(BLOB_LABEL).is_none_or(|of| of != blob.as_str()) {
            return Ok(false);
        }
        let containerd = &self.shared.containerd;
        let there = containerd.blob(blob.as_str()).await.map_err(|e| containerd.explain(e))?;
        let owner = match there.map(|(_, labels)| Owner::of(&labels)) {
            // By now it is nobody's.
            Some(None) => return Ok(true),
            Some(Some(now)) => now,
            // The snapshot's label is all that is known.
            None => owner,
        };
        self.permits_of(&owner, Kind::Blob(size), blob).await
    }
}

impl Store<'_> {
    /// Makes what was written a blob of the content store, which says whose it is.
    pub(super) async fn commit(
        &self,
        writer: ContentWriter,
        rest: Vec<u8>,
        digest: &Digest,
        mut labels: Labels,
    ) -> Result<(), CallError> {
        let owner = self.access.credential.as_ref().map(|_| Owner {
            tenant: self.access.tenant.clone(),
            registry: self.image.registry().to_owned(),
        });
        labels.extend(owner.as_ref().map(Owner::label));
        let owners = &self.shared.owners;
        // It may be somebody else's by now that is there.
        owners.forget(digest);
        writer.commit(rest, labels).await?;
        owners.note(digest, owner);
        Ok(())
    }

    /// Whose a snapshot of a layer is: its blob's owner's, or that of the layers below.
    pub(super) async fn owner_of_unpacked(
        &self,
        blob: &Digest,
        parent: Option<&Digest>,
    ) -> Result<Option<Owner>> {
        let owner = self.shared.owner(blob).await?;
        let (None, Some(parent)) = (&owner, parent) else { return Ok(owner) };
        if let Some(known) = self.unpacked.get(parent) {
            return Ok(known);
        }
        Ok(self.shared.snapshot_labels(parent).await?.and_then(|labels| Owner::of(&labels)))
    }
}

/// Those of a snapshot that is somebody's.
pub(super) fn labels_of_unpacked(
    owner: Option<&Owner>,
    blob: &Digest,
) -> impl Iterator<Item = (String, String)> {
    owner.map(|owner| [owner.label(), (BLOB_LABEL.to_owned(), blob.to_string())]).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_labels_say() {
        let labels = |text: &str| Labels::from([(OWNER_LABEL.to_owned(), text.to_owned())]);
        let owner = Owner { tenant: "a".parse().unwrap(), registry: "r.example:5000".to_owned() };
        assert_eq!(owner.label().1, "a r.example:5000");
        assert_eq!(Owner::of(&labels("a r.example:5000")), Some(owner));
        for none in [Labels::new(), labels("")] {
            assert_eq!(Owner::of(&none), None);
        }
        // What cannot be read is not for everybody.
        for odd in ["a", "../a r", " r"] {
            let owner = Owner::of(&labels(odd)).unwrap();
            assert!(
                "a".parse::<Tenant>().unwrap() != owner.tenant && Tenant::default() != owner.tenant,
                "{odd}"
            );
        }
    }

    #[test]
    fn what_was_read_does_not_undo_what_was_written_since() {
        let owner = Owner { tenant: "a".parse().unwrap(), registry: "r".to_owned() };
        let (owners, digest) = (Owners::default(), Digest::of(b"x"));
        owners.note(&digest, Some(owner.clone()));
        owners.note_read(&digest, None);
        assert_eq!(owners.get(&digest), Some(Some(owner.clone())));
        owners.forget(&digest);
        owners.note_read(&digest, None);
        owners.note(&digest, Some(owner.clone()));
        assert_eq!(owners.get(&digest), Some(Some(owner)));
    }

    #[test]
    fn answers_count_for_a_while() {
        let answers = Answers::default();
        let key = |tenant: &str| (tenant.parse::<Tenant>().unwrap(), "r/x".to_owned(), Digest::of(b"x"));
        answers.note(key("a"));
        assert!(answers.has(&key("a"), Duration::from_secs(60)));
        assert!(!answers.has(&key("a"), Duration::ZERO));
        assert!(!answers.has(&key("b"), Duration::from_secs(60)));
    }
}
