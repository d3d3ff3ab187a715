//! Makes room in the pool: takes stock, has `gc` plan, and does what the plan says.
//!
//! ```text
//!   fill rate, marks ─► watch ──┐                                              ┌─► grow (a seam)
//!   interval ─────────► watch ──┼─► stock ─► gc's plan (pure) ─► step by step ─┼─► spares ─► reclaimer
//!   refused Acquire ─► room ────┤     ▲                              │         └─► images, each looked at again
//!   RunGc ──────────────────────┘     └──── a step that came to nothing: anew ─┘
//! ```
//!
//! One run at a time. What a plan takes for unneeded is looked at once more right before it goes, in the turn of pins and
//! removals; a step that has become impossible is passed over, and what is left is planned again. What was removed counts as
//! coming back until the kernel shows it, so that nothing else goes for it meanwhile.

mod could;
mod grow;
mod holds;
mod inventory;
mod occupancy;
mod pace;
mod returning;
mod room;
mod run;
mod survey;
mod watch;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{
    Growth, Kind, Occupancy, Outcome, Plan, Policy, Takes, Target, Trigger, VolumeGroup, plan, takes,
};
use tokio::time::Instant;

pub use grow::{ByLvm, Grower, Hurry, NoGrower, Steps};
pub(crate) use occupancy::is_ours;
pub(crate) use room::deadline;
pub use room::{MakesRoom, NoRoom, admit};
pub use run::{Fate, Report};
pub use survey::Survey;

use crate::{
    admission::Admission,
    error::{Error, Reason, Result},
    keeping::Keeper,
    kernel::Devices,
    metrics::Metrics,
    tasks::Tasks,
};
use inventory::Sizes;
use occupancy::{Seen, Wanted};
use returning::Returning;

/// So long advice may take to learn what VMs have, where somebody waits for a refusal, and elsewhere.
const AT_ONCE: Duration = Duration::from_millis(30);
const AT_LEISURE: Duration = Duration::from_secs(2);

/// `[gc]`, as far as it is not policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether anything is done without being asked for.
    pub enabled: bool,
    /// How often it is looked what was not used for too long.
    pub interval: Duration,
    /// So long what a prefetch job has fetched is kept for who comes for it.
    pub prefetched_for: Duration,
}

/// Where the pool is going, as far as it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outlook {
    /// Of its data.
    pub data: Trend,
    /// Of its metadata.
    pub metadata: Trend,
    /// Bytes that are free in its volume group, if the pool grows by itself.
    pub group_free: Option<u64>,
}

/// How a kind of room is filling.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Trend {
    /// Bytes a second, negative while it empties; `None` before there were two looks.
    pub rate: Option<f64>,
    /// Until it is full; `None`: it does not fill.
    pub full_in: Option<Duration>,
}

/// What an image takes of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// What its names lead to.
    pub target: Target,
    /// All its names.
    pub names: Vec<String>,
    /// Whether one of them is pinned.
    pub pinned: bool,
    /// How much.
    pub takes: Takes,
}

/// What all images take, and what else there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllTaken {
    /// Of each image that is ours to remove, those that take most first.
    pub images: Vec<Taken>,
    /// Unpacked layers, of whatever image.
    pub layers: usize,
    /// Bytes that these have.
    pub layer_bytes: u64,
    /// Snapshots that are disks, of whatever client.
    pub disks: usize,
}

/// Who makes room.
pub struct Evictor {
    policy: Policy,
    settings: Settings,
    pub(crate) keeper: Arc<Keeper>,
    survey: Arc<dyn Survey>,
    kernel: Devices,
    admission: Admission,
    grower: Arc<dyn Grower>,
    metrics: Metrics,
    tasks: Tasks,
    sizes: Sizes,
    returning: Mutex<Returning>,
    /// Whose turn it is.
    turn: tokio::sync::Mutex<()>,
    room: room::State,
    could: could::State,
    outlook: Mutex<Outlook>,
    /// What times are measured from.
    origin: Instant,
}

/// What an evictor works on.
pub struct Parts {
    /// What stays.
    pub policy: Policy,
    /// When anything goes.
    pub settings: Settings,
    /// Removes images, and knows the ledger.
    pub keeper: Arc<Keeper>,
    /// containerd.
    pub survey: Arc<dyn Survey>,
    /// The pool.
    pub kernel: Devices,
    /// What new disks need.
    pub admission: Admission,
    /// Grows the pool.
    pub grower: Arc<dyn Grower>,
    /// What is counted.
    pub metrics: Metrics,
    /// Where runs run.
    pub tasks: Tasks,
}

