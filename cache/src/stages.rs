//! Where a request's time went.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// A part of Acquire's work; the names are part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Looking up an existing lease.
    Ledger,
    /// Image reference to unpacked image.
    Resolve,
    /// Fetching and unpacking.
    Pull,
    /// Making a spare the VM's.
    Spare,
    /// Waiting until it may be made.
    Queue,
    /// Writing the intent down.
    Intent,
    /// containerd's lease.
    Lease,
    /// The device that VMs share: made, or looked at.
    Share,
    /// The snapshot.
    Prepare,
    /// Checking the device.
    Verify,
    /// Writing the grant down.
    Confirm,
}

impl Stage {
    /// The name in replies and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Resolve => "resolve",
            Self::Pull => "pull",
            Self::Spare => "spare",
            Self::Queue => "queue",
            Self::Intent => "intent",
            Self::Lease => "lease",
            Self::Share => "share",
            Self::Prepare => "prepare",
            Self::Verify => "verify",
            Self::Confirm => "confirm",
        }
    }
}

/// The stages that a request went through, one after the other, without gaps.
#[derive(Clone, Debug)]
pub struct Stages {
    last: Instant,
    done: Vec<(Stage, Duration)>,
}

impl Stages {
    /// Starts the clock.
    pub fn start() -> Self {
        Self { last: Instant::now(), done: Vec::with_capacity(8) }
    }

    /// All since the stage before was this one.
    pub fn done(&mut self, stage: Stage) {
        self.done_at(stage, Instant::now());
    }

    /// The same, which was over then.
    pub fn done_at(&mut self, stage: Stage, then: Instant) {
        self.done.push((stage, then.saturating_duration_since(self.last)));
        self.last = then;
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = (Stage, Duration)> + '_ {
        self.done.iter().copied()
    }
}

/// How long one thing after the other took, for the log.
pub(crate) struct Laps(Instant);

impl Laps {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// The time since the last lap.
    pub(crate) fn lap(&mut self) -> Duration {
        let begun = std::mem::replace(&mut self.0, Instant::now());
        self.0.duration_since(begun)
    }
}

impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (stage, took)) in self.done.iter().enumerate() {
            let gap = if at == 0 { "" } else { " " };
            write!(f, "{gap}{}={:.1}ms", stage.as_str(), took.as_secs_f64() * 1e3)?;
        }
        Ok(())
    }
}
