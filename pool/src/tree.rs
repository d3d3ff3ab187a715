//! The snapshot tree: which names there are, on which thin device, of which parent. Decides every operation; pure.
//!
//! ```text
//!            Prepare, View                confirmed                Remove
//!   (none) ───────────────► Preparing ──────────────► Ready ────────────────► Removing ─────► (none)
//!                               │                       │ Commit: Active → Committed   ▲ reclaimed
//!                               └───────────────────────┴──── failed, or found so at start
//! ```
//!
//! Only what is Ready is known to containerd. A thin id belongs to its record until the record is deleted, which is
//! after the pool has deleted the thin device. dm-thin's snapshots do not need their origins, so what is Removing can
//! go in any order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::{
    error::{Code, Error, Result},
    ids::ThinIds,
    size::{Bytes, SMALLEST},
};

/// Identifies a snapshot for ever; never used again, and part of its device's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u64);

/// A thin device's id in the pool (24 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ThinId(pub u32);

/// Nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixNanos(pub i64);

/// What a snapshot is. The last four are ours, and never listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Writable, on its way to be committed, or a VM's.
    Active,
    /// Read-only.
    View,
    /// Unchangeable, a parent of others.
    Committed,
    /// A formatted, empty filesystem, the origin of what has no parent.
    Blank,
    /// The same without a filesystem.
    Raw,
    /// Its parent, grown to another size.
    Grown,
    /// Made ahead of need of its parent, and active: the next Active snapshot that is asked for.
    Heir,
}

/// Where a snapshot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Intended: there may be a thin device, and a device of it.
    Preparing,
    /// There.
    Ready,
    /// To be deleted as soon as nobody has its device open.
    Removing,
}

impl Kind {
    /// As it stands in filters and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::View => "view",
            Self::Committed => "committed",
            Self::Blank => "blank",
            Self::Raw => "raw",
            Self::Grown => "grown",
            Self::Heir => "heir",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Active, Self::View, Self::Committed, Self::Blank, Self::Raw, Self::Grown, Self::Heir]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }

    /// Whether such snapshots have an active device for as long as they are there.
    pub(crate) fn is_active(self) -> bool {
        matches!(self, Self::Active | Self::View)
    }

    /// Whether containerd knows of such snapshots.
    pub fn is_listed(self) -> bool {
        matches!(self, Self::Active | Self::View | Self::Committed)
    }
}

impl State {
    /// As it stands in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Removing => "removing",
        }
    }

    /// Reads what [`Self::as_str`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Preparing, Self::Ready, Self::Removing].into_iter().find(|state| state.as_str() == text)
    }
}

/// A snapshot's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// For ever.
    pub id: SnapshotId,
    /// containerd's name for it; empty for ours.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// Where it is in its life.
    pub state: State,
    /// Which committed snapshot it is of.
    pub parent: Option<SnapshotId>,
    /// Its thin device.
    pub thin: ThinId,
    /// Size of its device.
    pub bytes: Bytes,
    /// Bytes of blocks that it maps, shared ones too; known once it was committed and closed.
    pub mapped: Option<u64>,
    /// Whether it was unpacked from an image's layer: then no guest has written it.
    pub layer: bool,
    /// Whether not all of what was written to it is there: then it is never committed.
    pub torn: bool,
    /// As containerd gave them.
    pub labels: BTreeMap<String, String>,
    /// When it was made, or committed.
    pub created: UnixNanos,
    /// When its record changed last.
    pub updated: UnixNanos,
}

impl Snapshot {
    /// Whether it was to have no filesystem.
    pub(crate) fn is_raw(&self) -> bool {
        self.labels.get(FORMAT_LABEL).is_some_and(|format| format == RAW)
    }
}

/// A change of the tree, and of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Makes or replaces the record of this id.
    Put(Box<Snapshot>),
    /// Deletes the record.
    Delete(SnapshotId),
    /// Says of which pool the tree is.
    Pool(String),
}

impl Change {
    /// Whose record it changes.
    pub(crate) fn of(&self) -> Option<SnapshotId> {
        match self {
            Self::Put(snapshot) => Some(snapshot.id),
            Self::Delete(id) => Some(*id),
            Self::Pool(_) => None,
        }
    }
}

