//! Whether this host would take a VM now, and how soon it would have its disk.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cowshed_leases::Mode;

use crate::{
    acquire::Acquired,
    disks::{is_unshareable, unshareable},
    error::Result,
    image::Cache,
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

/// What Offer says of a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// A disk that is ready.
    Spare,
    /// An image that is unpacked.
    Base,
    /// One of which some is there.
    Partial,
    /// Nothing is known of it.
    Cold,
    /// It would not be taken on.
    Refused,
}

impl Offered {
    /// Each of them.
    pub const ALL: [Self; 5] = [Self::Spare, Self::Base, Self::Partial, Self::Cold, Self::Refused];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spare => "spare",
            Self::Base => "base",
            Self::Partial => "partial",
            Self::Cold => "cold",
            Self::Refused => "refused",
        }
    }
}

/// What an Acquire has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// A disk that was so far there.
    Disk(Warmth),
    /// None, for whatever reason.
    Refused,
}

impl Got {
    /// Each of them.
    pub const ALL: [Self; 4] =
        [Self::Disk(Warmth::Spare), Self::Disk(Warmth::Base), Self::Disk(Warmth::Cold), Self::Refused];

    /// `None`: what its VM had already.
    pub fn of(outcome: &Result<Arc<Acquired>>) -> Option<Self> {
        let Ok(done) = outcome else { return Some(Self::Refused) };
        let warmth = match (done.spare, done.cache) {
            (true, _) => Warmth::Spare,
            (false, Cache::Hit) => Warmth::Base,
            (false, Cache::Miss) => Warmth::Cold,
        };
        (!done.existing).then_some(Self::Disk(warmth))
    }

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk(warmth) => warmth.as_str(),
            Self::Refused => "refused",
        }
    }
}

/// Whether what the snapshotter makes can be shared, as far as it is known: by its name, and by what the latest Acquire that wanted
/// it has come to.
#[derive(Debug)]
pub struct Shareable(AtomicBool);

impl Shareable {
    /// The views of containerd's own can not; any other one is thought fit until it was tried.
    pub fn of(snapshotter: &str) -> Self {
        Self(AtomicBool::new(snapshotter != "devmapper"))
    }

    /// An Acquire has come to this.
    pub fn note(&self, mode: Mode, outcome: &Result<Arc<Acquired>>) {
        match outcome {
            Ok(_) if mode == Mode::SharedReadOnly => self.0.store(true, Ordering::Relaxed),
            Err(error) if is_unshareable(error) => self.0.store(false, Ordering::Relaxed),
            Ok(_) | Err(_) => {}
        }
    }

    /// # Errors
    /// If it cannot.
    pub fn admit(&self, mode: Mode) -> Result<()> {
        match mode {
            Mode::SharedReadOnly if !self.0.load(Ordering::Relaxed) => Err(unshareable()),
            Mode::SharedReadOnly | Mode::CopyOnWrite => Ok(()),
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
    use crate::error::{Error, Reason};

    #[test]
    fn that_nothing_can_be_shared_is_known_by_name_or_learnt() {
        let admits = |shareable: &Shareable| shareable.admit(Mode::SharedReadOnly).map_err(|e| e.reason());
        let other = Shareable::of("cowshed");
        assert_eq!(admits(&other), Ok(()));
        let bad_device = Error::new(Reason::SnapshotterUnfit, "no thin device").with("path", "/dev/x");
        other.note(Mode::SharedReadOnly, &Err(bad_device));
        assert_eq!(admits(&other), Ok(()), "that was about a device");
        other.note(Mode::SharedReadOnly, &Err(unshareable().with("path", "/dev/x")));
        for shareable in [&other, &Shareable::of("devmapper")] {
            assert_eq!(admits(shareable), Err(Reason::SnapshotterUnfit));
            assert!(shareable.admit(Mode::CopyOnWrite).is_ok());
        }
    }

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
