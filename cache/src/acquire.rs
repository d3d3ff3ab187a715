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

use cowshed_leases::{Acquisition, DeviceIdentity, Grant, Lease, LeaseId, Process, Spec, State, VmId};
use tracing::Instrument as _;

use crate::{
    admission::Admission,
    clock,
    containerd::{LEASE_LABEL, Mount, Snapshots},
    error::{Error, Reason, Result},
    flights::{Arrival, Flights, GivenUp},
    image::{Cache, ImageCache, ImageRef, Platform, ResolvedImage},
    kernel::{Devices, KernelError},
    ledger::{Ledger, Release},
    making::{Maker, Making},
    reclaim::Wake,
    stages::{Stage, Stages},
    tasks::Tasks,
};

/// How long a device node may take to appear after its snapshot was made (udev makes it).
const DEVICE_WAIT: Duration = Duration::from_secs(10);

/// What a launcher wants, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// For which VM.
    pub vm: VmId,
    /// Of which image.
    pub image: ImageRef,
    /// For which platform.
    pub platform: Platform,
}

impl Wish {
    fn spec(&self) -> Spec {
        Spec { image: self.image.to_string(), platform: self.platform.to_string() }
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

type Outcome = Result<Arc<Acquired>>;

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
    /// To be woken when there is something to clear away.
    pub wake: Wake,
    /// What is being made, for the reclaimer.
    pub making: Making,
    /// Where the work runs.
    pub tasks: Tasks,
    /// Work under way, so that equal wishes share it.
    pub(crate) flights: Flights<Outcome>,
}

impl Acquirer {
    /// Grants the wish, or says why not; see `Acquire` in the API.
    pub async fn acquire(self: &Arc<Self>, wish: Wish) -> Outcome {
        let stopped = || Error::new(Reason::Stopping, "the service is stopping; acquire again when it is up");
        self.join(wish).await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Gives back the disk of the VM, or only this lease of it; `None` if there is nothing to give back.
    pub async fn release(&self, vm: &VmId, only: Option<LeaseId>) -> Result<Option<Lease>> {
        if only.is_none() {
            self.flights.give_up(vm);
        }
        let released = self.ledger.release_of(vm.clone(), only, clock::now()).await?;
        self.wake.now();
        match released {
            Release::Nothing => Ok(None),
            Release::Again(lease) => Ok(Some(lease)),
            Release::Now(lease) => {
                // One that began meanwhile may have found the lease as it was.
                self.flights.close(vm);
                tracing::info!(%vm, lease = %lease.id, "released");
                Ok(Some(lease))
            }
        }
    }

    fn join(self: &Arc<Self>, wish: Wish) -> Arrival<Outcome> {
        let spec = wish.spec();
        let key = (wish.vm.clone(), format!("{} {}", spec.image, spec.platform));
        self.flights.join(key, |landing| {
            let span =
                tracing::info_span!("acquire", vm = %wish.vm, image = %wish.image, lease = tracing::field::Empty);
            let this = Arc::clone(self);
            let work = async move {
                let outcome = this.run(&wish, landing.given_up()).await.map(Arc::new);
                log(&outcome);
                landing.land(outcome);
            };
            self.tasks.spawn(work.instrument(span));
        })
    }

    async fn run(&self, wish: &Wish, given_up: GivenUp) -> Result<Acquired> {
        let mut stages = Stages::start();
        let spec = wish.spec();
        let fresh = || LeaseId::from_random(uuid::Uuid::new_v4().as_u128());
        let known = self.ledger.read(|book| book.acquire(&wish.vm, &spec, fresh(), clock::now()))?;
        if let Acquisition::Existing(lease) = known {
            return self.existing(*lease, stages).await;
        }
        self.admission.admit(&self.kernel).await?;
        let (image, cache) = self.image(wish, &mut stages).await?;
        let id = fresh();
        let maker = self.making.begin(id.clone());
        let lease = match self.ledger.acquire(wish.vm.clone(), spec, id, clock::now(), given_up).await? {
            Acquisition::Existing(lease) => return self.existing(*lease, stages).await,
            Acquisition::New(lease) => *lease,
        };
        stages.done(Stage::Intent);
        tracing::Span::current().record("lease", lease.id.as_str());
        match self.make(wish, &lease, image, &mut stages).await {
            Ok(lease) => Ok(Acquired { lease, cache, stages, existing: false }),
            Err(error) => Err(self.give_up(&lease.id, maker, error).await),
        }
    }

    /// The VM's own lease again, if its device still is what was granted.
    async fn existing(&self, lease: Lease, mut stages: Stages) -> Result<Acquired> {
        let State::Granted(grant) = &lease.state else {
            let message = format!("lease {} of VM {} is still being made; try again", lease.id, lease.vm);
            return Err(Error::new(Reason::NotReady, message).with("lease_id", &lease.id));
        };
        if let Some(what) = self.differs(&lease, &grant.device).await? {
            let message = format!(
                "the device {} of lease {} is not what VM {} was granted: {what}; release it and acquire again",
                grant.device.path, lease.id, lease.vm
            );
            return Err(Error::new(Reason::DeviceMismatch, message).with("lease_id", &lease.id));
        }
        stages.done(Stage::Ledger);
        Ok(Acquired { lease, cache: Cache::Hit, stages, existing: true })
    }

    /// How the lease's device differs from what was granted. An error if that cannot be told: who releases a disk
    /// because its device is not there *yet* (after a reboot, say) loses what is on it.
    async fn differs(&self, lease: &Lease, granted: &DeviceIdentity) -> Result<Option<String>> {
        let mounts = match self.snapshots.mounts(&lease.id.snapshot_key()).await {
            Ok(mounts) => mounts,
            Err(error) if error.is_not_found() => return Ok(Some("its snapshot is gone".to_owned())),
            Err(error) => return Err(self.snapshots.explain(error).with("lease_id", &lease.id)),
        };
        let path = mounts.first().map_or("", |mount| &mount.source);
        if path != granted.path {
            return Ok(Some(format!("its snapshot's device is {path:?}")));
        }
        match self.kernel.inspect(path).await {
            Ok(now) => Ok(granted
                .differs_from(&now)
                .map(|(what, was, is)| format!("{what} was {was:?} and is {is:?}"))),
            Err(error @ KernelError::NotThin { .. }) => Ok(Some(error.to_string())),
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
            at: clock::now(),
        };
        let granted = self.ledger.grant(lease.id.clone(), grant).await?;
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
        if prepared.as_ref().is_err_and(crate::containerd::CallError::is_not_found) {
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
    async fn give_up(&self, id: &LeaseId, maker: Maker, error: Error) -> Error {
        let marked = self.ledger.release(id.clone(), clock::now()).await;
        drop(maker);
        self.wake.now();
        match marked {
            Ok(_) => error,
            Err(second) => {
                error.context(format!("(and lease {id} could not be marked for removal: {second})"))
            }
        }
    }
}

fn log(outcome: &Outcome) {
    match outcome {
        Ok(done) if done.existing => tracing::debug!(lease = %done.lease.id, "held already"),
        Ok(done) => tracing::info!(cache = done.cache.as_str(), stages = %done.stages, "granted"),
        Err(error) => tracing::warn!(reason = error.reason().as_str(), %error, "refused"),
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
