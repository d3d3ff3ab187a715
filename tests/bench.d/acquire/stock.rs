//! A launcher written against containerd alone: for each VM a lease, a snapshot of the image under it, its mounts, and a
//! look at the device.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use crate::{
    Outcome,
    acquire::disks::{Disk, Launcher, checked, opened, run, settle},
    devices,
    side::{self, Holder, NAMESPACE, Side},
};

const SNAPSHOTTER: &str = "devmapper";
pub(crate) const NAME: &str = "containerd alone, devmapper";

pub(crate) struct Stock {
    side: Side,
    made: AtomicU64,
    /// Of each disk.
    bytes: u64,
}

impl Stock {
    /// Pulls the image into its snapshotter, as `ctr` does.
    pub(crate) async fn new(image: &str) -> Outcome<Self> {
        let hosts = "/etc/containerd/certs.d";
        let pull =
            ["-n", NAMESPACE, "images", "pull", "--hosts-dir", hosts, "--snapshotter", SNAPSHOTTER, image];
        run("ctr", &pull).await?;
        let mut side = Side::of_images("s", SNAPSHOTTER).await?;
        let (disk, _) = side.prepare_held(Holder::Itself).await?;
        side.set_pool(devices::pool_of(&disk.device)?);
        let (_, bytes) = opened(&disk.path)?;
        side.clear(&[disk]).await?;
        Ok(Self { side, made: AtomicU64::new(0), bytes })
    }

    pub(crate) fn pool(&self) -> Outcome<&devices::Pool> {
        self.side.pool()
    }

    /// One disk, back as far as its launcher has a part in it.
    pub(crate) async fn release(&self, disk: &Disk) -> Outcome {
        self.side.remove_key(&disk.key).await?;
        self.side.drop_lease(&disk.key).await
    }

    /// Has containerd collect what was released.
    pub(crate) async fn collect(&self) -> Outcome {
        self.side.collect().await
    }

    /// Waits until released disks are gone.
    pub(crate) async fn gone(&self, disks: &[Disk]) -> Outcome {
        self.collect().await?;
        let disks: Vec<side::Disk> = disks.iter().map(of_side).collect();
        devices::wait_gone(&disks).await
    }
}

impl Launcher for Stock {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn launch(&self) -> Outcome<(Disk, Duration)> {
        let key = format!("vm-{}", self.made.fetch_add(1, Ordering::Relaxed));
        let begun = Instant::now();
        self.side.make_lease(&key).await?;
        self.side.prepare_labelled(&key, Holder::Lease(&key), &[("containerd.io/snapshot/vm", &key)]).await?;
        let path = self.side.mounts(&key).await?;
        let number = checked(&path, self.bytes)?;
        let took = begun.elapsed();
        let device = devices::openable(&path)?;
        Ok((Disk { key, device, number }, took))
    }

    async fn clear(&self, disks: &[Disk]) -> Outcome {
        stream::iter(disks.iter().map(|disk| self.release(disk)))
            .buffer_unordered(8)
            .try_collect::<Vec<()>>()
            .await?;
        self.gone(disks).await?;
        self.side.rest().await?;
        settle().await
    }
}

fn of_side(disk: &Disk) -> side::Disk {
    side::Disk { key: disk.key.clone(), path: String::new(), device: disk.device.clone() }
}
