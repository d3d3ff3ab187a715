//! The operations: each decided by the tree, made durable by the store, done by the pool, in the order
//! intent → effect → confirmation.
//!
//! Prepares run side by side; only the writes share a thread (and its fsyncs). What a thin device is made of must stand
//! still while it is made: origins are inactive for almost all of their lives, and the few that are not (a layer just
//! committed) are closed, or suspended if somebody has them open.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Notify, Semaphore, oneshot};

use crate::{
    device::{Access, Activation, Deactivated, DeviceError, DeviceName, Filesystem, Pool, Tools},
    error::{Code, Error, Result},
    metrics::Metrics,
    size::Bytes,
    store::{Store, WriteError},
    traffic::Traffic,
    tree::{Base, Change, Kind, Plan, Snapshot, SnapshotId, State, ThinId, Traces, Tree, UnixNanos, Wish},
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
}

/// Whether snapshots can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// They can.
    Serving,
    /// Not yet, or not at the moment: it is tried again.
    Waiting(String),
    /// Not before somebody has done something and restarted it.
    Refusing(String),
}

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

/// Within this time an image's next layer is made of the one just committed, and need not wait for its deactivation.
const NEXT_LAYER: Duration = Duration::from_secs(1);
/// So long at the most deactivations wait for the end of makings that follow each other as those of an unpack do.
const UNPACK: Duration = Duration::from_secs(10);

/// A base that udevd looks at, although no rule sends it, is let go within this time.
const BASE_IN_USE: Duration = Duration::from_secs(3);

/// So many snapshots can be made in one pool, ever.
const CREATIONS: u32 = 1 << 24;

/// A making that failed.
struct Failed {
    error: Error,
    /// What it has left in the pool.
    traces: Traces,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, traces: Traces::Maybe }
    }
}

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
    /// Committed snapshots (and bases) that may be active still. Whoever makes a snapshot of one holds its lock.
    pub(crate) active_origins: Mutex<HashMap<SnapshotId, Arc<tokio::sync::Mutex<()>>>>,
    /// Snapshots whose effects are under way: the reclaimer leaves them alone.
    pub(crate) making: Arc<Mutex<HashSet<SnapshotId>>>,
    /// Snapshots that are marked as removed, and that is not durable yet: the reclaimer leaves them alone too.
    unwritten: Mutex<HashMap<SnapshotId, usize>>,
    /// Snapshots that were given up, and what they have left, when the store could not be written.
    abandoned: Mutex<HashMap<SnapshotId, Traces>>,
    /// Who changes whether a device is active holds one of them, by its snapshot's id.
    devices: Vec<tokio::sync::Mutex<()>>,
    pub(crate) traffic: Traffic,
    /// Snapshots ever made in the pool.
    pub(crate) creations: AtomicU32,
    /// One mkfs or resize2fs per base.
    bases: Mutex<HashMap<Base, Arc<tokio::sync::Mutex<()>>>>,
    pub(crate) wake: Notify,
}

impl Inner {
    pub(crate) fn new(settings: Settings, store_id: String, store: Store<Tree>, metrics: Metrics) -> Self {
        Self {
            settings,
            store_id,
            store,
            pool: RwLock::new(None),
            filesystem: Arc::new(Tools),
            health: RwLock::new(Health::Waiting("it is starting".to_owned())),
            metrics,
            turns: Semaphore::new(PARALLEL),
            active_origins: Mutex::default(),
            making: Arc::default(),
            unwritten: Mutex::default(),
            abandoned: Mutex::default(),
            devices: (0..STRIPES).map(|_| tokio::sync::Mutex::default()).collect(),
            traffic: Traffic::default(),
            creations: AtomicU32::new(0),
            bases: Mutex::default(),
            wake: Notify::new(),
        }
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
        let pool = self.pool()?;
        self.blocking(move || work(&*pool)).await
    }

    async fn blocking<T: Send + 'static>(
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

