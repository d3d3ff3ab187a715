//! What takes room in the pool, and who needs it.
//!
//! ```text
//!   image (all its names) ─► manifests ─► top layer ─► parent ─► …        a layer's room comes back with the last
//!   lease, spare ───────────────────────► top layer ─► parent ─► …        of those that stand on it
//!   others' snapshots and leases ───────► layer ─────► parent ─► …
//! ```
//!
//! Sizes may be too small, never too large: a plan promises them. Nothing may be missing that stands on a layer.

use std::{collections::BTreeMap, fmt, num::NonZeroU64};

use cowshed_leases::{LeaseId, UnixMicros, VmId};

use super::{Bytes, Room};

/// Everything, as of one moment. Who needs what is asked last, so that nothing goes for which somebody has come meanwhile; and
/// whoever removes it looks again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// The pool.
    pub pool: Pool,
    /// What the pool can grow into.
    pub group: VolumeGroup,
    /// Committed snapshots. One on which nothing here stands is somebody's.
    pub layers: BTreeMap<ChainId, Layer>,
    /// Images that are ours to remove.
    pub images: BTreeMap<Target, Image>,
    /// Leases whose disks are there or are being made, but for spares: of VMs, of what they share, and all that were released.
    pub leases: BTreeMap<LeaseId, Lease>,
    /// Spares that were not released, by their leases.
    pub spares: BTreeMap<LeaseId, Spare>,
}

/// How full the pool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// In all.
    pub total: Room,
    /// In use, as the kernel says.
    pub used: Room,
    /// Of that, what was removed and is to come back yet.
    pub returning: Room,
}

impl Pool {
    /// In use, and to stay so.
    #[must_use]
    pub fn settled(&self) -> Self {
        Self { used: self.used.less(self.returning), returning: Room::NONE, ..*self }
    }
}

/// The volume group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeGroup {
    /// In free extents.
    pub free: Bytes,
    /// An extent, in bytes.
    pub extent: NonZeroU64,
}

/// A layer, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// The one below it.
    pub parent: Option<ChainId>,
    /// What it takes beyond those below it.
    pub own: Room,
    /// How much holds it that is not here: snapshots, leases and labels of other clients, pulls of our own.
    pub others: u32,
}

/// What containerd's image records of one target lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is called.
    pub names: Names,
    /// All manifests that it is or leads to, for whatever platform, each with its top layer if it is unpacked.
    pub manifests: BTreeMap<Manifest, Option<ChainId>>,
    /// Since when it has been here.
    pub since: UnixMicros,
    /// When a disk was last made of it.
    pub last_use: Option<UnixMicros>,
    /// How many spares are kept of it, by its pin and demand; `None`: as many as of any.
    pub spares_kept: Option<u32>,
}

/// The names of an image: one at the least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    first: Name,
    more: Vec<Name>,
}

impl Names {
    /// Only this one.
    pub fn of(name: Name) -> Self {
        Self { first: name, more: Vec::new() }
    }

    /// With this one.
    #[must_use]
    pub fn and(mut self, name: Name) -> Self {
        self.more.push(name);
        self
    }

    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = &Name> {
        std::iter::once(&self.first).chain(&self.more)
    }
}

/// A name of an image, and what is so of the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The full reference.
    pub image: ImageName,
    /// Its pin.
    pub pin: Option<Pin>,
    /// A prefetch job has had it fetched for later: it stays until then.
    pub prefetched_until: Option<UnixMicros>,
    /// Whether somebody is at it.
    pub fetch: Fetch,
}

impl Name {
    /// One of which nothing else is so.
    pub fn plain(image: ImageName) -> Self {
        Self { image, pin: None, prefetched_until: None, fetch: Fetch::Idle }
    }
}

/// A pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// Until it is taken off.
    ForGood,
    /// By the wall clock.
    Until(UnixMicros),
}

/// Whether an image is being fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// It is not.
    Idle,
    /// It is being pulled.
    Pulled,
    /// A prefetch job that runs waits for it.
    Awaited,
}

/// A disk that somebody has, or had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose.
    pub vm: VmId,
    /// Of what.
    pub made_of: MadeOf,
    /// The layer that its snapshot stands on; `None` if it has none yet.
    pub top: Option<ChainId>,
    /// What it takes beyond the layers.
    pub own: Room,
    /// Whether it is still wanted.
    pub tenure: Tenure,
}

/// Of what a disk is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MadeOf {
    /// This manifest.
    Manifest(Manifest),
    /// What this name will lead to: nothing is granted yet.
    Name(ImageName),
}

/// Whether a lease is still wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tenure {
    /// A VM has it, or is to have it.
    Held,
    /// It was released: its disk goes by itself when it is closed.
    Releasing,
}

/// A disk made ahead of need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spare {
    /// Of what.
    pub manifest: Manifest,
    /// The layer that it stands on.
    pub top: ChainId,
    /// What it takes beyond the layers.
    pub own: Room,
    /// Whether it can be dropped.
    pub state: SpareState,
}

/// Whether a spare can be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpareState {
    /// Nobody is at it.
    Idle,
    /// It is being made or handed out, or its device is open.
    Busy,
}

macro_rules! name {
    ($(#[$doc:meta] $name:ident),*) => {$(
        #[$doc]
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub String);

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

name!(
    /// What a layer is with all below it; the name of its snapshot.
    ChainId,
    /// Digest of what an image record names: a manifest, or an index.
    Target,
    /// Digest of a manifest.
    Manifest,
    /// Reference of an image, with registry and tag or digest.
    ImageName
);
