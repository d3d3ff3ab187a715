//! What a plan is to reach.

use super::{Bytes, Kind, Policy, Pool, Room, Share, Trigger};

/// What is used, and what is to come, shall be no more than a share of the pool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    share: Share,
    incoming: Bytes,
}

impl Goal {
    fn below(share: Share) -> Self {
        Self { share, incoming: Bytes(0) }
    }

    /// How much has to go.
    fn lack(self, used: Bytes, total: Bytes) -> Bytes {
        used.plus(self.incoming).less(self.share.of(total))
    }
}

/// One of each kind, where there is something to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goals {
    data: Option<Goal>,
    metadata: Option<Goal>,
}

impl Goals {
    fn each(of: impl Fn(Kind) -> Option<Goal>) -> Self {
        Self { data: of(Kind::Data), metadata: of(Kind::Metadata) }
    }

    fn of(self, kind: Kind) -> Option<Goal> {
        match kind {
            Kind::Data => self.data,
            Kind::Metadata => self.metadata,
        }
    }

    /// From the high mark to the low one; or as much as is to be admitted.
    pub(super) fn new(trigger: Trigger, policy: &Policy, pool: &Pool) -> Self {
        Self::each(|kind| {
            let limits = policy.limits(kind);
            match trigger {
                Trigger::Admission(room) => {
                    Some(Goal { share: limits.admits_up_to, incoming: room.of(kind) })
                }
                Trigger::Pressure | Trigger::Schedule => {
                    let is_high = limits.marks.high().is_reached(pool.used.of(kind), pool.total.of(kind));
                    is_high.then_some(Goal::below(limits.marks.low()))
                }
            }
        })
    }

    /// If it is an emergency, to the high mark.
    pub(super) fn out_of_emergency(policy: &Policy, pool: &Pool) -> Self {
        Self::each(|kind| {
            let marks = policy.limits(kind).marks;
            let is_one = marks.emergency().is_reached(pool.used.of(kind), pool.total.of(kind));
            is_one.then_some(Goal::below(marks.high()))
        })
    }

    /// How much has to go.
    pub(super) fn lack(self, pool: &Pool) -> Room {
        Room::each(|kind| {
            self.of(kind).map_or(Bytes(0), |goal| goal.lack(pool.used.of(kind), pool.total.of(kind)))
        })
    }

    /// How much the pool would have to have in all, with what is used now.
    pub(super) fn total(self, kind: Kind, pool: &Pool) -> Bytes {
        self.of(kind).map_or(Bytes(0), |goal| goal.share.total_for(pool.used.of(kind).plus(goal.incoming)))
    }
}
