//! Rescue mode: what keeps the service from doing all of its work, and from when on that counts.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError, RwLock},
};

use cowshed_pool::{Health, Standing};

use crate::error::{Error, Reason, Result};

/// What the service cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Who holds what.
    Ledger,
    /// Cowshed's own, or the one that containerd should have.
    Snapshotter,
    /// It does not answer.
    Containerd,
    /// The thin pool is gone, or does not write.
    Pool,
}

impl Cause {
    /// All.
    pub const ALL: [Self; 4] = [Self::Ledger, Self::Snapshotter, Self::Containerd, Self::Pool];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Snapshotter => "snapshotter",
            Self::Containerd => "containerd",
            Self::Pool => "pool",
        }
    }

    /// Of what an error tells, when everybody was asked how they are. `None`: of nothing that has to be mended.
    pub(crate) fn of(reason: Reason) -> Option<Self> {
        match reason {
            Reason::LedgerUnusable => Some(Self::Ledger),
            Reason::SnapshotterMissing | Reason::SnapshotterUnfit | Reason::SnapshotterUnusable => {
                Some(Self::Snapshotter)
            }
            Reason::ContainerdUnavailable
            | Reason::ContainerdTimeout
            | Reason::ContainerdFull
            | Reason::ContainerdError => Some(Self::Containerd),
            // The kernel has not told of the pool in time.
            Reason::PoolMissing | Reason::PoolUnusable | Reason::PoolUnzeroed | Reason::NotReady => {
                Some(Self::Pool)
            }
            _ => None,
        }
    }
}

/// Whether an answer was only late: that may be load.
fn is_slow(error: &Error) -> bool {
    matches!(error.reason(), Reason::ContainerdTimeout | Reason::NotReady)
}

/// What keeps the service from its work, by the looks so far.
#[derive(Debug, Default)]
pub struct Mode {
    causes: BTreeSet<Cause>,
    slow: BTreeSet<Cause>,
}

/// What a look has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Whether all of the work can be done.
    pub serving: bool,
    /// What has begun to keep it from that, and the words for it.
    pub entered: Vec<(Cause, String)>,
    /// What has ceased to.
    pub left: Vec<Cause>,
}

impl Mode {
    /// Takes in what a look has found. What did not answer in time counts when it did not the last time either.
    pub fn look(&mut self, problems: &[Error]) -> Verdict {
        let cause = |error: &Error| Cause::of(error.reason());
        let counts = |error: &&Error| {
            !is_slow(error)
                || cause(error).is_some_and(|c| self.slow.contains(&c) || self.causes.contains(&c))
        };
        let counted: Vec<&Error> = problems.iter().filter(counts).collect();
        let now: BTreeSet<Cause> = counted.iter().filter_map(|error| cause(error)).collect();
        let words = |c: Cause| counted.iter().find(|error| cause(error) == Some(c)).map(ToString::to_string);
        let entered = now.difference(&self.causes).map(|c| (*c, words(*c).unwrap_or_default())).collect();
        let left = self.causes.difference(&now).copied().collect();
        let serving = counted.is_empty();
        self.slow = problems.iter().filter(|error| is_slow(error)).filter_map(cause).collect();
        self.causes = now;
        Verdict { serving, entered, left }
    }

    /// What keeps it from its work.
    pub fn causes(&self) -> &BTreeSet<Cause> {
        &self.causes
    }
}

/// What besides the pool is known to keep disks from being made, so that nobody waits for it. Clones share it.
#[derive(Clone, Default)]
pub struct Hindrances {
    snapshotter: Option<Standing>,
    hung: Arc<RwLock<Option<Error>>>,
}

impl Hindrances {
    /// Of a service that serves this snapshotter, or none.
    pub fn of(snapshotter: Option<Standing>) -> Self {
        Self { snapshotter, hung: Arc::default() }
    }

    /// Refuses what has to be made.
    ///
    /// # Errors
    /// SNAPSHOTTER_UNUSABLE or CONTAINERD_UNAVAILABLE.
    pub fn admit(&self) -> Result<()> {
        self.snapshotter().or_else(|| self.hung()).map_or(Ok(()), Err)
    }

    /// Why our own snapshotter makes nothing.
    pub fn snapshotter(&self) -> Option<Error> {
        match self.snapshotter.as_ref()?.health() {
            Health::Serving => None,
            Health::Waiting(why) | Health::Refusing(why) => Some(Error::new(
                Reason::SnapshotterUnusable,
                format!("Cowshed's snapshotter cannot make snapshots: {why}"),
            )),
        }
    }

    /// Why containerd is not worth waiting for, by the last looks.
    pub fn hung(&self) -> Option<Error> {
        self.hung.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It hangs, as `timeout` has told, or does not.
    pub fn set_hung(&self, timeout: Option<&Error>) {
        let hung = timeout.map(|error| Error::new(Reason::ContainerdUnavailable, error.to_string()));
        *self.hung.write().unwrap_or_else(PoisonError::into_inner) = hung;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(serving: bool, entered: &[Cause], left: &[Cause]) -> Verdict {
        let entered = entered.iter().map(|cause| (*cause, "words".to_owned())).collect();
        Verdict { serving, entered, left: left.to_vec() }
    }

    #[test]
    fn what_is_wrong_counts_at_once_and_what_is_late_counts_the_second_time() {
        use Cause::{Containerd, Ledger, Pool, Snapshotter};
        use Reason::{
            ContainerdTimeout, ContainerdUnavailable, Draining, LedgerUnusable, NotReady, PoolFull,
            PoolMissing, SnapshotterUnusable,
        };
        let steps: [(&[Reason], Verdict); 11] = [
            (&[], verdict(true, &[], &[])),
            (&[LedgerUnusable, PoolMissing], verdict(false, &[Ledger, Pool], &[])),
            (&[LedgerUnusable, SnapshotterUnusable], verdict(false, &[Snapshotter], &[Pool])),
            (&[], verdict(true, &[], &[Ledger, Snapshotter])),
            // Nothing to be mended, and all the same no service.
            (&[PoolFull, Draining], verdict(false, &[], &[])),
            (&[ContainerdTimeout], verdict(true, &[], &[])),
            (&[NotReady], verdict(true, &[], &[])),
            (&[ContainerdTimeout, NotReady], verdict(false, &[Pool], &[])),
            (&[ContainerdTimeout], verdict(false, &[Containerd], &[Pool])),
            // Dead, then late once more: never well in between.
            (&[ContainerdUnavailable], verdict(false, &[], &[])),
            (&[ContainerdTimeout], verdict(false, &[], &[])),
        ];
        let mut mode = Mode::default();
        for (n, (reasons, expected)) in steps.into_iter().enumerate() {
            let problems: Vec<Error> = reasons.iter().map(|reason| Error::new(*reason, "words")).collect();
            assert_eq!(mode.look(&problems), expected, "step {n}");
        }
        assert!(mode.causes().iter().eq([&Containerd]));
    }

    #[test]
    fn a_containerd_that_hangs_refuses_until_it_answers() {
        let hindrances = Hindrances::default();
        assert!(hindrances.admit().is_ok());
        hindrances.set_hung(Some(&Error::new(Reason::ContainerdTimeout, "no answer within 4 s")));
        let refused = hindrances.clone().admit().err().map(|e| (e.reason(), e.to_string()));
        assert_eq!(refused, Some((Reason::ContainerdUnavailable, "no answer within 4 s".to_owned())));
        hindrances.set_hung(None);
        assert!(hindrances.admit().is_ok());
    }
}
