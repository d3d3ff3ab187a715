//! Everything around the book, as small as it can be, and every step that anybody can take in it.
//!
//! | what | lost when the service crashes | lost in a power cut |
//! |---|---|---|
//! | the book as it is written down, containerd's leases, snapshots with their content | no | no |
//! | which devices are open, the uptime | no | yes |
//! | calls under way, the making of what is shared, and of spares, the reclaimer | yes | yes |
//!
//! An effect and what is written down of it are two steps, so that a crash or somebody else's step comes between any two.
//! What is one step here is one transaction there, with these exceptions, which leave nothing out:
//!
//! - A call that changes the book once and has no other effect (release, renew) is one step. It may come at any time, so
//!   late and twice too. Neither has a reply a step of its own: a launcher may use a device from when the grant is written
//!   down, which is before it can know, and for ever, also when it knows a newer one; and a crash before the reply is to
//!   it as one before its next call.
//! - An acquire that finds a lease looks at its device together with the book, as early as that can be: what it saw may be
//!   old when the lease is kept.
//! - Recovery is one step with the start: it asks nobody but the book, and nothing is served before it is done. If it is
//!   broken off, the next one does the rest.
//! - Who looks at what is shared, and finds it granted, tells all who wait for it at once; each is granted it in a step of
//!   its own.
//! - Which spares there are to choose from is not remembered: a call may choose whatever has a device, at any time, also
//!   what was handed out or is another's. So it does not matter what the shelf says, nor what is left on it by mistake.
//! - A call whose spare is none any more ends, and may come again, as one that has none to choose from.
//! - One spare is made, or looked at, at a time: nobody who makes one has anything to do with another.
//! - Who opens a device writes on it, unless the kernel refuses. A launcher has one device open at a time.
//! - Which of the two clients does something does not matter.

use super::{
    asks::{Return, Sharing, Which, Wish},
    desk::{Clock, Desk},
    flaws::Flaw,
    view::LeaseView,
};

pub(super) const VMS: usize = 2;
pub(super) const CLIENTS: usize = 2;
/// Room for so many leases in one run.
pub(super) const MOST_LEASES: usize = 6;
/// What is shared is made by one flight, and every two have a lease between them that shares what the first one makes.
pub(super) const MOST_FLIGHTS: usize = MOST_LEASES / 2;

/// How far a run may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// So many leases are made.
    pub(super) leases: u8,
    /// So many boots.
    pub(super) boots: u8,
    /// Each so many steps of time long.
    pub(super) up: u8,
    /// Whether requests for VM 0 have names.
    pub(super) names: bool,
    pub(super) sharing: Sharing,
    /// So many spares at a time, those included that are being made.
    pub(super) spares: u8,
}

/// A snapshot, its device and what is on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Disk {
    pub(super) lease: u8,
    pub(super) image: u8,
    /// The VMs that have written on it, a bit each.
    pub(super) marks: u8,
    /// Whether the kernel refuses every write.
    pub(super) read_only: bool,
}

/// An acquire under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Call {
    None,
    /// The intent is written down.
    Intended(Wish, u8),
    /// What it is to share, this lease, is looked at, or made.
    Waiting(Wish, u8, u8),
    /// That is there.
    Shared(Wish, u8),
    /// That is not to be had.
    Unshared(Wish, u8),
    /// containerd has a lease for it.
    Leased(Wish, u8),
    /// There is a snapshot.
    Prepared(Wish, u8),
    /// This spare is chosen, and its device looked at.
    Chosen(Wish, u8),
    /// The VM has this lease already, or somebody makes it.
    Found(Wish, u8),
}

/// Looks at what is shared, or makes it, for all who wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Flight {
    None,
    Begun(u8),
    /// It is to be made.
    Making(u8),
    /// containerd has a lease for it.
    Leased(u8),
    /// There is a view.
    Viewed(u8),
}

/// Who makes spares, and looks at those of an earlier run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Refiller {
    Idle,
    /// The intent is written down.
    Intended(u8),
    /// containerd has a lease for it.
    Leased(u8),
    /// There is a snapshot.
    Prepared(u8),
    /// It saw that the device of this spare is what it was.
    Seen(u8),
}

