//! A containerd snapshotter on a thin pool.
//!
//! `tree` decides (pure), `store` remembers, `device` does, `snapshotter` puts the three in the order
//! intent → effect → confirmation (`make` for Prepare and View), `service` speaks containerd's Snapshots API. Beside them
//! `standing` opens the store, when it can be, `start` compares and repairs, `rest` deactivates what was committed, `reclaim` deletes what was removed, and leaves
//! alone what is `busy`. `lvm` makes and extends the pool itself.

mod busy;
#[cfg(test)]
mod crash_tests;
pub mod device;
mod error;
#[cfg(test)]
mod fake;
mod filter;
mod heirs;
#[cfg(test)]
mod hold_tests;
mod ids;
pub mod lvm;
mod make;
mod metrics;
mod reclaim;
mod rest;
mod service;
mod size;
mod snapshotter;
mod standing;
mod start;
#[cfg(test)]
mod start_tests;
pub mod store;
mod traffic;
mod tree;
mod trim;

pub use error::{Code, Error, Result};
pub use metrics::Metrics;
pub use service::{Api, IsHeld, SnapshotsServer};
pub use size::Bytes;
pub use snapshotter::{Health, Held, Settings, Snapshotter};
pub use standing::Standing;
pub use tree::{Kind, Snapshot, SnapshotId, ThinId};
pub use trim::Trim;
