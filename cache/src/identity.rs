//! Whether the devices of a lease are what it was granted: asked of containerd and the kernel each time, never remembered.

use std::time::Duration;

use cowshed_leases::{DeviceIdentity, Lease, LeaseId, Seen};

use crate::{
    acquire::Acquirer,
    containerd::{CallError, Mount},
    error::{Error, Reason, Result},
    kernel::KernelError,
};

/// How long containerd is waited for when the kernel can tell as well.
pub(crate) const CONTAINERD_WAIT: Duration = Duration::from_secs(5);

impl Acquirer {
    /// The devices of a lease that is held, as they are now, which are what was granted.
    pub(crate) async fn seen(&self, lease: &Lease) -> Result<Seen> {
        let Some(grant) = lease.grant() else {
            let message = format!("lease {} of VM {} is still being made; try again", lease.id, lease.vm);
            return Err(Error::new(Reason::NotReady, message).with("lease_id", &lease.id));
        };
        let root = self.seen_of(lease, lease.root(), &grant.device).await?;
        let scratch = match &grant.scratch {
            Some(scratch) => Some(self.seen_of(lease, &lease.id, &scratch.device).await?),
            None => None,
        };
        Ok(Seen { root, scratch })
    }

    async fn seen_of(
        &self,
        lease: &Lease,
        snapshot: &LeaseId,
        granted: &DeviceIdentity,
    ) -> Result<DeviceIdentity> {
        self.identify(lease, snapshot, granted).await?.map_err(|what| {
            let held = self.ledger.read(|book| book.get(&lease.id).is_some_and(Lease::is_held));
            if !held {
                return crate::ledger::released(&lease.vm);
            }
            let message = format!(
                "the device {} of lease {} is not what VM {} was granted: {what}; release it and acquire again",
                granted.path, lease.id, lease.vm
            );
            Error::new(Reason::DeviceMismatch, message).with("lease_id", &lease.id)
        })
    }

    /// The device of `snapshot`, which is the lease's own or the one that it shares, as it is now, or how it differs from what
    /// was granted. An error if that cannot be told: who releases a disk because its device is not there *yet* (after a
    /// reboot, say) loses what is on it.
    pub(crate) async fn identify(
        &self,
        lease: &Lease,
        snapshot: &LeaseId,
        granted: &DeviceIdentity,
    ) -> Result<Result<DeviceIdentity, String>> {
        let mounts = match self.recorded(snapshot).await {
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

    /// The mounts of this lease's snapshot, if containerd knows it, and says so within a few seconds.
    async fn recorded(&self, lease: &LeaseId) -> Result<Option<Vec<Mount>>> {
        if let Some(hung) = self.admission.hindrances.hung() {
            return Err(hung);
        }
        let key = lease.snapshot_key();
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
}
