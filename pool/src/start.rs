//! Start-up: compares store, pool and kernel, and repairs in that order of trust.
//!
//! | found | done |
//! |---|---|
//! | a record Preparing, its thin id not in the pool | deleted |
//! | a record Preparing | it was half made: marked Removing |
//! | a record Ready, Active or View | its device is activated |
//! | a layer Ready and Active, its device not in the kernel | the host has started anew while it was unpacked, without a journal: never committed |
//! | a record Ready, of another kind, its device active | deactivated when nobody has it open |
//! | a record Ready, an heir | marked Removing |
//! | a record Removing | left to the reclaimer |
//! | one of our devices, suspended | resumed: a snapshot of it was being made |
//! | one of our devices without a record | deactivated if closed: its name is ours, and says so |
//! | a thin id in the pool without a record | reported, avoided, left alone |
//! | a base without a thin id in the pool | deleted; made anew when it is needed |
//! | another record without a thin id in the pool | reported; its use fails |

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use rusqlite::Connection;

use crate::{
    device::{DeviceError, DeviceMapper, DeviceName, Live, Pool, PoolMode, REPAIR},
    error::Code,
    metrics::Metrics,
    reclaim,
    snapshotter::{Health, Inner, Settings, Snapshotter, now},
    store::{self, Store, again::IfMissing, file::OpenError},
    tree::{Change, Kind, Snapshot, SnapshotId, State, ThinId, Traces, Tree},
};

/// Pause before a pool that is not there is looked for again, or what cannot be activated tried again.
const RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Why snapshots cannot be made.
enum Hindrance {
    /// It may go away by itself.
    Passing(String),
    /// Somebody has to do something.
    Lasting(String),
    /// The same, and to look again is work: the metadata are checked.
    Damaged(String),
}

impl Snapshotter {
    /// Opens the store, and starts to look for the pool; answers reads from now on, and writes when all is reconciled.
    ///
    /// # Errors
    /// If it cannot be opened. Nothing was changed then.
    pub(crate) fn open(
        settings: Settings,
        metrics: Metrics,
        if_missing: IfMissing,
    ) -> Result<Self, OpenError> {
        let (connection, tree, store_id) = store::open(&settings.store, if_missing)?;
        let store = start_writer(connection, tree, &settings.store)?;
        let inner = Arc::new(Inner::new(settings, store_id, store, metrics));
        tokio::spawn(bring_up(inner.clone(), DeviceMapper::new));
        tokio::spawn(reclaim::run(inner.clone()));
        Ok(Self(inner))
    }

    /// Answers what can be read of a damaged store, if anything can.
    pub(crate) fn reader(settings: Settings, metrics: Metrics, damage: &OpenError) -> Option<Self> {
        if !matches!(damage, OpenError::Damaged { .. }) {
            return None;
        }
        // No writer of the damaged file; the gate in front of every write is `Health::Refusing`.
        let (tree, store_id) = store::open_for_reading(&settings.store).ok()?;
        let store = start_writer(Connection::open_in_memory().ok()?, tree, &settings.store).ok()?;
        let inner = Inner::new(settings, store_id, store, metrics);
        set(&inner, Health::Refusing(damage.to_string()));
        Some(Self(Arc::new(inner)))
    }
}

fn start_writer(connection: Connection, tree: Tree, path: &Path) -> Result<Store<Tree>, OpenError> {
    Store::start(connection, tree, path.to_owned()).map_err(|e| OpenError::Io {
        noun: "snapshot store",
        path: path.display().to_string(),
        what: e.to_string(),
    })
}

fn set(inner: &Inner, health: Health) {
    inner.metrics.healthy(health == Health::Serving);
    *inner.health.write().unwrap_or_else(PoisonError::into_inner) = health;
}

