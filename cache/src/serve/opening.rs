//! Opens the ledger: at the start, or as soon as it can be.
//!
//! As long as it cannot, the state directory's lock is held only during a try, so that an operator can run
//! `cowshed ledger restore` beside the service. The lock that a try has succeeded with is kept.

use std::{
    fs::File,
    mem::{self, ManuallyDrop},
    path::PathBuf,
    time::Duration,
};

use cowshed_pool::store::again::Tries;
use nix::fcntl::Flock;

use super::{ServeError, lock};
use crate::ledger::{Ledger, LedgerSlot};

/// Pause before a ledger that cannot be opened is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// A ledger that is not open yet.
pub(super) struct Opening {
    directory: PathBuf,
    slot: LedgerSlot,
    tries: Tries,
    first: Held,
}

/// The lock that the start has taken, or why it could not.
enum Held {
    Lock(Flock<File>),
    Refused(ServeError),
    Spent,
}

/// One that is open, and what keeps others from it.
pub(super) struct Opened {
    pub(super) ledger: Ledger,
    /// The kernel lets go of it when the process has ended: until then somebody who is stuck may write yet.
    #[cfg_attr(not(test), expect(dead_code, reason = "held"))]
    pub(super) lock: ManuallyDrop<Flock<File>>,
}

impl Opening {
    /// Takes the state directory.
    ///
    /// # Errors
    /// If another process has it.
    pub(super) fn begin(directory: PathBuf, slot: LedgerSlot) -> Result<Self, ServeError> {
        let first = match lock::take(&directory) {
            Ok(lock) => Held::Lock(lock),
            Err(in_use @ ServeError::InUse { .. }) => return Err(in_use),
            Err(refused) => Held::Refused(refused),
        };
        let tries = Tries::new(directory.join("ledger.db"));
        Ok(Self { directory, slot, tries, first })
    }

    /// One try; why it has failed is in the slot.
    pub(super) fn attempt(&mut self) -> Option<Opened> {
        if !self.tries.is_due() {
            return None;
        }
        let lock = match mem::replace(&mut self.first, Held::Spent) {
            Held::Lock(lock) => Ok(lock),
            Held::Refused(refused) => Err(refused),
            Held::Spent => lock::take(&self.directory),
        };
        let lock = match lock {
            Ok(lock) => lock,
            Err(refused) => {
                self.tries.see();
                self.slot.refuse(refused.to_string());
                return None;
            }
        };
        let opened = self.tries.go(|if_missing| Ledger::open_or(&self.directory, if_missing));
        let ledger = opened.map_err(|refused| self.slot.refuse(refused.to_string())).ok()?;
        Some(Opened { ledger, lock: ManuallyDrop::new(lock) })
    }

