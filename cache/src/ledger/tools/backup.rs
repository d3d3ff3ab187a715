//! A backup: one file with all that is in the ledger at one moment, checked before it has its name.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use cowshed_pool::store::file::{OpenError, beside};
use tempfile::NamedTempFile;

use super::{Findings, ToolError, check::examine, copy::PrivateCopy, sync_directory_of};

const MAKE_ROOM: &str = "name a file in a directory that is there, is writable, and has free space";

/// What to do with a file that has the backup's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfThere {
    /// Leave it alone and make no backup.
    Keep,
    /// Put the backup in its place.
    Replace,
}

/// Copies the ledger to `destination`, which has its name only when it is whole, sound and durable; the service may run.
///
/// # Errors
/// If the ledger cannot be read or is damaged, if something is in the way, or if it cannot be written. Then there is no
/// backup, and what was there before is there still.
pub fn backup(ledger: &Path, destination: &Path, if_there: IfThere) -> Result<Findings, ToolError> {
    expect_free(ledger, destination, if_there)?;
    let damaged = |what| ToolError::NoBackup { path: ledger.display().to_string(), what };
    let copy = PrivateCopy::of_ledger(ledger)?;
    copy.fold(ledger).map_err(|error| match error {
        OpenError::Damaged { what, .. } => damaged(what),
        other => other.into(),
    })?;
    let not_written = |e: io::Error| ToolError::NotWritten {
        path: destination.display().to_string(),
        what: e.to_string(),
        way_out: MAKE_ROOM,
    };
    // Readable by its owner only; gone if it gets no name.
    let mut made = unnamed_beside(destination).map_err(not_written)?;
    let copied = File::open(copy.path()).and_then(|mut from| io::copy(&mut from, &mut made));
    copied.and_then(|_| made.as_file().sync_all()).map_err(not_written)?;

    let findings = examine(&PrivateCopy::of(made.path(), "backup")?, ledger)?.0;
    if let Some(problem) = findings.problems.first() {
        return Err(damaged(problem.what.clone()));
    }
    let named = match if_there {
        IfThere::Replace => made.persist(destination),
        IfThere::Keep => made.persist_noclobber(destination),
    };
    named.map_err(|e| not_written(e.error))?;
    sync_directory_of(destination).map_err(not_written)?;
    Ok(findings)
}

fn unnamed_beside(destination: &Path) -> io::Result<NamedTempFile> {
    let name = destination.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let directory = destination.parent().unwrap_or(Path::new("/"));
    tempfile::Builder::new().prefix(&format!("{name}.")).suffix(".partial").tempfile_in(directory)
}

/// Whether the backup can have its name. Looked at first, so that nothing is copied in vain.
fn expect_free(ledger: &Path, destination: &Path, if_there: IfThere) -> Result<(), ToolError> {
    let refuse = |path: &Path, what| Err(ToolError::Destination { path: path.display().to_string(), what });
    if let Ok(there) = fs::metadata(destination) {
        let same = |ledger: &fs::Metadata| (ledger.dev(), ledger.ino()) == (there.dev(), there.ino());
        if fs::metadata(ledger).is_ok_and(|ledger| same(&ledger)) {
            return refuse(destination, "is the ledger itself: name another file");
        }
        if !there.is_file() {
            return refuse(destination, "is there and is not a file: name a file in it, or another one");
        }
    }
    if if_there == IfThere::Keep && destination.symlink_metadata().is_ok() {
        return refuse(destination, "is there already: name another file, or say --force to replace it");
    }
    for suffix in ["-wal", "-shm", "-journal"] {
        let beside = beside(destination, suffix);
        if beside.symlink_metadata().is_ok() {
            // SQLite would replay it into the backup.
            return refuse(
                &beside,
                "is part of a database that was there: move it away, or name another file",
            );
        }
    }
    Ok(())
}
