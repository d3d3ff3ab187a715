//! Who has a device open, as far as /proc and /sys tell: processes, mounts in any mount namespace, devices on top of it.

use std::{
    collections::BTreeSet,
    fs,
    os::linux::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use cowshed_leases::DeviceNumber;
use nix::sys::stat;

/// Somebody who keeps a device open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A process has it open.
    Process {
        /// Its id.
        pid: u32,
        /// Its command, as the kernel has it (15 bytes at most).
        command: String,
    },
    /// It is mounted there.
    Mount(String),
    /// Another device is made of it.
    Device(String),
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Process { pid, command } => write!(f, "{command} (pid {pid})"),
            Self::Mount(directory) => write!(f, "mounted on {directory}"),
            Self::Device(name) => write!(f, "device {name}"),
        }
    }
}

/// All that are found. Blocks: a look at every file of every process.
pub(super) fn of(device: DeviceNumber) -> Vec<Holder> {
    let mut holders = BTreeSet::new();
    let mut namespaces = BTreeSet::new();
    for process in entries(Path::new("/proc")) {
        let Some(pid) = name(&process).parse::<u32>().ok() else { continue };
        if entries(&process.join("fd")).iter().any(|file| is(file, device)) {
            let command = fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned();
            holders.insert(Holder::Process { pid, command });
        }
        // One look for each mount namespace; one that cannot be told apart is looked at as well.
        let namespace = fs::read_link(process.join("ns/mnt")).unwrap_or_else(|_| process.clone());
        if namespaces.insert(namespace) {
            holders
                .extend(mounts(&fs::read_to_string(process.join("mountinfo")).unwrap_or_default(), device));
        }
    }
    for holder in entries(&PathBuf::from(format!("/sys/dev/block/{device}/holders"))) {
        let dm = fs::read_to_string(holder.join("dm/name")).map(|text| text.trim_end().to_owned());
        holders.insert(Holder::Device(dm.unwrap_or_else(|_| name(&holder))));
    }
    holders.into_iter().collect()
}

/// What is not there (any more) has no entries.
fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is(file: &Path, device: DeviceNumber) -> bool {
    // Sockets and pipes have no path, and are most of all files.
    fs::read_link(file).is_ok_and(|target| target.is_absolute())
        && fs::metadata(file).is_ok_and(|found| {
            let rdev = found.st_rdev();
            found.st_mode() & 0o170_000 == 0o060_000
                && (stat::major(rdev), stat::minor(rdev)) == (device.major.into(), device.minor.into())
        })
}

/// Where a mountinfo says that the device is mounted.
fn mounts(mountinfo: &str, device: DeviceNumber) -> BTreeSet<Holder> {
    let number = device.to_string();
    let of_device = |line: &&str| line.split(' ').nth(2) == Some(number.as_str());
    let directory = |line: &str| line.split(' ').nth(4).map(|field| Holder::Mount(unescape(field)));
    mountinfo.lines().filter(of_device).filter_map(directory).collect()
}

/// mountinfo writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number() {
        let text = "36 35 253:5 / /mnt/a\\040b rw,noatime shared:1 - ext4 /dev/dm-5 rw\n\
                    37 35 253:50 / /other rw - ext4 /dev/dm-50 rw\n\
                    38 35 253:5 /sub /again rw - ext4 /dev/dm-5 rw\nnonsense\n";
        let found = mounts(text, DeviceNumber { major: 253, minor: 5 });
        let expected = ["/again", "/mnt/a b"].map(|directory| Holder::Mount(directory.to_owned()));
        assert!(found.iter().eq(expected.iter()), "{found:?}");
    }

    #[test]
    fn a_device_that_nobody_has_has_no_holders() {
        assert_eq!(of(DeviceNumber { major: 511, minor: 1_048_575 }), []);
    }
}
