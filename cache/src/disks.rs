//! The disks of a lease, made from its intent on.
//!
//! ```text
//!  COPY_ON_WRITE     containerd lease ─► Prepare ─► verify ─────────────────────────────────► confirm
//!  SHARED_READ_ONLY  the image's own lease: granted? look : containerd lease ─► View ─► verify ─► confirm
//!                      └─► scratch: containerd lease ─► Prepare ─► verify ──────────────────► confirm
//! ```

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use cowshed_leases::{
    DeviceIdentity, Failure, Grant, Lease, LeaseId, Process, Scratch, ScratchGrant, State, VmId,
};
use tracing::Instrument as _;

use crate::{
    acquire::{Acquirer, Wish},
    containerd::{CallError, LEASE_LABEL, Mount},
    error::{Error, Reason, Result},
    image::ResolvedImage,
    kernel::{KernelError, PoolUsage},
    spares::refill::image_gone,
    stages::{Stage, Stages},
};

/// How long a device node may take to appear after its snapshot was made (udev makes it).
const DEVICE_WAIT: Duration = Duration::from_secs(10);
const MODE_FIELD: &str = "spec.mode";

impl Acquirer {
    /// From intent to confirmation.
    pub(crate) async fn make(
        self: &Arc<Self>,
        wish: &Wish,
        lease: &Lease,
        image: ResolvedImage,
        stages: &mut Stages,
        is_awaited: impl Fn() -> bool,
    ) -> Result<Lease> {
        let grant = match &lease.shares {
            None => self.image_disk(Some(wish), lease, image, stages).await?,
            Some(shared) => {
                let shared = self.shared(shared, wish, image).await?;
                stages.done(Stage::Share);
                let scratch = match wish.scratch {
                    Some(scratch) => Some(self.scratch(lease, scratch, stages).await?),
                    None => None,
                };
                Grant { scratch, at: crate::clock::wall(), ..shared }
            }
        };
        let (id, now) = (lease.id.clone(), self.clock.now());
        let granted = if wish.is_plain() && self.spares.are_kept() && !is_awaited() {
            self.ledger.shelve(id, grant, now).await?
        } else {
            self.ledger.grant(id, grant, now).await?
        };
        stages.done(Stage::Confirm);
        Ok(granted)
    }

    /// The image's disk for this lease: writable, or, if the lease is in the image's name, read-only for all. Without a wish,
    /// the image is not pulled if it is not there.
    pub(crate) async fn image_disk(
        &self,
        wish: Option<&Wish>,
        lease: &Lease,
        image: ResolvedImage,
        stages: &mut Stages,
    ) -> Result<Grant> {
        self.take_lease(lease).await?;
        stages.done(Stage::Lease);
        let (image, mounts) = self.prepare(wish, lease, image, stages).await?;
        let (path, filesystem) = block_device(&mounts)?;
        let device = self.verify(path).await?;
        match (device.read_only, lease.vm.is_image()) {
            (false, true) => return Err(writable(path)),
            (true, false) => return Err(unfit(path, "the kernel refuses writes to it")),
            _ => {}
        }
        stages.done(Stage::Verify);
        Ok(Grant {
            device,
            filesystem: filesystem.to_owned(),
            scratch: None,
            image_digest: image.manifest.to_string(),
            process: Process {
                entrypoint: image.process.entrypoint,
                cmd: image.process.cmd,
                env: image.process.env,
                user: image.process.user,
                working_dir: image.process.working_dir,
            },
            at: crate::clock::wall(),
        })
    }