/// What a snapshot that was given up has left in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traces {
    /// Its thin id is not there, or somebody else's.
    None,
    /// Perhaps a thin device, and a device of it.
    Maybe,
}

/// What Prepare and View ask for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    /// Name of the new snapshot.
    pub key: String,
    /// Name of its parent; empty for none.
    pub parent: String,
    /// Active or View.
    pub kind: Kind,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Size, where it has no parent and no label.
    pub base_size: Bytes,
    /// The time.
    pub now: UnixNanos,
    /// Whether it is to be made, although there is an heir.
    pub anew: bool,
}

/// A snapshot of ours that others are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Base {
    /// Grown from this, or its heir if it is as large; empty if `None`.
    pub of: Option<SnapshotId>,
    /// Size.
    pub bytes: Bytes,
    /// Whether it has no filesystem.
    pub raw: bool,
}

impl Base {
    fn of(snapshot: &Snapshot) -> Self {
        Self { of: snapshot.parent, bytes: snapshot.bytes, raw: snapshot.kind == Kind::Raw }
    }
}

/// What is to be done for a [`Wish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// First this base has to be made.
    Needs(Base),
    /// The record to write, and the snapshot whose thin device is its origin.
    Make(Box<Snapshot>, Box<Snapshot>),
    /// The record to write: it was made ahead.
    Inherit(Box<Snapshot>),
}

/// The record of a base that is to be made, and the snapshot that it is grown from.
#[derive(Debug)]
pub(crate) struct BasePlan {
    pub(crate) new: Box<Snapshot>,
    pub(crate) origin: Option<Box<Snapshot>>,
    /// One that was begun and could not be given up: nobody is making it.
    left: Option<Box<Snapshot>>,
}

/// The record of an heir that is to be made, and the snapshot that it is made of.
#[derive(Debug)]
pub(crate) struct HeirPlan {
    pub(crate) new: Snapshot,
    pub(crate) origin: Snapshot,
}

impl BasePlan {
    /// What is written down of it. `traces`: what those have left that could not be given up yet.
    pub(crate) fn changes(&self, traces: &HashMap<SnapshotId, Traces>) -> Vec<Change> {
        let left = self.left.iter().map(|left| match traces.get(&left.id) {
            Some(Traces::None) => Change::Delete(left.id),
            Some(Traces::Maybe) | None => removing(left, self.new.created),
        });
        left.chain([Change::Put(self.new.clone())]).collect()
    }
}

/// All snapshots.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    all: BTreeMap<SnapshotId, Snapshot>,
    /// Those that are not Removing.
    keys: HashMap<String, SnapshotId>,
    /// How many children that are listed and not Removing.
    children: HashMap<SnapshotId, usize>,
    bases: HashMap<Base, SnapshotId>,
    removing: BTreeSet<SnapshotId>,
    thins: ThinIds,
    next: u64,
    /// Uuid of the pool's device; empty until it was first seen.
    pool: String,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            keys: HashMap::new(),
            children: HashMap::new(),
            bases: HashMap::new(),
            removing: BTreeSet::new(),
            thins: ThinIds::default(),
            next: 1,
            pool: String::new(),
        }
    }
}

/// So many blanks of other sizes than the usual one are kept.
const ODD_BLANKS: usize = 8;
const SIZE_LABELS: [&str; 2] = ["containerd.io/snapshot/cowshed.size", "containerd.io/snapshot/max-size"];
/// Of what has no parent: "raw" if it is to have no filesystem.
const FORMAT_LABEL: &str = "containerd.io/snapshot/cowshed.format";
const RAW: &str = "raw";
/// containerd and Cowshed set it on what a layer is unpacked into.
const LAYER_LABEL: &str = "containerd.io/snapshot.ref";
/// containerd's name for what a layer is unpacked into begins so (its `snapshots.UnpackKeyPrefix`), and ends with the
/// layer's chain id after a space; containerd 1.7 sets no label when it pulls by itself.
const UNPACK_KEY: &str = "extract-";

