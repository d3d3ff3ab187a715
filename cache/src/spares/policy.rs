//! How many spares there should be of which image: pure.
//!
//! The demand for an image is two numbers that decay: how often it is asked for, and how often it was asked for at once. Spares
//! have to bridge the time that it takes to make one, and a crowd that has come once may come again.

use std::time::Duration;

/// What comes within this time comes at once.
const AT_ONCE: Duration = Duration::from_secs(10);
/// So many times what is asked for while a spare is made.
const RESERVE: f64 = 3.0;
/// Who was asked for so rarely is not in use any more.
const FORGOTTEN: f64 = 0.05;

/// What an operator has set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of an image that is in use, at least.
    pub image_min: u32,
    /// Of one image, at the most.
    pub image_max: u32,
    /// Of all, at the most.
    pub total_max: u32,
    /// In this time half of the demand is forgotten.
    pub half_life: Duration,
}

/// How often an image was asked for. All times are since the same moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Demand {
    /// Number of requests, each of which decays.
    level: f64,
    /// The most that came at once, which decays.
    peak: f64,
    at: Duration,
    /// Those that are coming now, and since when.
    crowd: u32,
    since: Duration,
}

impl Demand {
    /// Somebody asks for it.
    pub fn asked(&mut self, now: Duration, half_life: Duration) {
        *self = self.at(now, half_life);
        self.level += 1.0;
        if self.crowd == 0 || now.saturating_sub(self.since) >= AT_ONCE {
            (self.crowd, self.since) = (0, now);
        }
        self.crowd = self.crowd.saturating_add(1);
        self.peak = self.peak.max(self.crowd.into());
    }

    /// So many are there of a run before, when it was asked for as often.
    pub fn inherited(&mut self, count: u32, now: Duration, half_life: Duration) {
        *self = self.at(now, half_life);
        self.level = self.level.max(count.into());
        self.peak = self.peak.max(count.into());
    }

    /// What is left of it.
    fn at(self, now: Duration, half_life: Duration) -> Self {
        let passed = now.saturating_sub(self.at).as_secs_f64() / half_life.as_secs_f64().max(1.0);
        let left = (-passed).exp2();
        Self { level: self.level * left, peak: self.peak * left, at: now.max(self.at), ..self }
    }

    /// Whether nobody asks for it any more.
    pub fn is_over(self, now: Duration, half_life: Duration) -> bool {
        self.at(now, half_life).level < FORGOTTEN
    }

    /// How many there should be, if it takes `refill` to make one.
    pub fn wants(self, now: Duration, refill: Duration, limits: &Limits) -> u32 {
        if self.is_over(now, limits.half_life) {
            return 0;
        }
        let left = self.at(now, limits.half_life);
        let per_second = left.level * std::f64::consts::LN_2 / limits.half_life.as_secs_f64().max(1.0);
        let bridge = (per_second * refill.as_secs_f64() * RESERVE).ceil();
        // Rounded: what was asked for once is ready for one half-life.
        let wanted = bridge.max(left.peak.round()).min(f64::from(u32::MAX));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and u32::MAX")]
        let wanted = wanted as u32;
        wanted.max(limits.image_min).min(limits.image_max)
    }
}

/// What is wanted of one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// By pins.
    pub pinned: u32,
    /// By demand.
    pub demanded: u32,
}

/// How many of each there should be: first what is pinned, in order; then one more for each that wants more, again and again.
pub fn allot(wants: &[Want], limits: &Limits) -> Vec<u32> {
    let mut left = limits.total_max;
    let mut take = |n: u32| {
        let taken = n.min(left);
        left -= taken;
        taken
    };
    let mut allotted: Vec<u32> = wants.iter().map(|want| take(want.pinned.min(limits.image_max))).collect();
    loop {
        let mut none = true;
        for (has, want) in allotted.iter_mut().zip(wants) {
            if *has < want.demanded.min(limits.image_max) && take(1) == 1 {
                *has += 1;
                none = false;
            }
        }
        if none {
            return allotted;
        }
    }
}

