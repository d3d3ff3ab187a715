//! `lvcreate -s` of a thin volume that holds the image, in a thin pool of its own.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::{
    Outcome,
    acquire::disks::{Disk, Launcher, checked, opened, run, settle},
    devices::{self, Pool},
};

const GROUP: &str = "vg";
const POOL: &str = "bench";
const BASE: &str = "bench-base";

pub(crate) struct Lvm {
    made: AtomicU64,
    bytes: u64,
    pool: Pool,
}

impl Lvm {
    /// Makes the pool, and a volume with what is on `source`. It is not active then: nothing has to be suspended for a
    /// snapshot of it.
    pub(crate) async fn new(source: &str) -> Outcome<Self> {
        let (_, bytes) = opened(source)?;
        let pool = format!("{GROUP}/{POOL}");
        let kind =
            ["--type", "thin-pool", "-L", "4G", "--poolmetadatasize", "128M", "-c", "64k", "--zero", "y"];
        run("lvcreate", &[kind.as_slice(), &["-n", POOL, GROUP]].concat()).await?;
        run("lvcreate", &["-V", &format!("{bytes}b"), "--thin", "-n", BASE, &pool]).await?;
        let base = format!("/dev/{GROUP}/{BASE}");
        run("dd", &[&format!("if={source}"), &format!("of={base}"), "bs=64k", "conv=sparse,fsync"]).await?;
        let pool = devices::pool_of(&devices::openable(&base)?)?;
        run("lvchange", &["-an", &format!("{GROUP}/{BASE}")]).await?;
        settle().await?;
        Ok(Self { made: AtomicU64::new(0), bytes, pool })
    }
}

impl Launcher for Lvm {
    fn name(&self) -> &'static str {
        "lvcreate -s"
    }

    async fn launch(&self) -> Outcome<(Disk, Duration)> {
        let key = format!("bench-vm-{}", self.made.fetch_add(1, Ordering::Relaxed));
        let origin = format!("{GROUP}/{BASE}");
        let begun = Instant::now();
        // activated at once: by default a thin snapshot is not
        run("lvcreate", &["-q", "-s", "-kn", "-ay", "-n", &key, &origin]).await?;
        let path = format!("/dev/{GROUP}/{key}");
        let number = checked(&path, self.bytes)?;
        let took = begun.elapsed();
        let device = devices::openable(&path)?;
        Ok((Disk { key, device, number }, took))
    }

    async fn clear(&self, disks: &[Disk]) -> Outcome {
        let names: Vec<String> = disks.iter().map(|disk| format!("{GROUP}/{}", disk.key)).collect();
        let mut arguments = vec!["-q", "-y"];
        arguments.extend(names.iter().map(String::as_str));
        run("lvremove", &arguments).await?;
        settle().await?;
        self.pool.wait_at_rest().await
    }
}