impl Tree {
    /// Puts together what was stored. `next` is the lowest id that was never used, `pool` the pool's uuid.
    ///
    /// # Errors
    /// Says what does not fit together.
    pub(crate) fn load(snapshots: Vec<Snapshot>, next: u64, pool: String) -> Result<Self, String> {
        let mut tree = Self { next, pool, ..Self::default() };
        let mut seen = HashSet::new();
        for snapshot in snapshots {
            let (id, thin) = (snapshot.id, snapshot.thin);
            if id.0 >= next {
                return Err(format!("snapshot {} has an id that is still to be given out ({next})", id.0));
            }
            if thin.0 == 0 || thin.0 > crate::ids::LAST || !seen.insert(thin) {
                return Err(format!("snapshot {}: thin id {} is not possible or taken twice", id.0, thin.0));
            }
            if snapshot.state != State::Removing
                && tree.keys.contains_key(&snapshot.key)
                && !snapshot.key.is_empty()
            {
                return Err(format!("two snapshots are called {:?}", snapshot.key));
            }
            tree.apply(Change::Put(Box::new(snapshot)));
        }
        let has_parent = |s: &Snapshot| {
            s.parent.is_none_or(|id| tree.all.get(&id).is_some_and(|parent| parent.kind == Kind::Committed))
        };
        let orphans = tree.all.values().filter(|s| s.state != State::Removing && !has_parent(s));
        let (listed, bases): (Vec<_>, Vec<_>) = orphans.cloned().partition(|s| s.kind.is_listed());
        if let Some(Snapshot { id, key, parent, .. }) = listed.first() {
            let parent = parent.map_or(0, |id| id.0);
            return Err(format!("snapshot {} ({key:?}) has no parent {parent}", id.0));
        }
        // What others would be made of, and nobody can ask for any more.
        bases.iter().for_each(|base| drop(tree.apply(removing(base, base.updated))));
        Ok(tree)
    }

    /// A snapshot's record, in any state.
    pub(crate) fn get(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.all.get(&id)
    }