/// How many of `ready` are too many. A few that will soon be wanted again are kept.
pub fn surplus(ready: u32, wanted: u32) -> u32 {
    let over = ready.saturating_sub(wanted);
    if over > wanted / 4 { over } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits =
        Limits { image_min: 1, image_max: 100, total_max: 150, half_life: Duration::from_secs(600) };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn asked(times: &[u64]) -> Demand {
        let mut demand = Demand::default();
        times.iter().for_each(|at| demand.asked(seconds(*at), LIMITS.half_life));
        demand
    }

    #[test]
    fn as_many_as_came_at_once_and_fewer_with_time() {
        let wants = |demand: Demand, at: u64| demand.wants(seconds(at), seconds(1), &LIMITS);
        assert_eq!(wants(Demand::default(), 5), 0, "nobody has asked");
        let crowd = asked(&[100; 40]);
        assert_eq!(wants(crowd, 100), 40);
        assert_eq!(wants(crowd, 700), 20);
        assert_eq!(wants(crowd, 1_300), 10);
        assert_eq!(wants(crowd, 5_000), 1, "the least for what is in use");
        assert_eq!(wants(crowd, 10_000), 0);
        assert_eq!(wants(asked(&[100; 400]), 100), LIMITS.image_max);
        // One a minute is never two at once.
        assert_eq!(wants(asked(&[0, 60, 120, 180, 240]), 240), 1);
        // One a second for a long time: as many as come while one is made, thrice.
        let steady: Vec<u64> = (0..6_000).collect();
        assert_eq!(asked(&steady).wants(seconds(6_000), seconds(20), &LIMITS), 60);
    }

    #[test]
    fn pins_first_then_fairly() {
        let want = |pinned, demanded| Want { pinned, demanded };
        assert_eq!(allot(&[want(0, 90), want(0, 90), want(10, 0)], &LIMITS), [70, 70, 10]);
        assert_eq!(allot(&[want(0, 90), want(0, 20)], &LIMITS), [90, 20]);
        assert_eq!(allot(&[want(200, 0), want(100, 0), want(0, 5)], &LIMITS), [100, 50, 0]);
        assert_eq!(allot(&[want(10, 30)], &LIMITS), [30]);
    }

    #[test]
    fn a_few_too_many_stay() {
        for (ready, wanted, over) in [(5, 5, 0), (5, 4, 0), (6, 4, 2), (3, 0, 3), (0, 7, 0)] {
            assert_eq!(surplus(ready, wanted), over, "{ready} {wanted}");
        }
    }

    proptest! {
        #[test]
        fn nobody_gets_more_than_the_limits(
            wants in prop::collection::vec((0_u32..300, 0_u32..300), 0..20), total in 0_u32..500
        ) {
            let limits = Limits { total_max: total, ..LIMITS };
            let wants: Vec<Want> =
                wants.into_iter().map(|(pinned, demanded)| Want { pinned, demanded }).collect();
            let allotted = allot(&wants, &limits);
            prop_assert!(allotted.iter().sum::<u32>() <= total);
            for (has, want) in allotted.iter().zip(&wants) {
                prop_assert!(*has <= want.pinned.max(want.demanded).min(limits.image_max));
            }
            // What is left over nobody wants.
            let wanted: u32 = wants.iter().map(|w| w.pinned.max(w.demanded).min(limits.image_max)).sum();
            prop_assert!(allotted.iter().sum::<u32>() == wanted.min(total));
        }

        #[test]
        fn one_more_request_can_at_most_divide_a_crowd(times in prop::collection::vec(0_u64..10_000, 1..60), more in 0_u64..10_000) {
            let sorted = |mut times: Vec<u64>| { times.sort_unstable(); times };
            let (few, many) = (sorted(times.clone()), sorted([times, vec![more]].concat()));
            let wants = |times: &[u64]| asked(times).wants(seconds(10_000), seconds(2), &LIMITS);
            // A crowd is counted from its first on, so one more can divide it.
            prop_assert!(wants(&many) + 1 >= wants(&few) / 2);
        }
    }
}
