//! Clears away what was released, and what a crash or a failure left half made; never with force.
//!
//! The release fence: a disk's snapshot is removed when the kernel has just said that its device is closed, and a
//! snapshotter that does not force keeps a device that is open. On one whose own removal forces (the stock one's does),
//! the fence is that check: the devices of a batch go at the collection that ends it, so a launcher that opens a device
//! that it has released, in the second or so between the two, loses it. Nothing can be lost by opening a device that was
//! not released.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Duration,
};

use cowshed_gc::{DeviceUse, Foreign, Inventory, Step, WaitReason};
use cowshed_leases::{Failure, Grace, Lease, LeaseId, Moment, SNAPSHOT_KEY_PREFIX, State, Suspicion, Uptime};
use futures_util::{StreamExt as _, stream};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use crate::{
    clock::Clock,
    containerd::Snapshots,
    disks::block_device,
    error::{Reason, Result},
    image::RunningPulls,
    kernel::{Devices, KernelError},
    ledger::Ledger,
    making::Making,
    metrics::Metrics,
    stages::Laps,
    writes::Writes,
};

/// So many disks go per garbage collection of containerd's, so that a crowd that leaves together does not hold
/// containerd's locks for long …
const BATCH: usize = 50;
/// … and so many if they do not become fewer that way: a collection looks at everything there is, however little goes.
const LARGEST_BATCH: usize = 400;
/// The part of the backlog that a batch has in between.
const BATCHES: usize = 8;
/// Calls to containerd at once: each waits for a transaction of its own.
pub(crate) const ABREAST: usize = 8;
/// How often the time is looked at.
const TICK: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// So long a snapshotter may take for a device whose snapshot containerd has collected; then containerd is asked again.
const AT_LEISURE: Duration = Duration::from_secs(10);
/// But not more often than this: a snapshotter that has much to remove would get even slower by it.
const BETWEEN_SWEEPS: Duration = Duration::from_secs(60);
/// So long one pass waits for that.
const A_MOMENT: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(25);

/// Wakes the reclaimer.
#[derive(Clone, Debug, Default)]
pub struct Wake(Arc<Notify>);

impl Wake {
    /// There is something to do.
    pub fn now(&self) {
        self.0.notify_one();
    }
}

/// Why released disks are still there, in words.
pub type Waiting = Arc<RwLock<HashMap<LeaseId, String>>>;

/// The reclaimer.
pub struct Reclaimer {
    /// What was released.
    pub ledger: Ledger,
    /// Where the snapshots are.
    pub snapshots: Arc<dyn Snapshots>,
    /// Who has devices open.
    pub kernel: Devices,
    /// Which pulls are alive.
    pub running_pulls: Arc<dyn RunningPulls>,
    /// Which leases are being made.
    pub making: Making,
    /// Learns what was written to disks before they go.
    pub writes: Arc<Writes>,
    /// Its alarm clock.
    pub wake: Wake,
    /// What time it is.
    pub clock: Clock,
    /// How long what nobody may want any more is kept.
    pub grace: Grace,
    /// For the replies of the API.
    pub waiting: Waiting,
    /// What it did.
    pub metrics: Metrics,
    /// Longest pause between two looks at an open device.
    pub retry: Duration,
    /// Pause between two looks at everything.
    pub interval: Duration,
    /// What was there without a record in the pass before: reported when it still is.
    pub suspects: Mutex<Suspects>,
    /// Since when the closed devices of overdue leases of an earlier boot have been seen.
    pub closed: Mutex<HashMap<LeaseId, Uptime>>,
    /// When containerd collected the snapshots of disks whose devices are still there.
    pub collected: Mutex<Collected>,
}

/// Things without a record, and whether that was said.
#[derive(Debug, Default)]
pub struct Suspects {
    seen: BTreeSet<Foreign>,
    reported: BTreeSet<Foreign>,
}

/// What a look may do to devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Nothing.
    Only,
    /// What is not active, and is to be judged, is activated.
    AndActivate,
}

/// How much a pass looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Released,
    Everything,
}

/// What containerd has that looks like ours.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) leases: Vec<String>,
    pub(crate) snapshots: Vec<String>,
}

/// What containerd was made to collect.
#[derive(Debug, Default)]
pub struct Collected {
    /// When each of these disks, whose devices are still there.
    disks: HashMap<LeaseId, Instant>,
    /// When it last looked for what it has forgotten.
    swept: Option<Instant>,
}