    pub(crate) fn making(&self) -> MutexGuard<'_, HashSet<SnapshotId>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many marks of each are on their way.
    pub(crate) fn unwritten(&self) -> MutexGuard<'_, HashMap<SnapshotId, usize>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Prepare and View. `is_wanted` says whether the caller still waits.
    async fn make(&self, wish: Wish, is_wanted: impl Fn() -> bool) -> Result<Mount> {
        self.pool()?;
        self.creations_are_left()?;
        let _making = self.traffic.making();
        let mut remade = false;
        loop {
            let (new, origin) = self.intend(wish.clone()).await?;
            let made = self.make_of(&new, &origin, &is_wanted).await;
            let result = match made {
                Ok(mount) => Ok(mount),
                Err(failed) => Err((failed.error.code, self.give_up(new.id, failed).await)),
            };
            self.making().remove(&new.id);
            match result {
                Ok(mount) => return Ok(mount),
                // A base can be made again. What else is gone is gone.
                Err((Code::DataLoss, error)) if !origin.kind.is_listed() && !remade => {
                    remade = true;
                    tracing::error!(base = origin.id.0, %error, "a base is not in the pool any more; it is made anew");
                    self.write(move |tree| {
                        Ok((tree.give_up(origin.id, Traces::Maybe).into_iter().collect(), ()))
                    })
                    .await?;
                    self.wake.notify_one();
                }
                Err((_, error)) => return Err(error),
            }
        }
    }

    async fn make_of(
        &self,
        new: &Snapshot,
        origin: &Snapshot,
        is_wanted: &impl Fn() -> bool,
    ) -> Result<Mount, Failed> {
        let access = if new.kind == Kind::View { Access::ReadOnly } else { Access::ReadWrite };
        self.effect(new, Some(origin), access).await?;
        let mount = self.mount_of(new).await?;
        if !is_wanted() {
            // containerd has written down nothing, and would not look for it.
            return Err(Error::new(Code::Cancelled, "its caller has gone away").into());
        }
        let id = new.id;
        self.write(move |tree| Ok((vec![tree.confirm(id)?], ()))).await?;
        Ok(mount)
    }

    /// Writes down what is about to be made; makes the base first that it needs.
    async fn intend(&self, wish: Wish) -> Result<(Box<Snapshot>, Box<Snapshot>)> {
        loop {
            let (asked, making) = (wish.clone(), self.making.clone());
            let intended = Arc::new(OnceLock::new());
            let id = intended.clone();
            let plan = self
                .store
                .write(move |batch| {
                    let plan = batch.state().prepare(&asked)?;
                    if let Plan::Make(new, _) = &plan {
                        let _first = id.set(new.id);
                        making.lock().unwrap_or_else(PoisonError::into_inner).insert(new.id);
                        batch.change(Change::Put(new.clone()));
                    }
                    Ok::<_, Error>(plan)
                })
                .await;
            match plan {
                Ok(Plan::Make(new, origin)) => return Ok((new, origin)),
                Ok(Plan::Needs(base)) => self.make_base(base, wish.now).await?,
                Err(error) => {
                    self.forget(&intended);
                    return Err(error);
                }
            }
        }
    }

    /// What was intended was not written down: nobody is making it.
    fn forget(&self, intended: &OnceLock<SnapshotId>) {
        if let Some(id) = intended.get() {
            self.making().remove(id);
        }
    }

    /// Writes down that it is not to be; the reclaimer does so later if that is not possible now.
    async fn give_up(&self, id: SnapshotId, failed: Failed) -> Error {
        let traces = failed.traces;
        let given_up = self.write(move |tree| Ok((tree.give_up(id, traces).into_iter().collect(), ()))).await;
        let error = match given_up {
            Ok(()) => failed.error,
            Err(second) => {
                self.abandoned().insert(id, traces);
                failed.error.and(second)
            }
        };
        self.wake.notify_one();
        error
    }

