//! Filesystems, made and grown by the distribution's own tools: once per size, never per snapshot.

use std::{path::Path, process::Command};

use super::DeviceError;

/// The seam to mkfs and its kin; tests put a fake here.
pub(crate) trait Filesystem: Send + Sync {
    /// Its name in mounts.
    fn name(&self) -> &'static str;
    /// Makes an empty filesystem on a fresh device; `zeroed`: what is not written reads as zeros, also beside what is.
    fn make(&self, path: &str, zeroed: bool) -> Result<(), DeviceError>;
    /// Makes a filesystem, that nobody has mounted, as large as its device.
    fn grow(&self, path: &str) -> Result<(), DeviceError>;
    /// Whether it was not unmounted in order, so that mounting it would have to write.
    fn needs_recovery(&self, path: &str) -> Result<bool, DeviceError>;
}

/// ext4, by e2fsprogs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tools;

/// Byte of the device where ext4's superblock is, and its fields (kernel: `struct ext4_super_block`).
const SUPERBLOCK: u64 = 1024;
const MAGIC: usize = 0x38;
const INCOMPATIBLE: usize = 0x60;
const NEEDS_RECOVERY: u32 = 4;

impl Filesystem for Tools {
    fn name(&self) -> &'static str {
        "ext4"
    }

    fn make(&self, path: &str, zeroed: bool) -> Result<(), DeviceError> {
        // Inode tables and journal are zeros already: neither mkfs nor a guest's kernel has to write them.
        let tables = if zeroed {
            "nodiscard,assume_storage_prezeroed=1"
        } else {
            "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
        };
        // Every mount reads an orphan file from end to end, and kernels before 5.15 do not know it.
        let make =
            |options: &[&str]| run("mkfs.ext4", &[&["-q", "-F", "-m", "0"], options, &[path]].concat());
        if make(&["-O", "^orphan_file", "-E", tables]).is_err() {
            // e2fsprogs before 1.47 know neither.
            make(&["-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"])?;
        }
        // A container's root directory has no lost+found; fsck makes it when it needs it.
        run("debugfs", &["-w", "-R", "rmdir lost+found", path])
    }

    fn grow(&self, path: &str) -> Result<(), DeviceError> {
        run("resize2fs", &["-f", path])
    }

    fn needs_recovery(&self, path: &str) -> Result<bool, DeviceError> {
        let read = || -> std::io::Result<[u8; 1024]> {
            use std::os::unix::fs::FileExt as _;
            let mut superblock = [0; 1024];
            std::fs::File::open(Path::new(path))?.read_exact_at(&mut superblock, SUPERBLOCK)?;
            Ok(superblock)
        };
        let superblock = read()
            .map_err(|e| DeviceError::Refused { what: format!("reading {path}"), error: e.to_string() })?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| superblock[at + n]));
        Ok(word(MAGIC) & 0xffff == 0xef53 && word(INCOMPATIBLE) & NEEDS_RECOVERY != 0)
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), DeviceError> {
    let failed = |what: &dyn std::fmt::Display| {
        DeviceError::Helper(format!(
            "`{program} {}`: {what}; it is in the package e2fsprogs",
            arguments.join(" ")
        ))
    };
    let ran = Command::new(program).args(arguments).output().map_err(|e| failed(&e))?;
    if ran.status.success() { Ok(()) } else { Err(failed(&String::from_utf8_lossy(&ran.stderr).trim())) }
}