/// What is left of a disk after its collection.
enum Remains {
    /// This device, whose snapshot is gone.
    Device(String),
    /// It cannot be told, or more than that.
    Other(String),
}

/// What became of letting a disk go.
enum LetGo {
    Done,
    /// Its device is not closed any more.
    Fenced(WaitReason),
    Failed(String),
}

impl Reclaimer {
    /// Marks what nobody is making (any more): of a process before, of a task that crashed, or because the ledger could
    /// not be written when it was given up; and what nobody may want any more. To be called before the first request is
    /// served.
    pub async fn recover(&self) -> Result<usize> {
        self.suspect().await?;
        // The ledger before the makers: a lease has one from before its intent until it is decided.
        let preparing: BTreeSet<LeaseId> = self.ledger.read(|book| {
            let preparing = book.after(None).filter(|lease| lease.state == State::Preparing);
            preparing.map(|lease| lease.id.clone()).collect()
        });
        let making = self.making.now();
        let half_made: Vec<LeaseId> = preparing.difference(&making).cloned().collect();
        if half_made.is_empty() {
            return Ok(0);
        }
        let failure = Failure {
            reason: Reason::Stopping.as_str().to_owned(),
            message: "the service ended, or failed, while the disk was being made; acquire again".to_owned(),
        };
        let count = self.ledger.fail_all(half_made, failure, self.clock.now()).await?;
        if count > 0 {
            tracing::warn!(count, "leases were left half made; their remains are cleared away");
        }
        Ok(count)
    }

    /// Marks leases whose time is over, or that an earlier boot has left.
    async fn suspect(&self) -> Result<()> {
        let count = self.ledger.suspect(self.grace, self.clock.now()).await?;
        if count > 0 {
            tracing::warn!(count, "leases have expired, or are of an earlier boot");
        }
        Ok(())
    }