    /// All records, by id.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Snapshot> {
        self.all.values()
    }

    /// What waits to be deleted, by id.
    pub(crate) fn removing(&self) -> impl Iterator<Item = &Snapshot> {
        self.removing.iter().filter_map(|id| self.get(*id))
    }

    /// What containerd knows, by id.
    pub(crate) fn listed(&self) -> impl Iterator<Item = &Snapshot> {
        self.all().filter(|s| s.state == State::Ready && s.kind.is_listed())
    }

    /// What it was made of: its parent, or a blank.
    pub(crate) fn below(&self, snapshot: &Snapshot) -> Option<&Snapshot> {
        let Some(parent) = snapshot.parent else {
            let kind = if snapshot.is_raw() { Kind::Raw } else { Kind::Blank };
            let fits = |s: &&Snapshot| s.bytes == snapshot.bytes || kind == Kind::Raw;
            return self.all().filter(|s| s.kind == kind && s.state == State::Ready).find(fits);
        };
        self.get(parent)
    }

    /// The name of its parent; empty if it has none.
    pub(crate) fn parent_key(&self, snapshot: &Snapshot) -> &str {
        snapshot.parent.and_then(|id| self.get(id)).map_or("", |parent| parent.key.as_str())
    }

    /// A snapshot that containerd knows.
    pub(crate) fn ready(&self, key: &str) -> Result<&Snapshot> {
        let found = self.keys.get(key).and_then(|id| self.get(*id));
        found
            .filter(|s| s.state == State::Ready)
            .ok_or_else(|| Error::new(Code::NotFound, format!("there is no snapshot {key:?}")))
    }

    /// How many thin ids are in use.
    pub(crate) fn thin_ids_used(&self) -> usize {
        self.thins.used()
    }

    /// Never gives out `thin`: it is in the pool, and not ours.
    pub(crate) fn avoid(&mut self, thin: ThinId) {
        self.thins.avoid(thin);
    }

    /// Uuid of its pool's device; empty until it was first seen.
    pub(crate) fn pool(&self) -> &str {
        &self.pool
    }

    /// Decides a Prepare or View.
    pub(crate) fn prepare(&self, wish: &Wish) -> Result<Plan> {
        if wish.key.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "key: a snapshot needs a name"));
        }
        if self.keys.contains_key(&wish.key) {
            return Err(Error::new(
                Code::AlreadyExists,
                format!("there is a snapshot {:?} already", wish.key),
            ));
        }
        let (wanted, raw) = (wanted_size(wish)?, wants_raw(wish)?);
        let bytes = wanted.unwrap_or(wish.base_size);
        let (base, parent) = if wish.parent.is_empty() {
            // What has nothing on it does for all sizes.
            (Base { of: None, bytes: if raw { SMALLEST } else { bytes }, raw }, None)
        } else {
            let parent = self.ready(&wish.parent)?;
            if parent.kind != Kind::Committed {
                let what = format!("parent {:?} is not committed, but {}", wish.parent, parent.kind.as_str());
                return Err(Error::new(Code::InvalidArgument, what));
            }
            let bytes = wanted.unwrap_or(parent.bytes);
            if bytes < parent.bytes {
                let what = format!(
                    "{:?} would have {bytes}, its parent {:?} has {}: ask for as much or more",
                    wish.key, wish.parent, parent.bytes
                );
                return Err(Error::new(Code::InvalidArgument, what));
            }
            (Base { of: Some(parent.id), bytes, raw: false }, Some(parent))
        };
        let origin = match parent {
            // Never is a filesystem grown that a guest has written; the guest can do it.
            Some(parent) if base.bytes == parent.bytes || !parent.layer => parent,
            _ => match self.ready_base(base) {
                Some(origin) => origin,
                None => return Ok(Plan::Needs(base)),
            },
        };
        let named = |ours: Snapshot| Snapshot {
            key: wish.key.clone(),
            kind: wish.kind,
            labels: wish.labels.clone(),
            layer: is_layer(wish),
            created: wish.now,
            updated: wish.now,
            ..ours
        };
        let heir = parent.filter(|_| self.wants_heir_of(wish).is_some()).and_then(|p| self.heir(p));
        if let Some(heir) = heir.filter(|heir| heir.state == State::Ready) {
            return Ok(Plan::Inherit(Box::new(named(heir.clone()))));
        }
        let new = named(self.intent(parent.map(|p| p.id), if raw { bytes } else { base.bytes })?);
        Ok(Plan::Make(Box::new(new), Box::new(origin.clone())))
    }

    /// The parent whose heir would do for this wish, whether there is one or not.
    pub(crate) fn wants_heir_of(&self, wish: &Wish) -> Option<SnapshotId> {
        if wish.kind != Kind::Active || wish.anew || self.keys.contains_key(&wish.key) {
            return None;
        }
        let (parent, wanted) = (self.ready(&wish.parent).ok()?, wanted_size(wish).ok()?);
        wanted.is_none_or(|bytes| bytes == parent.bytes).then_some(parent.id)
    }

    /// What was made ahead of need of `parent`, or is being made.
    pub(crate) fn heir(&self, parent: &Snapshot) -> Option<&Snapshot> {
        let base = Base { of: Some(parent.id), bytes: parent.bytes, raw: false };
        self.bases.get(&base).and_then(|id| self.get(*id))
    }

    /// All heirs that are there, by id.
    pub(crate) fn heirs(&self) -> impl Iterator<Item = &Snapshot> {
        self.bases
            .values()
            .filter_map(|id| self.get(*id))
            .filter(|s| s.kind == Kind::Heir && s.state == State::Ready)
    }

    /// Decides the making of an heir of this snapshot: its record and its origin. `None` if it has one, or can have none. With
    /// `most` of them there, the one that was made first goes.
    pub(crate) fn make_heir(
        &self,
        of: SnapshotId,
        most: usize,
        now: UnixNanos,
    ) -> Option<(HeirPlan, Vec<Change>)> {
        let is_parent = |s: &&Snapshot| s.state == State::Ready && s.kind == Kind::Committed;
        let origin = self.get(of).filter(is_parent).filter(|parent| self.heir(parent).is_none())?.clone();
        let new = self.intent(Some(of), origin.bytes).ok()?;
        let new = Snapshot { kind: Kind::Heir, created: now, updated: now, ..new };
        let mut surplus: Vec<&Snapshot> = self.heirs().collect();
        surplus.sort_by_key(|heir| heir.id);
        surplus.truncate((surplus.len() + 1).saturating_sub(most));
        let gone = surplus.into_iter().map(|heir| removing(heir, now));
        let changes = gone.chain([Change::Put(Box::new(new.clone()))]).collect();
        Some((HeirPlan { new, origin }, changes))
    }

    /// The heirs that were made before `then`, and are not wanted any more.
    pub(crate) fn old_heirs(&self, then: UnixNanos, now: UnixNanos) -> Vec<Change> {
        self.heirs().filter(|heir| heir.created < then).map(|heir| removing(heir, now)).collect()
    }

    /// Decides how a base that is not there is made: its record, and its origin (none for a blank). `None` if another
    /// has made it in the meantime. To be asked by one at a time.
    pub(crate) fn make_base(&self, base: Base, now: UnixNanos) -> Result<Option<BasePlan>> {
        if self.ready_base(base).is_some() {
            return Ok(None);
        }
        let gone = || Error::new(Code::NotFound, "the parent was removed in the meantime");
        let parent = match base.of {
            Some(id) => Some(self.get(id).filter(|p| p.state == State::Ready).ok_or_else(gone)?),
            None => None,
        };
        let kind = match parent {
            Some(_) => Kind::Grown,
            None if base.raw => Kind::Raw,
            None => Kind::Blank,
        };
        let new = Snapshot { kind, created: now, updated: now, ..self.intent(base.of, base.bytes)? };
        let left = self.bases.get(&base).and_then(|id| self.get(*id)).cloned().map(Box::new);
        Ok(Some(BasePlan { new: Box::new(new), origin: parent.cloned().map(Box::new), left }))
    }

    /// The blanks of odd sizes that are too many when `new` is there as well, which somebody waits for: those made first.
    /// Anybody can ask for any size.
    pub(crate) fn surplus_blanks(&self, new: SnapshotId, base_size: Bytes, now: UnixNanos) -> Vec<Change> {
        let is_odd = |s: &&Snapshot| s.kind == Kind::Blank && s.bytes != base_size;
        let there = |s: &&Snapshot| s.state == State::Ready && s.id != new;
        // By id, which is the order in which they were begun; the time is that of whoever had asked.
        let odd: Vec<&Snapshot> = self.all().filter(is_odd).filter(there).collect();
        let one_more = usize::from(self.get(new).as_ref().is_some_and(is_odd));
        let surplus = (odd.len() + one_more).saturating_sub(ODD_BLANKS);
        odd.into_iter().take(surplus).map(|blank| removing(blank, now)).collect()
    }

    fn ready_base(&self, base: Base) -> Option<&Snapshot> {
        self.bases.get(&base).and_then(|id| self.get(*id)).filter(|s| s.state == State::Ready)
    }

    fn intent(&self, parent: Option<SnapshotId>, bytes: Bytes) -> Result<Snapshot> {
        let none = || {
            Error::new(Code::ResourceExhausted, "all 2^24 thin ids of the pool are in use: remove snapshots")
        };
        Ok(Snapshot {
            id: SnapshotId(self.next),
            key: String::new(),
            kind: Kind::Active,
            state: State::Preparing,
            parent,
            thin: self.thins.lowest_free().ok_or_else(none)?,
            bytes,
            mapped: None,
            layer: false,
            torn: false,
            labels: BTreeMap::new(),
            created: UnixNanos::default(),
            updated: UnixNanos::default(),
        })
    }

    /// Confirms a snapshot that was made.
    pub(crate) fn confirm(&self, id: SnapshotId) -> Result<Change> {
        let gone = || Error::new(Code::Internal, format!("snapshot {} has no record any more", id.0));
        let snapshot = self.get(id).filter(|s| s.state == State::Preparing).ok_or_else(gone)?;
        Ok(Change::Put(Box::new(Snapshot { state: State::Ready, ..snapshot.clone() })))
    }

    /// Gives a snapshot that is being made another thin id: the pool has the one that it had.
    pub(crate) fn another_thin(&self, id: SnapshotId) -> Result<Change> {
        let gone = || Error::new(Code::Internal, format!("snapshot {} has no record any more", id.0));
        let snapshot = self.get(id).filter(|s| s.state == State::Preparing).ok_or_else(gone)?;
        let thin = self.intent(None, snapshot.bytes)?.thin;
        Ok(Change::Put(Box::new(Snapshot { thin, ..snapshot.clone() })))
    }

    /// Gives up a snapshot that could not be made or marked as removed, or a base that is not there, and the bases grown
    /// from it; not one that has children by now.
    pub(crate) fn give_up(&self, id: SnapshotId, traces: Traces, now: UnixNanos) -> Vec<Change> {
        let childless = |snapshot: &&Snapshot| !self.children.contains_key(&snapshot.id);
        let Some(snapshot) = self.get(id).filter(childless) else { return Vec::new() };
        let given_up = match traces {
            Traces::Maybe => removing(snapshot, now),
            Traces::None => Change::Delete(id),
        };
        let grown = self.grown(id).map(|base| removing(base, now));
        [given_up].into_iter().chain(grown).collect()
    }

    /// The bases grown from it, and its heir. One that is being made finds at its confirmation that it is not wanted any more.
    fn grown(&self, id: SnapshotId) -> impl Iterator<Item = &Snapshot> {
        let bases = self.bases.iter().filter(move |(base, _)| base.of == Some(id));
        bases.filter_map(|(_, base)| self.get(*base))
    }

    /// Says that not all of what was written to it is there. Nothing changes if it is not there itself, or committed.
    pub(crate) fn tear(&self, id: SnapshotId) -> Option<Change> {
        let whole = |s: &&Snapshot| s.state == State::Ready && s.kind == Kind::Active && !s.torn;
        let torn = self.get(id).filter(whole)?.clone();
        Some(Change::Put(Box::new(Snapshot { torn: true, ..torn })))
    }

    /// Decides a Commit of what was flushed: `key` was this snapshot's name then.
    pub(crate) fn commit(
        &self,
        name: &str,
        (key, flushed): (&str, SnapshotId),
        labels: BTreeMap<String, String>,
        now: UnixNanos,
    ) -> Result<Change> {
        if name.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "name: a committed snapshot needs a name"));
        }
        let snapshot = self.ready(key)?;
        if snapshot.id != flushed {
            let what = format!("snapshot {key:?} was removed and made anew while it was committed");
            return Err(Error::new(Code::NotFound, what));
        }
        if snapshot.torn {
            return Err(torn(key));
        }
        if snapshot.kind != Kind::Active {
            let what = format!("snapshot {key:?} is not active, but {}", snapshot.kind.as_str());
            return Err(Error::new(Code::FailedPrecondition, what));
        }
        if self.keys.contains_key(name) {
            return Err(Error::new(Code::AlreadyExists, format!("there is a snapshot {name:?} already")));
        }
        let committed = Snapshot {
            key: name.to_owned(),
            kind: Kind::Committed,
            labels,
            created: now,
            updated: now,
            ..snapshot.clone()
        };
        Ok(Change::Put(Box::new(committed)))
    }

    /// Decides a Remove. Nothing changes if there is no such snapshot.
    pub(crate) fn remove(&self, key: &str, now: UnixNanos) -> Result<Vec<Change>> {
        let Some(snapshot) = self.keys.get(key).and_then(|id| self.get(*id)) else { return Ok(Vec::new()) };
        if snapshot.state == State::Preparing {
            // The one error that does not end containerd's collection.
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("snapshot {key:?} is being made; try again"),
            ));
        }
        let children = self.children.get(&snapshot.id).copied().unwrap_or(0);
        if children > 0 {
            let what = format!("snapshot {key:?} has {children} snapshots on it: remove them first");
            return Err(Error::new(Code::FailedPrecondition, what));
        }
        Ok([snapshot].into_iter().chain(self.grown(snapshot.id)).map(|s| removing(s, now)).collect())
    }

    /// Decides an Update of the labels that `paths` name ("labels" or "labels.NAME"; all of them if there is none).
    pub(crate) fn update(
        &self,
        key: &str,
        labels: &BTreeMap<String, String>,
        paths: &[String],
        now: UnixNanos,
    ) -> Result<Change> {
        let mut snapshot = self.ready(key)?.clone();
        if paths.is_empty() {
            snapshot.labels.clone_from(labels);
        }
        for path in paths {
            if path == "labels" {
                snapshot.labels.clone_from(labels);
            } else if let Some(name) = path.strip_prefix("labels.") {
                match labels.get(name) {
                    Some(value) => snapshot.labels.insert(name.to_owned(), value.clone()),
                    None => snapshot.labels.remove(name),
                };
            } else {
                let what = format!("field {path:?} of snapshot {key:?} cannot be changed; labels can");
                return Err(Error::new(Code::InvalidArgument, what));
            }
        }
        snapshot.updated = now;
        Ok(Change::Put(Box::new(snapshot)))
    }

    /// Makes a change; returns the one that takes it back.
    pub(crate) fn apply(&mut self, change: Change) -> Change {
        match change {
            Change::Put(snapshot) => {
                let id = snapshot.id;
                let before = self.all.remove(&id);
                if let Some(before) = &before {
                    self.unindex(before);
                }
                self.index(&snapshot);
                self.next = self.next.max(id.0 + 1);
                self.all.insert(id, *snapshot);
                before.map_or(Change::Delete(id), |before| Change::Put(Box::new(before)))
            }
            Change::Delete(id) => match self.all.remove(&id) {
                Some(before) => {
                    self.unindex(&before);
                    Change::Put(Box::new(before))
                }
                None => Change::Delete(id),
            },
            Change::Pool(pool) => Change::Pool(std::mem::replace(&mut self.pool, pool)),
        }
    }

    fn index(&mut self, snapshot: &Snapshot) {
        self.thins.take(snapshot.thin);
        if snapshot.state == State::Removing {
            self.removing.insert(snapshot.id);
            return;
        }
        if snapshot.kind.is_listed() {
            self.keys.insert(snapshot.key.clone(), snapshot.id);
            if let Some(parent) = snapshot.parent {
                *self.children.entry(parent).or_default() += 1;
            }
        } else {
            self.bases.insert(Base::of(snapshot), snapshot.id);
        }
    }

    fn unindex(&mut self, snapshot: &Snapshot) {
        self.thins.free(snapshot.thin);
        if snapshot.state == State::Removing {
            self.removing.remove(&snapshot.id);
            return;
        }
        if snapshot.kind.is_listed() {
            if self.keys.get(&snapshot.key) == Some(&snapshot.id) {
                self.keys.remove(&snapshot.key);
            }
            if let Some(parent) = snapshot.parent
                && let Some(count) = self.children.get_mut(&parent)
            {
                *count -= 1;
                if *count == 0 {
                    self.children.remove(&parent);
                }
            }
        } else {
            // One that could not be given up in time may have a successor.
            let base = Base::of(snapshot);
            if self.bases.get(&base) == Some(&snapshot.id) {
                self.bases.remove(&base);
            }
        }
    }
}