/// `find` finds the pool of a name.
pub(crate) async fn bring_up<P: Pool + 'static>(
    inner: Arc<Inner>,
    find: impl Fn(&str) -> Result<P, DeviceError> + Clone + Send + 'static,
) {
    let mut said = String::new();
    while let Err(hindrance) = attempt(&inner, find.clone()).await {
        let is_damaged = matches!(hindrance, Hindrance::Damaged(_));
        let health = match hindrance {
            Hindrance::Passing(why) => Health::Waiting(why),
            Hindrance::Lasting(why) | Hindrance::Damaged(why) => Health::Refusing(why),
        };
        match &health {
            Health::Waiting(why) if *why != said => {
                tracing::warn!(why, "no snapshots yet; trying again");
                said.clone_from(why);
            }
            Health::Refusing(why) if *why != said => {
                tracing::error!(why, "the snapshotter changes nothing; it answers reads");
                said.clone_from(why);
            }
            _ => {}
        }
        set(&inner, health);
        if is_damaged {
            until_taken_away(&inner, find.clone()).await;
        } else {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// A damaged pool has to be deactivated to be repaired. In case that was not seen, this ends after a while.
async fn until_taken_away<P: Pool + 'static>(
    inner: &Inner,
    find: impl Fn(&str) -> Result<P, DeviceError> + Clone + Send + 'static,
) {
    let is_there = move |name: String| find(&name).and_then(|pool| pool.facts()).is_ok();
    let deadline = Instant::now() + LONGEST_RETRY;
    while Instant::now() < deadline {
        tokio::time::sleep(RETRY).await;
        let (is_there, name) = (is_there.clone(), inner.settings.pool.clone());
        if !tokio::task::spawn_blocking(move || is_there(name)).await.unwrap_or(false) {
            return;
        }
    }
}

async fn attempt<P: Pool + 'static>(
    inner: &Arc<Inner>,
    find: impl FnOnce(&str) -> Result<P, DeviceError> + Send + 'static,
) -> Result<(), Hindrance> {
    let settings = inner.settings.clone();
    let known = inner.store.read(|tree| tree.pool().to_owned());
    let looked = tokio::task::spawn_blocking(move || {
        let pool = find(&settings.pool).map_err(passing)?;
        let found = look_at_pool(&pool, &settings, &known)?;
        Ok((pool, found))
    })
    .await;
    let (pool, found) = looked.map_err(|e| Hindrance::Passing(e.to_string()))??;
    reconcile(inner, Arc::new(pool), found).await.map_err(Hindrance::Passing)
}

/// What the pool itself tells.
pub(crate) struct Found {
    /// Its uuid, if the store does not know it yet.
    pub(crate) new_uuid: Option<String>,
    /// `None` if they could not be listed.
    pub(crate) thin_ids: Option<BTreeSet<ThinId>>,
    pub(crate) creations: u32,
}

fn look_at_pool(pool: &impl Pool, settings: &Settings, known: &str) -> Result<Found, Hindrance> {
    let facts = pool.facts().map_err(passing)?;
    let name = &facts.usage.name;
    match facts.usage.mode {
        PoolMode::ReadWrite | PoolMode::OutOfDataSpace => {}
        // As one without room for metadata is; the kernel lets it write again when it has some.
        PoolMode::ReadOnly => {
            let (used, total) = (facts.usage.metadata_used >> 20, facts.usage.metadata_total >> 20);
            return Err(Hindrance::Passing(format!(
                "the thin pool {name} is in mode {}, so nothing is changed in it; {used} of {total} MiB of its metadata are in \
                 use. If there is no room, extend it (lvextend --poolmetadatasize); else see the kernel's log, deactivate the \
                 pool, and check its metadata with thin_check",
                facts.usage.mode
            )));
        }
        mode @ (PoolMode::NeedsCheck | PoolMode::Failed) => {
            return Err(Hindrance::Lasting(stopped(name, mode)));
        }
    }
    if !facts.usage.zeroing && !settings.allow_unzeroed {
        return Err(Hindrance::Lasting(format!(
            "the thin pool {name} does not zero new blocks, so bytes of one disk could be read from another: \
             `lvchange --zero y`, or allow it with [pool] allow_unzeroed"
        )));
    }
    if facts.uuid.is_empty() {
        return Err(Hindrance::Lasting(format!(
            "the thin pool {name} has no device-mapper uuid, so it could not be told from another of its name: give it one \
             (`dmsetup rename {name} --setuuid UUID`), wherever it is made"
        )));
    }
    if !known.is_empty() && known != facts.uuid {
        return Err(Hindrance::Lasting(format!(
            "the snapshot store {} is of the thin pool with uuid {known}, but {name} has {}: name the right pool, or give \
             this one a state directory of its own",
            settings.store.display(),
            facts.uuid
        )));
    }
    let thin_ids = match pool.thin_ids() {
        Ok(ids) => Some(ids),
        Err(error) => {
            // What cannot be listed may be damaged, and every change would make it worse; so would not knowing.
            if let Some(said) = pool.damage().map_err(passing)? {
                return Err(Hindrance::Damaged(format!(
                    "the metadata of the thin pool {name} is damaged, so nothing is changed in it. thin_check says: {said}. What to \
                     do: {REPAIR}"
                )));
            }
            tracing::warn!(%error, "what else is in the pool cannot be told");
            None
        }
    };
    let creations = pool.creations().map_err(passing)?;
    let new_uuid = Some(facts.uuid).filter(|_| known.is_empty());
    Ok(Found { new_uuid, thin_ids, creations })
}

fn stopped(name: &str, mode: PoolMode) -> String {
    format!("the thin pool {name} is in mode {mode}, so nothing is changed in it: {REPAIR}")
}

/// Looks at a pool that is in use; says what has become of it if it is not the one any more that was found good at the
/// start: it was taken away, or has to be. Everything that was active in it is gone then, or of no use.
///
/// `had_active`: whether any of the devices that should be active was there in an earlier look. Those that never were are no
/// sign of anything new.
pub(crate) async fn lost(snapshotter: &Snapshotter, had_active: &mut bool) -> Option<String> {
    let inner = &snapshotter.0;
    if inner.pool().is_err() {
        return None;
    }
    let pool = inner.pool.read().unwrap_or_else(PoisonError::into_inner).clone()?;
    // Names of what has been active for a while: another one may be on its way.
    let active = inner.store.read(|tree| {
        let active = tree.listed().filter(|s| s.kind.is_active() && s.state == State::Ready);
        active.map(|s| inner.name(s.id).to_string()).collect::<BTreeSet<_>>()
    });
    let look = move || Ok::<_, DeviceError>((pool.facts()?, pool.names()?));
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok((facts, names))) => match facts.usage.mode {
            mode @ (PoolMode::NeedsCheck | PoolMode::Failed) => Some(stopped(&facts.usage.name, mode)),
            // The kernel lets a read-only one write again by itself.
            PoolMode::ReadWrite | PoolMode::OutOfDataSpace | PoolMode::ReadOnly => {
                let has_active = names.iter().any(|name| active.contains(name));
                *had_active |= has_active;
                let all_gone = *had_active && !has_active && !active.is_empty();
                let what = format!(
                    "all devices in the thin pool {} are gone, it was deactivated and activated again",
                    facts.usage.name
                );
                all_gone.then_some(what)
            }
        },
        Ok(Err(error @ DeviceError::NoPool(_))) => Some(error.to_string()),
        // Nothing is known of it.
        Ok(Err(_)) | Err(_) => None,
    }
}

