//! What image names meant a moment ago, so that an Acquire need not ask containerd for it.
//!
//! containerd tells of each change of an image's record, and what was known of the name is forgotten then. Since a
//! subscription can miss what happens while it is made, nothing is believed for long either: what is asked for is looked up again
//! in time, beside the answers. Only what needs no registry's word is remembered: images that are nobody's, and for a tenant those
//! that are its own.

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

/// From this age on it is looked up again, if it was asked for lately …
const FRESH: Duration = Duration::from_secs(15);
/// … and from this on it is not believed.
const STALE: Duration = Duration::from_secs(60);
/// What nobody has asked for in this time is not looked up again.
const WANTED: Duration = Duration::from_secs(600);
/// So many names are remembered.
const REMEMBERED: usize = 10_000;

/// As it was asked for; `None`: by whomever.
pub(super) type Key = (ImageRef, Platform, Option<Tenant>);

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
    asked: Instant,
}

/// When a look-up was begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    forgotten: u64,
    at: Instant,
}

impl Known {
    /// What is known; it is wanted from now on.
    pub(super) fn get(
        &self,
        image: &ImageRef,
        platform: &Platform,
        tenant: &Tenant,
    ) -> Option<Arc<ResolvedImage>> {
        let mut entries = self.entries();
        let keys = keys(image, platform, tenant);
        let key = keys.iter().find(|key| entries.contains_key(*key))?;
        let entry = entries.get_mut(key)?;
        if entry.at.elapsed() >= STALE {
            entries.remove(key);
            return None;
        }
        entry.asked = Instant::now();
        Some(entry.image.clone())
    }

    /// What is to be looked up again, as long as it is wanted; what nobody may believe any more is forgotten.
    pub(super) fn due(&self, now: Instant) -> Vec<Key> {
        let since = |then| now.saturating_duration_since(then);
        let mut entries = self.entries();
        entries.retain(|_, entry| since(entry.at) < STALE);
        let due = |entry: &Entry| since(entry.at) >= FRESH && since(entry.asked) < WANTED;
        entries.iter().filter(|(_, entry)| due(entry)).map(|(key, _)| key.clone()).collect()
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
            let asked = entries.get(&key).map_or_else(Instant::now, |entry| entry.asked);
            entries.insert(key, Entry { image: Arc::new(image.clone()), at: begun.at, asked });
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
        let knows = |platform: &Platform, tenant: &Tenant| known.get(&image.name, platform, tenant).is_some();
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

    #[test]
    fn what_is_asked_for_is_looked_up_again_in_time() {
        let (known, image) = (Known::default(), image());
        let (begun, tenant) = (Instant::now(), Tenant::default());
        let key = (image.name.clone(), image.platform.clone(), None);
        let note = |at| known.note(&image.platform, None, &image, Begun { forgotten: 0, at });
        note(begun);
        assert_eq!(known.due(begun + FRESH / 2), []);
        assert_eq!(known.due(begun + FRESH), [key]);
        note(begun + FRESH);
        assert_eq!(known.due(begun + FRESH), []);
        // Nobody has asked meanwhile: it is not kept up, and then it is not there.
        note(begun + WANTED);
        assert_eq!(known.due(begun + WANTED + FRESH), []);
        assert!(known.peek(&image.name, &image.platform, &tenant).is_some());
        assert_eq!(known.due(begun + WANTED + STALE), []);
        assert_eq!(known.peek(&image.name, &image.platform, &tenant), None);
    }
}
