//! A private copy of a ledger, also of one that is being written. The original's files, log and index are only read:
//! to open them with SQLite would replay the log, or at least write its index.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use cowshed_pool::store::file::{OpenError, beside};
use rusqlite::{
    Connection, OpenFlags,
    backup::{Backup, StepResult},
};
use tempfile::TempDir;

use super::{super::schema::FORMAT, ToolError};

/// How often a file that changes meanwhile is copied once more.
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(20);
/// A log's header, with the two salts that tell one use of the log from the next (sqlite.org/fileformat2.html#walformat).
const LOG_HEADER: usize = 32;
const MAKE_ROOM: &str = "free space there, or name another directory in TMPDIR";

/// A file that nobody else opens, and its log; gone when this is dropped.
pub(super) struct PrivateCopy {
    directory: TempDir,
}

impl PrivateCopy {
    /// Copies a ledger. If it is missing because a restore was interrupted, the error says so.
    pub(super) fn of_ledger(path: &Path) -> Result<Self, ToolError> {
        match Self::of(path, FORMAT.noun) {
            Err(missing @ ToolError::Missing { .. }) => {
                // A directory that is not there either has nothing left in it.
                match FORMAT.expect_nothing_left(path) {
                    Err(left @ (OpenError::Restoring { .. } | OpenError::Damaged { .. })) => Err(left.into()),
                    _ => Err(missing),
                }
            }
            copy => copy,
        }
    }

    /// Copies `path`, which people call `noun`.
    pub(super) fn of(path: &Path, noun: &'static str) -> Result<Self, ToolError> {
        let copy = Self::empty()?;
        for _ in 0..TRIES {
            if copy.copy_files(path, noun)? {
                return Ok(copy);
            }
            pause();
        }
        drop(copy);
        Self::while_written(path)
    }

    /// Has SQLite copy `path`, as one of those that have it open. Only when somebody writes it so fast that its files
    /// cannot be copied: then its log is replayed already, and its index is in use.
    pub(super) fn while_written(path: &Path) -> Result<Self, ToolError> {
        let sqlite = |e: rusqlite::Error| FORMAT.sqlite(path, &e);
        let copy = Self::empty()?;
        let from = FORMAT.open_for_reading(path)?;
        let mut to = Connection::open(copy.path()).map_err(sqlite)?;
        let backup = Backup::new(&from, &mut to).map_err(sqlite)?;
        for _ in 0..TRIES {
            // All pages in one step are of one moment.
            if backup.step(-1).map_err(sqlite)? == StepResult::Done {
                return Ok(copy);
            }
            pause();
        }
        let what = "another program has locked it, try again when that has finished".to_owned();
        Err(ToolError::Unreadable { noun: FORMAT.noun, path: path.display().to_string(), what })
    }

    fn empty() -> Result<Self, ToolError> {
        let made = tempfile::Builder::new().prefix("cowshed-ledger-").tempdir();
        made.map(|directory| Self { directory }).map_err(|e| not_written(&std::env::temp_dir(), &e))
    }

    /// The copied file.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("ledger.db")
    }

    /// Moves the log into the copied file, which is then one file that can be read without making others.
    pub(super) fn fold(&self, original: &Path) -> Result<(), OpenError> {
        let folded = Connection::open_with_flags(self.path(), OpenFlags::SQLITE_OPEN_READ_WRITE).and_then(
            |connection| {
                connection.pragma_update(None, "journal_mode", "DELETE")?;
                connection.close().map_err(|(_, error)| error)
            },
        );
        folded.map_err(|e| FORMAT.sqlite(original, &e))
    }

    /// Copies the file, then its log; says whether the two belong together.
    ///
    /// What a checkpoint moves into the file while that is copied is still in the log, so long as that was not begun
    /// anew meanwhile; then its header has changed. A commit that is half copied is none: its last frame is missing.
    fn copy_files(&self, path: &Path, noun: &'static str) -> Result<bool, ToolError> {
        let failed = |e: io::Error| unreadable(noun, path, &e);
        let before = Stamp::of(path).map_err(failed)?;
        let (log, copied_log) = (beside(path, "-wal"), beside(&self.path(), "-wal"));
        copy_file(path, noun, &self.path())?;
        if log.exists() {
            match copy_file(&log, noun, &copied_log) {
                // Gone since, as the service's end does it.
                Err(ToolError::Missing { .. }) => return Ok(false),
                other => other?,
            }
        } else if copied_log.exists() {
            fs::remove_file(&copied_log).map_err(|e| not_written(&copied_log, &e))?;
        }
        Ok(Stamp::of(path).map_err(failed)? == before)
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "an operator's command: no task of the service's is on this thread"
)]
fn pause() {
    std::thread::sleep(PAUSE);
}

/// What is the same as long as file and log belong together.
#[derive(PartialEq, Eq)]
struct Stamp {
    /// Device and inode: a restore puts another file there.
    file: (u64, u64),
    /// Inode and header of the log, if it has one.
    log: Option<(u64, Vec<u8>)>,
    /// Without a log, size and time of the last change tell whether somebody has written.
    written: Option<(u64, i64, i64)>,
}

impl Stamp {
    fn of(path: &Path) -> io::Result<Self> {
        let file = fs::metadata(path)?;
        let log = match File::open(beside(path, "-wal")) {
            Ok(log) => {
                let mut header = Vec::new();
                let inode = log.metadata()?.ino();
                log.take(LOG_HEADER as u64).read_to_end(&mut header)?;
                Some((inode, header))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let written = log.is_none().then(|| (file.len(), file.mtime(), file.mtime_nsec()));
        Ok(Self { file: (file.dev(), file.ino()), log, written })
    }
}

/// Copies one file; who may read the copy is not what it was for the original.
fn copy_file(from: &Path, noun: &'static str, to: &Path) -> Result<(), ToolError> {
    let mut source = File::open(from).map_err(|e| unreadable(noun, from, &e))?;
    let mut options = File::options();
    let target = options.write(true).create(true).truncate(true).mode(0o600).open(to);
    let mut target = target.map_err(|e| not_written(to, &e))?;
    match io::copy(&mut source, &mut target) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            Err(not_written(to, &error))
        }
        Err(error) => Err(unreadable(noun, from, &error)),
    }
}

fn unreadable(noun: &'static str, path: &Path, error: &io::Error) -> ToolError {
    let path = path.display().to_string();
    match error.kind() {
        io::ErrorKind::NotFound => ToolError::Missing { noun, path },
        _ => ToolError::Unreadable { noun, path, what: error.to_string() },
    }
}

fn not_written(path: &Path, error: &io::Error) -> ToolError {
    ToolError::NotWritten { path: path.display().to_string(), what: error.to_string(), way_out: MAKE_ROOM }
}
