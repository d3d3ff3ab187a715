//! How far a pull is, for all who wait for it.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::Digest;
use crate::error::Error;

/// Byte counts are shown so often at the most; a change of stage is shown at once.
const PACE: Duration = Duration::from_millis(100);

/// The whole picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of the pull.
    pub stage: PullStage,
    /// The lowest first; empty until the manifest is known.
    pub layers: Vec<LayerProgress>,
    /// What the registry was asked in vain, so that what the name meant here was taken: its error.
    pub not_refreshed: Option<String>,
}

impl Progress {
    /// Bytes in the content store, and in all; 0 as long as the layers are not known.
    pub fn bytes(&self) -> (u64, u64) {
        self.layers.iter().fold((0, 0), |(fetched, total): (u64, u64), layer| {
            (fetched.saturating_add(layer.bytes_fetched), total.saturating_add(layer.bytes_total))
        })
    }

    /// Bytes that are still to be fetched, if it is known.
    pub fn missing(&self) -> Option<u64> {
        let missing = self.layers.iter().map(|layer| layer.bytes_total.saturating_sub(layer.bytes_fetched));
        (!self.layers.is_empty()).then(|| missing.fold(0, u64::saturating_add))
    }
}

/// Of the pull as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullStage {
    /// Reading manifest and configuration.
    #[default]
    Resolving,
    /// Fetching and unpacking.
    Layers,
    /// The image is there.
    Done,
}

/// Of one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProgress {
    /// Which.
    pub digest: Digest,
    /// Where it is.
    pub stage: LayerStage,
    /// Bytes in the content store.
    pub bytes_fetched: u64,
    /// Bytes in all.
    pub bytes_total: u64,
}

/// Of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LayerStage {
    /// Not begun.
    Waiting,
    /// Bytes arrive.
    Fetching,
    /// In the content store.
    Fetched,
    /// Being applied; it may still be arriving.
    Unpacking,
    /// Committed.
    Done,
}

/// Where a pull writes its progress.
#[derive(Debug)]
pub(super) struct Board {
    sender: watch::Sender<Progress>,
    last_bytes: Mutex<Option<Instant>>,
}

impl Board {
    pub(super) fn new() -> (Self, watch::Receiver<Progress>) {
        let (sender, receiver) = watch::channel(Progress::default());
        (Self { sender, last_bytes: Mutex::new(None) }, receiver)
    }

    pub(super) fn layers(&self, layers: impl Iterator<Item = (Digest, u64)>) {
        let waiting = |(digest, bytes_total)| LayerProgress {
            digest,
            stage: LayerStage::Waiting,
            bytes_fetched: 0,
            bytes_total,
        };
        let layers = layers.map(waiting).collect();
        self.sender.send_modify(|progress| {
            progress.stage = PullStage::Layers;
            progress.layers = layers;
        });
    }

    /// The registry does not answer; what is here is taken.
    pub(super) fn not_refreshed(&self, error: &Error) {
        self.sender.send_modify(|progress| progress.not_refreshed = Some(error.to_string()));
    }

    /// All of these were here: it is done.
    pub(super) fn was_here(&self, layers: impl Iterator<Item = (Digest, u64)>) {
        let here = |(digest, bytes)| LayerProgress {
            digest,
            stage: LayerStage::Done,
            bytes_fetched: bytes,
            bytes_total: bytes,
        };
        let layers = layers.map(here).collect();
        self.sender.send_modify(|progress| {
            progress.stage = PullStage::Done;
            progress.layers = layers;
        });
    }

    pub(super) fn stage(&self, layer: usize, stage: LayerStage) {
        self.sender.send_modify(|progress| {
            if let Some(layer) = progress.layers.get_mut(layer) {
                layer.stage = layer.stage.max(stage);
                if matches!(stage, LayerStage::Fetched | LayerStage::Done) {
                    layer.bytes_fetched = layer.bytes_total;
                }
            }
        });
    }

    /// So many bytes are there; more arrive.
    pub(super) fn bytes(&self, layer: usize, fetched: u64) {
        let due = self.is_due(Instant::now());
        self.sender.send_if_modified(|progress| {
            let Some(layer) = progress.layers.get_mut(layer) else { return due };
            layer.bytes_fetched = fetched;
            let before = layer.stage;
            layer.stage = before.max(LayerStage::Fetching);
            due || layer.stage != before
        });
    }

    pub(super) fn done(&self) {
        self.sender.send_modify(|progress| progress.stage = PullStage::Done);
    }

    fn is_due(&self, now: Instant) -> bool {
        let mut last = self.last_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.duration_since(last) >= PACE);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[test]
    fn sums_of_what_registries_claim() {
        let layer = |bytes_fetched, bytes_total| LayerProgress {
            digest: Digest::of(b"a"),
            stage: LayerStage::Fetching,
            bytes_fetched,
            bytes_total,
        };
        let of = |layers| Progress { stage: PullStage::Layers, layers, not_refreshed: None };
        let table = [
            (of(Vec::new()), (0, 0), None),
            (of(vec![layer(1, 3), layer(5, 4)]), (6, 7), Some(2)),
            (of(vec![layer(0, u64::MAX), layer(0, u64::MAX)]), (0, u64::MAX), Some(u64::MAX)),
            (of(vec![layer(u64::MAX, 1), layer(2, 2)]), (u64::MAX, 3), Some(0)),
        ];
        for (progress, bytes, missing) in table {
            assert_eq!((progress.bytes(), progress.missing()), (bytes, missing), "{progress:?}");
        }
    }

    #[test]
    fn stages_are_shown_at_once_and_bytes_at_a_pace() {
        let (board, mut receiver) = Board::new();
        board.layers([(Digest::of(b"a"), 10)].into_iter());
        board.stage(0, LayerStage::Waiting);
        board.bytes(0, 1);
        assert_eq!(receiver.borrow().layers[0].stage, LayerStage::Fetching, "only what arrives is fetched");
        receiver.mark_unchanged();
        board.bytes(0, 2);
        assert!(!receiver.has_changed().unwrap_or(true), "too early");
        assert_eq!(receiver.borrow().layers[0].bytes_fetched, 2, "but counted");
        board.stage(0, LayerStage::Fetched);
        assert!(receiver.has_changed().unwrap_or(false));
        assert_eq!(receiver.borrow().layers[0].bytes_fetched, 10);
        // A layer that does not exist is no reason to panic.
        board.bytes(7, 1);
        board.stage(7, LayerStage::Done);
    }

    #[test]
    fn that_a_registry_did_not_answer_is_known_to_the_end() {
        let (board, receiver) = Board::new();
        board.not_refreshed(&Error::new(Reason::RegistryUnavailable, "registry r does not answer"));
        board.was_here([(Digest::of(b"a"), 10)].into_iter());
        let progress = receiver.borrow();
        assert_eq!(progress.not_refreshed.as_deref(), Some("registry r does not answer"));
        assert_eq!((progress.stage, progress.layers[0].stage), (PullStage::Done, LayerStage::Done));
        assert_eq!(progress.bytes(), (10, 10));
    }
}
