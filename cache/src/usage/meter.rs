//! What disks have and how fast they write, from one look at their counters to the next; decides over values.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    time::Duration,
};

use cowshed_leases::{Lease, LeaseId};

use crate::kernel::Load;

/// What a disk is a snapshot of: disks of the same have the same to begin with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// An image, by its manifest's digest, and the disk's size.
    Image(String, u64),
    /// Nothing: a scratch disk, by its size and whether it is raw.
    Empty(u64, bool),
}

impl Origin {
    /// Of a lease that has a disk of its own.
    pub(crate) fn of(lease: &Lease) -> Option<Self> {
        let (grant, device) = (lease.grant()?, lease.own_device()?);
        if lease.shares.is_some() {
            let raw = grant.scratch.as_ref().is_some_and(|scratch| scratch.filesystem.is_empty());
            return Some(Self::Empty(device.size_bytes, raw));
        }
        Some(Self::Image(grant.image_digest.clone(), device.size_bytes))
    }
}

/// From this many disks of an origin it is learnt what that maps, at the most.
const TRIES: u8 = 8;

/// What an origin maps, as far as it is known: what a disk maps, less what it has besides its origin. A disk that has discarded
/// more of that than it has of its own seems to have nothing, and tells too little; then others are asked as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Below {
    bytes: u64,
    tries: u8,
}

/// What origins map.
#[derive(Debug, Default)]
pub(crate) struct Belows(HashMap<Origin, Below>);

impl Belows {
    /// Whether a disk of this origin, that was not seen before, is to be asked.
    pub(crate) fn wants(&self, origin: &Origin) -> bool {
        self.0.get(origin).is_none_or(|below| below.tries < TRIES)
    }

    /// A disk that maps so much has so much besides its origin.
    pub(crate) fn learn(&mut self, origin: Origin, mapped: u64, own: u64) {
        let below = self.0.entry(origin).or_default();
        below.bytes = below.bytes.max(mapped.saturating_sub(own));
        below.tries = if own > 0 { TRIES } else { below.tries.saturating_add(1) };
    }

    /// What a disk that maps so much has of its own, at the least; `None` if nothing is known of its origin.
    pub(crate) fn own(&self, origin: &Origin, mapped: u64) -> Option<u64> {
        self.0.get(origin).map(|below| mapped.saturating_sub(below.bytes))
    }

    /// Forgets the others.
    pub(crate) fn keep(&mut self, origins: &HashSet<Origin>) {
        self.0.retain(|origin, _| origins.contains(origin));
    }
}

/// How fast a disk is written, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// By its VM.
    pub written: f64,
    /// By what it maps; negative if it discards.
    pub grown: f64,
}

/// A disk at one look.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// Its lease.
    pub lease: Lease,
    /// What it counts.
    pub load: Load,
    /// Bytes of its own, at the least.
    pub own: Option<u64>,
    /// Since the look before, if it was there.
    pub rate: Option<Rate>,
}

/// What disks have counted at the look before.
#[derive(Debug, Default)]
pub(super) struct Meters {
    at: Option<Duration>,
    last: HashMap<LeaseId, Load>,
}

impl Meters {
    /// Whether it was seen before.
    pub(super) fn knows(&self, id: &LeaseId) -> bool {
        self.last.contains_key(id)
    }

    /// Takes in a look at this time, since whatever moment. Returns the disks with their rates, over what time these are, and
    /// what was written in it.
    pub(super) fn look(
        &mut self,
        disks: Vec<(Lease, Load, Option<u64>)>,
        now: Duration,
    ) -> (Vec<Disk>, Option<Duration>, u64) {
        let over = self.at.map(|at| now.saturating_sub(at)).filter(|over| !over.is_zero());
        let mut written = 0;
        let seen: HashMap<LeaseId, Load> =
            disks.iter().map(|(lease, load, _)| (lease.id.clone(), *load)).collect();
        let with_rate = |(lease, load, own): (Lease, Load, Option<u64>)| {
            // One that counts less than before was activated anew.
            let before = self.last.get(&lease.id).filter(|before| before.written <= load.written);
            written += before.map_or(0, |before| load.written - before.written);
            let rate = before.zip(over).map(|(before, over)| Rate {
                written: (load.written - before.written) as f64 / over.as_secs_f64(),
                grown: (load.mapped as f64 - before.mapped as f64) / over.as_secs_f64(),
            });
            Disk { lease, load, own, rate }
        };
        let disks = disks.into_iter().map(with_rate).collect();
        (self.last, self.at) = (seen, Some(now));
        (disks, over, written)
    }
}

