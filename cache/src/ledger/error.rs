//! What a refused write means to a caller.

use std::time::Duration;

use cowshed_leases::BookError;
use cowshed_pool::store::WriteError;

use crate::error::{Error, Reason};

/// When it is worth another try while too many writes wait; the message says the same.
const AGAIN: Duration = Duration::from_secs(1);

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Full(path) => Self::new(Reason::StateDirectoryFull, message).with("path", path),
            WriteError::NotWritten { path, .. } => {
                Self::new(Reason::LedgerError, format!("the ledger {message}")).with("path", path)
            }
            WriteError::Busy => Self::new(Reason::NotReady, message).retry_after(AGAIN),
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
            BookError::NotReleasing(id) | BookError::Reused(id) | BookError::NoSpare(id) => {
                Self::new(Reason::LedgerError, message).with("lease_id", id)
            }
            BookError::Gone(id) => {
                Self::new(Reason::LeaseNotFound, format!("{message} (any more); acquire again")).with("lease_id", id)
            }
            BookError::Released(id) => Self::new(
                Reason::LeaseReleased,
                format!("{message}, so it cannot be renewed; acquire again if a disk is wanted still"),
            )
            .with("lease_id", id),
            BookError::Abandoned(id) => Self::new(
                Reason::LeaseReleased,
                format!("{message}: its disk goes when its device is closed; acquire again if one is wanted still"),
            )
            .with("lease_id", id),
            BookError::NotShared { device, asked } => Self::new(
                Reason::NotReady,
                format!("{message}: it was removed while the lease was being made; acquire again"),
            )
            .with("device", device)
            .with("lease_id", asked),
            BookError::Doubtful(id) => Self::new(
                Reason::NotReady,
                format!("{message}, and its device was not looked at; renew it once more"),
            )
            .with("lease_id", id),
            BookError::StillPreparing(id) => {
                Self::new(Reason::NotReady, format!("{message}; try again")).with("lease_id", id)
            }
            BookError::RequestOver { request, lease } => Self::new(
                Reason::RequestOver,
                format!("{message}; acquire with a new request_id if a disk is wanted again"),
            )
            .with("request_id", request)
            .with("lease_id", lease),
            BookError::RequestReused { request, .. } => Self::new(
                Reason::RequestIdReused,
                format!("{message}; a request_id names one request only"),
            )
            .with("field", "request_id")
            .with("request_id", request),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn who_is_to_try_again_is_told_when() {
        let error = Error::from(WriteError::Busy);
        assert!(error.to_string().contains("in a second"), "{error}");
        assert_eq!(error.to_status().get_details_retry_info().unwrap().retry_delay, Some(AGAIN));
    }
}