fn passing(error: DeviceError) -> Hindrance {
    Hindrance::Passing(error.to_string())
}

/// Brings store, pool and kernel together, then lets requests in.
pub(crate) async fn reconcile(inner: &Arc<Inner>, pool: Arc<dyn Pool>, found: Found) -> Result<(), String> {
    inner.know_creations(found.creations);
    half_made(inner, found.new_uuid, found.thin_ids.as_ref()).await.map_err(|e| e.to_string())?;
    if let Some(ids) = found.thin_ids {
        compare_ids(inner, ids).await;
    }
    *inner.pool.write().unwrap_or_else(PoisonError::into_inner) = Some(pool.clone());
    let store_id = inner.store_id.clone();
    let tree = inner.store.read(Clone::clone);
    let seen = tree.clone();
    let in_kernel = tokio::task::spawn_blocking(move || kernel_side(&*pool, &store_id, &seen)).await;
    let InKernel { awake, names } = in_kernel.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    tear_layers(inner, names).await.map_err(|e| e.to_string())?;
    // Before the first request: whoever makes a snapshot of one of these has to know.
    for id in &awake {
        inner.active_origins().entry(*id).or_default();
    }
    set(inner, Health::Serving);
    activate_all(inner, &tree).await;
    for snapshot in tree.all().filter(|s| s.state == State::Ready && !s.kind.is_active()) {
        if snapshot.mapped.is_none() || awake.contains(&snapshot.id) {
            inner.active_origins().entry(snapshot.id).or_default();
            let (inner, id) = (inner.clone(), snapshot.id);
            tokio::spawn(async move { inner.put_to_rest(id).await });
        }
    }
    inner.wake.notify_one();
    let count = |kind: Kind| tree.listed().filter(|s| s.kind == kind).count();
    tracing::info!(
        active = count(Kind::Active),
        views = count(Kind::View),
        committed = count(Kind::Committed),
        removed = tree.removing().count(),
        creations = found.creations,
        "snapshotter ready"
    );
    Ok(())
}

