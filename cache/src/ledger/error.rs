//! What is wrong with a ledger, and what to do about it.

use std::{io, path::Path};

use cowshed_leases::BookError;
use thiserror::Error as ThisError;

use crate::error::{Error, Reason};

/// A ledger that cannot be opened. Nothing was changed.
#[derive(Debug, ThisError)]
pub enum OpenError {
    /// Its contents are not what was written.
    #[error(
        "the ledger {path} is damaged: {what}. It is left as it is, for it is all that says which VM holds which disk: \
         put back a backup, or, only if no VM runs on this host, move it away and start with none"
    )]
    Damaged {
        /// The file.
        path: String,
        /// What was found.
        what: String,
    },
    /// A later version has written it.
    #[error(
        "the ledger {path} has format {found}, this version knows {known}: install the version that wrote it"
    )]
    Newer {
        /// The file.
        path: String,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The operating system refused.
    #[error("the ledger {path} cannot be opened: {what}; check that its directory is writable and not full")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        what: String,
    },
}

impl OpenError {
    pub(super) fn damaged(path: &Path, what: impl ToString) -> Self {
        Self::Damaged { path: path.display().to_string(), what: what.to_string() }
    }

    pub(super) fn io(path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { path: path.display().to_string(), what: source.into().to_string() }
    }

    /// Tells a damaged file from one that cannot be reached.
    pub(super) fn sqlite(path: &Path, error: &rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match error.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) => Self::damaged(path, error),
            Some(_) => Self::Io { path: path.display().to_string(), what: error.to_string() },
            None => Self::damaged(path, error),
        }
    }
}

impl From<BookError> for Error {
    fn from(error: BookError) -> Self {
        let message = error.to_string();
        match error {
            BookError::Conflict { vm, lease, differences } => {
                let list: Vec<String> = differences
                    .iter()
                    .map(|d| {
                        format!("{} is {:?} in the lease, {:?} in the request", d.field, d.held, d.asked)
                    })
                    .collect();
                let fields: Vec<&str> = differences.iter().map(|d| d.field).collect();
                Self::new(
                    Reason::SpecConflict,
                    format!("{message}: {}; release it first, or ask for the same again", list.join(", ")),
                )
                .with("vm_id", vm)
                .with("lease_id", lease)
                .with("differs", fields.join(","))
            }
            BookError::NotPreparing(id) => Self::new(
                Reason::Stopping,
                format!("{message}: it was released while its disk was being made; acquire again"),
            )
            .with("lease_id", id),
            BookError::DeviceTaken { device, owner, .. } => Self::new(
                Reason::DeviceMismatch,
                format!("{message}: the snapshotter has handed it out twice"),
            )
            .with("device", device)
            .with("lease_id", owner),
            BookError::NotReleasing(id) | BookError::Reused(id) => {
                Self::new(Reason::LedgerError, message).with("lease_id", id)
            }
        }
    }
}
