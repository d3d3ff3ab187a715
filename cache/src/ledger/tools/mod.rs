//! What an operator can do with a ledger's file: check it, back it up, put a backup in its place.

mod backup;
mod check;
mod copy;
mod restore;
#[cfg(test)]
mod tests;

use std::path::Path;

use cowshed_pool::store::file::OpenError;
use thiserror::Error as ThisError;

pub use backup::{IfThere, backup};
pub use check::{Findings, Problem, check};
pub use restore::{MARGIN, Moved, RESTORED_AT, Restored, restore};

use crate::{exit, serve::ServeError};

/// What could not be done with a ledger. Unless it says otherwise, nothing was changed.
#[derive(Debug, ThisError)]
pub enum ToolError {
    /// It is not there.
    #[error(
        "there is no {noun} {path}: see whether the path, or [state] directory of the configuration, is right"
    )]
    Missing {
        /// Ledger or backup.
        noun: &'static str,
        /// The file.
        path: String,
    },
    /// It cannot be read.
    #[error(
        "the {noun} {path} cannot be read: {what}; run this as the user whose it is (root, as installed)"
    )]
    Unreadable {
        /// Ledger or backup.
        noun: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        what: String,
    },
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is damaged, so there is no backup of it.
    #[error(
        "the ledger {path} is damaged: {what}. No backup was made of it: keep the ones that there are, and see what \
         `cowshed ledger check {path}` says"
    )]
    NoBackup {
        /// The file.
        path: String,
        /// The first of its problems.
        what: String,
    },
    /// The backup is damaged, newer, or something else.
    #[error(
        "{path} cannot be put in the ledger's place: {what}. Nothing was changed: look for another backup; \
         `cowshed ledger check FILE` says whether one is sound"
    )]
    NotRestorable {
        /// The backup.
        path: String,
        /// Why.
        what: String,
    },
    /// A file cannot be written.
    #[error("{path} cannot be written: {what}; {way_out}")]
    NotWritten {
        /// The file or directory.
        path: String,
        /// What the system said.
        what: String,
        /// What to do.
        way_out: &'static str,
    },
    /// There is something in the place of the backup that is to be made.
    #[error("no backup was made: {path} {what}")]
    Destination {
        /// What is in its place.
        path: String,
        /// What it is, and what to do.
        what: &'static str,
    },
    /// The service has the ledger.
    #[error(
        "process {pid} has the state directory {directory}: stop the service first (systemctl stop cowshed.socket \
         cowshed.service). Nothing was changed"
    )]
    InUse {
        /// Its process id, or "unknown".
        pid: String,
        /// The state directory.
        directory: String,
    },
    /// The state directory cannot be used.
    #[error("{0}")]
    State(String),
    /// The present ledger is aside, and the restored one not in its place.
    #[error(
        "{path} cannot be moved: {what}. The restore is half done, and the service does not start: run the same command \
         again. Nothing is lost: what was there before has {path}, or {path}.before-restore-…, as its name"
    )]
    HalfDone {
        /// The ledger.
        path: String,
        /// What the system said.
        what: String,
    },
}

impl ToolError {
    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Missing { .. } | Self::Unreadable { .. } | Self::State(_) => exit::STATE_UNUSABLE,
            Self::Open(OpenError::Io { .. } | OpenError::Missing { .. }) | Self::HalfDone { .. } => {
                exit::STATE_UNUSABLE
            }
            Self::Open(OpenError::Damaged { .. } | OpenError::Newer { .. } | OpenError::Restoring { .. })
            | Self::NoBackup { .. }
            | Self::NotRestorable { .. } => exit::LEDGER_DAMAGED,
            Self::InUse { .. } => exit::STATE_IN_USE,
            Self::NotWritten { .. } | Self::Destination { .. } => exit::FAILURE,
        }
    }
}

impl From<ServeError> for ToolError {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::InUse { pid, directory } => Self::InUse { pid, directory },
            other => Self::State(other.to_string()),
        }
    }
}

/// Makes what was renamed in a directory durable.
fn sync_directory_of(path: &Path) -> std::io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}
