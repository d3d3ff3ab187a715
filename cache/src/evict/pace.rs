//! How fast the pool fills, and so how soon it is looked at again.

use std::time::Duration;

use cowshed_gc::evict::{Bytes, Kind, Marks, Policy, Room};

/// The pause between two looks, at the least and at the most.
pub(super) const SHORTEST: Duration = Duration::from_secs(1);
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// Nobody fills a pool faster than this, in bytes of data a second; LVM2 leaves the kernel's low-water mark at nothing, so that its
/// event comes when the pool is full.
const FASTEST: f64 = (2_u64 << 30) as f64;
/// So many looks there are on the way to the next mark.
const LOOKS: u32 = 4;
/// What happened so long ago counts for a third of what happens now.
const MEMORY: Duration = Duration::from_secs(30);

/// Bytes a second, smoothed; negative while it empties.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    last: Option<(Duration, Room)>,
    is_known: bool,
    data: f64,
    metadata: f64,
}

impl Pace {
    /// So much is in use, at this time since whatever moment.
    pub(super) fn look(&mut self, used: Room, now: Duration) {
        let Some((then, before)) = self.last.replace((now, used)) else { return };
        let seconds = now.saturating_sub(then).as_secs_f64();
        if seconds <= 0.0 {
            self.last = Some((then, before));
            return;
        }
        self.is_known = true;
        let weight = 1.0 - (-seconds / MEMORY.as_secs_f64()).exp();
        for kind in Kind::ALL {
            let change = used.of(kind).0 as f64 - before.of(kind).0 as f64;
            let rate = self.rate_of(kind);
            *rate += (change / seconds - *rate) * weight;
        }
    }

    fn rate_of(&mut self, kind: Kind) -> &mut f64 {
        match kind {
            Kind::Data => &mut self.data,
            Kind::Metadata => &mut self.metadata,
        }
    }

    /// Bytes a second.
    pub(super) fn rate(&self, kind: Kind) -> f64 {
        match kind {
            Kind::Data => self.data,
            Kind::Metadata => self.metadata,
        }
    }

    /// The same; `None` before there were two looks.
    pub(super) fn known_rate(&self, kind: Kind) -> Option<f64> {
        self.is_known.then(|| self.rate(kind))
    }

    /// How long it takes at this rate until so much is in use; `None`: it never comes to it.
    pub(super) fn time_to(&self, kind: Kind, limit: Bytes) -> Option<Duration> {
        let (_, used) = self.last?;
        let missing = limit.less(used.of(kind)).0 as f64;
        if missing <= 0.0 {
            return Some(Duration::ZERO);
        }
        let rate = self.rate(kind);
        (rate > 0.0).then(|| Duration::try_from_secs_f64(missing / rate).unwrap_or(Duration::MAX))
    }

    /// How long it can be left alone.
    pub(super) fn pause(&self, total: Room, policy: &Policy) -> Duration {
        let next = |kind| {
            let (total, marks) = (total.of(kind), policy.limits(kind).marks);
            self.time_to(kind, self.next_mark(kind, total, marks))
        };
        let soonest = Kind::ALL.into_iter().filter_map(next).min();
        soonest
            .map_or(LONGEST, |time| time / LOOKS)
            .min(self.at_the_least(total, policy))
            .clamp(SHORTEST, LONGEST)
    }

    /// Whatever the rate was until now: not before this it comes to the next mark.
    fn at_the_least(&self, total: Room, policy: &Policy) -> Duration {
        let Some((_, used)) = self.last else { return SHORTEST };
        let mark = self.next_mark(Kind::Data, total.data, policy.data.marks);
        Duration::from_secs_f64(mark.less(used.data).0 as f64 / FASTEST)
    }

    /// The first mark that is not reached; then the end.
    fn next_mark(&self, kind: Kind, total: Bytes, marks: Marks) -> Bytes {
        let used = self.last.map_or(Bytes(0), |(_, used)| used.of(kind));
        let marks = [marks.high().of(total), marks.emergency().of(total)];
        marks.into_iter().find(|mark| *mark > used).unwrap_or(total)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Config;

    /// A pool is a million of these.
    const UNIT: u64 = 16 << 20;

    fn used(units: u64) -> Room {
        Room { data: Bytes(units * UNIT), metadata: Bytes(0) }
    }

    const TOTAL: Room = Room { data: Bytes(1_000_000 * UNIT), metadata: Bytes(1_000_000 * UNIT) };

    /// Fills at this rate for some minutes, from the end back.
    fn filling(rate: u64, until: u64) -> Pace {
        let mut pace = Pace::default();
        for second in 0..=300 {
            pace.look(used(until.saturating_sub(rate * (300 - second))), Duration::from_secs(second));
        }
        pace
    }

    #[test]
    fn the_faster_it_fills_the_sooner_it_is_looked_at() {
        let policy = Config::default().gc_policy();
        let high = policy.data.marks.high().of(TOTAL.data).0 / UNIT;
        let table = [
            ("it does not fill", 0, high / 2, LONGEST),
            ("in an hour", 10, high - 36_000, LONGEST),
            ("in 40 s", 100, high - 4_000, Duration::from_secs(10)),
            ("in a second", 1000, high - 1000, SHORTEST),
            ("above the high mark the emergency's counts", 500, high + 2_000, Duration::from_secs(30)),
            ("it might begin to fill at once", 0, high - 2_560, Duration::from_secs(20)),
        ];
        for (what, rate, until, expected) in table {
            let pause = filling(rate, until).pause(TOTAL, &policy);
            assert!(pause.abs_diff(expected) < Duration::from_millis(500), "{what}: {pause:?}");
        }
    }

    #[test]
    fn time_to_full_is_known_if_it_fills() {
        let pace = filling(100, 500_000);
        let time = pace.time_to(Kind::Data, TOTAL.data).unwrap();
        assert!(time.abs_diff(Duration::from_secs(5000)) < Duration::from_secs(10), "{time:?}");
        assert_eq!(pace.time_to(Kind::Metadata, TOTAL.metadata), None);
        assert_eq!(pace.time_to(Kind::Data, Bytes(1)), Some(Duration::ZERO));
        assert_eq!(Pace::default().time_to(Kind::Data, TOTAL.data), None);
        let mut pace = pace;
        for second in 301..400 {
            pace.look(used(500_000 - second), Duration::from_secs(second));
        }
        assert!(pace.rate(Kind::Data) < 3.0 * UNIT as f64, "it empties: {pace:?}");
        // The same moment again tells nothing.
        let before = pace.rate(Kind::Data);
        pace.look(used(0), Duration::from_secs(399));
        assert!((pace.rate(Kind::Data) - before).abs() < f64::EPSILON);
    }
}