/// The kernel tells once only what it could not write, and does not try again: so it is told from now on.
pub(crate) fn torn(key: &str) -> Error {
    let what = format!(
        "not all of what was written to snapshot {key:?} is on the disk: remove it and make it anew (a layer: unpack it again)"
    );
    Error::new(Code::DataLoss, what)
}

fn removing(snapshot: &Snapshot, now: UnixNanos) -> Change {
    Change::Put(Box::new(Snapshot { state: State::Removing, updated: now, ..snapshot.clone() }))
}

/// Whether it is for an image's layer to be unpacked into. Keys come as NAMESPACE/NUMBER/KEY.
fn is_layer(wish: &Wish) -> bool {
    let key = wish.key.splitn(3, '/').last().unwrap_or_default();
    wish.labels.contains_key(LAYER_LABEL) || key.starts_with(UNPACK_KEY) && key.contains(' ')
}

/// A layer's labels can be an image's annotations, and all images on it have its size: only disks can ask for one.
fn wanted_size(wish: &Wish) -> Result<Option<Bytes>> {
    if is_layer(wish) {
        return Ok(None);
    }
    let Some((label, text)) = SIZE_LABELS.iter().find_map(|label| wish.labels.get_key_value(*label)) else {
        return Ok(None);
    };
    let bad = |what: String| Error::new(Code::InvalidArgument, format!("label {label}: {what}"));
    text.parse::<Bytes>().and_then(Bytes::of_disk).map(Some).map_err(bad)
}

/// What has a parent has its filesystem.
fn wants_raw(wish: &Wish) -> Result<bool> {
    let bad = |what: &str| Err(Error::new(Code::InvalidArgument, format!("label {FORMAT_LABEL}: {what}")));
    match wish.labels.get(FORMAT_LABEL).map(String::as_str) {
        None => Ok(false),
        Some(RAW) if wish.parent.is_empty() => Ok(true),
        Some(RAW) => bad("what has a parent has that one's filesystem; leave the label out"),
        Some(other) => bad(&format!("{other:?} is not known; it is \"raw\", or leave the label out")),
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
pub(crate) mod tests;
