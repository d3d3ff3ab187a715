//! What a thin pool does when it is full, and with discards; and the kernel module's patience with full pools.

use std::{fmt, fs, io, path::Path};

use super::table::Target;

/// The module's patience, in seconds: then what waits for room in a full pool fails. 0: never. For all pools of the host.
pub const NO_SPACE_TIMEOUT: &str = "/sys/module/dm_thin_pool/parameters/no_space_timeout";

/// What becomes of writes that need new blocks when there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// They wait.
    Queue,
    /// They fail.
    Error,
}

impl fmt::Display for WhenFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queue => "queue",
            Self::Error => "error",
        })
    }
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discards {
    /// They give blocks back to the pool, and are passed to the disks below.
    PassedDown,
    /// They give blocks back to the pool.
    Kept,
    /// Nothing.
    Ignored,
}

impl fmt::Display for Discards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PassedDown => "passed down",
            Self::Kept => "kept in the pool",
            Self::Ignored => "ignored",
        })
    }
}

/// What a pool does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// When it is full.
    pub when_full: WhenFull,
    /// With discards.
    pub discards: Discards,
}

/// Reads a `thin-pool`'s status.
///
/// # Errors
/// Says what it is instead; a pool that has failed tells nothing.
pub fn parse(status: &[Target]) -> Result<Behaviour, String> {
    let [(_, _, kind, status)] = status else {
        return Err(format!("its table has {} targets", status.len()));
    };
    let words: Vec<&str> = status.split_ascii_whitespace().collect();
    let has = |word: &str| words.contains(&word);
    let when_full = match (has("queue_if_no_space"), has("error_if_no_space")) {
        (true, false) => Some(WhenFull::Queue),
        (false, true) => Some(WhenFull::Error),
        _ => None,
    };
    let discards = match (has("discard_passdown"), has("no_discard_passdown"), has("ignore_discard")) {
        (true, false, false) => Some(Discards::PassedDown),
        (false, true, false) => Some(Discards::Kept),
        (false, false, true) => Some(Discards::Ignored),
        _ => None,
    };
    match (when_full, discards) {
        (Some(when_full), Some(discards)) if kind == "thin-pool" => Ok(Behaviour { when_full, discards }),
        _ => Err(format!("its status is {kind:?} {status:?}")),
    }
}

/// The module's patience, in seconds.
///
/// # Errors
/// If the module is not loaded.
pub fn no_space_timeout() -> io::Result<u64> {
    read_timeout(Path::new(NO_SPACE_TIMEOUT))
}

/// Has the module wait without end.
///
/// # Errors
/// If it cannot be told, as in a unit with `ProtectKernelTunables=`.
pub fn wait_without_end() -> io::Result<()> {
    fs::write(NO_SPACE_TIMEOUT, "0")
}

fn read_timeout(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("it says {text:?}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn status_words() {
        let parsed =
            |words: &str| parse(&[(0, 8, "thin-pool".to_owned(), format!("0 1/2 3/4 - rw {words} - 1024"))]);
        let both = |when_full, discards| Ok(Behaviour { when_full, discards });
        assert_eq!(parsed("discard_passdown queue_if_no_space"), both(WhenFull::Queue, Discards::PassedDown));
        assert_eq!(parsed("no_discard_passdown error_if_no_space"), both(WhenFull::Error, Discards::Kept));
        assert_eq!(parsed("ignore_discard queue_if_no_space"), both(WhenFull::Queue, Discards::Ignored));
        assert!(parsed("queue_if_no_space").is_err());
        assert!(parse(&[(0, 8, "thin-pool".to_owned(), "Fail".to_owned())]).is_err());
        assert!(parse(&[]).is_err());
    }

    #[test]
    fn the_module_s_patience() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, expected) in [("60\n", Some(60)), ("0", Some(0)), ("never", None)] {
            fs::write(file.path(), text).unwrap();
            assert_eq!(read_timeout(file.path()).ok(), expected, "{text}");
        }
    }
}