    /// Makes the thin device of a record that is written, and activates it.
    async fn effect(&self, new: &Snapshot, origin: Option<&Snapshot>, access: Access) -> Result<(), Failed> {
        let mut thin = new.thin;
        loop {
            let made = match origin {
                Some(origin) => self.snap(thin, origin).await,
                None => self.on_pool(move |pool| Ok(pool.create_thin(thin))).await,
            };
            match made {
                Ok(Ok(())) => break,
                Ok(Err(DeviceError::ThinExists(_))) => {
                    let another = self.another_thin(new.id, thin).await;
                    thin = another.map_err(|error| Failed { error, traces: Traces::None })?;
                }
                Ok(Err(error)) => {
                    let traces = if error.may_have_made() { Traces::Maybe } else { Traces::None };
                    return Err(Failed { error: error.into(), traces });
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.count_creation();
        let activation = Activation { name: self.name(new.id), thin, bytes: new.bytes, access };
        Ok(self.on_pool(move |pool| pool.activate(&activation)).await?)
    }

    /// Somebody else has made a thin device in our pool.
    async fn another_thin(&self, id: SnapshotId, taken: ThinId) -> Result<ThinId> {
        tracing::warn!(thin = taken.0, "a thin device that is not ours is in the pool; it is left alone");
        let thin = self
            .write(move |tree| {
                let change = tree.another_thin(id)?;
                let Change::Put(snapshot) = &change else { return Ok((Vec::new(), taken)) };
                let thin = snapshot.thin;
                Ok((vec![change], thin))
            })
            .await?;
        self.store.note(move |tree| tree.avoid(taken))?;
        Ok(thin)
    }

    /// Makes a snapshot of an origin that stands still meanwhile. The inner result is the pool's own answer.
    async fn snap(&self, thin: ThinId, origin: &Snapshot) -> Result<Result<(), DeviceError>> {
        let origin_thin = origin.thin;
        let lock = self.active_origins().get(&origin.id).cloned();
        let Some(lock) = lock else {
            return self.on_pool(move |pool| Ok(pool.create_snap(thin, origin_thin))).await;
        };
        let _still = lock.lock().await;
        let name = self.name(origin.id);
        let (gone, made) = self
            .on_pool(move |pool| {
                let live = pool.look(&name)?;
                // What nobody has open has nothing under way: its last close has waited for that.
                if live.as_ref().is_none_or(|live| live.open == 0) {
                    return Ok((live.is_none(), pool.create_snap(thin, origin_thin)));
                }
                pool.suspend(&name)?;
                let made = pool.create_snap(thin, origin_thin);
                let resumed = pool.resume(&name);
                Ok((false, made.and(resumed)))
            })
            .await?;
        if gone {
            self.active_origins().remove(&origin.id);
        }
        Ok(made)
    }

    /// Makes a base: a blank by mkfs, or a grown copy by resize2fs.
    async fn make_base(&self, base: Base, now: UnixNanos) -> Result<()> {
        let lock = self.bases.lock().unwrap_or_else(PoisonError::into_inner).entry(base).or_default().clone();
        let _alone = lock.lock().await;
        let making = self.making.clone();
        let intended = Arc::new(OnceLock::new());
        let id = intended.clone();
        let intent = self
            .write(move |tree| {
                let made = tree.make_base(base, now)?;
                if let Some((new, _)) = &made {
                    let _first = id.set(new.id);
                    making.lock().unwrap_or_else(PoisonError::into_inner).insert(new.id);
                }
                Ok((made.iter().map(|(new, _)| Change::Put(new.clone())).collect(), made))
            })
            .await;
        let (new, origin) = match intent {
            Ok(Some(base)) => base,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.forget(&intended);
                return Err(error);
            }
        };
        let result = match self.make_base_of(&new, origin.as_deref()).await {
            Ok(()) => Ok(()),
            Err(Failed { error, traces }) => {
                let error = error.context(format!("making the {} of {}", new.kind.as_str(), new.bytes));
                Err(self.give_up(new.id, Failed { error, traces }).await)
            }
        };
        self.making().remove(&new.id);
        result
    }

    async fn make_base_of(&self, new: &Snapshot, origin: Option<&Snapshot>) -> Result<(), Failed> {
        self.effect(new, origin, Access::ReadWrite).await?;
        let (name, filesystem, grows) = (self.name(new.id), self.filesystem.clone(), origin.is_some());
        let mapped = self
            .on_pool(move |pool| {
                if grows {
                    filesystem.grow(&name.path())?;
                } else {
                    filesystem.make(&name.path(), pool.facts()?.usage.zeroing)?;
                }
                Ok(pool.look(&name)?.and_then(|live| live.mapped))
            })
            .await?;
        let name = self.name(new.id);
        let until = Instant::now() + BASE_IN_USE;
        loop {
            let name = name.clone();
            match self.on_pool(move |pool| pool.deactivate(&name)).await? {
                Deactivated::Gone => break,
                Deactivated::InUse if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Deactivated::InUse => {
                    let what = format!("somebody has opened {}", self.name(new.id).path());
                    return Err(Error::new(Code::Unavailable, what).into());
                }
            }
        }
        let id = new.id;
        Ok(self
            .write(move |tree| {
                let Change::Put(snapshot) = tree.confirm(id)? else { return Ok((Vec::new(), ())) };
                Ok((vec![Change::Put(Box::new(Snapshot { mapped, ..*snapshot }))], ()))
            })
            .await?)
    }

    /// How a snapshot that is there is mounted.
    async fn mount_of(&self, snapshot: &Snapshot) -> Result<Mount> {
        let path = self.name(snapshot.id).path();
        let is_view = snapshot.kind == Kind::View;
        let mut options = vec![if is_view { "ro" } else { "rw" }.to_owned()];
        if is_view || snapshot.layer {
            let (filesystem, path) = (self.filesystem.clone(), path.clone());
            let needs_recovery = self.blocking(move || filesystem.needs_recovery(&path)).await?;
            if is_view && needs_recovery {
                // Its journal cannot be replayed on a device that is read-only.
                options.push("noload".to_owned());
            } else if !is_view && !needs_recovery {
                // Thrown away unless it is unpacked to its end, unmounted and committed, which flushes it: until then
                // there is nothing to save, and in no order.
                options.extend(["noload", "nobarrier"].map(str::to_owned));
            }
        }
        Ok(Mount { kind: self.filesystem.name(), source: path, options })
    }

    /// The pool's count of snapshots ever made has 24 bits, and dm-thin corrupts its mappings beyond.
    fn creations_are_left(&self) -> Result<()> {
        let made = self.creations.load(Ordering::Relaxed);
        if made < CREATIONS / 10 * 9 {
            return Ok(());
        }
        let what = format!(
            "{made} snapshots were made in this pool, and it corrupts itself at {CREATIONS}: make a new pool, let \
             Cowshed pull its images into that, and delete this one when its last VM is gone"
        );
        Err(Error::new(Code::ResourceExhausted, what))
    }

    /// Counts a snapshot that was made in the pool.
    fn count_creation(&self) {
        let made = self.creations.fetch_add(1, Ordering::Relaxed) + 1;
        self.metrics.creations(made);
        if made == CREATIONS / 2 {
            tracing::warn!(
                made,
                "half of all snapshots that this pool can ever make were made: plan for a new pool"
            );
        }
    }
}

impl Snapshotter {
    /// Whether snapshots can be made.
    pub fn health(&self) -> Health {
        self.0.health.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings the metrics up to date; to be called before a scrape.
    pub fn look(&self) {
        self.0.metrics.healthy(self.health() == Health::Serving);
        self.0.store.read(|tree| self.0.metrics.look_at(tree, now().0));
    }

    /// Finishes what has begun, and closes the store.
    pub async fn close(&self) {
        self.0.store.close().await;
    }

    pub(crate) async fn make(
        &self,
        key: String,
        parent: String,
        kind: Kind,
        labels: BTreeMap<String, String>,
    ) -> Result<Mount> {
        let base_size = self.0.settings.base_size;
        let wish = Wish { key, parent, kind, labels, base_size, now: now() };
        let inner = self.0.clone();
        let (reply, answer) = oneshot::channel();
        // In a task of its own: a caller that goes away must not leave it half made.
        tokio::spawn(async move {
            let made = inner.make(wish, || !reply.is_closed()).await;
            // A caller that has gone in this very moment has a snapshot that it does not know of.
            let _gone = reply.send(made);
        });
        answer.await.map_err(|_| Error::new(Code::Internal, "making it has panicked; see the log"))?
    }

    pub(crate) async fn mounts(&self, key: &str) -> Result<Mount> {
        let snapshot = self.0.store.read(|tree| tree.ready(key).cloned())?;
        if snapshot.kind == Kind::Committed {
            let what = format!("snapshot {key:?} is committed: it is not mounted, but a view of it can be");
            return Err(Error::new(Code::FailedPrecondition, what));
        }
        self.0.ensure_active(snapshot.id).await?;
        self.0.mount_of(&snapshot).await
    }

    pub(crate) async fn commit(
        &self,
        name: String,
        key: String,
        labels: BTreeMap<String, String>,
    ) -> Result<()> {
        self.0.pool()?;
        let (inner, writer) = (self.0.clone(), self.0.clone());
        // It is put to rest whether or not its caller stays.
        let committed = tokio::spawn(async move {
            let snapshot = writer.store.read(|tree| tree.ready(&key).cloned())?;
            if snapshot.layer && snapshot.kind == Kind::Active {
                writer.flush(snapshot.id).await?;
            }
            let written = writer.write(move |tree| {
                let id = tree.ready(&key)?.id;
                let change = tree.commit(&name, &key, labels, now())?;
                // Before it can be a parent.
                inner.active_origins().entry(id).or_default();
                Ok((vec![change], id))
            });
            let id = written.await?;
            tokio::spawn(async move {
                tokio::time::sleep(NEXT_LAYER).await;
                let until = Instant::now() + UNPACK;
                while !writer.traffic.is_quiet_for(NEXT_LAYER) && Instant::now() < until {
                    tokio::time::sleep(NEXT_LAYER / 4).await;
                }
                writer.put_to_rest(id).await;
            });
            Ok(())
        });
        committed.await.map_err(|e| Error::new(Code::Internal, e.to_string()))?
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
                let ids: Vec<SnapshotId> = changes.iter().filter_map(Change::of).collect();
                // Nothing of it is deleted before that is written down.
                let mut unwritten = inner.unwritten();
                ids.iter().for_each(|id| *unwritten.entry(*id).or_default() += 1);
                drop(unwritten);
                changes.into_iter().for_each(|change| batch.change(change));
                Ok(ids)
            },
            move |ids, written| writer.removed(&ids, written),
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
            let blank = |bytes| {
                tree.all().find(|s| s.kind == Kind::Blank && s.state == State::Ready && s.bytes == bytes)
            };
            let below = match snapshot.parent {
                Some(parent) => tree.get(parent),
                None => blank(snapshot.bytes),
            };
            Ok::<_, Error>((snapshot, below.cloned()))
        })?;
        let mapped = self.0.mapped(&snapshot).await?;
        let below = match below {
            Some(below) => self.0.mapped(&below).await?,
            None => 0,
        };
        Ok(mapped.saturating_sub(below))
    }

