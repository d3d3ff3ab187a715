//! Does what a plan says, step by step; decides nothing but whether a step is needed, and possible, still.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use cowshed_gc::evict::{
    Action, Kind, Manifest, Occupancy, Outcome, Plan, Pool, Reason as Why, Room, Step, Target, Trigger,
};
use cowshed_leases::{Lease, LeaseId, UnixMicros};
use tokio::{sync::oneshot, time::Instant};

use super::{Evictor, Growing, name_of, pace::SHORTEST};
use crate::{
    error::{Error, Reason, Result},
    keeping::Going,
};

/// So long the removal of images waits for the spares before them.
const SPARES_GO: Duration = Duration::from_secs(10);
/// So long an extension is waited for where somebody waits for room, or the pool is about to be full. Then room is made without it,
/// and it goes on.
const EXTENDS_SOON: Duration = Duration::from_secs(10);
/// The same where there is time.
const EXTENDS: Duration = Duration::from_secs(120);
/// What is left when steps came to nothing is planned so often.
const ROUNDS: usize = 3;

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was done.
    Done,
    /// Somebody has come meanwhile, or it had been done.
    Skipped(String),
    /// It could not be done.
    Failed(String),
    /// Enough had come back before it.
    NotNeeded,
}

impl Fate {
    /// Its stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Done => "DONE",
            Self::Skipped(_) => "SKIPPED",
            Self::Failed(_) => "FAILED",
            Self::NotNeeded => "NOT_NEEDED",
        }
    }

    /// Why, if there is something to say.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Skipped(why) | Self::Failed(why) => Some(why),
            Self::Done | Self::NotNeeded => None,
        }
    }
}

/// What a run has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How full the pool was.
    pub pool: Pool,
    /// What was lacking then.
    pub lacking: Room,
    /// What was to be done, in order, and what became of it.
    pub steps: Vec<(Step, Fate)>,
    /// What is lacking after it.
    pub outcome: Outcome,
}

impl Report {
    /// What comes back, at the least.
    pub fn frees(&self) -> Room {
        let is_freed = |(step, fate): &&(Step, Fate)| {
            *fate == Fate::Done && !matches!(step.action, Action::Extend { .. })
        };
        self.steps.iter().filter(is_freed).map(|(step, _)| step.gives).sum()
    }

    /// Whether anything was done.
    pub fn did_something(&self) -> bool {
        self.steps.iter().any(|(_, fate)| *fate == Fate::Done)
    }
}

impl Evictor {
    /// Makes room as far as the trigger says; see `RunGc` in the API. In a task of its own: what has begun is done to its end.
    ///
    /// # Errors
    /// If the pool does not write, or nobody tells what there is. What was done before is done.
    pub async fn run(self: &Arc<Self>, trigger: Trigger) -> Result<Report> {
        self.run_for(trigger, name_of(trigger)).await
    }

