//! What only the pool's metadata itself tells: which thin ids there are, and how many were ever made.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    process::Command,
};

use nix::libc;

use super::{DeviceError, table::DeviceNumber};
use crate::tree::ThinId;

/// Byte of the superblock where its `time` is: 32 bits, little-endian (kernel: `struct thin_disk_superblock`).
const TIME: usize = 44;
const BLOCK: usize = 4096;

/// All thin ids, from the pool's reserved metadata snapshot.
pub(super) fn thin_ls(metadata: DeviceNumber) -> Result<BTreeSet<ThinId>, DeviceError> {
    let path = node(metadata);
    let failed = |what: &dyn std::fmt::Display| {
        DeviceError::Helper(format!(
            "thin_ls of {path}: {what}; it is in the package thin-provisioning-tools"
        ))
    };
    let listed = Command::new("thin_ls").args(["-m", "--no-headers", "-o", "DEV", &path]).output();
    let listed = listed.map_err(|e| failed(&e))?;
    if !listed.status.success() {
        return Err(failed(&String::from_utf8_lossy(&listed.stderr).trim()));
    }
    let text = String::from_utf8_lossy(&listed.stdout);
    text.split_whitespace()
        .map(|id| id.parse().map(ThinId).map_err(|_| failed(&format!("{id:?} is no id"))))
        .collect()
}

/// What thin_check has against the pool's reserved metadata snapshot; `None` if nothing.
pub(super) fn thin_check(metadata: DeviceNumber) -> Result<Option<String>, DeviceError> {
    let path = node(metadata);
    let checked = Command::new("thin_check").args(["-m", &path]).output();
    let checked = checked.map_err(|e| {
        DeviceError::Helper(format!(
            "thin_check of {path}: {e}; it is in the package thin-provisioning-tools"
        ))
    })?;
    if checked.status.success() {
        return Ok(None);
    }
    let said = [checked.stderr, checked.stdout].concat();
    let said: Vec<String> = String::from_utf8_lossy(&said).lines().take(5).map(str::to_owned).collect();
    Ok(Some(said.join("; ")))
}

/// How many snapshots were ever made in the pool: it counts in 24 bits, and corrupts itself beyond.
///
/// # Errors
/// If the metadata device cannot be read.
pub fn superblock_time(metadata: DeviceNumber) -> Result<u32, DeviceError> {
    let path = node(metadata);
    let read = || -> io::Result<u32> {
        // Past the page cache, which knows nothing of what the kernel's driver writes.
        let mut file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
        let mut space = vec![0; 2 * BLOCK];
        let start = space.as_ptr().align_offset(BLOCK);
        let block = &mut space[start..start + BLOCK];
        file.read_exact(block)?;
        let mut time = [0; 4];
        time.copy_from_slice(&block[TIME..TIME + 4]);
        Ok(u32::from_le_bytes(time))
    };
    read().map_err(|e| DeviceError::Refused { what: format!("reading {path}"), error: e.to_string() })
}

/// Where a device can be opened.
pub(super) fn node(device: DeviceNumber) -> String {
    format!("/dev/block/{}:{}", device.major, device.minor)
}