    pub(crate) fn cleanup(&self) {
        self.0.wake.notify_one();
    }
}

impl Inner {
    /// Activates a snapshot that should be active: after a start, or if somebody has removed its device by hand. One
    /// that was half activated when the service was killed is completed.
    pub(crate) async fn ensure_active(&self, id: SnapshotId) -> Result<()> {
        let _alone = self.device_lock(id).lock().await;
        // As it is now: its thin id is another's once it was removed.
        let is_active =
            |s: &&Snapshot| s.state == State::Ready && matches!(s.kind, Kind::Active | Kind::View);
        let snapshot = self.store.read(|tree| tree.get(id).filter(is_active).cloned());
        let Some(snapshot) = snapshot else {
            return Err(Error::new(Code::NotFound, "the snapshot was removed or committed in the meantime"));
        };
        let access = if snapshot.kind == Kind::View { Access::ReadOnly } else { Access::ReadWrite };
        let name = self.name(id);
        let activation = Activation { name, thin: snapshot.thin, bytes: snapshot.bytes, access };
        self.on_pool(move |pool| pool.activate(&activation)).await
    }

    /// Makes what was written to a snapshot durable: a layer was mounted with neither journal nor barriers.
    async fn flush(&self, id: SnapshotId) -> Result<()> {
        let (name, seen) = (self.name(id), self.name(id));
        if self.on_pool(move |pool| pool.look(&seen)).await?.is_none() {
            self.ensure_active(id).await?;
        }
        self.on_pool(move |pool| pool.flush(&name)).await
    }

