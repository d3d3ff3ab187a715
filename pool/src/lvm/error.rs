//! Why LVM2 did not do what it was asked, told from what it has said.

use std::time::Duration;

use thiserror::Error as ThisError;

/// Each names the command, the volume group or the file, and the way out.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum LvmError {
    /// It is not there, or cannot be started.
    #[error("LVM2 cannot be run ({0}): install lvm2, and run this as root")]
    NotThere(String),
    /// It had to be killed.
    #[error(
        "`lvm {command}` had not ended after {} s and was killed{}: a disk of the volume group hangs, or udevd or dmeventd does; \
         see the kernel's log",
        .after.as_secs(), if *.stuck { ", which it does not heed: it is stuck in the kernel" } else { "" }
    )]
    TimedOut {
        /// Its words.
        command: String,
        /// How long it had.
        after: Duration,
        /// Whether it is there still.
        stuck: bool,
    },
    /// It was killed, or has crashed.
    #[error("`lvm {command}` was ended by signal {signal}: run it again")]
    Killed {
        /// Its words.
        command: String,
        /// By what.
        signal: i32,
    },
    /// Another LVM2 command has the lock.
    #[error(
        "LVM2 is locked{}: another of its commands has been at work for {} s; wait for it, or end it",
        .holder.as_ref().map(|holder| format!(" by {holder}")).unwrap_or_default(), .after.as_secs()
    )]
    Locked {
        /// Process id and command of who has the lock, if that can be told.
        holder: Option<String>,
        /// How long it was waited for.
        after: Duration,
    },
    /// The volume group lacks extents.
    #[error(
        "the volume group {group} has {free} bytes free, and {needed} are needed: give it a disk (vgextend {group} DISK)"
    )]
    NoRoom {
        /// Its name.
        group: String,
        /// Bytes that are free.
        free: u64,
        /// Bytes that would be taken.
        needed: u64,
    },
    /// Something is not as it has to be.
    #[error("{0}")]
    Unfit(String),
    /// It has said no.
    #[error("`lvm {command}` failed: {said}{}", hint(.said))]
    Failed {
        /// Its words.
        command: String,
        /// Its last lines.
        said: String,
    },
    /// A report that is none.
    #[error("`lvm {command}` has reported what cannot be read: {what}")]
    Unreadable {
        /// Its words.
        command: String,
        /// What is wrong with it.
        what: String,
    },
    /// The kernel's side.
    #[error("{0}")]
    Kernel(#[from] crate::device::DeviceError),
}

impl LvmError {
    /// Whether it may go by itself.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Killed { .. } | Self::Locked { .. })
    }
}

/// Whether what LVM2 has said means that somebody else has its lock.
pub(super) fn is_locked(said: &str) -> bool {
    said.contains("Can't get lock for") || said.contains("flock failed: Resource temporarily unavailable")
}

/// The way out, for what is known.
fn hint(said: &str) -> &'static str {
    let known = [
        ("PVs are missing", ": attach the missing disk, or (its data is lost) vgreduce --removemissing"),
        ("is missing", ": attach the missing disk"),
        ("read-only", ": vgchange --permission rw makes the volume group writable"),
        ("locking type", ": the lock directory has to be writable"),
        ("Read-only file system", ": /run/lock/lvm and /etc/lvm have to be writable"),
        ("signature detected", ": if what is there is not needed, wipefs -a DEVICE, and again"),
        ("Can't open", ": somebody has the device open (lsblk, dmsetup ls)"),
        ("Permission denied", ": run this as root"),
        ("Manual repair required", ": cowshed pool repair"),
    ];
    known.iter().find(|(words, _)| said.contains(words)).map_or("", |(_, hint)| hint)
}

/// What is worth repeating of LVM2's words: not its progress, and no more than its last four lines.
pub(super) fn gist(stderr: &str, stdout: &str) -> String {
    let worth =
        |line: &&str| !line.is_empty() && !line.starts_with("WARNING: Sum of") && !line.starts_with("{");
    let lines = |text: &str| text.lines().map(str::trim).filter(worth).map(str::to_owned).collect::<Vec<_>>();
    let mut said = lines(stderr);
    if said.is_empty() {
        said = lines(stdout);
    }
    if said.is_empty() {
        return "it has said nothing".to_owned();
    }
    said[said.len().saturating_sub(4)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lvm_says_gets_a_way_out() {
        let failed =
            |said: &str| LvmError::Failed { command: "lvextend vg/pool".to_owned(), said: said.to_owned() };
        for (said, word) in [
            ("Cannot change VG vg while PVs are missing.", "vgreduce"),
            ("WARNING: Device for PV x not found; VG vg is missing PV x", "attach"),
            ("Volume group vg is read-only", "vgchange"),
            ("/run/lock/lvm/V_vg:aux: open failed: Permission denied", "root"),
        ] {
            let error = failed(said).to_string();
            assert!(error.contains(said) && error.contains(word), "{error}");
        }
        assert!(is_locked(
            "  /run/lock/lvm/V_vg: flock failed: Resource temporarily unavailable\n  Can't get lock for vg."
        ));
        assert!(!is_locked("  Volume group \"vg\" not found"));
    }

    #[test]
    fn the_gist_is_short() {
        assert_eq!(gist("", ""), "it has said nothing");
        assert_eq!(gist("\n  a\n  WARNING: Sum of all thin volume sizes\n", "x"), "a");
        assert_eq!(gist("1\n2\n3\n4\n5\n", ""), "2; 3; 4; 5");
        assert_eq!(gist("", "  out\n"), "out");
    }

    #[test]
    fn the_lock_s_holder_is_named() {
        let locked = |holder: Option<&str>| LvmError::Locked {
            holder: holder.map(str::to_owned),
            after: Duration::from_secs(10),
        };
        assert!(locked(Some("process 7 (vgs)")).to_string().contains("locked by process 7 (vgs): another"));
        assert!(locked(None).to_string().contains("LVM2 is locked: another"));
        assert!(locked(None).may_pass());
    }
}
