//! What was done, what failed, and what may not fail.

use std::{
    collections::BTreeMap,
    fmt,
    io::Write as _,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// More of the kind are not told.
const ENOUGH: usize = 20;

/// Shared by all who do something.
#[derive(Default)]
pub(crate) struct Tally {
    acquires: AtomicU64,
    goal: AtomicU64,
    counts: Mutex<BTreeMap<String, u64>>,
    unexpected: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a call may fail so, since somebody was killed or stopped.
fn is_trouble(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted)
        || (status.code() == Code::Unknown && status.get_details_error_info().is_none())
}

impl Tally {
    pub(crate) fn go_on_for(&self, acquires: u64) {
        self.goal.store(self.acquires() + acquires, Ordering::Relaxed);
    }

    pub(crate) fn is_done(&self) -> bool {
        self.acquires() >= self.goal.load(Ordering::Relaxed)
    }

    /// New leases, until now.
    pub(crate) fn acquires(&self) -> u64 {
        self.acquires.load(Ordering::Relaxed)
    }

    pub(crate) fn acquired(&self) {
        self.acquires.fetch_add(1, Ordering::Relaxed);
    }

    /// One more of these.
    pub(crate) fn count(&self, what: &str) {
        *lock(&self.counts).entry(what.to_owned()).or_default() += 1;
    }

    /// A call that has failed: since somebody was killed or stopped, or else it is a finding.
    pub(crate) fn failed(&self, what: &str, status: &Status) {
        let reason =
            status.get_details_error_info().map_or_else(|| format!("{:?}", status.code()), |i| i.reason);
        self.count(&format!("failed {reason}"));
        if !is_trouble(status) {
            self.find(format!("{what}: {:?} [{reason}] {}", status.code(), status.message()));
        }
    }

    /// Something that may not be.
    pub(crate) fn find(&self, what: String) {
        self.count("findings");
        let mut unexpected = lock(&self.unexpected);
        if unexpected.len() < ENOUGH {
            // At once: what comes after it may take hours.
            let _gone = writeln!(std::io::stdout(), "@finding {what}");
            unexpected.push(what);
        }
    }

    pub(crate) fn unexpected(&self) -> Vec<String> {
        lock(&self.unexpected).clone()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} acquires", self.acquires(), self.goal.load(Ordering::Relaxed))?;
        lock(&self.counts).iter().try_for_each(|(what, count)| write!(f, ", {what} {count}"))
    }
}
