//! What image names meant a moment ago, so that an Acquire need not ask containerd for it.
//!
//! containerd tells of each change of an image's record, and what was known of the name is forgotten then. Since a
//! subscription can miss what happens while it is made, nothing is believed for long either.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Access, ImageRef, Platform, ResolvedImage};

/// From this age on it is looked up again, behind the answer …
const FRESH: Duration = Duration::from_secs(15);
/// … and from this on before it.
const STALE: Duration = Duration::from_secs(60);
/// So many names are remembered.
const REMEMBERED: usize = 10_000;

type Key = (ImageRef, Platform, Access);

/// Names that were resolved, by who has asked.
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
    /// What is known, if no answer may be older than `most`.
    pub(super) fn get(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
        most: Duration,
    ) -> Answer {
        let mut entries = self.entries();
        let key = (image.clone(), platform.clone(), access.clone());
        let Some(entry) = entries.get_mut(&key) else { return Answer::Nothing };
        let age = entry.at.elapsed();
        if age >= most.min(STALE) {
            entries.remove(&key);
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
        access: &Access,
    ) -> Option<Arc<ResolvedImage>> {
        let entries = self.entries();
        let entry = entries.get(&(image.clone(), platform.clone(), access.clone()))?;
        (entry.at.elapsed() < STALE).then(|| entry.image.clone())
    }

    /// To be called before a look-up.
    pub(super) fn begin(&self) -> Begun {
        Begun { forgotten: self.forgotten.load(Ordering::SeqCst), at: Instant::now() }
    }

    /// What a look-up has come to, unless something has changed since it began.
    pub(super) fn note(&self, access: &Access, image: &ResolvedImage, begun: Begun) {
        let mut entries = self.entries();
        if self.forgotten.load(Ordering::SeqCst) != begun.forgotten {
            return;
        }
        if entries.len() >= REMEMBERED {
            entries.retain(|_, entry| entry.at.elapsed() < STALE);
        }
        if entries.len() < REMEMBERED {
            let key = (image.name.clone(), image.platform.clone(), access.clone());
            let entry = Entry { image: Arc::new(image.clone()), at: begun.at, renewing: false };
            entries.insert(key, entry);
        }
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
