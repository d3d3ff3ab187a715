//! Room for those who would be refused: one run for all of them, then each is admitted or told what is lacking.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{Bytes, Outcome, Room, Trigger};
use futures_util::{FutureExt as _, future::Shared};
use tokio::{sync::oneshot, time::Instant};

use super::{Evictor, inventory::total, run::Report};
use crate::{
    admission::Admission,
    error::{Error, Reason, Result},
    kernel::{Devices, PoolUsage},
};

/// What was removed is waited for so long.
const COMES_WITHIN: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);
/// So long it counts that nothing was to be had.
const BARREN: Duration = Duration::from_secs(1);
/// So long the next ones are told so at once even then, while it is looked at anew behind the answer: a full pool refuses
/// without delay.
const REMEMBERED: Duration = Duration::from_secs(15);
/// Before its caller is gone he is told that it takes longer: so long before, and at least so much of his time.
const MARGIN: Duration = Duration::from_millis(200);
/// More than is lacking is made, so that not each disk has to wait for some: this part of the pool.
const PART: u64 = 100;
/// So many things that would help are named to somebody who is refused.
const NAMED: usize = 3;

/// Makes room where there is none.
#[async_trait::async_trait]
pub trait MakesRoom: Send + Sync {
    /// Makes some, or refuses as `refused` does, with what would help; by `until`, if the caller does not wait for longer.
    ///
    /// # Errors
    /// If there is still none.
    async fn make(&self, refused: Error, until: Option<Instant>) -> Result<()>;
}

/// Of a service that removes nothing by itself.
pub struct NoRoom;

#[async_trait::async_trait]
impl MakesRoom for NoRoom {
    async fn make(&self, refused: Error, _until: Option<Instant>) -> Result<()> {
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
            room.make(full, until).await?;
            admission.hindrances.admit()
        }
        admitted => admitted,
    }
}

type Flight = Shared<oneshot::Receiver<Result<()>>>;

/// The run under way for those who would be refused, and what the last one came to.
#[derive(Default)]
pub(super) struct State(Mutex<Latest>);

#[derive(Default)]
struct Latest {
    flight: Option<Flight>,
    barren: Option<(Instant, Error)>,
}

#[async_trait::async_trait]
impl MakesRoom for Arc<Evictor> {
    async fn make(&self, refused: Error, until: Option<Instant>) -> Result<()> {
        let flight = match self.join(&refused) {
            Ok(flight) => flight,
            Err(barren) => return Err(barren),
        };
        let landed = match until {
            Some(until) => match tokio::time::timeout_at(until, flight).await {
                Ok(landed) => landed,
                Err(_) => return Err(later(&refused)),
            },
            None => flight.await,
        };
        // The runtime is gone otherwise.
        landed.unwrap_or(Err(refused))
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
    /// Joins the run for those who would be refused, or begins it. If there was nothing to be had lately that is the answer,
    /// whatever comes of it.
    fn join(self: &Arc<Self>, refused: &Error) -> Result<Flight> {
        let mut latest = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        let barren = latest.barren.clone().filter(|(at, _)| at.elapsed() < REMEMBERED);
        if let Some((at, error)) = &barren
            && at.elapsed() < BARREN
        {
            return Err(error.clone());
        }
        // One that has crashed has arrived with nothing.
        let flight = match latest.flight.as_ref().filter(|flight| flight.peek().is_none()) {
            Some(flight) => flight.clone(),
            None => self.begin(&mut latest, refused),
        };
        barren.map_or(Ok(flight), |(_, error)| Err(error.retry_after(BARREN)))
    }

    fn begin(self: &Arc<Self>, latest: &mut Latest, refused: &Error) -> Flight {
        let (sender, arrival) = oneshot::channel();
        let flight = arrival.shared();
        let (this, refused) = (self.clone(), refused.clone());
        let begun = self.tasks.spawn(async move {
            let made = this.make_room(refused).await;
            let mut latest = this.room.0.lock().unwrap_or_else(PoisonError::into_inner);
            latest.flight = None;
            latest.barren = made.as_ref().err().map(|error| (Instant::now(), error.clone()));
            drop(latest);
            let _nobody_waits = sender.send(made);
        });
        // Otherwise the service is stopping.
        latest.flight = begun.then(|| flight.clone());
        flight
    }

    async fn make_room(self: &Arc<Self>, refused: Error) -> Result<()> {
        let ample = match self.kernel.pool().await {
            Ok(usage) => {
                let total = total(&usage);
                Room::each(|kind| Bytes(total.of(kind).0 / PART))
            }
            Err(_) => Room::NONE,
        };
        let ran = self.run_in_turn(Trigger::Admission(ample)).await;
        let limit = Instant::now() + COMES_WITHIN;
        let refused = loop {
            let (judged, is_coming) = match self.pool().await {
                Ok((pool, usage)) => {
                    let settled = pool.settled().used;
                    let (data_used, metadata_used) = (settled.data.0, settled.metadata.0);
                    let settled = PoolUsage { data_used, metadata_used, ..usage.clone() };
                    (self.admission.judge(&Ok(usage)), self.admission.judge(&Ok(settled)).is_ok())
                }
                Err(error) => (Err(error), false),
            };
            let Err(still) = judged else { return Ok(()) };
            if still.reason() != Reason::PoolFull || !is_coming || Instant::now() >= limit {
                break if still.reason() == Reason::PoolFull { still } else { refused };
            }
            tokio::time::sleep(POLL).await;
        };
        Err(match ran {
            Ok(report) => with_advice(refused, &report),
            Err(error) => refused.and(format!("and no room can be made: {error}")),
        })
    }
}

/// Says what is lacking, and what would help.
fn with_advice(refused: Error, report: &Report) -> Error {
    let Outcome::Short { lacking, helps } = &report.outcome else {
        let more = format!("enough was removed, and has not come back within {COMES_WITHIN:?}: repeat it");
        return refused.and(more).retry_after(COMES_WITHIN / 4);
    };
    let helps: Vec<String> = helps.iter().take(NAMED).map(ToString::to_string).collect();
    let helps = if helps.is_empty() { "nothing that is known here".to_owned() } else { helps.join("; ") };
    let more = format!("nothing more can be removed, lacking: {lacking}; what would help: {helps}");
    refused.and(more).with("lacking", lacking).with("helps", helps)
}
