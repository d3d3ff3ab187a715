//! Makes spares, finds those of the run before, and gives up those that nobody wants.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cowshed_leases::{Failure, Lease, LeaseId, Mode, Seen, Spec, Tenant};
use tokio::sync::watch;
use tracing::Instrument as _;

use super::{Key, MakeError, Pins, Room, Settings, Spares};
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
/// How often the ledger is searched for spares that nobody knows of; and while there are some that cannot be told …
const SEARCH: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_secs(5);
/// … which are given up after this time.
const PATIENCE: Duration = Duration::from_secs(600);

/// Fills the shelves.
pub struct Refiller {
    /// What is on them.
    pub spares: Spares,
    /// Makes disks.
    pub acquirer: Arc<Acquirer>,
    /// What is counted.
    pub metrics: Metrics,
}

/// What there is of a spare.
enum Look {
    /// What was made.
    Right(Seen),
    /// Something else, or nothing.
    Wrong,
    /// What was made, and somebody has it open so many times: a VM that got it before the state directory was put back, or udev for
    /// a moment. It is neither handed out nor given up, for then it would go when it is closed.
    Open(u32),
    /// It cannot be told.
    Untold(Error),
}

/// What it remembers from one round to the next.
#[derive(Default)]
pub(super) struct Round {
    pins: Option<Instant>,
    search: Option<Instant>,
    /// Those of which it cannot be told whether they are well, and since when.
    untold: HashMap<LeaseId, Instant>,
}

impl Refiller {
    /// Until `stopped` changes.
    pub async fn run(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let mut round = Round::default();
        loop {
            self.round(&mut round).await;
            let woken = tokio::select! {
                () = self.spares.0.wake.notified() => true,
                () = tokio::time::sleep(TICK) => false,
                _ = stopped.wait_for(|stop| *stop) => return,
            };
            if woken {
                self.spares.quiet().await;
            }
        }
    }

