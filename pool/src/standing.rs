//! The snapshotter, whatever its store is like: opens it at once, or as soon as it can be, and says who answers until then.
//!
//! | the store | reads | the rest | then |
//! |---|---|---|---|
//! | good | answered | by its health | |
//! | damaged, and can be read | answered | refused | opened when it was repaired |
//! | anything else | refused | refused | opened when it can be |
//!
//! A pool that is lost while it is in use (it was deactivated, or has failed) is found again as at a start: the store is
//! closed and opened anew, and what is in it is compared with the pool that comes back, which may have been repaired.
//!
//! One process has a store: whoever opens it holds its lock, a file beside it.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};

use crate::{
    error::{Code, Error, Result},
    metrics::Metrics,
    snapshotter::{Health, Held, Settings, Snapshotter},
    start,
    store::{
        again::Tries,
        file::{OpenError, beside},
    },
};

/// Pause before a store that cannot be opened is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Clones share everything.
#[derive(Clone)]
pub struct Standing(Arc<Shared>);

struct Shared {
    metrics: Metrics,
    now: RwLock<Now>,
    /// The service stops: nothing is opened any more.
    closed: AtomicBool,
}

enum Now {
    Open(Snapshotter, #[expect(dead_code, reason = "held as long as the store is open")] Flock<File>),
    /// Damaged: only reads.
    Reading(Snapshotter),
    Closed(String),
}

impl Standing {
    /// Opens the store, or goes on trying to.
    pub fn start(settings: Settings, metrics: Metrics) -> Self {
        let mut tries = Tries::new(settings.store.clone());
        let opened = open(&settings, &metrics, &mut tries);
        let failed = opened.is_err();
        let now = opened.unwrap_or_else(|error| {
            tracing::error!(%error, "the snapshotter changes nothing; its store is tried again");
            meanwhile(&settings, &metrics, &error)
        });
        let standing =
            Self(Arc::new(Shared { metrics, now: RwLock::new(now), closed: AtomicBool::new(false) }));
        tokio::spawn(standing.clone().stand(settings, tries, !failed));
        standing
    }

    /// Whether snapshots can be made.
    pub fn health(&self) -> Health {
        match &*self.now() {
            Now::Open(snapshotter, _) | Now::Reading(snapshotter) => snapshotter.health(),
            Now::Closed(why) => Health::Refusing(why.clone()),
        }
    }

