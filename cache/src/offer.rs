//! Whether this host would take a VM now, and how soon it would have its disk.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The latest so many of each warmth are remembered.
const REMEMBERED: usize = 256;

/// How far a disk was there when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warmth {
    /// It was ready.
    Spare,
    /// Its image was unpacked.
    Base,
    /// Its image was not.
    Cold,
}

impl Warmth {
    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spare => "spare",
            Self::Base => "base",
            Self::Cold => "cold",
        }
    }
}

/// How long the latest Acquires have taken, by warmth.
#[derive(Debug, Default)]
pub struct Latencies([Mutex<VecDeque<Duration>>; 3]);

/// How long it is expected to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The median.
    pub p50: Duration,
    /// The 99th percentile.
    pub p99: Duration,
    /// Of so many.
    pub samples: usize,
}

impl Latencies {
    /// One has taken so long.
    pub fn note(&self, warmth: Warmth, took: Duration) {
        let mut latest = self.0[warmth as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if latest.len() == REMEMBERED {
            latest.pop_front();
        }
        latest.push_back(took);
    }

    /// What that says of the next one; `None` if there was none.
    pub fn expected(&self, warmth: Warmth) -> Option<Expected> {
        let latest = self.0[warmth as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<Duration> = latest.iter().copied().collect();
        drop(latest);
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        Some(Expected { p50: sorted[last / 2], p99: sorted[last * 99 / 100], samples: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_ones_count() {
        let latencies = Latencies::default();
        assert_eq!(latencies.expected(Warmth::Spare), None);
        (1..=1_000).for_each(|ms| latencies.note(Warmth::Spare, Duration::from_millis(ms)));
        let expected = latencies.expected(Warmth::Spare);
        let ms = Duration::from_millis;
        assert_eq!(expected, Some(Expected { p50: ms(872), p99: ms(997), samples: 256 }));
        assert_eq!(latencies.expected(Warmth::Base), None, "each by itself");
    }
}
