//! What launchers ask for, and what they give back.

use super::desk::{TTL_STEPS, generation_of, steps};
use crate::{
    Ask, LeaseId, Release, RequestId, Share,
    book::tests::{IMAGE, SHARED, id, spec, vm},
};

/// Whose disks the VMs of a run have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Sharing {
    /// Each its own.
    Nobody,
    /// Both share image 0.
    Both,
    /// VM 0 shares image 0, VM 1 has its own disk of it.
    One,
    /// Both share image 0, and VM 1 has a scratch disk beside it.
    AndScratch,
}

/// What an acquire asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Wish {
    pub(super) vm: u8,
    pub(super) fresh: bool,
    /// With the request id of this VM's acquires.
    pub(super) named: bool,
    pub(super) sharing: Sharing,
}

impl Wish {
    /// Of which image. If nobody shares any, VM 1 wants its fresh disks of another one.
    pub(super) fn image(self) -> u8 {
        match self.sharing {
            Sharing::Nobody => self.vm + u8::from(self.vm == 1 && self.fresh),
            Sharing::Both | Sharing::One | Sharing::AndScratch => 0,
        }
    }

    pub(super) fn shares(self) -> bool {
        match self.sharing {
            Sharing::Nobody => false,
            Sharing::One => self.vm == 0,
            Sharing::Both | Sharing::AndScratch => true,
        }
    }

    pub(super) fn has_scratch(self) -> bool {
        self.sharing == Sharing::AndScratch && self.vm == 1
    }

    /// With this lease for what is shared, if one is to be made.
    pub(super) fn ask(self, fresh: LeaseId) -> Ask {
        let spec =
            if self.shares() { spec(SHARED + u8::from(self.has_scratch())) } else { spec(self.image()) };
        Ask {
            spare: None,
            vm: vm(self.vm),
            spec,
            ttl: (self.vm == 0).then(|| steps(TTL_STEPS)),
            fresh: self.fresh,
            request: self.named.then(|| request("acquire", self.vm)),
            share: self.shares().then(|| Share { image: vm(IMAGE), fresh }),
        }
    }
}

/// What a release gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Return {
    pub(super) vm: u8,
    pub(super) which: Which,
    /// With the request id of this VM's releases.
    pub(super) named: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Which {
    /// Whatever the VM has.
    Any,
    /// Only this lease.
    Lease(u8),
    /// Only the generation of this lease.
    Generation(u8),
}

impl Return {
    pub(super) fn release(self) -> Release {
        Release {
            vm: vm(self.vm),
            lease: if let Which::Lease(n) = self.which { Some(id(n.into())) } else { None },
            generation: if let Which::Generation(n) = self.which { Some(generation_of(n)) } else { None },
            request: self.named.then(|| request("release", self.vm)),
            abandon: false,
        }
    }
}

fn request(call: &str, vm: u8) -> RequestId {
    #[allow(clippy::unwrap_used, reason = "a test")]
    format!("{call}-{vm}").parse().unwrap()
}