    /// Waits until it serves, or refuses to.
    pub async fn settled(&self, limit: Duration) -> Health {
        let settle = async {
            while matches!(self.health(), Health::Waiting(_)) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let _timed_out = tokio::time::timeout(limit, settle).await;
        self.health()
    }

    /// Brings the metrics up to date; to be called before a scrape.
    pub fn look(&self) {
        match self.answering() {
            Ok(snapshotter) => snapshotter.look(),
            Err(_) => self.0.metrics.healthy(false),
        }
    }

    /// Has whatever would be asked of the pool wait, for as long as what is returned lives: for those who extend it, while
    /// which the kernel activates nothing. `None` if something is still under way after `limit`, or nobody asks anything.
    pub async fn hold(&self, limit: Duration) -> Option<Held> {
        let snapshotter = self.answering().ok()?;
        snapshotter.hold(limit).await
    }

    /// Finishes what has begun, and closes the store.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
        if let Ok(snapshotter) = self.answering() {
            snapshotter.close().await;
        }
        // Its lock is let go of.
        let closed =
            Now::Closed("the service is stopping; repeat the request when it is up again".to_owned());
        *self.0.now.write().unwrap_or_else(PoisonError::into_inner) = closed;
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Who answers now.
    pub(crate) fn answering(&self) -> Result<Snapshotter> {
        match &*self.now() {
            Now::Open(snapshotter, _) | Now::Reading(snapshotter) => Ok(snapshotter.clone()),
            Now::Closed(why) => Err(Error::new(Code::Unavailable, why.clone())),
        }
    }

    fn now(&self) -> std::sync::RwLockReadGuard<'_, Now> {
        self.0.now.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that it is open, for as long as there is the service.
    async fn stand(self, settings: Settings, mut tries: Tries, mut is_open: bool) {
        loop {
            if !is_open {
                let Some(left) = self.open_later(settings.clone(), tries).await else { return };
                tries = left;
            }
            if !self.is_lost_some_day().await {
                return;
            }
            tries.was_open();
            is_open = false;
        }
    }

    /// Waits until the pool is lost, and closes the store then. False: the service stops.
    async fn is_lost_some_day(&self) -> bool {
        let (mut told, mut had_active) = (false, false);
        loop {
            tokio::time::sleep(RETRY).await;
            if self.0.closed.load(Ordering::Relaxed) {
                return false;
            }
            let Ok(snapshotter) = self.answering() else { continue };
            let Some(why) = start::lost(&snapshotter, &mut had_active).await else {
                told = false;
                continue;
            };
            // One look may have met with somebody's reload.
            if !std::mem::replace(&mut told, true) {
                continue;
            }
            tracing::error!(why, "the pool is lost; it is looked for as at a start");
            snapshotter.retire(why.clone()).await;
            *self.0.now.write().unwrap_or_else(PoisonError::into_inner) = Now::Closed(why);
            return true;
        }
    }

    /// Gives up if the service stops.
    async fn open_later(&self, settings: Settings, mut tries: Tries) -> Option<Tries> {
        loop {
            tokio::time::sleep(RETRY).await;
            if self.0.closed.load(Ordering::Relaxed) {
                return None;
            }
            let (settings_, metrics) = (settings.clone(), self.0.metrics.clone());
            let tried = tokio::task::spawn_blocking(move || {
                let opened = tries.is_due().then(|| open(&settings_, &metrics, &mut tries));
                let told =
                    opened.map(|o| o.map_err(|error| (meanwhile(&settings_, &metrics, &error), error)));
                (told, tries)
            });
            let Ok((opened, left)) = tried.await else {
                tracing::error!("opening the snapshot store panicked; it is not tried again");
                return None;
            };
            tries = left;
            let (now, done) = match opened {
                None => continue,
                Some(Ok(now)) => {
                    tracing::info!("the snapshot store is open");
                    (now, true)
                }
                Some(Err((now, error))) => {
                    tracing::debug!(%error, "the snapshot store cannot be opened yet");
                    (now, false)
                }
            };
            let before =
                std::mem::replace(&mut *self.0.now.write().unwrap_or_else(PoisonError::into_inner), now);
            if let Now::Reading(reader) = before {
                reader.close().await;
            }
            if done {
                return Some(tries);
            }
        }
    }
}

fn open(settings: &Settings, metrics: &Metrics, tries: &mut Tries) -> Result<Now, OpenError> {
    let lock = lock(&settings.store).inspect_err(|_| tries.see())?;
    let snapshotter =
        tries.go(|if_missing| Snapshotter::open(settings.clone(), metrics.clone(), if_missing))?;
    Ok(Now::Open(snapshotter, lock))
}

fn meanwhile(settings: &Settings, metrics: &Metrics, error: &OpenError) -> Now {
    metrics.healthy(false);
    let reader = Snapshotter::reader(settings.clone(), metrics.clone(), error);
    reader.map_or_else(|| Now::Closed(error.to_string()), Now::Reading)
}

fn lock(store: &Path) -> Result<Flock<File>, OpenError> {
    let refused =
        |what: String| OpenError::Io { noun: "snapshot store", path: store.display().to_string(), what };
    let path = beside(store, ".lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(|e| refused(format!("{}: {e}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| refused(format!("another process has it open ({}: {e})", path.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::{collections::BTreeMap, fs};

    use super::*;
    use crate::size::Bytes;

    fn settings(directory: &Path) -> Settings {
        Settings {
            store: directory.join("snapshots.db"),
            pool: "there-is-none".to_owned(),
            base_size: Bytes(1 << 30),
            allow_unzeroed: false,
            heirs: 0,
            trim: None,
        }
    }

    fn start(settings: &Settings) -> Standing {
        Standing::start(settings.clone(), Metrics::register(&prometheus::Registry::new()).unwrap())
    }

    /// All that there is, but for locks and the index.
    fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
        let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let named = files.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), path));
        let kept = named.filter(|(name, _)| !name.ends_with(".lock") && !name.ends_with("-shm"));
        kept.map(|(name, path)| (name, fs::read(path).unwrap())).collect()
    }

    async fn until(condition: impl Fn() -> bool) {
        for _ in 0..1000 {
            if condition() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("waited in vain");
    }

    /// Looks for the pool, that is, which needs the store.
    fn is_open(standing: &Standing) -> bool {
        matches!(standing.health(), Health::Waiting(_))
    }

    #[tokio::test]
    async fn a_damaged_store_is_left_as_it_is_and_opened_when_it_was_repaired() {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        let first = start(&settings);
        assert!(is_open(&first), "{:?}", first.health());
        first.close().await;
        drop(first);
        let good = fs::read(&settings.store).unwrap();
        let mut damaged = good.clone();
        let end = damaged.len();
        damaged[end - 4096..].fill(0xa5);
        for bytes in [damaged, vec![0x5a; 20_000], Vec::new()] {
            fs::write(&settings.store, &bytes).unwrap();
            let before = contents(directory.path());
            until(|| lock(&settings.store).is_ok()).await;
            let standing = start(&settings);
            tokio::time::sleep(RETRY + RETRY / 2).await;
            let Health::Refusing(why) = standing.health() else { panic!("{:?}", standing.health()) };
            assert!(why.contains("damaged") && why.contains("snapshots.db"), "{why}");
            assert!(contents(directory.path()) == before, "something was changed");
            // Taken away to be repaired: it must not be made anew.
            fs::remove_file(&settings.store).unwrap();
            until(|| matches!(standing.health(), Health::Refusing(why) if why.contains("is missing"))).await;
            assert!(!settings.store.exists());
            fs::write(&settings.store, &good).unwrap();
            until(|| is_open(&standing)).await;
            standing.close().await;
        }
    }

    #[tokio::test]
    async fn a_store_that_another_process_has_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        let other = lock(&settings.store).unwrap();
        let standing = start(&settings);
        let Health::Refusing(why) = standing.health() else { panic!("{:?}", standing.health()) };
        assert!(why.contains("another process"), "{why}");
        assert!(matches!(standing.answering().map(drop), Err(error) if error.code == Code::Unavailable));
        assert!(!settings.store.exists());
        drop(other);
        until(|| is_open(&standing)).await;
        assert!(matches!(lock(&settings.store), Err(OpenError::Io { .. })), "it has no lock");
    }
}
