//! Makes spares, finds those of the run before, and gives up those that nobody wants.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cowshed_leases::{Failure, Lease, LeaseId, Mode, Spec, State, Tenant};
use tokio::sync::watch;
use tracing::Instrument as _;

use super::{Key, MakeError, Room, Spares};
use crate::{
    acquire::Acquirer,
    error::{Error, Reason, Result},
    image::{ImageRef, Platform, ResolvedImage},
    kernel::{PoolMode, PoolUsage},
    metrics::Metrics,
    stages::Stages,
};

/// How often it is looked whether there are enough.
const TICK: Duration = Duration::from_secs(1);
/// How often what pinned names mean is looked up; the same after a failure.
const PINS: Duration = Duration::from_secs(5);
/// How often the ledger is searched for spares that nobody knows of.
const SEARCH: Duration = Duration::from_secs(30);

/// Fills the shelves.
pub struct Refiller {
    /// What is on them.
    pub spares: Spares,
    /// Makes disks.
    pub acquirer: Arc<Acquirer>,
    /// What is counted.
    pub metrics: Metrics,
}

/// What it remembers from one round to the next.
#[derive(Default)]
pub(super) struct Round {
    pins: Option<Instant>,
    search: Option<Instant>,
}

impl Refiller {
    /// Until `stopped` changes.
    pub async fn run(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let mut round = Round::default();
        loop {
            self.round(&mut round).await;
            tokio::select! {
                () = self.spares.0.wake.notified() => {}
                () = tokio::time::sleep(TICK) => {}
                _ = stopped.wait_for(|stop| *stop) => return,
            }
        }
    }

    pub(super) async fn round(self: &Arc<Self>, round: &mut Round) {
        let is_due = |at: Option<Instant>, every: Duration| at.is_none_or(|at| at.elapsed() >= every);
        if is_due(round.search, SEARCH) {
            // What cannot be told yet is looked at again in the next round.
            round.search = self.adopt().await.then(Instant::now);
        }
        if self.spares.0.settings.enabled && is_due(round.pins, PINS) {
            round.pins = Some(Instant::now());
            self.look_at_pins().await;
        }
        let plan = self.spares.plan(self.room().await, self.at_once());
        if !plan.drop.is_empty() {
            self.drop_all(plan.drop, "surplus").await;
        }
        for (key, image) in plan.make {
            self.begin(key, image);
        }
        self.metrics.spares(self.spares.total());
    }

    /// One at a time while launchers' own disks are being made.
    fn at_once(&self) -> u32 {
        if self.acquirer.are_disks_being_made() { 1 } else { self.spares.0.settings.concurrency }
    }

    async fn room(&self) -> Room {
        let Acquirer { kernel, admission, drain, .. } = &*self.acquirer;
        let pool = kernel.pool().await;
        match &pool {
            Ok(usage) if admission.judge(&pool).is_err() && usage.mode == PoolMode::ReadWrite => Room::Short,
            Ok(usage) if !drain.is_on() && admission.hindrances.admit().is_ok() => {
                if is_fuller(usage, self.spares.0.settings.pool_max_percent) {
                    Room::Tight
                } else {
                    Room::Ample
                }
            }
            // Nothing can be made now, and nothing is gained by giving any up.
            Ok(_) | Err(_) => Room::Tight,
        }
    }

    /// Spares of the run before, and such as got lost: those whose device is what it was can be handed out. Returns whether
    /// all could be told.
    async fn adopt(&self) -> bool {
        let Acquirer { ledger, clock, .. } = &*self.acquirer;
        let lost: Vec<Lease> = ledger.read(|book| {
            let is_spare = |lease: &&Lease| lease.vm.is_spare() && matches!(lease.state, State::Granted(_));
            let lost = book.after(None).filter(is_spare).filter(|lease| !self.spares.knows(&lease.id));
            lost.cloned().collect()
        });
        let mut told = true;
        let mut wrong = Vec::new();
        for lease in lost {
            let key = lease.grant().and_then(|grant| grant.image_digest.parse::<Key>().ok());
            match (self.acquirer.seen(&lease).await, key) {
                (Ok(seen), Some(key)) => {
                    let renewed = ledger.renew(lease.id.clone(), None, Some(seen), clock.now()).await;
                    match renewed {
                        Ok(_) => self.spares.put(&key, lease.id),
                        Err(_) => told = false,
                    }
                }
                (Err(error), _) if error.reason() != Reason::DeviceMismatch => {
                    tracing::debug!(lease = %lease.id, %error, "whether a spare is well cannot be told yet");
                    told = false;
                }
                (_, _) => wrong.push(lease.id),
            }
        }
        if !wrong.is_empty() {
            tracing::warn!(count = wrong.len(), "spares are not what they were; they are given up");
            self.drop_all(wrong, "lost").await;
        }
        told
    }

