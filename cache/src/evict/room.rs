//! Room for those who would be refused: one run for all of them, then each is admitted or told what is lacking.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{Bytes, Kind, Outcome, Room, Trigger};
use futures_util::{FutureExt as _, future::Shared};
use tokio::{sync::oneshot, time::Instant};

use super::{Evictor, Report, inventory::total, name_of, pace::LONGEST};
use crate::{
    admission::Admission,
    error::{Error, Reason, Result},
    kernel::{Devices, PoolUsage},
};

/// What was removed is waited for so long.
const COMES_WITHIN: Duration = Duration::from_secs(20);
/// If for so long none of it comes, others have taken it, and it is not waited for any more.
const STANDS_STILL: Duration = Duration::from_secs(4);
const POLL: Duration = Duration::from_millis(50);
/// So long it counts that nothing was to be had.
const BARREN: Duration = Duration::from_secs(1);
/// So long the next ones are told so at once even then, while it is looked at anew behind the answer: a full pool refuses
/// without delay. The watch, which runs in vain as well, does so once in `LONGEST`.
const REMEMBERED: Duration = LONGEST.saturating_add(Duration::from_secs(15));
/// Before its caller is gone he is told that it takes longer: so long before, and at least so much of his time.
const MARGIN: Duration = Duration::from_millis(200);
/// More than is lacking is made, so that not each disk has to wait for some: this part of the pool.
const PART: u64 = 100;
/// So many things that would help are named to somebody who is refused.
const NAMED: usize = 3;

/// Makes room where there is none.
#[async_trait::async_trait]
pub trait MakesRoom: Send + Sync {
    /// Makes some, so that new disks are admitted and so much data is free beside the reserve, or refuses as `refused` does, with
    /// what would help; by `until`, if the caller does not wait for longer.
    ///
    /// # Errors
    /// If there is still none.
    async fn make(&self, refused: Error, needed: Bytes, until: Option<Instant>) -> Result<()>;
}

/// Of a service that removes nothing by itself.
pub struct NoRoom;

#[async_trait::async_trait]
impl MakesRoom for NoRoom {
    async fn make(&self, refused: Error, _needed: Bytes, _until: Option<Instant>) -> Result<()> {
        Err(refused)
    }
}

/// Admits another disk; if the pool is full, room is made first.
///
/// # Errors
/// As [`Admission::admit`].
pub async fn admit(
    admission: &Admission,
    kernel: &Devices,
    room: &dyn MakesRoom,
    until: Option<Instant>,
) -> Result<()> {
    match admission.admit(kernel).await {
        Err(full) if full.reason() == Reason::PoolFull => {
            room.make(full, Bytes(0), until).await?;
            admission.hindrances.admit()
        }
        admitted => admitted,
    }
}

type Flight = Shared<oneshot::Receiver<Result<(), Vain>>>;

/// Why there is none: the same for all who wait for it, each of whom is refused by words of his own.
#[derive(Clone, Debug)]
enum Vain {
    /// What a run has come to.
    Ran(Outcome),
    /// There was none.
    Failed(Error),
}

impl Vain {
    /// The refusal, with what is lacking, and what would help.
    fn refuse(&self, refused: Error) -> Error {
        match self {
            Self::Ran(outcome) => with_advice(refused, outcome),
            Self::Failed(error) => refused.and(format!("and no room can be made: {error}")),
        }
    }
}

/// The run under way for those who would be refused, and what the last one came to.
#[derive(Default)]
pub(super) struct State(Mutex<Latest>);

#[derive(Default)]
struct Latest {
    /// The run under way, and what it is to make.
    flight: Option<(Flight, Bytes)>,
    /// How many were begun.
    begun: u64,
    /// When one came to nothing, for what was needed then, and why.
    barren: Option<(Instant, Bytes, Vain)>,
}

#[async_trait::async_trait]
impl MakesRoom for Arc<Evictor> {
    async fn make(&self, refused: Error, needed: Bytes, until: Option<Instant>) -> Result<()> {
        let flight = match self.join(needed) {
            Ok(flight) => flight,
            Err((barren, None)) => return Err(barren.refuse(refused)),
            Err((barren, Some(after))) => return Err(barren.refuse(refused).retry_after(after)),
        };
        let landed = match until {
            Some(until) => match tokio::time::timeout_at(until, flight).await {
                Ok(landed) => landed,
                Err(_) => return Err(later(&refused)),
            },
            None => flight.await,
        };
        match landed {
            Ok(made) => made.map_err(|vain| vain.refuse(refused)),
            // The runtime is gone.
            Err(_) => Err(refused),
        }
    }
}

fn later(refused: &Error) -> Error {
    let more = "room is being made, which takes longer than this call may: repeat it";
    refused.clone().and(more).retry_after(COMES_WITHIN / 4)
}

/// When a caller who waits for so long is told at the latest.
pub(crate) fn deadline(patience: Duration) -> Instant {
    Instant::now() + patience.saturating_sub(MARGIN.max(patience / 10).min(patience / 2))
}

impl Evictor {
    /// What a run in an emergency has come to is known to the first who would be refused after it: a pool that fills up while
    /// nothing can be removed refuses without delay.
    pub(super) fn remember(&self, report: &Report) {
        let mut latest = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest.barren = match &report.outcome {
            short @ Outcome::Short { .. } if !report.did_something() => {
                Some((Instant::now(), Bytes(0), Vain::Ran(short.clone())))
            }
            _ => None,
        };
    }