    /// What was removed is written down, or could not be.
    fn removed(&self, ids: &[SnapshotId], written: Result<(), WriteError>) {
        if let Err(error) = written {
            tracing::warn!(?ids, %error, "removed snapshots could not be written down; trying again");
            // They are back, and may be active.
            let mut active = self.active_origins();
            for id in ids {
                active.entry(*id).or_default();
            }
            drop(active);
            self.abandoned().extend(ids.iter().map(|id| (*id, Traces::Maybe)));
        }
        self.unwritten().retain(|id, count| {
            *count -= usize::from(ids.contains(id));
            *count > 0
        });
        self.wake.notify_one();
    }

    /// Bytes of the blocks that it maps.
    async fn mapped(&self, snapshot: &Snapshot) -> Result<u64> {
        if let Some(mapped) = snapshot.mapped {
            return Ok(mapped);
        }
        let name = self.name(snapshot.id);
        if let Some(mapped) = self.on_pool(move |pool| pool.look(&name)).await?.and_then(|live| live.mapped) {
            return Ok(mapped);
        }
        self.active_origins().entry(snapshot.id).or_default();
        self.rest_once(snapshot.id).await?;
        let known = self.store.read(|tree| tree.get(snapshot.id).and_then(|s| s.mapped));
        let unknown =
            || Error::new(Code::Unavailable, format!("what {:?} maps is not known yet", snapshot.key));
        known.ok_or_else(unknown)
    }