async fn half_made(
    inner: &Inner,
    new_uuid: Option<String>,
    in_pool: Option<&BTreeSet<ThinId>>,
) -> crate::error::Result<()> {
    let in_pool = in_pool.cloned();
    let is_missing = move |s: &Snapshot| in_pool.as_ref().is_some_and(|ids| !ids.contains(&s.thin));
    let count = inner
        .write(move |tree| {
            let half: Vec<&Snapshot> = tree.all().filter(|s| s.state == State::Preparing).collect();
            let is_lost_base =
                |s: &&Snapshot| s.state == State::Ready && !s.kind.is_listed() && is_missing(s);
            // Whoever would have come for them has gone.
            let heirs: Vec<&Snapshot> = tree.heirs().filter(|s| !is_missing(s)).collect();
            let mut changes: Vec<Change> = half
                .iter()
                .copied()
                .chain(tree.all().filter(is_lost_base))
                .chain(heirs)
                .flat_map(|s| {
                    tree.give_up(s.id, if is_missing(s) { Traces::None } else { Traces::Maybe }, now())
                })
                .collect();
            changes.extend(new_uuid.map(Change::Pool));
            Ok((changes, half.len()))
        })
        .await?;
    if count > 0 {
        tracing::warn!(
            count,
            "snapshots were being made when the service stopped; their remains are cleared away"
        );
    }
    Ok(())
}

async fn compare_ids(inner: &Inner, in_pool: BTreeSet<ThinId>) {
    let (foreign, missing) = inner.store.read(|tree| {
        let ours: BTreeSet<ThinId> = tree.all().map(|s| s.thin).collect();
        let missing: Vec<String> = tree
            .all()
            .filter(|s| s.state == State::Ready && !in_pool.contains(&s.thin))
            .map(|s| format!("{:?} (thin id {})", s.key, s.thin.0))
            .collect();
        (in_pool.difference(&ours).copied().collect::<Vec<_>>(), missing)
    });
    if !foreign.is_empty() {
        let ids: Vec<String> = foreign.iter().take(20).map(|id| id.0.to_string()).collect();
        tracing::warn!(
            count = foreign.len(),
            ids = ids.join(" "),
            "thin devices in the pool that are in no record: left alone; another snapshotter's, or delete them by hand"
        );
        let avoid = |tree: &mut Tree| foreign.iter().for_each(|id| tree.avoid(*id));
        if let Err(error) = inner.store.note(avoid) {
            tracing::warn!(%error, "their thin ids are not avoided");
        }
    }
    if !missing.is_empty() {
        tracing::error!(
            count = missing.len(),
            snapshots = missing.iter().take(20).cloned().collect::<Vec<_>>().join(", "),
            "snapshots are in the store and not in the pool: remove them, or put back the pool's metadata"
        );
    }
}

