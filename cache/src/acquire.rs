//! Acquire: from a wish to a granted, verified disk.
//!
//! ```text
//!  parse ─► held already? ─► admit ─► image (hit | pull) ─► intent ─► containerd lease ─► Prepare ─► verify ─► confirm
//!               │                                              └── any failure from here on: mark, reclaim ──┘
//!               └─► the same lease again
//! ```
//!
//! The work runs in a task of its own: a caller that goes away stops nothing, and one that asks again meanwhile joins.
//! A release ends that: it gives up what is under way, whatever it has come to.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cowshed_leases::{
    Acquisition, Ask, DeviceIdentity, Failure, Grant, Lease, LeaseId, Process, Release, Releasing, RequestId,
    Spec, Ttl, VmId,
};
use tracing::Instrument as _;

use crate::{
    admission::Admission,
    clock::Clock,
    containerd::{CallError, LEASE_LABEL, Mount, Snapshots},
    drain::Drain,
    error::{Error, Reason, Result},
    flights::{Arrival, Flights, GivenUp},
    image::{Cache, ImageCache, ImageRef, Platform, ResolvedImage},
    kernel::{Devices, KernelError},
    ledger::Ledger,
    making::{Maker, Making},
    reclaim::Wake,
    stages::{Stage, Stages},
    tasks::Tasks,
};

/// How long a device node may take to appear after its snapshot was made (udev makes it).
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// How long containerd is waited for when the kernel can tell as well.
const CONTAINERD_WAIT: Duration = Duration::from_secs(5);

/// What a launcher wants, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// For which VM.
    pub vm: VmId,
    /// Of which image.
    pub image: ImageRef,
    /// For which platform.
    pub platform: Platform,
    /// For how long.
    pub ttl: Option<Ttl>,
    /// Whether a Suspect lease's disk is not wanted any more.
    pub fresh: bool,
    /// The client's name for it.
    pub request: Option<RequestId>,
}

impl Wish {
    fn ask(&self) -> Ask {
        Ask {
            vm: self.vm.clone(),
            spec: Spec { image: self.image.to_string(), platform: self.platform.to_string() },
            ttl: self.ttl,
            fresh: self.fresh,
            request: self.request.clone(),
        }
    }

    /// Wishes of one key share a flight. What else they ask for is added to what it comes to.
    fn key(&self) -> (VmId, String) {
        (self.vm.clone(), format!("{} {} {}", self.image, self.platform, self.fresh))
    }
}

/// A wish come true.
#[derive(Clone, Debug)]
pub struct Acquired {
    /// The lease, granted.
    pub lease: Lease,
    /// Whether the image was there.
    pub cache: Cache,
    /// Where the time went.
    pub stages: Stages,
    /// Whether the VM held the lease before.
    pub existing: bool,
}

type Outcome = Result<Arc<Acquired>, Refusal>;

/// A wish that did not come true.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    error: Error,
    /// The lease that has failed by it, until its caller was told.
    failed: Option<LeaseId>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error, failed: None }
    }
}

/// Whether a caller's flight is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    Own,
    Joined,
}

/// Grants disks.
pub struct Acquirer {
    /// Who holds what.
    pub ledger: Ledger,
    /// The images.
    pub images: Arc<dyn ImageCache>,
    /// The snapshots.
    pub snapshots: Arc<dyn Snapshots>,
    /// The devices.
    pub kernel: Devices,
    /// Whether there is room.
    pub admission: Admission,
    /// Whether anything new is taken on.
    pub drain: Drain,
    /// To be woken when there is something to clear away.
    pub wake: Wake,
    /// What is being made, for the reclaimer.
    pub making: Making,
    /// What time it is.
    pub clock: Clock,
    /// Where the work runs.
    pub tasks: Tasks,
    /// Work under way, so that equal wishes share it.
    pub(crate) flights: Flights<Outcome>,
}

impl Acquirer {
    /// Grants the wish, or says why not; see `Acquire` in the API.
    pub async fn acquire(self: &Arc<Self>, wish: Wish) -> Result<Arc<Acquired>> {
        let stopped = || Error::new(Reason::Stopping, "the service is stopping; acquire again when it is up");
        let (arrival, seat) = self.join(wish.clone());
        match arrival.await.map_err(|_| stopped())? {
            Ok(acquired) if seat == Seat::Joined => self.add(&wish, acquired).await,
            Ok(acquired) => Ok(acquired),
            Err(Refusal { error, failed }) => {
                // This caller is here to be told.
                if let Some(id) = failed
                    && let Err(second) = self.ledger.see(id.clone(), self.clock.now()).await
                {
                    tracing::warn!(lease = %id, error = %second, "that its failure was told cannot be written down");
                }
                Err(error)
            }
        }
    }