/// The reclaimer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reclaimer {
    Idle,
    /// It saw that this lease is being prepared and nobody does it.
    HalfMade(u8),
    /// It saw that the grace of this lease is over and its device closed.
    Overdue(u8),
    /// It saw that this lease is to be reclaimed and its device closed.
    ToReclaim(u8),
    /// Its snapshot is gone.
    Unsnapshotted(u8),
    /// containerd's lease too.
    Unleased(u8),
}

/// What a VM's launcher knows and has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Launcher {
    /// The devices that it was ever given, a bit each.
    pub(super) given: u8,
    /// The device that it has open.
    pub(super) open: Option<u8>,
}

/// That a VM has a lease: from when it is written down, so before it is said, until it has to be kept no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Promise {
    pub(super) lease: u8,
    pub(super) boot: u8,
    pub(super) until: Option<u8>,
    /// Whether the VM has written on the disk.
    pub(super) written: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// The desk's number of the book.
    pub(super) book: u32,
    pub(super) clock: Clock,
    /// So many leases were made.
    pub(super) made: u8,
    /// By device name.
    pub(super) disks: [Option<Disk>; MOST_LEASES],
    /// The leases that containerd has one for, a bit each.
    pub(super) containerd_leases: u8,
    pub(super) calls: [Call; CLIENTS],
    pub(super) flights: [Flight; MOST_FLIGHTS],
    pub(super) refiller: Refiller,
    pub(super) reclaimer: Reclaimer,
    pub(super) launchers: [Launcher; VMS],
    pub(super) promises: [Option<Promise>; VMS],
    /// What each VM's named acquire has got.
    pub(super) acquired: [Option<u8>; VMS],
    /// Whether each VM's named release was answered.
    pub(super) given_back: [bool; VMS],
}