    pub(super) async fn round(self: &Arc<Self>, round: &mut Round) {
        let is_due = |at: Option<Instant>, every: Duration| at.is_none_or(|at| at.elapsed() >= every);
        let every = if round.untold.is_empty() { SEARCH } else { AGAIN };
        if self.spares.is_to_look_again() || is_due(round.search, every) {
            self.adopt(round).await;
            round.search = Some(Instant::now());
        }
        if self.spares.0.settings.enabled && is_due(round.pins, PINS) {
            round.pins = Some(Instant::now());
            self.spares.pin(self.acquirer.pins().await);
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
        let pool = kernel.pool_lately().await;
        match &pool {
            Ok(usage) if admission.judge(&pool).is_err() && usage.mode == PoolMode::ReadWrite => Room::Short,
            Ok(usage) if !drain.is_on() && admission.hindrances.admit().is_ok() => {
                if is_fuller(usage, &self.spares.0.settings) { Room::Tight } else { Room::Ample }
            }
            // Nothing can be made now, and nothing is gained by giving any up.
            Ok(_) | Err(_) => Room::Tight,
        }
    }

    /// Spares of the run before, and such as got lost: those whose device is what it was, and that nobody has open, can be handed
    /// out.
    async fn adopt(&self, round: &mut Round) {
        let ledger = &self.acquirer.ledger;
        // Before the ledger: what is made meanwhile is known to its maker.
        let known = self.spares.known();
        let lost: Vec<Lease> = ledger.read(|book| {
            let lost = book.after(None).filter(|lease| lease.is_spare() && !known.contains(&lease.id));
            lost.cloned().collect()
        });
        let mut untold = HashMap::new();
        let (mut right, mut wrong) = (Vec::new(), Vec::new());
        for lease in lost {
            let key = lease.grant().and_then(|grant| grant.image_digest.parse::<Key>().ok());
            let (why, may_drop) = match (self.look_at(&lease).await, key) {
                (Look::Right(seen), Some(key)) if self.spares.are_kept() => {
                    right.push((lease.id, seen, key));
                    continue;
                }
                (Look::Right(_) | Look::Wrong, _) => {
                    wrong.push(lease.id);
                    continue;
                }
                (Look::Open(count), _) => (format!("its device is open {count} times"), false),
                (Look::Untold(error), _) => (error.to_string(), true),
            };
            let since = round.untold.get(&lease.id).copied().unwrap_or_else(|| {
                tracing::warn!(lease = %lease.id, why, "a spare cannot be handed out yet");
                Instant::now()
            });
            if may_drop && since.elapsed() >= PATIENCE {
                wrong.push(lease.id);
            } else {
                untold.insert(lease.id, since);
            }
        }
        round.untold = untold;
        self.take_over(right).await;
        if !wrong.is_empty() {
            tracing::warn!(
                count = wrong.len(),
                "spares are not what they were, or not wanted; they are given up"
            );
            self.drop_all(wrong, "lost").await;
        }
    }

    /// Puts those on the shelves that are spares still.
    async fn take_over(&self, right: Vec<(LeaseId, Seen, Key)>) {
        let Acquirer { ledger, clock, .. } = &*self.acquirer;
        if right.is_empty() {
            return;
        }
        let seen = right.iter().map(|(id, seen, _)| (id.clone(), seen.clone())).collect();
        match ledger.confirm_spares(seen, clock.now()).await {
            Ok(confirmed) => {
                let mut counts: HashMap<&Key, u32> = HashMap::new();
                for (id, _, key) in right.iter().filter(|(id, ..)| confirmed.contains(id)) {
                    *counts.entry(key).or_default() += 1;
                    self.spares.put(key, id.clone());
                }
                counts.into_iter().for_each(|(key, count)| self.spares.inherit(key, count));
            }
            Err(error) => tracing::warn!(%error, "spares of the run before cannot be taken over yet"),
        }
    }

    /// Whether its device is what was made, and nobody has it open.
    async fn look_at(&self, lease: &Lease) -> Look {
        let seen = match self.acquirer.seen(lease).await {
            Ok(seen) => seen,
            Err(error) if error.reason() == Reason::DeviceMismatch => return Look::Wrong,
            Err(error) => return Look::Untold(error),
        };
        match self.acquirer.kernel.open_count(&seen.root.dm_name).await {
            Ok(Some(0)) => Look::Right(seen),
            Ok(Some(count)) => Look::Open(count),
            Ok(None) => Look::Wrong,
            Err(error) => Look::Untold(Error::new(Reason::NotReady, error.to_string())),
        }
    }

    fn begin(self: &Arc<Self>, key: Key, image: Arc<ResolvedImage>) {
        let (this, counted) = (self.clone(), key.clone());
        let span = tracing::info_span!("spare", image = %image.name);
        let work = async move {
            let begun = Instant::now();
            let made = Made { spares: &this.spares, key: &key, outcome: Err(MakeError::Other) };
            let mut orphan = None;
            made.tell(match this.acquirer.make_spare(&image).await {
                Ok(lease) => {
                    orphan = Some(lease.clone());
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
            // Its image was removed meanwhile.
            if let Some(lease) = orphan.filter(|_| !this.spares.has_shelf(&key)) {
                this.drop_all(vec![lease], "surplus").await;
            }
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
    /// How many spares a pin of so many, which is there, keeps ready of the image, and why they are fewer.
    pub async fn spares_pinned(&self, image: &ImageRef, asked: u32) -> (u32, Option<String>) {
        let is_any = asked > 0 && self.spares.are_kept();
        let pins = if is_any { self.pins().await } else { Pins::default() };
        self.spares.0.settings.pinned(image, asked, &pins)
    }

    /// What the names with pinned spares mean now, to this host.
    async fn pins(&self) -> Pins {
        let named = self.ledger.read_all(|_, marks| marks.pinned_spares(&self.clock.now()));
        let mut pins = Pins::default();
        for (name, count) in named {
            let Ok(name) = ImageRef::parse(&name) else { continue };
            match self.images.local(&name, &Platform::host()).await {
                Ok(Some(image)) => pins.here.push((image, count)),
                // It is pulled, or not: pins hold on to names.
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(image = %name, %error, "what a pinned name means cannot be learnt now");
                    pins.unknown.push((name, count));
                }
            }
        }
        pins
    }

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
                // If that cannot be written, the reclaimer finds it without a maker.
                let _later = self.ledger.fail(id, Failure::from(&error), self.clock.now()).await;
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

fn is_fuller(usage: &PoolUsage, settings: &Settings) -> bool {
    let over =
        |used: u64, total: u64, most: u8| u128::from(used) * 100 > u128::from(total) * u128::from(most);
    over(usage.data_used, usage.data_total, settings.data_max_percent)
        || over(usage.metadata_used, usage.metadata_total, settings.metadata_max_percent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn none_are_made_of_a_pool_above_its_own_limit_or_the_marks() {
        let usage = |data_used, metadata_used| PoolUsage {
            name: String::new(),
            data_used,
            data_total: 100,
            metadata_used,
            metadata_total: 100,
            block_bytes: 1,
            mode: PoolMode::ReadWrite,
            zeroing: true,
        };
        let (with_marks, mut config) = (Config::default().spares(), Config::default());
        config.gc.enabled = false;
        let table = [(80, 75, false, false), (81, 0, true, true), (0, 76, true, false), (0, 81, true, true)];
        for (data, metadata, is_fuller_with_marks, is_fuller_without) in table {
            assert_eq!(
                is_fuller(&usage(data, metadata), &with_marks),
                is_fuller_with_marks,
                "{data} {metadata}"
            );
            assert_eq!(
                is_fuller(&usage(data, metadata), &config.spares()),
                is_fuller_without,
                "{data} {metadata}"
            );
        }
    }
}
