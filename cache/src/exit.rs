//! Exit statuses of the `cowshed` command. Kept for ever: scripts depend on them.

use tonic::Code;

/// Anything that has no status of its own.
pub const FAILURE: u8 = 1;
/// Wrong command line, or INVALID_ARGUMENT.
pub const USAGE: u8 = 2;
/// The service does not answer on its socket.
pub const NO_SERVICE: u8 = 20;
/// `serve`, `ledger`: the configuration is wrong.
pub const CONFIGURATION: u8 = 21;
/// `serve`, `ledger`: another `cowshed serve` has the state directory.
pub const STATE_IN_USE: u8 = 22;
/// `snapshotter`, `ledger`: the state directory cannot be used (missing, read-only, full).
pub const STATE_UNUSABLE: u8 = 23;
/// `ledger`: the ledger is damaged or newer. (`serve` stays up, in rescue mode.)
pub const LEDGER_DAMAGED: u8 = 24;
/// `serve`: the ledger's disk failed while running.
pub const LEDGER_FAILED: u8 = cowshed_pool::store::DISK_FAILED;
/// `serve`: a socket or address cannot be listened on.
pub const LISTEN: u8 = 26;

/// `pool`: its metadata are damaged.
pub const POOL_DAMAGED: u8 = 27;
/// `pool`: something is not as it has to be (as FAILED_PRECONDITION).
pub const UNFIT: u8 = 6;
/// `pool`: the volume group has no room (as RESOURCE_EXHAUSTED).
pub const FULL: u8 = 7;
/// `pool`: it may pass, as a lock of LVM2's (as UNAVAILABLE).
pub const AGAIN: u8 = 8;
/// `pool`: LVM2 had to be killed (as DEADLINE_EXCEEDED).
pub const LATE: u8 = 9;

/// The status for an error of the service.
pub fn for_code(code: Code) -> u8 {
    match code {
        Code::Ok => 0,
        Code::InvalidArgument => USAGE,
        Code::NotFound => 3,
        Code::AlreadyExists => 4,
        Code::PermissionDenied | Code::Unauthenticated => 5,
        Code::FailedPrecondition => UNFIT,
        Code::ResourceExhausted => FULL,
        Code::Unavailable => AGAIN,
        Code::DeadlineExceeded => LATE,
        Code::DataLoss => 10,
        Code::Cancelled
        | Code::Unknown
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal => FAILURE,
    }
}