    /// Adds to what an equal wish has come to what this one asks for besides.
    async fn add(&self, wish: &Wish, acquired: Arc<Acquired>) -> Result<Arc<Acquired>> {
        let Some(grant) = acquired.lease.grant() else { return Ok(acquired) };
        let (id, device) = (acquired.lease.id.clone(), grant.device.clone());
        let lease = self.ledger.keep(wish.ask(), id, device, self.clock.now()).await?;
        Ok(Arc::new(Acquired { lease, ..Acquired::clone(&acquired) }))
    }

    /// How many are under way.
    pub fn under_way(&self) -> usize {
        // What was given up is off the map, and its maker may be at work still.
        self.flights.count().max(self.making.now().len())
    }

    /// Gives back what `ask` says.
    pub async fn release(&self, ask: Release) -> Result<Releasing> {
        let named = ask.lease.is_some() || ask.generation.is_some();
        let repeated =
            ask.request.as_ref().is_some_and(|id| self.ledger.read(|book| book.request(id).is_some()));
        if !named && !repeated {
            self.flights.give_up(&ask.vm);
        }
        let vm = ask.vm.clone();
        let released = self.ledger.release(ask, self.clock.now()).await?;
        self.wake.now();
        if let Releasing::Now(lease) = &released {
            // One that began meanwhile may have found the lease as it was.
            self.flights.close(&vm);
            tracing::info!(%vm, lease = %lease.id, "released");
        }
        Ok(released)
    }

    /// Lets a lease hold for its time from now on, if its device still is what was granted.
    pub async fn renew(&self, id: LeaseId, ttl: Option<Ttl>) -> Result<Lease> {
        let lease = self.ledger.read(|book| book.get(&id).cloned());
        let seen = match &lease {
            Some(lease) if lease.is_held() && lease.grant().is_some() => Some(self.seen(lease).await?),
            // Why not is the book's to say.
            _ => None,
        };
        self.ledger.renew(id, ttl, seen, self.clock.now()).await
    }

    fn join(self: &Arc<Self>, wish: Wish) -> (Arrival<Outcome>, Seat) {
        let mut seat = Seat::Joined;
        let arrival = self.flights.join(wish.key(), |landing| {
            seat = Seat::Own;
            let span =
                tracing::info_span!("acquire", vm = %wish.vm, image = %wish.image, lease = tracing::field::Empty);
            let this = Arc::clone(self);
            let work = async move {
                let outcome = this.run(&wish, landing.given_up()).await.map(Arc::new);
                log(&outcome);
                landing.land(outcome);
            };
            self.tasks.spawn(work.instrument(span));
        });
        (arrival, seat)
    }

    async fn run(&self, wish: &Wish, given_up: GivenUp) -> Result<Acquired, Refusal> {
        let mut stages = Stages::start();
        let ask = wish.ask();
        let fresh = || LeaseId::from_random(uuid::Uuid::new_v4().as_u128());
        let known =
            self.ledger.read(|book| book.acquire(&ask, fresh(), &self.clock.now())).map_err(Error::from)?;
        if let Acquisition::Existing(lease) = known {
            return Ok(self.existing(ask, *lease, stages).await?);
        }
        self.drain.admit()?;
        self.admission.admit(&self.kernel).await?;
        let (image, cache) = self.image(wish, &mut stages).await?;
        let id = fresh();
        let maker = self.making.begin(id.clone());
        let lease = match self.ledger.acquire(ask.clone(), id, self.clock.now(), given_up).await? {
            Acquisition::Existing(lease) => return Ok(self.existing(ask, *lease, stages).await?),
            Acquisition::New { lease, .. } => *lease,
        };
        stages.done(Stage::Intent);
        tracing::Span::current().record("lease", lease.id.as_str());
        match self.make(wish, &lease, image, &mut stages).await {
            Ok(lease) => Ok(Acquired { lease, cache, stages, existing: false }),
            Err(error) => Err(self.give_up(&lease.id, maker, error).await),
        }
    }

    /// The VM's own lease again, if its device still is what was granted.
    async fn existing(&self, ask: Ask, lease: Lease, mut stages: Stages) -> Result<Acquired> {
        let seen = self.seen(&lease).await?;
        let lease = self.ledger.keep(ask, lease.id, seen, self.clock.now()).await?;
        stages.done(Stage::Ledger);
        Ok(Acquired { lease, cache: Cache::Hit, stages, existing: true })
    }