    /// Whether somebody waits for room.
    pub(super) fn is_waited_for(&self) -> bool {
        let latest = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest.flight.as_ref().is_some_and(|(flight, _)| flight.peek().is_none())
    }

    /// Joins the run for those who would be refused, or begins it. If there was nothing to be had lately that is the answer,
    /// whatever comes of it; then also after what time to ask again, if it is being looked at anew.
    fn join(self: &Arc<Self>, needed: Bytes) -> Result<Flight, (Vain, Option<Duration>)> {
        let mut latest = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        let barren = latest.barren.clone().filter(|(at, of, _)| at.elapsed() < REMEMBERED && needed >= *of);
        if let Some((at, _, vain)) = &barren
            && at.elapsed() < BARREN
        {
            return Err((vain.clone(), None));
        }
        // One that has crashed has arrived with nothing; and one that is to make more may come to nothing where this would not.
        let joined =
            latest.flight.as_ref().filter(|(flight, makes)| flight.peek().is_none() && *makes <= needed);
        let flight = match joined {
            Some((flight, _)) => flight.clone(),
            None => self.begin(&mut latest, needed),
        };
        barren.map_or(Ok(flight), |(_, _, vain)| Err((vain, Some(BARREN))))
    }

    fn begin(self: &Arc<Self>, latest: &mut Latest, needed: Bytes) -> Flight {
        let (sender, arrival) = oneshot::channel();
        let flight = arrival.shared();
        let this = self.clone();
        latest.begun += 1;
        let number = latest.begun;
        let begun = self.tasks.spawn(async move {
            let begun = Instant::now();
            let made = this.make_room(needed).await;
            if made.is_ok() {
                this.could.took(begun.elapsed());
            }
            let mut latest = this.room.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A later one may have been begun for less.
            if latest.begun == number {
                latest.flight = None;
            }
            latest.barren = made.as_ref().err().map(|vain| (Instant::now(), needed, vain.clone()));
            drop(latest);
            let _nobody_waits = sender.send(made);
        });
        // Otherwise the service is stopping.
        latest.flight = begun.then(|| (flight.clone(), needed));
        flight
    }

    async fn make_room(self: &Arc<Self>, needed: Bytes) -> Result<(), Vain> {
        let ample = match self.kernel.pool().await {
            Ok(usage) => {
                let total = total(&usage);
                let part = Room::each(|kind| Bytes(total.of(kind).0 / PART));
                part.plus(Room::only(Kind::Data, needed))
            }
            Err(_) => Room::only(Kind::Data, needed),
        };
        if needed.0 > 0 {
            // A promise is no reason to remove what would not be enough.
            let planned = self.plan(Trigger::Admission(Room::only(Kind::Data, needed))).await;
            match planned.map(|plan| plan.outcome) {
                Ok(Outcome::Met) => {}
                Ok(short) => return Err(Vain::Ran(short)),
                Err(error) => return Err(Vain::Failed(error)),
            }
        }
        let trigger = Trigger::Admission(ample);
        let ran = self.run_in_turn(trigger, name_of(trigger)).await;
        if self.has_come(needed).await {
            return Ok(());
        }
        Err(ran.map_or_else(Vain::Failed, |report| Vain::Ran(report.outcome)))
    }

    /// Waits until there is enough, or it is clear that it does not come.
    async fn has_come(&self, needed: Bytes) -> bool {
        let is_enough = |usage: PoolUsage| {
            let is_free = self.admission.to_promise(&usage) >= needed;
            is_free && self.admission.judge(&Ok(usage)).is_ok()
        };
        let limit = Instant::now() + COMES_WITHIN;
        let (mut least, mut came) = (u64::MAX, Instant::now());
        while let Ok((_, usage)) = self.pool().await {
            let used = usage.data_used.saturating_add(usage.metadata_used);
            if used < least {
                (least, came) = (used, Instant::now());
            }
            let returning = self.returning().outstanding();
            let settled = PoolUsage {
                data_used: usage.data_used.saturating_sub(returning.data.0),
                metadata_used: usage.metadata_used.saturating_sub(returning.metadata.0),
                ..usage.clone()
            };
            if is_enough(usage) {
                return true;
            }
            let is_coming = came.elapsed() < STANDS_STILL && is_enough(settled);
            if !is_coming || Instant::now() >= limit {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        false
    }
}

/// Says what is lacking, and what would help.
fn with_advice(refused: Error, outcome: &Outcome) -> Error {
    let Outcome::Short { lacking, helps } = outcome else {
        let more = format!("enough was removed, and has not come back within {COMES_WITHIN:?}: repeat it");
        return refused.and(more).retry_after(COMES_WITHIN / 4);
    };
    let helps: Vec<String> = helps.iter().take(NAMED).map(ToString::to_string).collect();
    let helps = if helps.is_empty() { "nothing that is known here".to_owned() } else { helps.join("; ") };
    let more = format!("nothing more can be removed, lacking: {lacking}; what would help: {helps}");
    refused.and(more).with("lacking", lacking).with("helps", helps)
}
