//! A plan in the making: what has been decided, and how the pool would stand then.

use std::{collections::BTreeMap, time::Duration};

use cowshed_leases::UnixMicros;

use super::{
    Action, Bytes, Image, Kind, Occupancy, Policy, Pool, Protection, Reason, Room, Step, Trigger,
    VolumeGroup,
    goal::Goals,
    protection,
    tally::{At, Tally, What},
};

pub(super) struct Draft<'a> {
    pub(super) policy: &'a Policy,
    pub(super) tally: Tally<'a>,
    pub(super) goals: Goals,
    /// As it would be.
    pub(super) pool: Pool,
    /// As it would be.
    pub(super) group: VolumeGroup,
    standings: BTreeMap<At, Standing<'a>>,
    growth: Vec<Step>,
    evictions: Vec<Step>,
}

/// How an image stands.
pub(super) struct Standing<'a> {
    pub(super) image: &'a Image,
    /// Why it stays.
    pub(super) because: Vec<Protection>,
    /// How long it was not used.
    pub(super) unused: Duration,
}

/// Why images go.
#[derive(Clone, Copy)]
pub(super) enum Why {
    Cold,
    Expired,
    Emergency,
}

impl<'a> Draft<'a> {
    pub(super) fn new(
        occupancy: &'a Occupancy,
        policy: &'a Policy,
        trigger: Trigger,
        now: UnixMicros,
    ) -> Self {
        let tally = Tally::new(occupancy);
        let standing = |(at, what)| match what {
            What::Image(_, image) => {
                let because = protection::of(&tally, occupancy, policy, now, at, image);
                Some((at, Standing { image, because, unused: protection::unused(image, now) }))
            }
            What::Spare(..) | What::Lease(..) => None,
        };
        let standings = tally.there().filter_map(standing).collect();
        let pool = occupancy.pool.settled();
        Self {
            policy,
            goals: Goals::new(trigger, policy, &pool),
            pool,
            group: occupancy.group,
            standings,
            tally,
            growth: Vec::new(),
            evictions: Vec::new(),
        }
    }

    /// What is lacking yet.
    pub(super) fn lack(&self) -> Room {
        self.goals.lack(&self.pool)
    }

    pub(super) fn standing(&self, image: At) -> Option<&Standing<'a>> {
        self.standings.get(&image)
    }

    /// The images that are there, and how they stand.
    pub(super) fn images(&self) -> impl Iterator<Item = (At, &Standing<'a>)> {
        self.tally.there().filter_map(|(at, _)| Some((at, self.standings.get(&at)?)))
    }

    /// How long an image, or that of a spare, was not used.
    pub(super) fn unused(&self, image: At) -> Duration {
        self.standing(image).map_or(Duration::MAX, |standing| standing.unused)
    }

    pub(super) fn extend(&mut self, kind: Kind, by: Bytes) {
        let (from, more) = (self.pool.total.of(kind), Room::only(kind, by));
        self.pool.total = self.pool.total.plus(more);
        self.group.free = self.group.free.less(by);
        let action = Action::Extend { kind, from, to: from.plus(by) };
        self.growth.push(Step { action, reason: Reason::Growth, gives: more });
    }

    pub(super) fn drop_spare(&mut self, at: At, reason: Reason) {
        if let What::Spare(id, spare) = self.tally.what(at) {
            let action = Action::DropSpare { id: id.clone(), manifest: spare.manifest.clone() };
            self.evict(at, action, reason);
        }
    }

    /// The images, those that were not used for longest first, each after the spares that are only its own.
    pub(super) fn remove_images(&mut self, images: &[At], why: Why) {
        let mut images = images.to_vec();
        images.sort_by_key(|at| (std::cmp::Reverse(self.unused(*at)), *at));
        let shared_with = u32::try_from(images.len().saturating_sub(1)).unwrap_or(u32::MAX);
        for image in images {
            for spare in self.tally.spares_of_all(&[image]) {
                self.drop_spare(spare, Reason::SpareOfRemoved);
            }
            let unused = self.unused(image);
            let reason = match why {
                Why::Cold => Reason::Cold { unused, shared_with },
                Why::Expired => Reason::Expired { unused },
                Why::Emergency => Reason::Emergency { unused, shared_with },
            };
            self.remove_image(image, reason);
        }
    }

    fn remove_image(&mut self, at: At, reason: Reason) {
        if let What::Image(target, image) = self.tally.what(at) {
            let mut names: Vec<_> = image.names.iter().map(|name| name.image.clone()).collect();
            names.sort();
            self.evict(at, Action::RemoveImage { target: target.clone(), names }, reason);
        }
    }

    fn evict(&mut self, at: At, action: Action, reason: Reason) {
        let gives = self.tally.remove(at);
        self.pool.used = self.pool.used.less(gives);
        self.evictions.push(Step { action, reason, gives });
    }

    /// All steps: the pool grows before anything goes.
    pub(super) fn into_steps(self) -> Vec<Step> {
        self.growth.into_iter().chain(self.evictions).collect()
    }
}