    /// The device of a lease that is held, as it is now, which is what was granted.
    async fn seen(&self, lease: &Lease) -> Result<DeviceIdentity> {
        let Some(grant) = lease.grant() else {
            let message = format!("lease {} of VM {} is still being made; try again", lease.id, lease.vm);
            return Err(Error::new(Reason::NotReady, message).with("lease_id", &lease.id));
        };
        self.identify(lease, &grant.device).await?.map_err(|what| {
            let held = self.ledger.read(|book| book.get(&lease.id).is_some_and(Lease::is_held));
            if !held {
                return crate::ledger::released(&lease.vm);
            }
            let message = format!(
                "the device {} of lease {} is not what VM {} was granted: {what}; release it and acquire again",
                grant.device.path, lease.id, lease.vm
            );
            Error::new(Reason::DeviceMismatch, message).with("lease_id", &lease.id)
        })
    }

    /// The lease's device as it is now, or how it differs from what was granted. An error if that cannot be told: who
    /// releases a disk because its device is not there *yet* (after a reboot, say) loses what is on it.
    pub(crate) async fn identify(
        &self,
        lease: &Lease,
        granted: &DeviceIdentity,
    ) -> Result<Result<DeviceIdentity, String>> {
        let mounts = match self.recorded(lease).await {
            Ok(Some(mounts)) => mounts,
            Ok(None) => return Ok(Err(self.without_record(granted).await)),
            // Who has a disk keeps it while containerd is away, if the kernel knows it by all its marks.
            Err(error) => match self.kernel.inspect(&granted.path).await {
                Ok(now) if granted.differs_from(&now).is_none() => return Ok(Ok(now)),
                _ => return Err(error.with("lease_id", &lease.id)),
            },
        };
        let path = mounts.first().map_or("", |mount| &mount.source);
        if path != granted.path {
            return Ok(Err(format!("its snapshot's device is {path:?}")));
        }
        match self.kernel.inspect(path).await {
            Ok(now) => Ok(match granted.differs_from(&now) {
                None => Ok(now),
                Some((what, was, is)) => Err(format!("{what} was {was:?} and is {is:?}")),
            }),
            Err(error @ KernelError::NotThin { .. }) => Ok(Err(error.to_string())),
            Err(error) => {
                let message = format!(
                    "the device of lease {} of VM {} cannot be looked at: {error}; its snapshot is there, so try again \
                     when the snapshotter has activated it",
                    lease.id, lease.vm
                );
                Err(Error::new(Reason::NotReady, message).with("lease_id", &lease.id))
            }
        }
    }

    /// The mounts of the lease's snapshot, if containerd knows it, and says so within a few seconds.
    async fn recorded(&self, lease: &Lease) -> Result<Option<Vec<Mount>>> {
        if let Some(hung) = self.admission.hindrances.hung() {
            return Err(hung);
        }
        let key = lease.id.snapshot_key();
        match tokio::time::timeout(CONTAINERD_WAIT, self.snapshots.mounts(&key)).await {
            Ok(Ok(mounts)) => Ok(Some(mounts)),
            Ok(Err(error)) if error.is_not_found() => Ok(None),
            Ok(Err(error)) => Err(self.snapshots.explain(error)),
            Err(_) => {
                let timeout = CallError::Timeout { call: "Snapshots.Mounts", after: CONTAINERD_WAIT };
                Err(self.snapshots.explain(timeout))
            }
        }
    }

    /// What is left of a disk whose snapshot containerd does not know.
    async fn without_record(&self, granted: &DeviceIdentity) -> String {
        match self.kernel.inspect(&granted.path).await {
            Ok(now) if granted.differs_from(&now).is_none() => {
                "containerd has lost its record of the snapshot (was its store replaced, or the lease or snapshot \
                 removed with ctr?), but the device is there: put containerd's store back, or copy what you need"
                    .to_owned()
            }
            _ => "its snapshot is gone".to_owned(),
        }
    }

    async fn image(&self, wish: &Wish, stages: &mut Stages) -> Result<(ResolvedImage, Cache)> {
        let found = self.images.resolve(&wish.image, &wish.platform).await?;
        stages.done(Stage::Resolve);
        if let Some(image) = found {
            return Ok((image, Cache::Hit));
        }
        let image = self.images.ensure(&wish.image, &wish.platform).await?;
        stages.done(Stage::Pull);
        // This caller has waited for a pull, whoever had begun it.
        Ok((image, Cache::Miss))
    }