impl Evictor {
    /// Of these.
    pub fn new(parts: Parts) -> Self {
        let Parts { mut policy, settings, keeper, survey, kernel, admission, grower, metrics, tasks } = parts;
        for kind in Kind::ALL {
            let limits = match kind {
                Kind::Data => &mut policy.data,
                Kind::Metadata => &mut policy.metadata,
            };
            limits.growth = grower.growth(kind);
        }
        Self {
            policy,
            settings,
            keeper,
            survey,
            kernel,
            admission,
            grower,
            metrics,
            tasks,
            sizes: Sizes::default(),
            returning: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            room: room::State::default(),
            could: could::State::default(),
            outlook: Mutex::default(),
            origin: Instant::now(),
        }
    }

    /// What a run would do now; changes nothing.
    ///
    /// # Errors
    /// If the pool does not write, or nobody tells what there is.
    pub async fn plan(&self, trigger: Trigger) -> Result<Plan> {
        self.plan_now(trigger, Growing::IfItCan).await.map(|(plan, _)| plan)
    }

    async fn plan_now(&self, trigger: Trigger, growing: Growing) -> Result<(Plan, Occupancy)> {
        let (seen, wanted) = self.take_stock(growing).await?;
        let (plan, occupancy, (mut seen, wanted)) = self.decide(trigger, seen, wanted).await?;
        if plan.outcome == Outcome::Met {
            return Ok((plan, occupancy));
        }
        // What would help depends on what VMs have, which nothing else does.
        let limit = if matches!(trigger, Trigger::Admission(_)) { AT_ONCE } else { AT_LEISURE };
        self.learn_of_vms(&mut seen, &wanted, limit).await;
        self.decide(trigger, seen, wanted).await.map(|(plan, occupancy, _)| (plan, occupancy))
    }

    /// Of many images that takes a while: in a thread of its own.
    async fn decide(
        &self,
        trigger: Trigger,
        seen: Seen,
        wanted: Wanted,
    ) -> Result<(Plan, Occupancy, (Seen, Wanted))> {
        let policy = self.policy.clone();
        let deciding = tokio::task::spawn_blocking(move || {
            let occupancy = occupancy::occupancy(&seen, &wanted);
            (plan(&occupancy, &policy, trigger, wanted.now.wall), occupancy, (seen, wanted))
        });
        deciding.await.map_err(|e| Error::new(Reason::InternalError, format!("planning what goes: {e}")))
    }

    /// How much each image takes.
    ///
    /// # Errors
    /// If the pool does not write, or nobody tells what there is.
    pub async fn taken(&self) -> Result<AllTaken> {
        let (seen, wanted) = self.take_stock(Growing::Not).await?;
        let summing = tokio::task::spawn_blocking(move || {
            let disks = seen.snapshots.iter().filter(|snapshot| !snapshot.committed).count();
            taken(&occupancy::occupancy(&seen, &wanted), disks)
        });
        summing.await.map_err(|e| Error::new(Reason::InternalError, format!("summing up images: {e}")))
    }

    /// What a snapshot has besides its parent's, in bytes; `None` if it has gone.
    pub(crate) async fn usage_of(&self, snapshot: &str) -> Result<Option<u64>> {
        self.survey.usage(snapshot).await
    }

    /// Where the pool is going.
    pub fn outlook(&self) -> Outlook {
        *self.outlook.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the volume group has, if the pool grows by itself and LVM2 has told. Does not wait for it.
    fn group_free(&self) -> Option<u64> {
        if self.grower.growth(Kind::Data) == Growth::Never
            && self.grower.growth(Kind::Metadata) == Growth::Never
        {
            return None;
        }
        self.grower.group_lately().map(|VolumeGroup { free, .. }| free.0)
    }

    fn returning(&self) -> MutexGuard<'_, Returning> {
        self.returning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }
}

fn taken(occupancy: &Occupancy, disks: usize) -> AllTaken {
    let image = |(target, takes): (Target, Takes)| {
        let image = occupancy.images.get(&target)?;
        let names = image.names.iter().map(|name| name.image.0.clone()).collect();
        let pinned = image.names.iter().any(|name| name.pin.is_some());
        Some(Taken { target, names, pinned, takes })
    };
    let mut images: Vec<Taken> = takes(occupancy).into_iter().filter_map(image).collect();
    images.sort_by_key(|image| std::cmp::Reverse((image.takes.alone.data, image.takes.layers.data)));
    let layer_bytes = occupancy.layers.values().map(|layer| layer.own.data.0).sum();
    AllTaken { images, layers: occupancy.layers.len(), layer_bytes, disks }
}

/// What has asked for a run, in metrics and logs.
pub(crate) fn name_of(trigger: Trigger) -> &'static str {
    match trigger {
        Trigger::Pressure => "pressure",
        Trigger::Admission(_) => "admission",
        Trigger::Schedule => "schedule",
    }
}

/// Whether the pool is to grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Growing {
    IfItCan,
    /// A step of this run has failed to, or nothing is planned.
    Not,
}

#[cfg(test)]
pub(crate) mod tests;
