//! A clone of an image file on XFS, durable, attached as a loop device.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::fs::ioctl_ficlone;
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::disks::{Disk, Launcher, checked, opened, run, settle},
    samples::Samples,
};

const VOLUME: &str = "bench-xfs";
const DIRECTORY: &str = "/run/cowshed-bench";

/// How the clone is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// `cp --reflink=always`
    Copy,
    /// The system call that is behind it, without a process.
    Call,
}

/// Where the time of a launch went.
#[derive(Default)]
struct Parts {
    clone: Samples,
    fsync: Samples,
    attach: Samples,
    check: Samples,
}

pub(crate) struct Reflink {
    by: By,
    made: AtomicU64,
    bytes: u64,
    parts: Mutex<Parts>,
}

impl Reflink {
    /// Makes the filesystem, and a file with what is on `source`.
    pub(crate) async fn new(source: &str) -> Outcome<Self> {
        let (_, bytes) = opened(source)?;
        run("lvcreate", &["-y", "-L", "4G", "-n", VOLUME, "vg"]).await?;
        let volume = format!("/dev/vg/{VOLUME}");
        run("mkfs.xfs", &["-q", "-m", "reflink=1", &volume]).await?;
        fs::create_dir_all(DIRECTORY)?;
        run("mount", &[&volume, DIRECTORY]).await?;
        let base = base();
        let to = format!("of={}", base.display());
        run("dd", &[&format!("if={source}"), &to, "bs=64k", "conv=sparse,fsync"]).await?;
        // what is sparse at the end is not written
        File::options().write(true).open(&base)?.set_len(bytes)?;
        Ok(Self { by: By::Copy, made: AtomicU64::new(0), bytes, parts: Mutex::default() })
    }

    /// The same filesystem and file, the clones being made otherwise.
    pub(crate) fn by_call(&self) -> Self {
        Self { by: By::Call, made: AtomicU64::new(1 << 32), bytes: self.bytes, parts: Mutex::default() }
    }

    /// Where the time went.
    pub(crate) fn story(&self) -> Value {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        json!({
            "clone": parts.clone.summary(),
            "fsync_of_file_and_directory": parts.fsync.summary(),
            "losetup": parts.attach.summary(),
            "check": parts.check.summary(),
        })
    }

    async fn clone_to(&self, file: &Path) -> Outcome {
        let base = base();
        match self.by {
            By::Copy => {
                let (base, file) = (base.to_string_lossy(), file.to_string_lossy());
                run("cp", &["--reflink=always", &base, &file]).await.map(drop)
            }
            By::Call => Ok(ioctl_ficlone(File::create_new(file)?, File::open(base)?)?),
        }
    }

    /// The file is cloned, durable, attached and looked at; how long each of these took.
    async fn make(&self, file: &Path) -> Outcome<(Disk, [Duration; 4])> {
        let begun = Instant::now();
        self.clone_to(file).await?;
        let cloned = begun.elapsed();
        sync(file).await?;
        let synced = begun.elapsed();
        let name = file.to_string_lossy().into_owned();
        let path = run("losetup", &["--find", "--show", "--direct-io=on", &name]).await?;
        let attached = begun.elapsed();
        let device = path.trim_end().to_owned();
        let number = checked(&device, self.bytes)?;
        let checked = begun.elapsed();
        let took = [cloned, synced - cloned, attached - synced, checked - attached];
        Ok((Disk { key: name, device, number }, took))
    }
}

/// The file and its directory entry survive a power cut from then on.
async fn sync(file: &Path) -> Outcome {
    let file = file.to_owned();
    tokio::task::spawn_blocking(move || {
        File::open(&file)?.sync_all()?;
        Ok(File::open(DIRECTORY)?.sync_all()?)
    })
    .await?
}

impl Launcher for Reflink {
    fn name(&self) -> &'static str {
        if self.by == By::Copy { "cp --reflink + losetup" } else { "FICLONE + losetup" }
    }

    async fn launch(&self) -> Outcome<(Disk, Duration)> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let (disk, took) = self.make(&Path::new(DIRECTORY).join(format!("vm-{number}"))).await?;
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let Parts { clone, fsync, attach, check } = &mut *parts;
        for (samples, took) in [clone, fsync, attach, check].into_iter().zip(took) {
            samples.add_time(took);
        }
        Ok((disk, took.iter().sum()))
    }

    async fn clear(&self, disks: &[Disk]) -> Outcome {
        let mut arguments = vec!["-d"];
        arguments.extend(disks.iter().map(|disk| disk.device.as_str()));
        run("losetup", &arguments).await?;
        for disk in disks {
            fs::remove_file(&disk.key)?;
        }
        settle().await?;
        run("sync", &["-f", DIRECTORY]).await.map(drop)
    }
}

fn base() -> PathBuf {
    Path::new(DIRECTORY).join("base")
}
