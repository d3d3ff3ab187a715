//! What a refused write means to a caller.

use cowshed_leases::BookError;
use cowshed_pool::store::WriteError;

use crate::error::{Error, Reason};

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Full(path) => Self::new(Reason::StateDirectoryFull, message).with("path", path),
            WriteError::NotWritten { path, .. } => {
                Self::new(Reason::LedgerError, format!("the ledger {message}")).with("path", path)
            }
            WriteError::Busy => Self::new(Reason::NotReady, message),
            WriteError::Stopping => Self::new(Reason::Stopping, message),
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
                Reason::Released,
                format!(
                    "{message}: it was released while its disk was being made; acquire again if it is wanted still"
                ),
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