    /// Watches the time, until `stop` changes: marks leases as they expire, and wakes the reclaimer for those whose grace
    /// is over.
    pub async fn watch_time(&self, mut stop: watch::Receiver<bool>) {
        let mut known = BTreeSet::new();
        loop {
            if let Err(error) = self.suspect().await {
                tracing::debug!(%error, "what has expired cannot be written down yet");
            }
            let now = self.clock.now();
            let overdue: BTreeSet<LeaseId> = self.ledger.read(|book| {
                book.after(None)
                    .filter(|lease| lease.is_overdue(&now))
                    .map(|lease| lease.id.clone())
                    .collect()
            });
            if !overdue.is_subset(&known) {
                self.wake.now();
            }
            known = overdue;
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                _ = stop.changed() => return,
            }
        }
    }

    /// Runs until `stop` changes.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let mut everything_at = Instant::now();
        let mut retry = FIRST_RETRY;
        loop {
            // Releases that keep coming must not put the look at everything off.
            let scope = if Instant::now() < everything_at { Scope::Released } else { Scope::Everything };
            let left = self.pass(scope).await;
            if scope == Scope::Everything {
                self.mend_holds().await;
                everything_at = Instant::now() + self.interval;
            }
            let until_everything = everything_at.saturating_duration_since(Instant::now());
            let pause =
                if left == 0 { until_everything } else { retry.min(self.retry).min(until_everything) };
            retry = if left == 0 { FIRST_RETRY } else { (retry * 2).min(self.retry) };
            tokio::select! {
                () = self.wake.0.notified() => retry = FIRST_RETRY,
                () = tokio::time::sleep(pause) => {}
                _ = stop.changed() => return,
            }
        }
    }

    #[cfg(test)]
    pub(crate) async fn pass_over_everything(&self) {
        self.pass(Scope::Everything).await;
    }

    /// One look, and what follows from it. Returns how much has to be looked at again soon.
    async fn pass(&self, scope: Scope) -> usize {
        let unmarked = match self.recover().await {
            Ok(_) => 0,
            Err(error) => {
                tracing::warn!(%error, "half made leases cannot be marked yet");
                1
            }
        };
        let inventory = self.inventory(scope).await;
        let (mut reclaim, mut given_up) = (Vec::new(), Vec::new());
        let mut waiting = HashMap::new();
        let mut foreign = BTreeSet::new();
        let mut unended = 0;
        for step in cowshed_gc::plan(&inventory) {
            match step {
                Step::Reclaim(id) => reclaim.push(id),
                Step::GiveUpOn(id) => given_up.push(id),
                Step::Wait(id, why) => {
                    waiting.insert(id, why.to_string());
                }
                Step::EndPull(lease) => unended += usize::from(!self.end_pull(&lease).await),
                Step::Report(what) => {
                    foreign.insert(what);
                }
            }
        }
        if scope == Scope::Everything {
            self.report(foreign);
        }
        let given_up = self.give_up_on(given_up).await;
        for batch in reclaim.chunks((reclaim.len() / BATCHES).clamp(BATCH, LARGEST_BATCH)) {
            waiting.extend(self.reclaim(batch).await);
        }
        let left = waiting.len() + unended + unmarked + given_up;
        *self.waiting.write().unwrap_or_else(PoisonError::into_inner) = waiting;
        left
    }

    /// Marks leases whose grace is over; returns how much there is to do for it.
    async fn give_up_on(&self, ids: Vec<LeaseId>) -> usize {
        if ids.is_empty() {
            return 0;
        }
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| !ids.contains(id));
        match self.ledger.give_up_on(ids, self.clock.now()).await {
            Ok(count) => {
                tracing::warn!(count, "leases that nobody has renewed are released: their grace is over");
                count
            }
            Err(error) => {
                tracing::warn!(%error, "leases whose grace is over cannot be released yet");
                1
            }
        }
    }

    /// containerd before the ledger: what was granted in between is then in the ledger, and no orphan.
    async fn inventory(&self, scope: Scope) -> Inventory {
        if scope == Scope::Released {
            return self.inventory_with(None, Look::AndActivate).await;
        }
        let compared = self.look_at_containerd().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "containerd's leases and snapshots cannot be compared with the ledger now");
            Compared::default()
        });
        self.inventory_with(Some(compared), Look::AndActivate).await
    }

    pub(crate) async fn look_at_containerd(&self) -> Result<Compared, crate::containerd::CallError> {
        let leases = self.snapshots.our_leases().await?;
        Ok(Compared { leases, snapshots: self.snapshots.keys(SNAPSHOT_KEY_PREFIX).await? })
    }

    /// Of everything if it is compared with what containerd has; otherwise of what is to be reclaimed.
    pub(crate) async fn inventory_with(&self, compared: Option<Compared>, look: Look) -> Inventory {
        let everything = compared.is_some();
        let Compared { leases, snapshots } = compared.unwrap_or_default();
        let mut inventory = Inventory { containerd_leases: leases, snapshots, ..Inventory::default() };
        // The ledger before the living: a pull is alive from before it is written down until after it is struck off.
        let (known, of_no_job) = (self.ledger.pulls(), self.ledger.pulls_of_no_job());
        let running = self.running_pulls.running();
        inventory.abandoned_pulls = of_no_job.into_iter().filter(|lease| !running.contains(lease)).collect();
        // Those that wait to be gone on with are nobody else's, either.
        let waiting = known.into_keys().filter(|lease| !inventory.abandoned_pulls.contains(lease));
        inventory.running_pulls = running.into_iter().chain(waiting).collect();
        let now = self.clock.now();
        let (looked_at, held): (Vec<Lease>, BTreeSet<LeaseId>) = self.ledger.read(|book| {
            // What is shared goes after all that name it.
            let is_over = |lease: &Lease| {
                lease.is_overdue(&now) || lease.is_to_be_reclaimed() && book.sharers(&lease.id) == 0
            };
            let leases = || book.after(None).filter(|lease| everything || is_over(lease));
            // And it is on record until then.
            let held = leases().filter(|lease| lease.is_held() || book.sharers(&lease.id) > 0);
            (
                leases().filter(|lease| is_over(lease)).cloned().collect(),
                held.map(|lease| lease.id.clone()).collect(),
            )
        });
        inventory.held = held;
        // Again the ledger first: who makes one of these now has begun before it was released.
        let making = self.making.now();
        for lease in looked_at {
            let device =
                if making.contains(&lease.id) { DeviceUse::BeingMade } else { self.device_use(&lease).await };
            if lease.is_to_be_reclaimed() {
                inventory.releasing.push((lease.id, device));
            } else {
                let device = self.unwanted(&lease, device, look, &now).await;
                inventory.overdue.push((lease.id, device));
            }
        }
        inventory
    }

    async fn device_use(&self, lease: &Lease) -> DeviceUse {
        let name = match lease.own_device() {
            Some(device) => Ok(Some(device.dm_name.clone())),
            None => self.device_of(&lease.id).await,
        };
        let open = match name {
            Ok(Some(name)) => self.kernel.open_count(&name).await.map_err(|e| e.to_string()),
            Ok(None) => Ok(None),
            Err(why) => Err(why),
        };
        match open {
            Ok(None) => DeviceUse::Absent,
            Ok(Some(0)) => DeviceUse::Closed,
            Ok(Some(n)) => DeviceUse::Open(n),
            Err(why) => DeviceUse::Unknown(why),
        }
    }

    /// What the device of an overdue lease counts as. One that is not there may only not be active: after a boot whose pool
    /// was down for longer than the grace, nobody could have come back for it. So it has to be there, closed, for a while.
    async fn unwanted(&self, lease: &Lease, device: DeviceUse, look: Look, now: &Moment) -> DeviceUse {
        let device = match device {
            // Its VM has nothing that goes with it.
            DeviceUse::Absent if lease.shares.is_some() && lease.own_device().is_none() => return device,
            DeviceUse::Absent if look == Look::Only => DeviceUse::Unknown("it is not active".to_owned()),
            DeviceUse::Absent => match self.snapshots.mounts(&lease.id.snapshot_key()).await {
                Err(error) if error.is_not_found() => return DeviceUse::Absent,
                Err(error) => DeviceUse::Unknown(error.to_string()),
                // That has made the snapshotter activate it.
                Ok(_) => match self.device_use(lease).await {
                    DeviceUse::Absent => DeviceUse::Unknown("it is not active".to_owned()),
                    device => device,
                },
            },
            device => device,
        };
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if device != DeviceUse::Closed {
            closed.remove(&lease.id);
            return device;
        }
        let since = *closed.entry(lease.id.clone()).or_insert(now.up);
        let earlier_boot = lease.suspicion(now) == Some(Suspicion::EarlierBoot);
        if earlier_boot && now.up < since.after(self.grace.expired.min(self.grace.boot)) {
            return DeviceUse::JustActive;
        }
        device
    }

    /// The device of a lease that was never granted one: whatever its snapshot, if there is one, has.
    async fn device_of(&self, id: &LeaseId) -> Result<Option<String>, String> {
        let mounts = match self.snapshots.mounts(&id.snapshot_key()).await {
            Ok(mounts) => mounts,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        // A snapshot that is no device has nothing that could be open.
        let Ok((path, _)) = block_device(&mounts) else { return Ok(None) };
        match self.kernel.inspect(path).await {
            Ok(device) => Ok(Some(device.dm_name)),
            Err(KernelError::Missing(_) | KernelError::NotThin { .. }) => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Has disks collected whose devices are closed; returns those that are still there, and why.
    async fn reclaim(&self, ids: &[LeaseId]) -> HashMap<LeaseId, String> {
        let mut clock = Laps::start();
        let (mut released, mut opened, mut left) = (Vec::new(), HashMap::new(), HashMap::new());
        let outcomes = abreast(ids.iter().map(|id| self.let_go(id)).collect()).await;
        for (id, outcome) in ids.iter().zip(outcomes) {
            match outcome {
                LetGo::Done => released.push(id),
                LetGo::Fenced(why) => drop(opened.insert(id.clone(), why.to_string())),
                LetGo::Failed(why) => drop(left.insert(id.clone(), why)),
            }
        }
        let let_go = clock.lap();
        let (due, overdue) = self.to_collect(&released);
        match self.collect(&due).await {
            Ok(()) => self.note_collected(&due),
            // It goes on. To remove and collect all of them once more would only make it longer.
            Err(error) if error.is_timeout() => {
                tracing::warn!(%error, "containerd is still collecting released disks");
                self.note_collected(&due);
            }
            Err(error) => tracing::warn!(%error, "containerd did not collect released disks; trying again"),
        }
        let collecting = clock.lap();
        if !overdue.is_empty()
            && let Err(error) = self.sweep().await
        {
            tracing::warn!(%error, "containerd did not look for snapshots that it has forgotten");
        }
        let mut at_leisure = HashMap::new();
        for (id, remains) in self.what_remains(&released).await {
            match remains {
                Remains::Device(name) if !overdue.contains(&id) => {
                    at_leisure.insert(id, format!("its device {name} is being removed"));
                }
                Remains::Device(name) => {
                    left.insert(id, format!("containerd has not removed the device {name} yet"));
                }
                Remains::Other(why) => {
                    // All of it once more.
                    self.collected().disks.remove(&id);
                    left.insert(id, why);
                }
            }
        }
        let looked = clock.lap();
        let is_gone = |id: &&&LeaseId| !left.contains_key(**id) && !at_leisure.contains_key(**id);
        let gone: Vec<LeaseId> = released.iter().filter(is_gone).map(|id| (*id).clone()).collect();
        self.metrics.reclaim_failures(left.len());
        for (id, why) in &left {
            // Once, however often it is tried.
            if self.waiting.read().unwrap_or_else(PoisonError::into_inner).get(id) != Some(why) {
                tracing::warn!(lease = %id, why, "a released disk is still there");
            }
        }
        left.extend(at_leisure);
        let count = gone.len();
        self.forget(gone).await;
        let forgot = clock.lap();
        tracing::debug!(
            count,
            of = ids.len(),
            ?let_go,
            ?collecting,
            ?looked,
            ?forgot,
            "released disks were reclaimed"
        );
        left.extend(opened);
        left
    }

    /// Removes a disk's snapshot and the containerd lease that holds it. Asks the kernel once more, right before: since the
    /// plan was made, hundreds of others may have gone.
    async fn let_go(&self, id: &LeaseId) -> LetGo {
        // Its snapshot has gone; what is left is the snapshotter's to do.
        if self.was_collected(id) {
            return LetGo::Done;
        }
        let Some(lease) = self.ledger.read(|book| book.get(id).cloned()) else { return LetGo::Done };
        // It takes its time, so the fence comes after it.
        let written = self.writes.of(&lease).await;
        if let Some(why) = self.device_use(&lease).await.hinders() {
            return LetGo::Fenced(why);
        }
        let key = id.snapshot_key();
        let gone = async {
            self.snapshots.remove(&key).await?;
            self.snapshots.delete_lease(&key, false).await
        };
        match gone.await {
            Ok(()) => {
                written.into_iter().for_each(|written| self.writes.learn(&lease, written));
                LetGo::Done
            }
            Err(error) => LetGo::Failed(error.to_string()),
        }
    }

    /// One garbage collection for all.
    async fn collect(&self, ids: &[&LeaseId]) -> Result<(), crate::containerd::CallError> {
        let Some(one) = ids.first() else { return Ok(()) };
        // Deleting a lease that is gone collects nothing, so there has to be one.
        self.snapshots.create_lease(&one.snapshot_key(), our_label(one)).await?;
        self.snapshots.delete_lease(&one.snapshot_key(), true).await
    }

    /// Those that containerd has not collected, and, if it is time to look at them again, those among them that it did a
    /// while ago.
    fn to_collect<'a>(&self, ids: &[&'a LeaseId]) -> (Vec<&'a LeaseId>, BTreeSet<LeaseId>) {
        let collected = self.collected();
        let sweeps = collected.swept.is_none_or(|swept| swept.elapsed() >= BETWEEN_SWEEPS);
        let is_late = |collected: &Instant| sweeps && collected.elapsed() >= AT_LEISURE;
        let due: Vec<&LeaseId> =
            ids.iter().copied().filter(|id| collected.disks.get(*id).is_none_or(is_late)).collect();
        let overdue =
            due.iter().filter(|id| collected.disks.contains_key(**id)).map(|id| (*id).clone()).collect();
        (due, overdue)
    }

    fn was_collected(&self, id: &LeaseId) -> bool {
        self.collected().disks.contains_key(id)
    }

    fn note_collected(&self, ids: &[&LeaseId]) {
        let now = Instant::now();
        self.collected().disks.extend(ids.iter().map(|id| ((*id).clone(), now)));
    }

    async fn sweep(&self) -> Result<(), crate::containerd::CallError> {
        self.collected().swept = Some(Instant::now());
        self.snapshots.sweep().await
    }

    fn collected(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left of disks, after a moment. A collection's success says nothing of that: containerd only logs what
    /// fails in it, and a snapshotter may remove devices at its leisure.
    async fn what_remains(&self, ids: &[&LeaseId]) -> HashMap<LeaseId, Remains> {
        let until = Instant::now() + A_MOMENT;
        let looks = abreast(ids.iter().map(|id| self.remains(id)).collect()).await;
        let mut remaining: HashMap<LeaseId, Remains> =
            ids.iter().zip(looks).filter_map(|(id, remains)| Some(((*id).clone(), remains?))).collect();
        while Instant::now() < until && remaining.values().any(|left| matches!(left, Remains::Device(_))) {
            tokio::time::sleep(POLL).await;
            let mut gone = Vec::new();
            for (id, left) in &remaining {
                if let Remains::Device(name) = left
                    && let Ok(None) = self.kernel.open_count(name).await
                {
                    gone.push(id.clone());
                }
            }
            remaining.retain(|id, _| !gone.contains(id));
        }
        remaining
    }

    async fn remains(&self, id: &LeaseId) -> Option<Remains> {
        match self.snapshots.mounts(&id.snapshot_key()).await {
            Err(error) if error.is_not_found() => {}
            Ok(_) => return Some(Remains::Other("containerd still has its snapshot".to_owned())),
            Err(error) => return Some(Remains::Other(error.to_string())),
        }
        let name =
            self.ledger.read(|book| book.get(id).and_then(Lease::own_device).map(|d| d.dm_name.clone()))?;
        match self.kernel.open_count(&name).await {
            Ok(None) => None,
            Ok(Some(_)) => Some(Remains::Device(name)),
            Err(error) => Some(Remains::Other(error.to_string())),
        }
    }

    async fn forget(&self, gone: Vec<LeaseId>) {
        if gone.is_empty() {
            return;
        }
        let count = gone.len();
        self.collected().disks.retain(|id, _| !gone.contains(id));
        let now = self.clock.now();
        let ages = self.ledger.read(|book| {
            let since = |id: &LeaseId| match book.get(id)?.state {
                State::Releasing { since, .. } => Some(now.wall.0.saturating_sub(since.0)),
                _ => None,
            };
            gone.iter().filter_map(since).collect::<Vec<_>>()
        });
        let shares = |id: &LeaseId| self.ledger.read(|book| book.get(id).is_some_and(|l| l.shares.is_some()));
        let shared = gone.iter().any(shares);
        match self.ledger.remove_all(gone, now).await {
            Ok(()) => {
                for age in ages {
                    self.metrics
                        .reclaimed_after(Duration::from_micros(u64::try_from(age).unwrap_or_default()));
                }
                if shared {
                    // Perhaps nobody has it any more.
                    self.wake.now();
                }
                self.metrics.reclaimed(count);
                tracing::info!(count, "released disks are gone");
            }
            // The next pass finds them gone and writes it down then.
            Err(error) => tracing::warn!(%error, "gone disks could not be struck off the ledger"),
        }
    }

    async fn end_pull(&self, lease: &str) -> bool {
        if let Err(error) = self.snapshots.delete_lease(lease, true).await {
            tracing::warn!(lease, %error, "the containerd lease of an unfinished pull cannot be deleted yet");
            return false;
        }
        match self.ledger.end_pull(lease.to_owned()).await {
            Ok(()) => {
                tracing::info!(lease, "an unfinished pull was cleared away");
                true
            }
            Err(error) => {
                tracing::warn!(lease, %error, "an unfinished pull could not be struck off the ledger");
                false
            }
        }
    }

    /// Says once what has been there without a record for two passes (in one, it may just be on its way).
    fn report(&self, foreign: BTreeSet<Foreign>) {
        let mut suspects = self.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        for what in foreign.intersection(&suspects.seen).filter(|what| !suspects.reported.contains(what)) {
            tracing::warn!(
                "{what} looks like ours and is in no record: left alone; delete it by hand if nobody needs it"
            );
        }
        let both: BTreeSet<Foreign> = foreign.intersection(&suspects.seen).cloned().collect();
        self.metrics.leaked(&both);
        suspects.reported = both;
        suspects.seen = foreign;
    }
}

/// All of them, some at a time, in their order.
async fn abreast<T>(all: Vec<impl Future<Output = T>>) -> Vec<T> {
    stream::iter(all).buffered(ABREAST).collect().await
}

pub(crate) fn our_label(id: &LeaseId) -> HashMap<String, String> {
    HashMap::from([(crate::containerd::LEASE_LABEL.to_owned(), id.to_string())])
}
