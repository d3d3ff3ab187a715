//! All of a book that anything is decided by, small enough to compare.

use super::{
    desk::{boot_of, number_of},
    world::VMS,
};
use crate::{
    Book, BootId, Grant, Kind, Lease, Mode, Request, RequestId, Spec, State, Stored, Suspicion, Term, Ttl,
    Uptime, book::tests::stored,
};

/// In whose name what is shared is held: the number after those of VMs.
pub(super) const IMAGE: u8 = VMS as u8;
/// In whose name every spare is held here.
pub(super) const SPARE: u8 = IMAGE + 1;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct View {
    /// By lease.
    pub(super) leases: Vec<LeaseView>,
    requests: Vec<(RequestId, bool, String, Option<u8>)>,
    pub(super) last_generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LeaseView {
    pub(super) lease: u8,
    pub(super) vm: u8,
    pub(super) image: u8,
    mode: Mode,
    scratch: bool,
    /// The lease whose device it shares.
    pub(super) shares: Option<u8>,
    pub(super) generation: u64,
    ttl: Option<Ttl>,
    pub(super) boot: BootId,
    until: Option<Uptime>,
    pub(super) stand: Stand,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stand {
    Preparing,
    Granted(Granted),
    Suspect { granted: Granted, expired: bool, boot: BootId, until: Uptime },
    Releasing(Option<Granted>),
    Failed { cleared: bool },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Granted {
    pub(super) device: u8,
    pub(super) image: u8,
    /// The device of its scratch disk.
    scratch: Option<u8>,
    /// The boot that its numbers are of, if it is, or was, a spare's; those of others stay as they are.
    pub(super) numbers: u8,
}

impl View {
    /// Each field is named, so that a new one is thought of here.
    pub(super) fn of(book: &Book) -> Self {
        // What has gone, and the revisions, are for those who watch: see `Desk::number`.
        let Stored { leases, gone: _, requests, horizon: _, last_generation, last_revision: _ } =
            stored(book);
        let request = |(id, request): (RequestId, Request)| {
            let Request { kind, vm, lease, revision: _ } = request;
            (id, kind == Kind::Acquire, vm.into(), lease.as_ref().map(number_of))
        };
        let requests = requests.into_iter().map(request).collect();
        Self { leases: leases.iter().map(LeaseView::of).collect(), requests, last_generation }
    }

    pub(super) fn get(&self, lease: u8) -> Option<&LeaseView> {
        self.leases.iter().find(|view| view.lease == lease)
    }

    /// What shares the device of this lease.
    pub(super) fn sharers(&self, shared: u8) -> impl Iterator<Item = &LeaseView> {
        self.leases.iter().filter(move |lease| lease.shares == Some(shared))
    }

    pub(super) fn holds(&self, vm: u8) -> bool {
        self.leases.iter().any(|lease| lease.vm == vm && lease.is_held())
    }
}

impl LeaseView {
    fn of(lease: &Lease) -> Self {
        let Lease { id, vm, generation, spec, created_at: _, term, revision: _, shares, expects: _, state } =
            lease;
        let (Term { ttl, boot, until }, Spec { image, platform: _, tenant: _, mode, scratch }) =
            (*term, spec);
        let stand = match state {
            State::Preparing => Stand::Preparing,
            State::Granted(grant) => Stand::Granted(Granted::of(grant)),
            State::Suspect { grant, why, since: _, boot, until } => Stand::Suspect {
                granted: Granted::of(grant),
                expired: *why == Suspicion::Expired,
                boot: *boot,
                until: *until,
            },
            State::Releasing { grant, since: _, abandoned: _ } => {
                Stand::Releasing(grant.as_deref().map(Granted::of))
            }
            State::Failed { failure: _, since: _, cleared } => Stand::Failed { cleared: *cleared },
        };
        Self {
            lease: number_of(id),
            vm: if vm.is_image() {
                IMAGE
            } else if vm.is_spare() {
                SPARE
            } else {
                last_digit(vm.as_str())
            },
            image: last_digit(image),
            mode: *mode,
            scratch: scratch.is_some(),
            shares: shares.as_ref().map(number_of),
            generation: generation.0,
            ttl,
            boot,
            until,
            stand,
        }
    }

    /// What its VM has, or had.
    pub(super) fn granted(&self) -> Option<&Granted> {
        match &self.stand {
            Stand::Granted(granted) | Stand::Suspect { granted, .. } => Some(granted),
            Stand::Releasing(granted) => granted.as_ref(),
            Stand::Preparing | Stand::Failed { .. } => None,
        }
    }

    /// The device that goes with it.
    pub(super) fn own_device(&self) -> Option<u8> {
        let granted = self.granted()?;
        if self.shares.is_some() { granted.scratch } else { Some(granted.device) }
    }

    /// Whether it has a snapshot of its own, and so a lease of containerd's, once it is granted.
    pub(super) fn has_own_device(&self) -> bool {
        self.shares.is_none() || self.scratch
    }

    pub(super) fn is_of_image(&self) -> bool {
        self.vm == IMAGE
    }

    pub(super) fn is_spare(&self) -> bool {
        self.vm == SPARE
    }

    pub(super) fn is_granted(&self) -> bool {
        matches!(self.stand, Stand::Granted(_) | Stand::Suspect { .. })
    }

    pub(super) fn is_held(&self) -> bool {
        self.is_granted() || self.stand == Stand::Preparing
    }
}

impl Granted {
    fn of(grant: &Grant) -> Self {
        let scratch = grant.scratch.as_ref().map(|scratch| scratch.device.thin_id as u8);
        let numbers = boot_of(grant.device.number);
        Self { device: grant.device.thin_id as u8, image: last_digit(&grant.image_digest), scratch, numbers }
    }
}

fn last_digit(text: &str) -> u8 {
    text.bytes().last().map_or(0, |digit| digit - b'0')
}
