//! The operations: each decided by the tree, made durable by the store, done by the pool, in the order
//! intent → effect → confirmation.
//!
//! Prepares run side by side; only the writes share a thread (and its fsyncs). `make` has the making of snapshots, `rest`
//! says which devices are active.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Notify, OwnedRwLockWriteGuard, Semaphore, oneshot};

use crate::{
    busy::{Busy, Hold},
    device::{DeviceError, DeviceName, Filesystem, Pool, PoolEvents, Tools},
    error::{Code, Error, Result},
    heirs::Heirs,
    metrics::Metrics,
    size::Bytes,
    store::{Store, WriteError},
    traffic::Traffic,
    tree::{self, Base, Change, Kind, Snapshot, SnapshotId, Traces, Tree, UnixNanos, Wish},
    trim::Trim,
};

/// What a snapshotter is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The store's file; its directory is there.
    pub store: PathBuf,
    /// device-mapper name of the pool; "" means the only one there is.
    pub pool: String,
    /// Size of disks without a parent.
    pub base_size: Bytes,
    /// Whether a pool that does not zero new blocks is used all the same.
    pub allow_unzeroed: bool,
    /// How many snapshots are kept at the most that were made ahead of need; 0: none is made.
    pub heirs: usize,
    /// Whether, and how fast, what is removed is discarded on the disk below.
    pub trim: Option<Trim>,
}

/// Whether snapshots can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// They can.
    Serving,
    /// Not yet, or not at the moment: it is tried again.
    Waiting(String),
    /// Not before somebody has done something; that is looked for.
    Refusing(String),
}

/// As long as it lives, nothing is asked of the pool: what would be waits.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "held")] OwnedRwLockWriteGuard<()>);

/// How a snapshot is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Filesystem.
    pub kind: &'static str,
    /// Path of the device.
    pub source: String,
    /// Options.
    pub options: Vec<String>,
}

/// At most so many calls to the kernel at once: they wait for grace periods most of the time.
const PARALLEL: usize = 64;

/// Locks for devices: as many as make it rare that two have the same.
const STRIPES: usize = 256;

/// A containerd snapshotter. Clones share everything.
#[derive(Clone)]
pub struct Snapshotter(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pub(crate) store_id: String,
    pub(crate) store: Store<Tree>,
    /// Set when the pool was found good; see `start`.
    pub(crate) pool: RwLock<Option<Arc<dyn Pool>>>,
    pub(crate) filesystem: Arc<dyn Filesystem>,
    pub(crate) health: RwLock<Health>,
    pub(crate) metrics: Metrics,
    turns: Semaphore,
    /// Whoever works on the pool itself has it alone; everybody else shares it.
    gate: Arc<tokio::sync::RwLock<()>>,
    /// Committed snapshots (and bases) that may be active still. Whoever makes a snapshot of one holds its lock.
    pub(crate) active_origins: Mutex<HashMap<SnapshotId, Arc<tokio::sync::Mutex<()>>>>,
    /// Snapshots that the reclaimer leaves alone.
    pub(crate) busy: Busy,
    /// Snapshots that could not be flushed, and where that could not be written down yet.
    torn: Mutex<HashSet<SnapshotId>>,
    /// Layers being unpacked, and what the pool had told when each began.
    unpacking: Mutex<HashMap<SnapshotId, PoolEvents>>,
    /// Snapshots that were given up, and what they have left, when the store could not be written.
    abandoned: Mutex<HashMap<SnapshotId, Traces>>,
    /// Who changes whether a device is active holds one of them, by its snapshot's id.
    devices: Vec<tokio::sync::Mutex<()>>,
    pub(crate) traffic: Traffic,
    /// Snapshots ever made in the pool.
    pub(crate) creations: AtomicU32,
    pub(crate) heirs: Heirs,
    /// One mkfs or resize2fs per base.
    pub(crate) bases: Mutex<HashMap<Base, Arc<tokio::sync::Mutex<()>>>>,
    pub(crate) wake: Notify,
    /// Another one has taken its place, or will.
    retired: AtomicBool,
}