    /// From intent to confirmation.
    async fn make(
        &self,
        wish: &Wish,
        lease: &Lease,
        image: ResolvedImage,
        stages: &mut Stages,
    ) -> Result<Lease> {
        let key = lease.id.snapshot_key();
        let labels = HashMap::from([
            (LEASE_LABEL.to_owned(), lease.id.to_string()),
            ("cowshed.io/vm".to_owned(), lease.vm.to_string()),
        ]);
        self.snapshots.create_lease(&key, labels).await.map_err(|e| self.snapshots.explain(e))?;
        stages.done(Stage::Lease);
        let (image, mounts) = self.prepare(wish, &key, image, stages).await?;
        let (path, filesystem) = block_device(&mounts)?;
        let device = self.verify(path).await?;
        stages.done(Stage::Verify);
        let grant = Grant {
            device,
            filesystem: filesystem.to_owned(),
            image_digest: image.manifest.to_string(),
            process: Process {
                entrypoint: image.process.entrypoint,
                cmd: image.process.cmd,
                env: image.process.env,
                user: image.process.user,
                working_dir: image.process.working_dir,
            },
            at: crate::clock::wall(),
        };
        let granted = self.ledger.grant(lease.id.clone(), grant, self.clock.now()).await?;
        stages.done(Stage::Confirm);
        Ok(granted)
    }

    /// The snapshot. If the image was removed from containerd since it was resolved, gets it once more.
    async fn prepare(
        &self,
        wish: &Wish,
        key: &str,
        mut image: ResolvedImage,
        stages: &mut Stages,
    ) -> Result<(ResolvedImage, Vec<Mount>)> {
        let mut prepared = self.snapshots.prepare(key, key, &image.chain_id.to_string()).await;
        if prepared.as_ref().is_err_and(CallError::is_not_found) {
            stages.done(Stage::Prepare);
            image = self.images.ensure(&wish.image, &wish.platform).await?;
            stages.done(Stage::Pull);
            prepared = self.snapshots.prepare(key, key, &image.chain_id.to_string()).await;
        }
        let mounts = prepared.map_err(|e| self.snapshots.explain(e))?;
        stages.done(Stage::Prepare);
        Ok((image, mounts))
    }

    /// Looks at the device as soon as its node is there.
    async fn verify(&self, path: &str) -> Result<DeviceIdentity> {
        let deadline = Instant::now() + DEVICE_WAIT;
        let mut pause = Duration::from_millis(1);
        loop {
            match self.kernel.inspect(path).await {
                Ok(device) => return Ok(device),
                Err(KernelError::Missing(_)) if Instant::now() < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(100));
                }
                Err(error) => return Err(unfit(path, &error.to_string())),
            }
        }
    }

    /// Leaves nothing behind: marks the lease, and the reclaimer clears away whatever was made of it. If it cannot be
    /// marked, the reclaimer does that too, as soon as it finds it without a maker.
    async fn give_up(&self, id: &LeaseId, maker: Maker, error: Error) -> Refusal {
        let failure = Failure { reason: error.reason().as_str().to_owned(), message: error.to_string() };
        let marked = self.ledger.fail(id.clone(), failure, self.clock.now()).await;
        drop(maker);
        self.wake.now();
        let error = match marked {
            Ok(_) => error,
            Err(second) => {
                error.context(format!("(and lease {id} could not be marked for removal: {second})"))
            }
        };
        Refusal { error, failed: Some(id.clone()) }
    }
}

fn log(outcome: &Outcome) {
    match outcome {
        Ok(done) if done.existing => tracing::debug!(lease = %done.lease.id, "held already"),
        Ok(done) => tracing::info!(cache = done.cache.as_str(), stages = %done.stages, "granted"),
        Err(Refusal { error, .. }) => tracing::warn!(reason = error.reason().as_str(), %error, "refused"),
    }
}

/// The device and filesystem of a snapshot's mounts.
pub(crate) fn block_device(mounts: &[Mount]) -> Result<(&str, &str)> {
    match mounts {
        [mount] if mount.source.starts_with("/dev/") => Ok((&mount.source, &mount.r#type)),
        [mount] => Err(unfit(&mount.source, &format!("it is mounted as {:?}", mount.r#type))),
        [] => Err(unfit("", "it gave no mount")),
        many => Err(unfit("", &format!("it gave {} mounts", many.len()))),
    }
}

fn unfit(path: &str, what: &str) -> Error {
    let message = format!(
        "the snapshotter's snapshot {path} is no usable thin device: {what}; name one that hands out thin devices in \
         [containerd] snapshotter, such as devmapper"
    );
    Error::new(Reason::SnapshotterUnfit, message).with("path", path)
}

#[cfg(test)]
#[path = "acquire_tests.rs"]
mod tests;
