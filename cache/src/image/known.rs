//! What image names meant a moment ago, so that an Acquire need not ask containerd for it.
//!
//! containerd tells of each change of an image's record, and what was known of the name is forgotten then. Since a
//! subscription can miss what happens while it is made, nothing is believed for long either. Only what needs no registry's word is
//! remembered: images that are nobody's, and for a tenant those that are its own.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cowshed_leases::Tenant;

use super::{ImageRef, Platform, ResolvedImage};

/// From this age on it is looked up again, behind the answer …
const FRESH: Duration = Duration::from_secs(15);
/// … and from this on before it.
const STALE: Duration = Duration::from_secs(60);
/// So many names are remembered.
const REMEMBERED: usize = 10_000;

/// As it was asked for; `None`: by whomever.
type Key = (ImageRef, Platform, Option<Tenant>);

/// Names that were resolved.
#[derive(Debug, Default)]
pub(super) struct Known {
    entries: Mutex<HashMap<Key, Entry>>,
    /// How often something was forgotten.
    forgotten: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    image: Arc<ResolvedImage>,
    at: Instant,
    /// Somebody is looking it up again.
    renewing: bool,
}

/// When a look-up was begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    forgotten: u64,
    at: Instant,
}

/// What is known.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Fresh(Arc<ResolvedImage>),
    /// It is time to look it up again; who is told so first does it.
    Old(Arc<ResolvedImage>),
    Nothing,
}

impl Known {
    /// What is known.
    pub(super) fn get(&self, image: &ImageRef, platform: &Platform, tenant: &Tenant) -> Answer {
        let mut entries = self.entries();
        let keys = keys(image, platform, tenant);
        let Some(key) = keys.iter().find(|key| entries.contains_key(*key)) else { return Answer::Nothing };
        let Some(entry) = entries.get_mut(key) else { return Answer::Nothing };
        let age = entry.at.elapsed();
        if age >= STALE {
            entries.remove(key);
            return Answer::Nothing;
        }
        if age < FRESH || std::mem::replace(&mut entry.renewing, true) {
            return Answer::Fresh(entry.image.clone());
        }
        Answer::Old(entry.image.clone())
    }

    /// What is known, without anything coming of it.
    pub(super) fn peek(
        &self,
        image: &ImageRef,
        platform: &Platform,
        tenant: &Tenant,
    ) -> Option<Arc<ResolvedImage>> {
        let entries = self.entries();
        let entry = keys(image, platform, tenant).iter().find_map(|key| entries.get(key))?;
        (entry.at.elapsed() < STALE).then(|| entry.image.clone())
    }

    /// To be called before a look-up.
    pub(super) fn begin(&self) -> Begun {
        Begun { forgotten: self.forgotten.load(Ordering::SeqCst), at: Instant::now() }
    }

    /// What a look-up has come to, unless something has changed since it began.
    pub(super) fn note(
        &self,
        platform: &Platform,
        owner: Option<Tenant>,
        image: &ResolvedImage,
        begun: Begun,
    ) {
        let mut entries = self.entries();
        if self.forgotten.load(Ordering::SeqCst) != begun.forgotten {
            return;
        }
        if entries.len() >= REMEMBERED {
            entries.retain(|_, entry| entry.at.elapsed() < STALE);
        }
        if entries.len() < REMEMBERED {
            let key = (image.name.clone(), platform.clone(), owner);
            let entry = Entry { image: Arc::new(image.clone()), at: begun.at, renewing: false };
            entries.insert(key, entry);
        }
    }

    /// A look-up has come to nothing.
    pub(super) fn drop_of(&self, image: &ImageRef, platform: &Platform, tenant: &Tenant) {
        let mut entries = self.entries();
        keys(image, platform, tenant).iter().for_each(|key| drop(entries.remove(key)));
    }

    /// The image of this name, or any, has changed.
    pub(super) fn forget(&self, name: Option<&str>) {
        let mut entries = self.entries();
        self.forgotten.fetch_add(1, Ordering::SeqCst);
        match name {
            Some(name) => entries.retain(|(image, ..), _| image.to_string() != name),
            None => entries.clear(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<Key, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Under what it may be known to a tenant.
fn keys(image: &ImageRef, platform: &Platform, tenant: &Tenant) -> [Key; 2] {
    let key = |tenant| (image.clone(), platform.clone(), tenant);
    [key(None), key(Some(tenant.clone()))]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fakes::image;

    #[test]
    fn what_was_noted_is_known_to_whom_it_concerns_until_it_is_forgotten() {
        let (known, image) = (Known::default(), image());
        let asked = Platform::parse("linux/amd64/v3").unwrap();
        let (mine, other) = (Tenant::default(), "other".parse::<Tenant>().unwrap());
        let knows = |platform: &Platform, tenant: &Tenant| {
            known.get(&image.name, platform, tenant) != Answer::Nothing
        };
        known.note(&asked, Some(mine.clone()), &image, known.begin());
        assert!(knows(&asked, &mine));
        assert!(!knows(&asked, &other), "another's is asked for at its registry");
        assert!(!knows(&image.platform, &mine), "as it was asked for, not as the configuration says");
        known.note(&image.platform, None, &image, known.begin());
        assert!(knows(&image.platform, &other));
        known.drop_of(&image.name, &image.platform, &other);
        assert!(!knows(&image.platform, &mine));
        // Something else was forgotten while this one was looked up: it may be this one.
        let begun = known.begin();
        known.forget(Some("r.example/another:1"));
        assert!(knows(&asked, &mine), "that is of another name");
        known.note(&image.platform, None, &image, begun);
        assert!(!knows(&image.platform, &mine));
        known.forget(Some(&image.name.to_string()));
        assert!(!knows(&asked, &mine));
    }
}
