//! Everything around the book, as small as it can be, and every step that anybody can take in it.
//!
//! | what | lost when the service crashes | lost in a power cut |
//! |---|---|---|
//! | the book as it is written down, containerd's leases, snapshots with their content | no | no |
//! | which devices are open, the uptime | no | yes |
//! | calls under way, the reclaimer | yes | yes |
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
//! - Who opens a device writes on it.
//! - Which of the two clients does something does not matter.

use super::desk::{BookFlaw, Clock, Desk, Return, Which, Wish};

pub(super) const VMS: usize = 2;
pub(super) const CLIENTS: usize = 2;
/// Room for so many leases in one run.
pub(super) const MOST_LEASES: usize = 6;

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
}

/// What is wrong with the service on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    Book(BookFlaw),
    /// Who removes a device does not ask once more whether it is open.
    RemovesOpenDevices,
    /// The reclaimer does not ask whether somebody is at work.
    RemovesWhatIsBeingMade,
    /// The reclaimer strikes a lease off before it clears it away.
    StrikesOffFirst,
    /// The reclaimer gives up on what is open.
    GivesUpOnOpenDevices,
    /// The reclaimer gives up on what has just become Suspect.
    GivesUpEarly,
    /// The snapshot is made before containerd's lease.
    PreparesUnleased,
    /// An acquire that has found a lease does not ask whether it is still there.
    AnswersWhatItFound,
    /// Success is said before it is written down.
    AnswersBeforeItWrites,
    /// What a crash has left half made is left so.
    LeavesHalfMade,
    /// A device gets the name of one that is gone.
    UsesNamesAgain,
}

/// A snapshot, its device and what is on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Disk {
    pub(super) lease: u8,
    pub(super) image: u8,
    /// The VMs that have written on it, a bit each.
    pub(super) marks: u8,
}

/// An acquire under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Call {
    None,
    /// The intent is written down.
    Intended(Wish, u8),
    /// containerd has a lease for it.
    Leased(Wish, u8),
    /// There is a snapshot.
    Prepared(Wish, u8),
    /// The VM has this lease already, or somebody makes it.
    Found(Wish, u8),
}

/// The reclaimer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reclaimer {
    Idle,
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
    /// The next effect of this call.
    Proceed(usize),
    /// It does not succeed.
    Fail(usize),
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
        self.calls_that_may_come(bounds, &mut steps);
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
                Call::Intended(..) | Call::Leased(..) | Call::Prepared(..) => {
                    steps.extend([Step::Proceed(client), Step::Fail(client)]);
                }
                Call::Found(..) => steps.push(Step::Proceed(client)),
            }
        }
    }

    fn calls_that_may_come(&self, bounds: Bounds, steps: &mut Vec<Step>) {
        for vm in 0..VMS as u8 {
            let names = if bounds.names && vm == 0 { &[false, true][..] } else { &[false] };
            for named in names.iter().copied() {
                if self.calls.contains(&Call::None) {
                    steps.extend([false, true].map(|fresh| Step::Acquire(Wish { vm, fresh, named })));
                }
                steps.push(Step::Release(Return { vm, which: Which::Any, named }));
            }
            for lease in 0..self.made {
                let which = [Which::Lease(lease), Which::Generation(lease)];
                steps.extend(which.map(|which| Step::Release(Return { vm, which, named: false })));
            }
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

    pub(super) fn is_being_made(&self, lease: u8) -> bool {
        self.calls.iter().any(|call| match call {
            Call::Intended(_, made) | Call::Leased(_, made) | Call::Prepared(_, made) => *made == lease,
            Call::None | Call::Found(..) => false,
        })
    }

    /// The device of this lease's snapshot.
    pub(super) fn device_of(&self, lease: u8) -> Option<u8> {
        let disk = self.disks.iter().position(|disk| disk.is_some_and(|disk| disk.lease == lease));
        disk.map(|device| device as u8)
    }

    pub(super) fn is_open(&self, lease: u8) -> bool {
        let device = self.device_of(lease);
        device.is_some() && self.launchers.iter().any(|launcher| launcher.open == device)
    }
}