    /// The same, because somebody wants it.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_on_request(self: &Arc<Self>, trigger: Trigger) -> Result<Report> {
        self.run_for(trigger, "request").await
    }

    async fn run_for(self: &Arc<Self>, trigger: Trigger, why: &'static str) -> Result<Report> {
        let (done, outcome) = oneshot::channel();
        let this = self.clone();
        self.tasks.spawn(async move {
            let report = this.run_in_turn(trigger, why).await;
            // The caller may have gone.
            let _gone = done.send(report);
        });
        let stopping = || Error::new(Reason::Stopping, "the service is stopping; call again when it is up");
        outcome.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// `why` is for metrics and logs.
    pub(super) async fn run_in_turn(self: &Arc<Self>, trigger: Trigger, why: &'static str) -> Result<Report> {
        let _turn = self.turn.lock().await;
        // Layers could not go.
        let ran = match self.keeper.hindrances.admit() {
            Ok(()) => self.run_rounds(trigger).await,
            Err(error) => Err(error),
        };
        // What has come back by now is seen to have.
        let _seen = self.pool().await;
        self.metrics.gc_ran(why, &ran);
        match &ran {
            Ok(report) if !report.did_something() => {
                tracing::debug!(trigger = why, lacking = %report.lacking, "nothing was to be had");
            }
            Ok(report) => {
                tracing::info!(
                    trigger = why,
                    lacking = %report.lacking,
                    frees = %report.frees(),
                    met = report.outcome == Outcome::Met,
                    "made room"
                );
            }
            Err(error) => tracing::warn!(trigger = why, %error, "no room can be made"),
        }
        ran
    }

    async fn run_rounds(&self, trigger: Trigger) -> Result<Report> {
        let mut growing = Growing::IfItCan;
        let (mut plan, mut occupancy) = self.plan_now(trigger, growing).await?;
        let (pool, lacking, outcome) = (plan.pool, plan.lacking, plan.outcome.clone());
        let mut report = Report { pool, lacking, steps: Vec::new(), outcome };
        for round in 1..=ROUNDS {
            let fates = self.carry_out(&plan, &occupancy, trigger).await;
            if has_not_grown(&plan.steps, &fates) {
                growing = Growing::Not;
            }
            let is_short = fates.iter().any(|fate| fate.why().is_some());
            report.steps.extend(plan.steps.into_iter().zip(fates));
            if !is_short {
                break;
            }
            (plan, occupancy) = self.plan_now(trigger, growing).await?;
            report.outcome = match plan.outcome.clone() {
                // What it would do is not done.
                Outcome::Met if round == ROUNDS && !plan.lacking.is_none() => {
                    Outcome::Short { lacking: plan.lacking, helps: Vec::new() }
                }
                outcome => outcome,
            };
            if plan.steps.is_empty() {
                break;
            }
        }
        Ok(report)
    }

    /// What became of each step; of none after one that was to let the pool grow, and did not: what there was is not enough then.
    pub(super) async fn carry_out(&self, plan: &Plan, occupancy: &Occupancy, trigger: Trigger) -> Vec<Fate> {
        let mut fates = Vec::with_capacity(plan.steps.len());
        for step in &plan.steps {
            let Action::Extend { kind, to, .. } = step.action else { break };
            let extended = self.grower.extend(kind, to, Box::pin(self.hurry(trigger, plan.pool))).await;
            // Who cannot be asked is not asked for more.
            let is_deaf = extended.as_ref().is_err_and(|error| error.reason() != Reason::PoolFull);
            fates.push(extended.map_or_else(|error| Fate::Failed(error.to_string()), |()| Fate::Done));
            self.settle(step, fates.last());
            if is_deaf {
                break;
            }
        }
        if has_not_grown(&plan.steps, &fates) {
            return fates;
        }
        let rest = &plan.steps[fates.len()..];
        for (step, spare) in rest.iter().zip(self.drop_spares(rest).await) {
            let fate = match (&step.action, spare) {
                (_, Some(fate)) => fate,
                (Action::RemoveImage { target, names }, None) if !self.is_met(step, plan).await => {
                    let names = names.iter().map(|name| name.0.clone()).collect();
                    self.remove_image(target, names, occupancy).await
                }
                (_, None) => Fate::NotNeeded,
            };
            fates.push(fate);
            self.settle(step, fates.last());
        }
        fates
    }

    /// Until an extension is not to be waited for any more, for what goes without it would have stayed: that long nobody is refused and
    /// no write waits.
    async fn hurry(&self, trigger: Trigger, pool: Pool) {
        let begun = Instant::now();
        let mut presses = matches!(trigger, Trigger::Admission(_)) || self.is_emergency(&pool);
        while begun.elapsed() < if presses { EXTENDS_SOON } else { EXTENDS } {
            tokio::time::sleep(SHORTEST).await;
            presses |=
                self.is_waited_for() || self.pool().await.is_ok_and(|(pool, _)| self.is_emergency(&pool));
        }
    }

    /// Tells what became of a step; what it gives is on its way.
    fn settle(&self, step: &Step, fate: Option<&Fate>) {
        let Some(fate) = fate else { return };
        if *fate == Fate::Done && !matches!(step.action, Action::Extend { .. }) {
            let now = self.elapsed();
            self.returning().promise(step.gives, now);
        }
        tell(step, fate);
        self.metrics.gc_step(step, fate);
    }

    /// Whether what is in use by now is no more than it was to become. What was kept too long goes all the same.
    async fn is_met(&self, step: &Step, plan: &Plan) -> bool {
        if matches!(step.reason, Why::Expired { .. }) {
            return false;
        }
        let Ok((pool, _)) = self.pool().await else { return false };
        let (settled, lacked) = (pool.settled().used, plan.lacking);
        let enough = plan.pool.settled().used.less(lacked);
        Kind::ALL.into_iter().all(|kind| lacked.of(kind).0 == 0 || settled.of(kind) <= enough.of(kind))
    }

    /// Gives up all spares of these steps at once, and waits until they are gone, or it is clear that it takes longer. Of each
    /// step that is about a spare, what became of it.
    async fn drop_spares(&self, steps: &[Step]) -> Vec<Option<Fate>> {
        let id = |step: &Step| match &step.action {
            Action::DropSpare { id, .. } => Some(id.clone()),
            Action::Extend { .. } | Action::RemoveImage { .. } => None,
        };
        let wanted: Vec<LeaseId> = steps.iter().filter_map(id).collect();
        if wanted.is_empty() {
            return vec![None; steps.len()];
        }
        let (ledger, spares) = (&self.keeper.ledger, &self.keeper.spares);
        let leases: Vec<Lease> =
            ledger.read(|book| wanted.iter().filter_map(|id| book.get(id).cloned()).collect());
        let closed = self.closed(&leases).await;
        let in_hand = spares.in_hand();
        let going: Vec<LeaseId> =
            wanted.iter().filter(|id| closed.contains(*id) && !in_hand.contains(*id)).cloned().collect();
        drop(spares.clear(orphaned(steps).filter_map(|Manifest(digest)| digest.parse().ok())));
        spares.take_off(&going);
        let written = ledger.drop_spares(going.clone(), self.keeper.clock.now()).await;
        self.keeper.wake.now();
        let is_going = |id: &LeaseId| {
            going.contains(id) && ledger.read(|book| book.get(id).is_none_or(Lease::is_to_be_reclaimed))
        };
        let fate = |id: LeaseId| match &written {
            Err(error) => Fate::Failed(error.to_string()),
            Ok(_) if is_going(&id) => Fate::Done,
            Ok(_) => Fate::Skipped("somebody has it by now".to_owned()),
        };
        let fates: Vec<Option<Fate>> = steps.iter().map(|step| id(step).map(fate)).collect();
        self.metrics
            .spares_dropped(fates.iter().flatten().filter(|fate| **fate == Fate::Done).count(), "room");
        self.keeper.wait_until_gone(&going, SPARES_GO).await;
        fates
    }

    async fn remove_image(&self, target: &Target, names: BTreeSet<String>, occupancy: &Occupancy) -> Fate {
        let Some(image) = occupancy.images.get(target) else {
            return Fate::Skipped("it is not known any more".to_owned());
        };
        let is_others = |manifest: &&Manifest| {
            let others = occupancy.images.iter().filter(|(other, _)| *other != target);
            others.into_iter().any(|(_, other)| other.manifests.contains_key(*manifest))
        };
        let own = image.manifests.keys().filter(|manifest| !is_others(manifest));
        let going = Going {
            target: target.0.clone(),
            names,
            own: own.map(|Manifest(digest)| digest.clone()).collect(),
            last_use: image.last_use.unwrap_or(UnixMicros(i64::MIN)),
            prefetched_for: self.settings.prefetched_for,
        };
        match self.keeper.evict(&going).await {
            Ok(true) => Fate::Done,
            Ok(false) => Fate::Skipped("it is gone already".to_owned()),
            Err(error) => match error.reason() {
                Reason::ImageInUse | Reason::ImagePinned | Reason::NotReady => {
                    Fate::Skipped(error.to_string())
                }
                _ => Fate::Failed(error.to_string()),
            },
        }
    }
}

/// The manifests of which spares go because nobody could ask for them any more.
fn orphaned(steps: &[Step]) -> impl Iterator<Item = &Manifest> {
    steps.iter().filter_map(|step| match (&step.action, &step.reason) {
        (Action::DropSpare { manifest, .. }, Why::SpareOfRemoved | Why::SpareOfNothing) => Some(manifest),
        _ => None,
    })
}

/// Whether one of the steps so far was to let the pool grow, and did not.
fn has_not_grown(steps: &[Step], fates: &[Fate]) -> bool {
    let is =
        |(step, fate): (&Step, &Fate)| matches!(step.action, Action::Extend { .. }) && *fate != Fate::Done;
    steps.iter().zip(fates).any(is)
}

fn tell(step: &Step, fate: &Fate) {
    let (reason, outcome, why) = (step.reason.code(), fate.code(), fate.why().unwrap_or_default());
    match fate {
        Fate::Failed(_) => tracing::warn!(reason, outcome, why, "{step}"),
        Fate::Done | Fate::Skipped(_) => tracing::info!(reason, outcome, why, "{step}"),
        Fate::NotNeeded => tracing::debug!(reason, outcome, "{step}"),
    }
}