impl Inner {
    pub(crate) fn new(settings: Settings, store_id: String, store: Store<Tree>, metrics: Metrics) -> Self {
        store.count_transactions(metrics.transactions());
        Self {
            settings,
            store_id,
            store,
            pool: RwLock::new(None),
            filesystem: Arc::new(Tools),
            health: RwLock::new(Health::Waiting("it is starting".to_owned())),
            metrics,
            turns: Semaphore::new(PARALLEL),
            gate: Arc::default(),
            active_origins: Mutex::default(),
            busy: Busy::default(),
            torn: Mutex::default(),
            unpacking: Mutex::default(),
            abandoned: Mutex::default(),
            devices: (0..STRIPES).map(|_| tokio::sync::Mutex::default()).collect(),
            traffic: Traffic::default(),
            creations: AtomicU32::new(0),
            heirs: Heirs::default(),
            bases: Mutex::default(),
            wake: Notify::new(),
            retired: AtomicBool::new(false),
        }
    }

    /// Whether it does nothing more: what runs by itself ends.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    pub(crate) fn name(&self, id: SnapshotId) -> DeviceName {
        DeviceName::new(&self.store_id, id)
    }

    /// The pool, if it is good.
    pub(crate) fn pool(&self) -> Result<Arc<dyn Pool>> {
        match &*self.health.read().unwrap_or_else(PoisonError::into_inner) {
            Health::Serving => {}
            Health::Waiting(why) => return Err(Error::new(Code::Unavailable, why.clone())),
            Health::Refusing(why) => return Err(Error::new(Code::FailedPrecondition, why.clone())),
        }
        let pool = self.pool.read().unwrap_or_else(PoisonError::into_inner).clone();
        pool.ok_or_else(|| Error::new(Code::Unavailable, "the pool is not there yet"))
    }

    /// Whether even the store must not be changed.
    fn refuses(&self) -> Result<()> {
        match &*self.health.read().unwrap_or_else(PoisonError::into_inner) {
            Health::Refusing(why) => Err(Error::new(Code::FailedPrecondition, why.clone())),
            Health::Serving | Health::Waiting(_) => Ok(()),
        }
    }

    /// Runs `work`, which blocks, away from the runtime's threads.
    pub(crate) async fn on_pool<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Pool) -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T> {
        let open = self.gate.clone().read_owned().await;
        let pool = self.pool()?;
        // Until it is done, whoever waits for it: a caller that goes away leaves it at work.
        self.blocking(move || {
            let _open = open;
            work(&*pool)
        })
        .await
    }

    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T> {
        let _turn = self.turns.acquire().await.map_err(|e| Error::new(Code::Unavailable, e.to_string()))?;
        let ran = tokio::task::spawn_blocking(work).await;
        ran.map_err(|e| Error::new(Code::Internal, e.to_string()))?.map_err(Error::from)
    }

    /// Writes what `decide` decides.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&Tree) -> Result<(Vec<Change>, T)> + Send + 'static,
    ) -> Result<T> {
        self.store
            .write(move |batch| {
                let (changes, answer) = decide(batch.state())?;
                for change in changes {
                    batch.change(change);
                }
                Ok(answer)
            })
            .await
    }

    pub(crate) fn torn(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        self.torn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn unpacking(&self) -> MutexGuard<'_, HashMap<SnapshotId, PoolEvents>> {
        self.unpacking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn abandoned(&self) -> MutexGuard<'_, HashMap<SnapshotId, Traces>> {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn device_lock(&self, id: SnapshotId) -> &tokio::sync::Mutex<()> {
        &self.devices[usize::try_from(id.0 % STRIPES as u64).unwrap_or(0)]
    }

    pub(crate) fn active_origins(&self) -> MutexGuard<'_, HashMap<SnapshotId, Arc<tokio::sync::Mutex<()>>>> {
        self.active_origins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was removed is written down, or could not be.
    fn removed(&self, marked: Hold, written: Result<(), WriteError>) {
        let ids = marked.ids();
        if let Err(error) = written {
            tracing::warn!(?ids, %error, "removed snapshots could not be written down; trying again");
            // Those that were there before are back, and may be active.
            let is_back = |tree: &Tree| ids.iter().filter(|id| tree.get(**id).is_some()).collect::<Vec<_>>();
            let back = self.store.read(is_back);
            let mut active = self.active_origins();
            for id in back {
                active.entry(*id).or_default();
            }
            drop(active);
            self.abandoned().extend(ids.iter().map(|id| (*id, Traces::Maybe)));
        }
        drop(marked);
        self.wake.notify_one();
    }
}

