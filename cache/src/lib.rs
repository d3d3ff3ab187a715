//! Cowshed, the service: a host's containerd client, images, acquire, release, reclaim, RPC, metrics, configuration and
//! command line. The crates `leases` and `gc` decide; this one carries out.

pub mod acquire;
pub mod admission;
pub mod audit;
pub mod cli;
mod clock;
pub mod config;
pub mod containerd;
pub mod cosign;
pub mod crowd;
mod disks;
pub mod drain;
pub mod error;
pub mod evict;
pub mod exit;
#[cfg(test)]
mod fakes;
mod flights;
mod identity;
pub mod image;
pub mod keeping;
pub mod kernel;
pub mod layer;
pub mod ledger;
pub mod making;
pub mod metrics;
pub mod offer;
pub mod prefetch;
pub mod promises;
pub mod provision;
pub mod reclaim;
pub mod registry;
pub mod rescue;
pub mod rpc;
pub mod serve;
pub mod spares;
pub mod stages;
pub mod status;
pub mod tasks;
mod time;
pub mod usage;
pub mod writes;
