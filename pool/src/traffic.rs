//! What launchers and containerd are at just now; the reclaimer keeps out of their way.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// Removals come in crowds, and containerd holds its lock for all of one: the next is awaited for so long.
const NEXT_REMOVAL: Duration = Duration::from_millis(30);
/// Who makes one snapshot after the other, or has waited for containerd's collection, comes back within this time.
const NEXT_MAKING: Duration = Duration::from_millis(250);

/// Makings and removals, under way and just over, and the layers among them.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    makings: AtomicUsize,
    last_making: Mutex<Option<Instant>>,
    last_removal: Mutex<Option<Instant>>,
    last_layer: Mutex<Option<Instant>>,
}

/// A Prepare or View under way.
pub(crate) struct Making<'a>(&'a Traffic);

impl Drop for Making<'_> {
    fn drop(&mut self) {
        note(&self.0.last_making);
        self.0.makings.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Traffic {
    /// A making begins; it ends when what is returned is dropped.
    pub(crate) fn making(&self) -> Making<'_> {
        self.makings.fetch_add(1, Ordering::Relaxed);
        Making(self)
    }

    /// Whether a making is under way.
    pub(crate) fn is_making(&self) -> bool {
        self.makings.load(Ordering::Relaxed) > 0
    }

    /// Something is removed.
    pub(crate) fn removal(&self) {
        note(&self.last_removal);
    }

    /// Whether somebody waits at this moment.
    pub(crate) fn is_in_the_way(&self) -> bool {
        self.is_making() || within(&self.last_removal, NEXT_REMOVAL)
    }

    /// An image's layer is made or committed.
    pub(crate) fn layer(&self) {
        note(&self.last_layer);
    }

    /// Whether no layer was for so long.
    pub(crate) fn has_no_layer_for(&self, time: Duration) -> bool {
        !within(&self.last_layer, time)
    }

    /// Whether somebody waits, or will in a moment.
    pub(crate) fn is_lively(&self) -> bool {
        self.is_in_the_way()
            || within(&self.last_making, NEXT_MAKING)
            || within(&self.last_removal, NEXT_MAKING)
    }
}

fn note(last: &Mutex<Option<Instant>>) {
    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
}

fn within(last: &Mutex<Option<Instant>>, time: Duration) -> bool {
    last.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|at| at.elapsed() < time)
}
