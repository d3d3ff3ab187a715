//! Which VM holds which disk: ids, the lease's states and legal moves, and the book that decides.
//!
//! Pure: no I/O, no clock, no runtime. `now` is an argument, effects are somebody else's.

mod book;
mod device;
mod draft;
#[cfg(test)]
mod explore;
mod id;
mod lease;
mod moves;
mod time;

pub use book::{Book, Change, Stored, Tombstone};
pub use device::{DeviceIdentity, DeviceNumber, Seen};
pub use id::{
    Generation, LeaseId, LeaseIdError, REQUEST_ID_MAX_BYTES, RequestId, RequestIdError, Revision,
    SNAPSHOT_KEY_PREFIX, Tenant, VM_ID_MAX_BYTES, VmId, VmIdError,
};
pub use lease::{Failure, Grant, Lease, Mode, Process, Scratch, ScratchGrant, Spec, State, Suspicion, Term};
pub use moves::{
    Acquisition, Ask, BookError, Difference, Grace, Kind, Release, Releasing, Request, Share, Spare,
};
pub use time::{BootId, BootIdError, Moment, Ttl, TtlError, UnixMicros, Uptime};