    /// An empty disk of the size that was asked for.
    async fn scratch(&self, lease: &Lease, wanted: Scratch, stages: &mut Stages) -> Result<ScratchGrant> {
        let key = lease.id.snapshot_key();
        fits_the_pool(wanted, self.kernel.pool().await.as_ref().ok())?;
        self.take_lease(lease).await?;
        stages.done(Stage::Lease);
        let mounts = self.snapshots.empty(&key, &key, wanted).await.map_err(|e| self.snapshots.explain(e))?;
        stages.done(Stage::Prepare);
        let (path, filesystem) = block_device(&mounts)?;
        let device = self.verify(path).await?;
        if device.size_bytes != wanted.size_bytes {
            let what = format!("it has {} bytes, not the {} asked for", device.size_bytes, wanted.size_bytes);
            return Err(unfit(path, &what));
        }
        stages.done(Stage::Verify);
        let filesystem = if wanted.raw { String::new() } else { filesystem.to_owned() };
        Ok(ScratchGrant { device, filesystem })
    }

    /// containerd's lease, which holds the snapshot that is to be made.
    async fn take_lease(&self, lease: &Lease) -> Result<()> {
        let labels = HashMap::from([
            (LEASE_LABEL.to_owned(), lease.id.to_string()),
            ("cowshed.io/vm".to_owned(), lease.vm.to_string()),
        ]);
        let taken = self.snapshots.create_lease(&lease.id.snapshot_key(), labels).await;
        taken.map_err(|e| self.snapshots.explain(e))
    }

    /// The snapshot. If the image was removed from containerd since it was resolved, gets it once more, if anybody wishes.
    async fn prepare(
        &self,
        wish: Option<&Wish>,
        lease: &Lease,
        mut image: ResolvedImage,
        stages: &mut Stages,
    ) -> Result<(ResolvedImage, Vec<Mount>)> {
        let mut prepared = self.snapshot(lease, &image).await;
        if prepared.as_ref().is_err_and(CallError::is_not_found) {
            let Some(wish) = wish else { return Err(image_gone(&image)) };
            stages.done(Stage::Prepare);
            (image, _) = self.images.ensure(&wish.image, &wish.platform, &wish.access).await?;
            stages.done(Stage::Pull);
            if lease.vm.is_image() && lease.vm != in_name_of(&image)? {
                let message = format!("{} has become another image just now; acquire again", wish.image);
                return Err(Error::new(Reason::NotReady, message).with("image", &wish.image));
            }
            prepared = self.snapshot(lease, &image).await;
        }
        let mounts = prepared.map_err(|e| self.snapshots.explain(e))?;
        stages.done(Stage::Prepare);
        Ok((image, mounts))
    }

