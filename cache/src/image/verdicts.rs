//! What was decided of images: remembered until the service ends if they may be used, and shared by those who wait if not.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::error::Error;

/// So many of each are remembered; more than a host has images.
const REMEMBERED: usize = 10_000;

/// By what was decided of, `P`, and by who asked for what, `R`.
#[derive(Debug)]
pub(super) struct Verdicts<P, R> {
    /// What has passed since this service started.
    passed: Mutex<HashSet<P>>,
    /// What has not, and when that was asked, for those who were waiting.
    refused: Mutex<HashMap<R, (Instant, Error)>>,
}

impl<P, R> Default for Verdicts<P, R> {
    fn default() -> Self {
        Self { passed: Mutex::default(), refused: Mutex::default() }
    }
}

impl<P: Hash + Eq, R: Hash + Eq> Verdicts<P, R> {
    pub(super) fn has_passed(&self, key: &P) -> bool {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner).contains(key)
    }

    pub(super) fn note(&self, key: P) {
        let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        if passed.len() >= REMEMBERED {
            passed.clear();
        }
        passed.insert(key);
    }

    /// The last refusal, if it was asked for no earlier than `since`.
    pub(super) fn refused_since(&self, key: &R, since: Instant) -> Option<Error> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.get(key).filter(|(asked, _)| *asked >= since).map(|(_, error)| error.clone())
    }

    pub(super) fn note_refused(&self, key: R, asked: Instant, error: Error) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() >= REMEMBERED {
            refused.clear();
        }
        refused.insert(key, (asked, error));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;
    use crate::{
        error::Reason,
        image::{Digest, ImageRef},
    };

    #[test]
    fn what_was_answered_is_for_those_who_were_waiting() {
        let verdicts = Verdicts::default();
        let key = |name: &str, bytes: &[u8]| (ImageRef::parse(name).unwrap(), Digest::of(bytes));
        let (it, moved, renamed) =
            (key("r.example/cow:1", b"1"), key("r.example/cow:1", b"2"), key("r.example/cow:2", b"1"));
        verdicts.note(it.clone());
        assert!(verdicts.has_passed(&it) && !verdicts.has_passed(&moved) && !verdicts.has_passed(&renamed));
        let (before, asked) = (Instant::now(), Instant::now());
        verdicts.note_refused(moved.clone(), asked, Error::new(Reason::ImageUnverified, "no"));
        assert!(verdicts.refused_since(&moved, before).is_some());
        assert!(verdicts.refused_since(&moved, asked + Duration::from_millis(1)).is_none());
        assert!(verdicts.refused_since(&renamed, before).is_none());
    }
}
