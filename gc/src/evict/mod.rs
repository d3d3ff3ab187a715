//! What goes when the pool gets full, in which order, and why.
//!
//! ```text
//!   what takes room × policy × trigger × now ─► plan
//!
//!   (schedule: what is kept too long) ─► the pool grows ─► spares ─► images that are cold ─► (emergency: young ones)
//!                                                 each only as far as something is lacking
//! ```
//!
//! Pressure begins at the high mark and ends at the low one, so that what has met its goal is not asked for again at once. No
//! plan touches what a lease, a pin, a pull, a prefetch job or another client holds. What a step promises is what comes back at
//! the least: a layer counts when the last goes that stands on it.
//!
//! Released disks go by themselves ([`crate::plan`]): that comes first, then the inventory for this. Room comes back when
//! containerd has collected and the snapshotter has deleted; until then it is [`Pool::returning`], so that it is not asked for
//! twice. A pool that does not write is nothing to plan for: nothing can be deleted from it.

mod draft;
mod goal;
mod grow;
mod help;
mod images;
mod occupancy;
mod plan;
mod policy;
mod protection;
mod rank;
mod room;
mod spares;
mod takes;
mod tally;

use cowshed_leases::UnixMicros;

use draft::Draft;

pub use occupancy::{
    ChainId, Fetch, Image, ImageName, Layer, Lease, MadeOf, Manifest, Name, Names, Occupancy, Pin, Pool,
    Spare, SpareState, Target, Tenure, VolumeGroup,
};
pub use plan::{Action, Bound, Help, Outcome, Plan, Reason, Source, Step};
pub use policy::{Floor, Growth, Limits, Marks, MarksError, Policy, Trigger, Yields, Young};
pub use protection::Protection;
pub use room::{Bytes, Kind, Room, Share, ShareError};
pub use takes::{Takes, takes};

/// Decides what to do now. The same inventory gives the same plan, and the plan of what a plan has left is empty.
pub fn plan(occupancy: &Occupancy, policy: &Policy, trigger: Trigger, now: UnixMicros) -> Plan {
    let mut draft = Draft::new(occupancy, policy, trigger, now);
    let lacking = draft.lack();
    if trigger == Trigger::Schedule {
        images::remove_expired(&mut draft);
    }
    grow::grow(&mut draft);
    spares::drop_surplus(&mut draft);
    match policy.spares.yields {
        Yields::BeforeImages => {
            spares::drop_kept(&mut draft);
            images::remove_cold(&mut draft);
        }
        Yields::AfterImages => {
            images::remove_cold(&mut draft);
            spares::drop_kept(&mut draft);
        }
    }
    images::remove_young(&mut draft);
    // What they shared with those may come back now.
    images::remove_cold(&mut draft);
    Plan { pool: occupancy.pool, lacking, outcome: outcome(&draft), steps: draft.into_steps() }
}

fn outcome(draft: &Draft<'_>) -> Outcome {
    let lacking = draft.lack();
    if lacking.is_none() {
        return Outcome::Met;
    }
    Outcome::Short { lacking, helps: help::helps(draft, lacking) }
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
