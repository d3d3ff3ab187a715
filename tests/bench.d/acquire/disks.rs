//! Disks for VMs and who makes them, as all sides of the benchmark `acquire` have it.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _},
    process::Stdio,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use rustix::fs::{major, minor};
use tokio::process::Command;

use crate::Outcome;

/// How much of each written disk is in use when it is released, in bytes.
pub(crate) const WRITTEN: u64 = 64 << 20;
/// Where, past the filesystem's first part.
const FROM: u64 = 256 << 20;

/// A disk that a VM could boot from.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// What its maker knows it by.
    pub(crate) key: String,
    /// The name of its device to the kernel.
    pub(crate) device: String,
    /// The device's number.
    pub(crate) number: u64,
}

/// Who makes disks.
pub(crate) trait Launcher {
    /// How it is called in results.
    fn name(&self) -> &'static str;

    /// Makes one disk. The device is there, opens, and has the right size; how long all that took.
    async fn launch(&self) -> Outcome<(Disk, Duration)>;

    /// Gives disks back, and waits until they are gone and nothing is left to be done for them.
    async fn clear(&self, disks: &[Disk]) -> Outcome;

    /// Makes so many disks at once; how long it took until the last one was there. No two of them are the same.
    async fn launch_at_once(&self, count: usize) -> Outcome<(Vec<Disk>, Duration)> {
        let begun = Instant::now();
        let launched = try_join_all((0..count).map(|_| self.launch())).await?;
        let took = begun.elapsed();
        let disks: Vec<Disk> = launched.into_iter().map(|(disk, _)| disk).collect();
        all_different(self.name(), &disks)?;
        Ok((disks, took))
    }
}

/// Fails if two are on the same device.
pub(crate) fn all_different(name: &str, disks: &[Disk]) -> Outcome {
    let numbers: HashSet<u64> = disks.iter().map(|disk| disk.number).collect();
    if numbers.len() < disks.len() {
        return Err(format!("{name}: {} disks are on {} devices", disks.len(), numbers.len()).into());
    }
    Ok(())
}

/// Opens a device, as a VMM would, and asks the kernel for its size, which has to be this: the device's number.
pub(crate) fn checked(path: &str, bytes: u64) -> Outcome<u64> {
    let (number, found) = opened(path)?;
    if found != bytes {
        return Err(format!("{path} has {found} bytes, not {bytes}").into());
    }
    Ok(number)
}

/// A device's number and its bytes.
pub(crate) fn opened(path: &str) -> Outcome<(u64, u64)> {
    let told = |e| format!("{path}, a new disk, does not open: {e}");
    let device = File::open(path).and_then(|file| file.metadata()).map_err(told)?;
    if !device.file_type().is_block_device() {
        return Err(format!("{path} is no block device").into());
    }
    let number = device.rdev();
    let size = format!("/sys/dev/block/{}:{}/size", major(number), minor(number));
    let sectors: u64 = fs::read_to_string(&size).map_err(|e| format!("{size}: {e}"))?.trim().parse()?;
    Ok((number, sectors * 512))
}

/// Runs a program to its end; what it printed.
pub(crate) async fn run(program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.await.map_err(|e| format!("{program}: {e}"))?;
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until udev has nothing to do.
pub(crate) async fn settle() -> Outcome {
    run("udevadm", &["settle", "--timeout=120"]).await.map(drop)
}

/// Has the pool, whose blocks have so many bytes, give each disk as many as would be written.
pub(crate) async fn write_all(disks: &[Disk], block: u64) -> Outcome {
    let paths: Vec<String> = disks.iter().map(|disk| format!("/dev/mapper/{}", disk.device)).collect();
    tokio::task::spawn_blocking(move || {
        let noise = vec![0x5a; 4096];
        for path in paths {
            let file = OpenOptions::new().write(true).open(path)?;
            for number in 0..WRITTEN / block {
                file.write_all_at(&noise, FROM + number * block)?;
            }
            file.sync_all()?;
        }
        Ok(())
    })
    .await?
}