/// By what disks are ordered, the most first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Bytes of their own.
    Own,
    /// Bytes written a second.
    Rate,
    /// Bytes written.
    Written,
}

/// The first so many; among equals, those with the lower lease ids.
pub(super) fn first(disks: &[Disk], order: Order, count: usize) -> Vec<&Disk> {
    let rate = |disk: &Disk| disk.rate.map_or(0, |rate| rate.written as u64);
    let key = |disk: &&Disk| match order {
        Order::Own => (disk.own.unwrap_or_default(), rate(disk)),
        Order::Rate => (rate(disk), disk.own.unwrap_or_default()),
        Order::Written => (disk.load.written, rate(disk)),
    };
    let mut all: Vec<&Disk> = disks.iter().collect();
    all.sort_by_cached_key(|disk| (Reverse(key(disk)), disk.lease.id.clone()));
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::fakes::book;

    const MIB: u64 = 1 << 20;

    fn lease(n: u32) -> Lease {
        let lease = book::lease(n);
        assert_eq!(lease.id, book::id(n));
        lease
    }

    fn load(mapped: u64, written: u64) -> Load {
        Load { mapped: mapped * MIB, written: written * MIB, read: 0 }
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn what_an_origin_maps_is_learnt_from_a_disk_that_has_something_of_its_own() {
        let origin = Origin::Image("sha256:1".to_owned(), 1 << 30);
        let mut belows = Belows::default();
        assert!(belows.wants(&origin));
        assert_eq!(belows.own(&origin, 100), None);
        // It has discarded 20 of the origin's 100.
        belows.learn(origin.clone(), 80, 0);
        assert_eq!(
            (belows.own(&origin, 150), belows.wants(&origin)),
            (Some(70), true),
            "as far as it is known"
        );
        belows.learn(origin.clone(), 100, 0);
        assert_eq!((belows.own(&origin, 150), belows.wants(&origin)), (Some(50), true));
        belows.learn(origin.clone(), 130, 30);
        assert_eq!((belows.own(&origin, 150), belows.wants(&origin)), (Some(50), false), "now for sure");
        assert_eq!(belows.own(&origin, 90), Some(0));
        let other = Origin::Empty(1 << 30, true);
        (0..TRIES).for_each(|_| belows.learn(other.clone(), 0, 0));
        assert!(!belows.wants(&other), "not for ever");
        belows.keep(&HashSet::from([origin.clone()]));
        assert!(belows.wants(&other) && !belows.wants(&origin));
    }

    #[test]
    fn rates_are_from_look_to_look() {
        let mut meters = Meters::default();
        let (first, over, written) = meters.look(vec![(lease(1), load(10, 50), Some(7))], seconds(10));
        assert_eq!((first[0].rate, first[0].own, over, written), (None, Some(7), None, 0));
        let disks = vec![(lease(1), load(6, 54), None), (lease(2), load(1, 1), None)];
        let (second, over, written) = meters.look(disks, seconds(12));
        let mib = MIB as f64;
        assert_eq!(second[0].rate, Some(Rate { written: 2.0 * mib, grown: -2.0 * mib }));
        assert_eq!((second[1].rate, over, written), (None, Some(seconds(2)), 4 * MIB), "one has come");
        // One has gone, the other was activated anew; the same moment is no time.
        let (third, _, written) = meters.look(vec![(lease(2), load(1, 0), None)], seconds(13));
        assert_eq!((third[0].rate, written, meters.knows(&book::id(1))), (None, 0, false));
        let (fourth, over, _) = meters.look(vec![(lease(2), load(1, 3), None)], seconds(13));
        assert_eq!((fourth[0].rate, over), (None, None));
    }

    #[test]
    fn the_first_ones_are_those_that_have_or_write_most() {
        let disk = |n: u32, own, written, rate| Disk {
            lease: lease(n),
            load: load(0, written),
            own,
            rate: Some(Rate { written: rate, grown: 0.0 }),
        };
        let disks = [
            disk(1, Some(5), 1, 9.0),
            disk(2, Some(9), 2, 0.0),
            disk(3, None, 3, 5.0),
            disk(4, Some(5), 3, 10.0),
        ];
        let ids = |order, count| -> Vec<LeaseId> {
            first(&disks, order, count).into_iter().map(|disk| disk.lease.id.clone()).collect()
        };
        assert_eq!(ids(Order::Own, 9), [2, 4, 1, 3].map(book::id));
        assert_eq!(ids(Order::Rate, 2), [4, 1].map(book::id));
        assert_eq!(ids(Order::Written, 1), [4].map(book::id));
        assert!(ids(Order::Own, 0).is_empty());
    }
}