    async fn snapshot(&self, lease: &Lease, image: &ResolvedImage) -> Result<Vec<Mount>, CallError> {
        let (key, parent) = (lease.id.snapshot_key(), image.chain_id.to_string());
        if lease.vm.is_image() {
            self.snapshots.view(&key, &key, &parent).await
        } else {
            self.snapshots.prepare(&key, &key, &parent).await
        }
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

    /// What is granted of the device that all VMs of the image share, as it is now; it is made if it is not there yet. All
    /// who ask meanwhile share that too.
    async fn shared(self: &Arc<Self>, id: &LeaseId, wish: &Wish, image: ResolvedImage) -> Result<Grant> {
        let key = (in_name_of(&image)?, id.to_string());
        let arrival = self.sharing.join(key, |landing| {
            let (this, id, wish) = (Arc::clone(self), id.clone(), wish.clone());
            let span = tracing::info_span!("share", lease = %id);
            let work = async move { landing.land(this.provide(&id, &wish, image).await) };
            // Who asks is under way itself.
            self.tasks.spawn_for_another(work.instrument(span));
        });
        let stopped = || Error::new(Reason::Stopping, "the service is stopping; acquire again when it is up");
        arrival.await.map_err(|_| stopped())?
    }

    async fn provide(&self, id: &LeaseId, wish: &Wish, image: ResolvedImage) -> Result<Grant> {
        let maker = self.making.begin(id.clone());
        let lease = self.ledger.read(|book| book.get(id).cloned());
        let lease = match lease {
            Some(lease) if lease.state == State::Preparing => {
                match self.make_shared(wish, &lease, image).await {
                    Ok(granted) => granted,
                    Err(error) => {
                        // If that cannot be written, the reclaimer finds it without a maker.
                        let _later =
                            self.ledger.fail(id.clone(), Failure::from(&error), self.clock.now()).await;
                        drop(maker);
                        self.wake.now();
                        return Err(error);
                    }
                }
            }
            Some(lease) if lease.is_held() => {
                let seen = self.seen(&lease).await;
                if let Err(error) = &seen
                    && error.reason() == Reason::DeviceMismatch
                {
                    return Err(self.retire(wish, &lease, error).await);
                }
                let seen = seen?;
                if lease.grant().is_some_and(|grant| grant.device == seen.root) {
                    lease
                } else {
                    self.ledger.renew(id.clone(), None, Some(seen), self.clock.now()).await?
                }
            }
            _ => return Err(being_removed(wish)),
        };
        lease.grant().cloned().ok_or_else(|| being_removed(wish))
    }

    /// What is shared is certainly not what it was: who acquires from now on gets a new one.
    async fn retire(&self, wish: &Wish, lease: &Lease, error: &Error) -> Error {
        tracing::warn!(lease = %lease.id, %error, "a shared device is not what it was: it is replaced");
        if let Err(error) = self.ledger.retire(lease.id.clone(), self.clock.now()).await {
            return error;
        }
        self.wake.now();
        let message = format!(
            "the device that VMs of {} share is lost or changed ({error}): acquire again, for a new one; VMs that have the \
             old one keep it until they release it",
            wish.image
        );
        Error::new(Reason::NotReady, message).with("image", &wish.image).with("lease_id", &lease.id)
    }

    async fn make_shared(&self, wish: &Wish, lease: &Lease, image: ResolvedImage) -> Result<Lease> {
        let mut stages = Stages::start();
        let grant = self.image_disk(Some(wish), lease, image, &mut stages).await?;
        let granted = self.ledger.grant(lease.id.clone(), grant, self.clock.now()).await?;
        stages.done(Stage::Confirm);
        tracing::info!(image = %wish.image, %stages, "a device to be shared is there");
        Ok(granted)
    }
}

/// In whose name what all VMs of the image share is held.
pub(crate) fn in_name_of(image: &ResolvedImage) -> Result<VmId> {
    let digest = image.manifest.to_string();
    VmId::of_image(&digest).map_err(|error| Error::new(Reason::InternalError, format!("{digest}: {error}")))
}

fn being_removed(wish: &Wish) -> Error {
    let message = format!("the device that VMs of {} share is being removed; acquire again", wish.image);
    Error::new(Reason::NotReady, message).with("image", &wish.image)
}

/// What could never be filled is a mistake, and a filesystem of such a size alone may not fit.
pub(crate) fn fits_the_pool(wanted: Scratch, pool: Option<&PoolUsage>) -> Result<()> {
    let total = pool.map_or(u64::MAX, |pool| pool.data_total);
    if wanted.size_bytes <= total {
        return Ok(());
    }
    let message = format!(
        "a scratch disk of {} bytes is larger than the whole pool, which has {total}: ask for less",
        wanted.size_bytes
    );
    Err(Error::new(Reason::ScratchInvalid, message).with("field", "spec.scratch"))
}

fn writable(path: &str) -> Error {
    let context = format!("the kernel lets everybody write to {path}, which is to be shared");
    unshareable().context(context).with("path", path)
}

/// Nothing that this snapshotter makes can be shared.
pub(crate) fn unshareable() -> Error {
    let message = "this snapshotter's views are read-only by a mount option only; name Cowshed's own in [containerd] \
                   snapshotter, or acquire with mode COPY_ON_WRITE";
    Error::new(Reason::SnapshotterUnfit, message).with("field", MODE_FIELD)
}

/// Whether the error is [`unshareable`].
pub(crate) fn is_unshareable(error: &Error) -> bool {
    error.reason() == Reason::SnapshotterUnfit && error.detail("field") == Some(MODE_FIELD)
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
#[path = "disks_tests.rs"]
mod tests;