/// Which devices of ours there are.
#[derive(Default)]
struct InKernel {
    /// Bases and committed ones.
    awake: BTreeSet<SnapshotId>,
    /// All.
    names: BTreeSet<SnapshotId>,
}

/// A layer is unpacked without a journal: what the end of the host has interrupted is not whole, whoever comes back to it.
async fn tear_layers(inner: &Inner, in_kernel: BTreeSet<SnapshotId>) -> crate::error::Result<()> {
    let count = inner
        .write(move |tree| {
            let interrupted = tree.all().filter(|s| s.layer && !in_kernel.contains(&s.id));
            let torn: Vec<Change> = interrupted.filter_map(|s| tree.tear(s.id)).collect();
            let count = torn.len();
            Ok((torn, count))
        })
        .await?;
    if count > 0 {
        tracing::warn!(
            count,
            "layers were being unpacked when the host stopped; they have to be unpacked anew"
        );
    }
    Ok(())
}

/// Resumes and deactivates what a crash has left.
fn kernel_side(pool: &dyn Pool, store_id: &str, tree: &Tree) -> Result<InKernel, DeviceError> {
    let mut found = InKernel::default();
    for name in pool.names()? {
        if let Some(name) = DeviceName::parse_while_trimmed(&name, store_id) {
            if let Err(error) = pool.deactivate(&name) {
                tracing::error!(%name, %error, "a device that was being trimmed stays");
            }
            continue;
        }
        let Some(id) = DeviceName::parse(&name, store_id) else {
            tracing::warn!(name, "a device of another snapshot store: left alone");
            continue;
        };
        let name = DeviceName::new(store_id, id);
        found.names.insert(id);
        // One device that does not obey must not keep all others waiting.
        if let Err(error) = let_go_on(pool, &name) {
            tracing::error!(%name, %error, "a device cannot be looked at or resumed");
        }
        match tree.get(id) {
            None => match pool.deactivate(&name) {
                Ok(became) => tracing::warn!(%name, ?became, "a device of ours without a record"),
                Err(error) => tracing::error!(%name, %error, "a device of ours without a record stays"),
            },
            Some(s) if s.state == State::Ready && !s.kind.is_active() => {
                found.awake.insert(id);
            }
            Some(_) => {}
        }
    }
    Ok(found)
}

fn let_go_on(pool: &dyn Pool, name: &DeviceName) -> Result<(), DeviceError> {
    if pool.look(name)?.is_some_and(Live::stands_still) {
        pool.resume(name)?;
    }
    Ok(())
}

async fn activate_all(inner: &Arc<Inner>, tree: &Tree) {
    let to_be_active = tree.listed().filter(|s| s.kind.is_active()).map(|snapshot| async move {
        let error = inner.ensure_active(snapshot.id).await.err()?;
        tracing::error!(key = snapshot.key, %error, "a snapshot's device cannot be activated");
        Some(snapshot.id).filter(|_| error.code != Code::DataLoss)
    });
    let left: Vec<_> = join_all(to_be_active).await.into_iter().flatten().collect();
    if !left.is_empty() {
        tokio::spawn(activate_later(inner.clone(), left));
    }
}

/// Their VMs may look for their devices and never ask for them.
async fn activate_later(inner: Arc<Inner>, mut left: Vec<SnapshotId>) {
    let mut pause = RETRY;
    while !left.is_empty() && !inner.is_retired() {
        tokio::time::sleep(pause).await;
        // One after the other: who asks for one now comes first.
        let mut again = Vec::new();
        for id in left {
            match inner.ensure_active(id).await {
                Ok(()) => tracing::info!(device = %inner.name(id), "a snapshot's device is active after all"),
                Err(error) if matches!(error.code, Code::DataLoss | Code::NotFound) => {}
                Err(error) => {
                    tracing::debug!(device = %inner.name(id), %error, "not yet active");
                    again.push(id);
                }
            }
        }
        left = again;
        pause = (pause * 2).min(LONGEST_RETRY);
    }
}