    /// What the names with pinned spares mean now.
    async fn look_at_pins(&self) {
        let Acquirer { ledger, images, clock, .. } = &*self.acquirer;
        let pins = ledger.read_all(|_, marks| marks.pinned_spares(&clock.now()));
        let mut pinned = Vec::with_capacity(pins.len());
        for (name, count) in pins {
            let Ok(image) = ImageRef::parse(&name) else { continue };
            match images.local(&image, &Platform::host()).await {
                Ok(Some(image)) => pinned.push((image, count)),
                // It is pulled, or not: pins hold on to names.
                Ok(None) => {}
                // Those that there are stay wanted.
                Err(error) => {
                    tracing::debug!(%name, %error, "what a pinned name means cannot be learnt now");
                    return;
                }
            }
        }
        self.spares.pin(pinned);
    }

    fn begin(self: &Arc<Self>, key: Key, image: Arc<ResolvedImage>) {
        let (this, counted) = (self.clone(), key.clone());
        let span = tracing::info_span!("spare", image = %image.name);
        let work = async move {
            let begun = Instant::now();
            let made = Made { spares: &this.spares, key: &key, outcome: Err(MakeError::Other) };
            made.tell(match this.acquirer.make_spare(&image).await {
                Ok(lease) => {
                    let took = begun.elapsed();
                    this.metrics.spare_made(took);
                    tracing::debug!(%lease, ?took, "a spare is ready");
                    Ok((lease, took))
                }
                Err(error) if error.reason() == Reason::ImageNotPresent => Err(MakeError::NoImage),
                Err(error) => {
                    tracing::warn!(reason = error.reason().as_str(), %error, "a spare cannot be made");
                    Err(MakeError::Other)
                }
            });
        };
        if !self.acquirer.tasks.spawn(work.instrument(span)) {
            // The service is stopping.
            self.spares.made(&counted, Err(MakeError::Other));
        }
    }

    async fn drop_all(&self, leases: Vec<LeaseId>, why: &'static str) {
        let Acquirer { ledger, clock, wake, .. } = &*self.acquirer;
        match ledger.drop_spares(leases, clock.now()).await {
            Ok(count) => {
                self.metrics.spares_dropped(count, why);
                wake.now();
            }
            // They are found again.
            Err(error) => tracing::warn!(%error, "spares that nobody wants stay"),
        }
    }
}

/// Tells the shelf what has become of a spare, also if its making panics.
struct Made<'a> {
    spares: &'a Spares,
    key: &'a Key,
    outcome: Result<(LeaseId, Duration), MakeError>,
}

impl Made<'_> {
    fn tell(mut self, outcome: Result<(LeaseId, Duration), MakeError>) {
        self.outcome = outcome;
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        self.spares.made(self.key, std::mem::replace(&mut self.outcome, Err(MakeError::Other)));
    }
}

impl Acquirer {
    /// Makes a spare of the image, from intent to confirmation.
    async fn make_spare(self: &Arc<Self>, image: &ResolvedImage) -> Result<LeaseId> {
        let id = LeaseId::from_random(uuid::Uuid::new_v4().as_u128());
        let maker = self.making.begin(id.clone());
        let spec = Spec {
            image: image.name.to_string(),
            platform: image.platform.to_string(),
            tenant: Tenant::default(),
            mode: Mode::CopyOnWrite,
            scratch: None,
        };
        let lease = self.ledger.intend_spare(id.clone(), spec, self.clock.now()).await?;
        let made = async {
            let grant = self.image_disk(None, &lease, image.clone(), &mut Stages::start()).await?;
            self.ledger.grant(id.clone(), grant, self.clock.now()).await
        };
        match made.await {
            Ok(granted) => Ok(granted.id),
            Err(error) => {
                let failure =
                    Failure { reason: error.reason().as_str().to_owned(), message: error.to_string() };
                // If that cannot be written, the reclaimer finds it without a maker.
                let _later = self.ledger.fail(id, failure, self.clock.now()).await;
                drop(maker);
                self.wake.now();
                Err(error)
            }
        }
    }
}

/// An image that a spare was to be made of has gone.
pub(crate) fn image_gone(image: &ResolvedImage) -> Error {
    let message = format!("image {} is not there any more", image.name);
    Error::new(Reason::ImageNotPresent, message).with("image", &image.name)
}

fn is_fuller(usage: &PoolUsage, most_percent: u8) -> bool {
    let over = |used: u64, total: u64| u128::from(used) * 100 > u128::from(total) * u128::from(most_percent);
    over(usage.data_used, usage.data_total) || over(usage.metadata_used, usage.metadata_total)
}
