//! What the kernel says of the devices and pools under measurement. Starts no process.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use devicemapper::{DM, DevId, DmFlags, DmName, DmOptions};

use crate::{Outcome, side::Disk};

const PATIENCE: Duration = Duration::from_secs(300);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// Looking must not take the processor from what is measured meanwhile.
const BETWEEN_LISTINGS: Duration = Duration::from_millis(200);

/// Opens the device once, as a launcher would, and says its device-mapper name.
pub(crate) fn openable(path: &str) -> Outcome<String> {
    fs::File::open(path).map_err(|e| format!("{path}, which Prepare returned, does not open: {e}"))?;
    let node = fs::canonicalize(path)?;
    let file = node.file_name().and_then(|name| name.to_str()).ok_or("a device without a name")?;
    if file.starts_with("dm-") {
        name_of(Path::new("/sys/block").join(file).as_path())
    } else {
        Ok(file.to_owned())
    }
}

/// The device-mapper name of a block device's directory in sysfs.
fn name_of(directory: &Path) -> Outcome<String> {
    Ok(fs::read_to_string(directory.join("dm/name"))?.trim_end().to_owned())
}

/// Names of all device-mapper devices there are, by one call of the kernel's.
pub(crate) fn names() -> Outcome<HashSet<String>> {
    let listed =
        DM::new().and_then(|dm| dm.list_devices()).map_err(|e| format!("device-mapper, listing: {e}"))?;
    Ok(listed.into_iter().map(|(name, _, _)| name.to_string()).collect())
}

/// Waits until the kernel has none of these devices any more.
pub(crate) async fn wait_gone(disks: &[Disk]) -> Outcome {
    let begun = Instant::now();
    loop {
        let there = names()?;
        let left = disks.iter().filter(|disk| there.contains(&disk.device)).count();
        if left == 0 {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("{left} of {} devices did not go in {PATIENCE:?}", disks.len()).into());
        }
        tokio::time::sleep(BETWEEN_LISTINGS).await;
    }
}

/// A thin pool.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    /// Its device-mapper name.
    pub(crate) name: String,
}

impl Pool {
    /// How many data blocks are in use. Does not make the pool commit.
    pub(crate) fn used_blocks(&self) -> Outcome<u64> {
        // <transaction id> <metadata used>/<total> <data used>/<total> …
        let status = self.status()?;
        let data = status.split_ascii_whitespace().nth(2).and_then(|data| data.split_once('/'));
        Ok(data.ok_or_else(|| format!("the status of {}: {status}", self.name))?.0.parse()?)
    }

    /// Bytes of one data block.
    pub(crate) fn block_bytes(&self) -> Outcome<u64> {
        // <metadata device> <data device> <sectors a block> …
        let table = line(&self.name, DmFlags::DM_STATUS_TABLE)?;
        Ok(table.split_ascii_whitespace().nth(2).ok_or("a pool without a block size")?.parse::<u64>()? * 512)
    }

    fn status(&self) -> Outcome<String> {
        line(&self.name, DmFlags::DM_NOFLUSH)
    }

    /// Waits until nothing has been written or freed for half a second.
    pub(crate) async fn wait_at_rest(&self) -> Outcome {
        let begun = Instant::now();
        let (mut last, mut since) = (self.status()?, Instant::now());
        while since.elapsed() < Duration::from_millis(500) {
            if begun.elapsed() > PATIENCE {
                return Err(format!("{} is not at rest after {PATIENCE:?}: {last}", self.name).into());
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
            let now = self.status()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(())
    }
}

/// The pool of a thin device.
pub(crate) fn pool_of(device: &str) -> Outcome<Pool> {
    // <pool, as major:minor> <thin id>
    let table = line(device, DmFlags::DM_STATUS_TABLE)?;
    let pool =
        table.split_ascii_whitespace().next().ok_or_else(|| format!("{device} is not thin: {table}"))?;
    Ok(Pool { name: name_of(&Path::new("/sys/dev/block").join(pool))? })
}

/// The parameters of a device's only target: those of its status, or of its table if the flags say so.
fn line(device: &str, flags: DmFlags) -> Outcome<String> {
    let told = |e| format!("device-mapper, {device}: {e}");
    let id = DmName::new(device).map_err(told)?;
    let dm = DM::new().map_err(told)?;
    let (_, targets) =
        dm.table_status(&DevId::Name(id), DmOptions::default().set_flags(flags)).map_err(told)?;
    targets.into_iter().next().map(|target| target.3).ok_or_else(|| format!("{device} has no table").into())
}