    /// Tries until it is open.
    pub(super) async fn wait(mut self) -> Option<Opened> {
        loop {
            tokio::time::sleep(RETRY).await;
            let tried = tokio::task::spawn_blocking(move || (self.attempt(), self)).await;
            let Ok((opened, left)) = tried else {
                tracing::error!("opening the ledger panicked; it is not tried again");
                return None;
            };
            if opened.is_some() {
                return opened;
            }
            self = left;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{collections::BTreeMap, fs, path::Path};

    use super::*;
    use crate::error::Reason;

    /// All that there is, but for the lock and the index.
    fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
        let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let named = files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path));
        let kept = named.filter(|(name, _)| name != "lock" && !name.ends_with("-shm"));
        kept.map(|(name, path)| (name, fs::read(path).unwrap())).collect()
    }

    fn begin(directory: &Path) -> (Opening, LedgerSlot) {
        let slot = LedgerSlot::default();
        (Opening::begin(directory.to_owned(), slot.clone()).unwrap(), slot)
    }

    fn refusal(slot: &LedgerSlot) -> String {
        let error = slot.get().err().unwrap();
        assert_eq!(error.reason(), Reason::LedgerUnusable);
        error.to_string()
    }

    async fn sound_ledger() -> (tempfile::TempDir, Vec<u8>) {
        let directory = tempfile::tempdir().unwrap();
        Ledger::open(directory.path()).unwrap().close().await;
        let bytes = fs::read(directory.path().join("ledger.db")).unwrap();
        (directory, bytes)
    }

    #[tokio::test]
    async fn a_damaged_ledger_is_left_as_it_is_and_others_may_have_the_lock() {
        let (directory, good) = sound_ledger().await;
        let path = directory.path().join("ledger.db");
        let mut damaged = good.clone();
        let end = damaged.len();
        damaged[end - 4096..].fill(0xa5);
        for bytes in [damaged, vec![0x5a; 20_000], good[..good.len() / 2].to_vec(), Vec::new()] {
            fs::write(&path, &bytes).unwrap();
            let before = contents(directory.path());
            let (mut opening, slot) = begin(directory.path());
            for _ in 0..2 {
                assert!(opening.attempt().is_none());
                let said = refusal(&slot);
                assert!(said.contains("damaged") && said.contains("ledger.db"), "{said}");
            }
            assert!(contents(directory.path()) == before, "something was changed");
            // A restore takes the lock, and the ledger is missing while it is at work.
            let restoring = lock::take(directory.path()).unwrap();
            fs::remove_file(&path).unwrap();
            assert!(opening.attempt().is_none());
            assert!(refusal(&slot).contains("state directory"), "{}", refusal(&slot));
            drop(restoring);
            assert!(opening.attempt().is_none());
            assert!(refusal(&slot).contains("is missing"), "{}", refusal(&slot));
            assert!(contents(directory.path()).is_empty(), "an empty ledger was made");
            fs::write(&path, &good).unwrap();
            let opened = opening.attempt().unwrap();
            opened.ledger.close().await;
            assert!(lock::take(directory.path()).is_err(), "the lock was let go");
            drop(ManuallyDrop::into_inner(opened.lock));
        }
    }

    #[tokio::test]
    async fn what_the_system_refuses_is_tried_each_time() {
        let directory = tempfile::tempdir().unwrap();
        // As good as a disk that is not mounted: the directory cannot be made.
        let state = directory.path().join("state");
        fs::write(&state, "no directory").unwrap();
        let (mut opening, slot) = begin(&state);
        assert!(opening.attempt().is_none() && opening.attempt().is_none());
        assert!(refusal(&slot).contains(&state.display().to_string()), "{}", refusal(&slot));
        fs::remove_file(&state).unwrap();
        // Something that is no file.
        fs::create_dir_all(state.join("ledger.db")).unwrap();
        assert!(opening.attempt().is_none());
        assert!(refusal(&slot).contains("cannot be opened"), "{}", refusal(&slot));
        fs::remove_dir(state.join("ledger.db")).unwrap();
        assert!(opening.attempt().is_none(), "what may have been a ledger was made anew");
        let (_sound, good) = sound_ledger().await;
        fs::write(state.join("ledger.db"), good).unwrap();
        opening.attempt().unwrap().ledger.close().await;
    }

    /// The filesystem that it is on cannot be written, and is unmounted to be repaired.
    #[tokio::test]
    async fn a_ledger_that_was_there_is_not_made_anew_where_no_lock_could_be_had() {
        let (directory, good) = sound_ledger().await;
        let (lock, ledger) = (directory.path().join("lock"), directory.path().join("ledger.db"));
        // Nobody can open that for writing.
        fs::create_dir(&lock).unwrap();
        let (mut opening, slot) = begin(directory.path());
        assert!(opening.attempt().is_none());
        fs::remove_dir(&lock).unwrap();
        fs::remove_file(&ledger).unwrap();
        assert!(opening.attempt().is_none());
        assert!(!ledger.exists(), "an empty ledger was made");
        assert!(refusal(&slot).contains("is missing"), "{}", refusal(&slot));
        fs::write(&ledger, good).unwrap();
        opening.attempt().unwrap().ledger.close().await;
    }

    #[tokio::test]
    async fn a_ledger_is_made_where_the_first_try_could_not() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        fs::write(&state, "no directory").unwrap();
        let (mut opening, _slot) = begin(&state);
        assert!(opening.attempt().is_none());
        fs::remove_file(&state).unwrap();
        opening.attempt().unwrap().ledger.close().await;
    }

    #[test]
    fn another_service_is_fatal_at_the_start_only() {
        let directory = tempfile::tempdir().unwrap();
        let other = lock::take(directory.path()).unwrap();
        let refused = Opening::begin(directory.path().to_owned(), LedgerSlot::default()).err().unwrap();
        assert!(matches!(refused, ServeError::InUse { .. }), "{refused}");
        drop(other);
    }
}