/// What somebody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Acquire(Wish),
    /// An acquire that chooses this spare.
    Choose(Wish, u8),
    /// The next effect of this call.
    Proceed(usize),
    /// It does not succeed.
    Fail(usize),
    /// The next effect of this flight.
    Provide(usize),
    /// It does not succeed.
    FailToProvide(usize),
    /// A spare is to be made.
    MakeSpare,
    /// The refiller looks at this spare.
    LookAtSpare(u8),
    /// The refiller's next effect.
    Refill,
    /// It does not succeed.
    FailToRefill,
    /// Nobody wants this spare any more.
    DropSpare(u8),
    Release(Return),
    Renew(u8),
    /// This VM opens this device and writes on it.
    Open(usize, u8),
    Close(usize),
    TimePasses,
    Crash,
    PowerCut,
    Suspect,
    /// The reclaimer looks at this lease.
    Look(u8),
    /// The reclaimer's next effect.
    Reclaim,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            book: 0,
            clock: Clock { boot: 0, up: 0 },
            made: 0,
            disks: [None; MOST_LEASES],
            containerd_leases: 0,
            calls: [Call::None; CLIENTS],
            flights: [Flight::None; MOST_FLIGHTS],
            refiller: Refiller::Idle,
            reclaimer: Reclaimer::Idle,
            launchers: [Launcher { given: 0, open: None }; VMS],
            promises: [None; VMS],
            acquired: [None; VMS],
            given_back: [false; VMS],
        }
    }

    /// Every step that can be taken, and some that change nothing.
    pub(super) fn steps(&self, desk: &Desk, bounds: Bounds) -> Vec<Step> {
        let mut steps = vec![Step::Crash];
        if self.clock.up + 1 < bounds.up {
            steps.push(Step::TimePasses);
        }
        if self.clock.boot + 1 < bounds.boots {
            steps.push(Step::PowerCut);
        }
        self.launchers_steps(&mut steps);
        self.calls_steps(&mut steps);
        let flights = (0..MOST_FLIGHTS).filter(|flight| self.flights[*flight] != Flight::None);
        steps.extend(flights.flat_map(|flight| [Step::Provide(flight), Step::FailToProvide(flight)]));
        self.calls_that_may_come(desk, bounds, &mut steps);
        self.refillers_steps(desk, bounds, &mut steps);
        self.reclaimers_steps(desk, &mut steps);
        steps
    }

    fn launchers_steps(&self, steps: &mut Vec<Step>) {
        for (vm, launcher) in self.launchers.iter().enumerate() {
            if launcher.open.is_some() {
                steps.push(Step::Close(vm));
            } else {
                let given = (0..MOST_LEASES as u8).filter(|device| launcher.given & (1 << device) != 0);
                steps.extend(given.map(|device| Step::Open(vm, device)));
            }
        }
    }

    fn calls_steps(&self, steps: &mut Vec<Step>) {
        for (client, call) in self.calls.iter().enumerate() {
            match call {
                Call::None => {}
                Call::Waiting(..) => steps.push(Step::Fail(client)),
                Call::Intended(..) | Call::Shared(..) | Call::Leased(..) | Call::Prepared(..) => {
                    steps.extend([Step::Proceed(client), Step::Fail(client)]);
                }
                Call::Unshared(..) | Call::Chosen(..) | Call::Found(..) => steps.push(Step::Proceed(client)),
            }
        }
    }

    fn calls_that_may_come(&self, desk: &Desk, bounds: Bounds, steps: &mut Vec<Step>) {
        for vm in 0..VMS as u8 {
            let names = if bounds.names && vm == 0 { &[false, true][..] } else { &[false] };
            for named in names.iter().copied() {
                if self.calls.contains(&Call::None) {
                    let sharing = bounds.sharing;
                    let wishes = [false, true].map(|fresh| Wish { vm, fresh, named, sharing });
                    steps.extend(wishes.map(Step::Acquire));
                    let chosen = (0..self.made).filter(|_| bounds.spares > 0);
                    steps.extend(chosen.flat_map(|spare| wishes.map(|wish| Step::Choose(wish, spare))));
                }
                steps.push(Step::Release(Return { vm, which: Which::Any, named }));
            }
            let generations = 1..=desk.view(self.book).last_generation as u8;
            let which = (0..self.made).map(Which::Lease).chain(generations.map(Which::Generation));
            steps.extend(which.map(|which| Step::Release(Return { vm, which, named: false })));
        }
        steps.extend((0..self.made).map(Step::Renew));
    }

    pub(super) fn reclaimers_steps(&self, desk: &Desk, steps: &mut Vec<Step>) {
        steps.push(Step::Suspect);
        if self.reclaimer == Reclaimer::Idle {
            steps.extend(desk.view(self.book).leases.iter().map(|lease| Step::Look(lease.lease)));
        } else {
            steps.push(Step::Reclaim);
        }
    }

    /// What is to be shared has a maker as long as whoever has intended it is at work, and while somebody provides it.
    pub(super) fn is_being_made(&self, desk: &Desk, lease: u8, flaw: Option<Flaw>) -> bool {
        let is_shared = desk.view(self.book).get(lease).is_some_and(LeaseView::is_of_image);
        // The lease after it was intended with it.
        let by = if is_shared { lease + 1 } else { lease };
        let is_made = |call: &Call| call.makes().is_some_and(|(_, made)| made == by);
        self.refiller.makes() == Some(lease) && flaw != Some(Flaw::ForgetsWhoMakesSpares)
            || self.calls.iter().any(is_made)
            || self.flights.iter().any(|flight| flight.provides() == Some(lease))
    }

    /// The device of this lease's snapshot.
    pub(super) fn device_of(&self, lease: u8) -> Option<u8> {
        let disk = self.disks.iter().position(|disk| disk.is_some_and(|disk| disk.lease == lease));
        disk.map(|device| device as u8)
    }

    /// With what is on it.
    pub(super) fn disk_of(&self, lease: u8) -> Option<(u8, Disk)> {
        let device = self.device_of(lease)?;
        Some((device, self.disks[usize::from(device)]?))
    }

    pub(super) fn is_open(&self, lease: u8) -> bool {
        let device = self.device_of(lease);
        device.is_some() && self.launchers.iter().any(|launcher| launcher.open == device)
    }
}

impl Call {
    /// For what wish it makes which lease.
    pub(super) fn makes(self) -> Option<(Wish, u8)> {
        match self {
            Self::None | Self::Chosen(..) | Self::Found(..) => None,
            Self::Intended(wish, lease)
            | Self::Waiting(wish, lease, _)
            | Self::Shared(wish, lease)
            | Self::Unshared(wish, lease)
            | Self::Leased(wish, lease)
            | Self::Prepared(wish, lease) => Some((wish, lease)),
        }
    }
}

impl Flight {
    /// Which lease's device.
    pub(super) fn provides(self) -> Option<u8> {
        match self {
            Self::None => None,
            Self::Begun(shared) | Self::Making(shared) | Self::Leased(shared) | Self::Viewed(shared) => {
                Some(shared)
            }
        }
    }
}