    /// Deactivates a committed snapshot as soon as nobody has it open, and writes down what it maps.
    pub(crate) async fn put_to_rest(&self, id: SnapshotId) {
        let mut pause = Duration::from_millis(20);
        loop {
            match self.rest_once(id).await {
                Ok(Deactivated::Gone) => return,
                Ok(Deactivated::InUse) => {}
                Err(error) if error.code == Code::DataLoss => {
                    tracing::error!(snapshot = id.0, %error, "a committed snapshot is not in the pool");
                    return;
                }
                Err(error) => tracing::warn!(snapshot = id.0, %error, "a committed snapshot stays active"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }

    async fn rest_once(&self, id: SnapshotId) -> Result<Deactivated> {
        let Some(lock) = self.active_origins().get(&id).cloned() else { return Ok(Deactivated::Gone) };
        let _still = lock.lock().await;
        let rests = |s: &&Snapshot| s.state == State::Ready && !matches!(s.kind, Kind::Active | Kind::View);
        let Some(snapshot) = self.store.read(|tree| tree.get(id).filter(rests).cloned()) else {
            // The commit was not made durable, or it is removed by now, and the reclaimer's.
            self.active_origins().remove(&id);
            return Ok(Deactivated::Gone);
        };
        let name = self.name(id);
        let _alone = self.device_lock(id).lock().await;
        let (thin, bytes, unknown) = (snapshot.thin, snapshot.bytes, snapshot.mapped.is_none());
        let (done, mapped) = self
            .on_pool(move |pool| {
                let maps =
                    |pool: &dyn Pool| Ok::<_, DeviceError>(pool.look(&name)?.and_then(|live| live.mapped));
                if unknown && maps(pool)?.is_none() {
                    pool.activate(&Activation { name: name.clone(), thin, bytes, access: Access::ReadOnly })?;
                }
                let mapped = maps(pool)?;
                Ok((pool.deactivate(&name)?, mapped))
            })
            .await?;
        if done == Deactivated::Gone {
            self.active_origins().remove(&id);
            self.write(move |tree| {
                let known = tree.get(id).filter(|s| s.mapped.is_none() && mapped.is_some());
                let change = known.map(|s| Change::Put(Box::new(Snapshot { mapped, ..s.clone() })));
                Ok((change.into_iter().collect(), ()))
            })
            .await?;
        }
        Ok(done)
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
            DeviceError::Refused { .. } | DeviceError::Helper(_) => Code::Internal,
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
