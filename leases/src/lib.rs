//! Which VM holds which disk: ids, the lease's states and legal moves, and the book that decides.
//!
//! Pure: no I/O, no clock, no runtime. `now` is an argument, effects are somebody else's.

mod book;
mod device;
mod id;
mod lease;

pub use book::{Acquisition, Book, BookError, Change, Difference};
pub use device::{DeviceIdentity, DeviceNumber};
pub use id::{Generation, LeaseId, LeaseIdError, SNAPSHOT_KEY_PREFIX, VM_ID_MAX_BYTES, VmId, VmIdError};
pub use lease::{Grant, Lease, Process, Spec, State, UnixMicros};
