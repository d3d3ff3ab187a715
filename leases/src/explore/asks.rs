//! What launchers ask for, and what they give back.

use super::desk::{TTL_STEPS, steps};
use crate::{
    Ask, Generation, LeaseId, Release, RequestId, Seen, Share, Spare,
    book::tests::{IMAGE, SHARED, id, spec, vm},
};

/// A lease id that no lease gets.
pub(super) const NO_LEASE: u64 = u64::MAX;

/// Whose disks the VMs of a run have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Sharing {
    /// Each its own.
    Nobody,
    /// Each its own, of image 0, of which there are spares; VM 1 wants its fresh disks of another one.
    Spares,
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
    /// Of which image. If nobody shares any, VM 1 wants its fresh disks of another one than its others.
    pub(super) fn image(self) -> u8 {
        match self.sharing {
            Sharing::Nobody => self.vm + u8::from(self.vm == 1 && self.fresh),
            Sharing::Spares => u8::from(self.vm == 1 && self.fresh),
            Sharing::Both | Sharing::One | Sharing::AndScratch => 0,
        }
    }

    pub(super) fn shares(self) -> bool {
        match self.sharing {
            Sharing::Nobody | Sharing::Spares => false,
            Sharing::One => self.vm == 0,
            Sharing::Both | Sharing::AndScratch => true,
        }
    }

    pub(super) fn has_scratch(self) -> bool {
        self.sharing == Sharing::AndScratch && self.vm == 1
    }

    /// With this spare; `seen`: its device as it is now.
    pub(super) fn ask_for(self, spare: u8, seen: Seen) -> Ask {
        let (lease, image_digest) = (id(spare.into()), format!("sha256:{}", self.image()));
        // No lease is made, and nothing shared.
        Ask { spare: Some(Spare { lease, image_digest, seen }), ..self.ask(id(NO_LEASE)) }
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
            expects: 0,
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
    /// Only this generation.
    Generation(u8),
}

impl Return {
    pub(super) fn release(self) -> Release {
        Release {
            vm: vm(self.vm),
            lease: if let Which::Lease(n) = self.which { Some(id(n.into())) } else { None },
            generation: if let Which::Generation(n) = self.which { Some(Generation(n.into())) } else { None },
            request: self.named.then(|| request("release", self.vm)),
            abandon: false,
        }
    }
}

fn request(call: &str, vm: u8) -> RequestId {
    #[allow(clippy::unwrap_used, reason = "a test")]
    format!("{call}-{vm}").parse().unwrap()
}