impl Snapshotter {
    /// Whether snapshots can be made.
    pub(crate) fn health(&self) -> Health {
        self.0.health.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings the metrics up to date; to be called before a scrape.
    pub(crate) fn look(&self) {
        self.0.metrics.healthy(self.health() == Health::Serving);
        self.0.store.read(|tree| self.0.metrics.look_at(tree, now().0));
    }

    /// Finishes what has begun, and closes the store.
    pub(crate) async fn close(&self) {
        self.0.store.close().await;
    }

    /// Refuses everything from now on, lets the kernel finish what it was asked for, and closes the store. Nothing of it
    /// touches the pool afterwards, so that another one can begin.
    pub(crate) async fn retire(&self, why: String) {
        let inner = &self.0;
        inner.metrics.healthy(false);
        *inner.health.write().unwrap_or_else(PoisonError::into_inner) = Health::Refusing(why);
        inner.retired.store(true, Ordering::Relaxed);
        inner.wake.notify_one();
        let all = u32::try_from(PARALLEL).unwrap_or(u32::MAX);
        let _all = inner.turns.acquire_many(all).await;
        inner.turns.close();
        inner.store.close().await;
    }

    pub(crate) async fn make(
        &self,
        key: String,
        parent: String,
        kind: Kind,
        labels: BTreeMap<String, String>,
    ) -> Result<Mount> {
        let base_size = self.0.settings.base_size;
        let name = key.clone();
        let wish = Wish { key, parent, kind, labels, base_size, now: now(), anew: false };
        let inner = self.0.clone();
        let (reply, answer) = oneshot::channel();
        // In a task of its own: a caller that goes away must not leave it half made.
        tokio::spawn(async move {
            let made = inner.make(wish, || !reply.is_closed()).await;
            let is_made = made.is_ok();
            // A caller that has gone in this very moment has a snapshot that it does not know of.
            let _gone = reply.send(made);
            if is_made {
                inner.heir_beside(&name);
            }
        });
        answer.await.map_err(|_| Error::new(Code::Internal, "making it has panicked; see the log"))?
    }

    pub(crate) async fn mounts(&self, key: &str) -> Result<Mount> {
        let snapshot = self.0.store.read(|tree| tree.ready(key).cloned())?;
        if snapshot.kind == Kind::Committed {
            let what = format!("snapshot {key:?} is committed: it is not mounted, but a view of it can be");
            return Err(Error::new(Code::FailedPrecondition, what));
        }
        let inner = self.0.clone();
        // In a task of its own: a caller that goes away must not let go of the locks before the kernel is through.
        let mounting = tokio::spawn(async move {
            match inner.pool() {
                Ok(_) => inner.ensure_active(snapshot.id).await?,
                // As long as nothing is changed in the pool, what is active already can be had all the same.
                Err(_) if inner.name(snapshot.id).is_linked() => {}
                Err(refusal) => return Err(refusal),
            }
            inner.mount_of(&snapshot).await
        });
        mounting.await.map_err(|e| Error::new(Code::Internal, e.to_string()))?
    }

    pub(crate) async fn commit(
        &self,
        name: String,
        key: String,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        self.0.pool()?;
        let (inner, writer) = (self.0.clone(), self.0.clone());
        // Gone with this future.
        let caller = Arc::new(());
        let is_wanted = Arc::downgrade(&caller);
        // It is put to rest whether or not its caller stays.
        let committed = tokio::spawn(async move {
            let snapshot = writer.store.read(|tree| tree.ready(&key).cloned())?;
            if snapshot.torn || writer.torn().contains(&snapshot.id) {
                return Err(tree::torn(&key));
            }
            if snapshot.kind == Kind::Active {
                let flushed = writer.flush(&snapshot).await;
                flushed.map_err(|error| error.context(format!("committing {key:?}")))?;
            }
            let (id, is_layer) = (snapshot.id, snapshot.layer);
            let written = writer.write(move |tree| {
                if inner.torn().contains(&id) {
                    return Err(tree::torn(&key));
                }
                // containerd has taken its own part back, knows it by its old name, and would collect the new one.
                if is_wanted.strong_count() == 0 {
                    let what = format!("committing {key:?}: its caller has gone away; it is as it was");
                    return Err(Error::new(Code::Cancelled, what));
                }
                let change = tree.commit(&name, (&key, id), labels, now())?;
                // Before it can be a parent.
                inner.active_origins().entry(id).or_default();
                Ok((vec![change], ()))
            });
            written.await?;
            if is_layer {
                writer.unpacking().remove(&id);
                writer.traffic.layer();
                writer.heir_later(id);
            }
            tokio::spawn(async move { writer.rest_later(id).await });
            Ok(())
        });
        let committed = committed.await.map_err(|e| Error::new(Code::Internal, e.to_string()))?;
        drop(caller);
        committed
    }

    /// Marks it. containerd calls this under its locks, for one after the other of hundreds, so it does not wait for the
    /// disk: what a crash has kept from being written down, containerd finds again in its next collection.
    pub(crate) fn remove(&self, key: &str) -> Result<()> {
        self.0.refuses()?;
        self.0.traffic.removal();
        let (inner, writer) = (self.0.clone(), self.0.clone());
        self.0.store.write_behind(
            move |batch| {
                let changes = batch.state().remove(key, now())?;
                // Nothing of it is deleted before that is written down.
                let marked = inner.busy.hold(changes.iter().filter_map(Change::of));
                changes.into_iter().for_each(|change| batch.change(change));
                Ok(marked)
            },
            move |marked, written| writer.removed(marked, written),
        )
    }

    pub(crate) async fn update(
        &self,
        key: String,
        labels: BTreeMap<String, String>,
        paths: Vec<String>,
    ) -> Result<(Snapshot, String)> {
        self.0.refuses()?;
        let name = key.clone();
        self.0.write(move |tree| Ok((vec![tree.update(&key, &labels, &paths, now())?], ()))).await?;
        self.stat(&name)
    }

    /// A snapshot and its parent's name.
    pub(crate) fn stat(&self, key: &str) -> Result<(Snapshot, String)> {
        self.0.store.read(|tree| {
            let snapshot = tree.ready(key)?;
            Ok((snapshot.clone(), tree.parent_key(snapshot).to_owned()))
        })
    }

    /// Bytes that it has besides its parent's.
    pub(crate) async fn usage(&self, key: &str) -> Result<u64> {
        let (snapshot, below) = self.0.store.read(|tree| {
            let snapshot = tree.ready(key)?.clone();
            let below = tree.below(&snapshot).cloned();
            Ok::<_, Error>((snapshot, below))
        })?;
        let inner = self.0.clone();
        // As for mounts.
        let looking = tokio::spawn(async move {
            let mapped = inner.mapped(&snapshot).await?;
            let below = match below {
                Some(below) => inner.mapped(&below).await?,
                None => 0,
            };
            Ok(mapped.saturating_sub(below))
        });
        looking.await.map_err(|e| Error::new(Code::Internal, e.to_string()))?
    }

    /// Nothing is asked of the pool as long as what is returned lives; `None` if somebody is still at it after `limit`.
    pub(crate) async fn hold(&self, limit: Duration) -> Option<Held> {
        let alone = self.0.gate.clone().write_owned();
        tokio::time::timeout(limit, alone).await.ok().map(Held)
    }

    pub(crate) fn cleanup(&self) {
        self.0.wake.notify_one();
    }
}

pub(crate) fn now() -> UnixNanos {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixNanos(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// Times an operation.
pub(crate) async fn timed<T>(
    metrics: &Metrics,
    name: &str,
    operation: impl Future<Output = Result<T>>,
) -> Result<T> {
    let begun = Instant::now();
    let result = operation.await;
    metrics.operation(name, begun.elapsed(), &result);
    result
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        let code = match &error {
            DeviceError::ThinExists(_) => Code::AlreadyExists,
            DeviceError::ThinMissing(_) => Code::DataLoss,
            DeviceError::NoPool(_) => Code::Unavailable,
            DeviceError::PoolStopped { .. } | DeviceError::PoolRefuses { .. } => Code::FailedPrecondition,
            DeviceError::Refused { .. } | DeviceError::NotFlushed { .. } | DeviceError::Helper(_) => {
                Code::Internal
            }
        };
        Self::new(code, error.to_string())
    }
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let code = match &error {
            WriteError::Full(_) => Code::ResourceExhausted,
            WriteError::NotWritten { .. } => Code::Internal,
            WriteError::Busy | WriteError::Stopping => Code::Unavailable,
        };
        Self::new(code, error.to_string())
    }
}
