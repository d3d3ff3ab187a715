//! What takes room, put together from what containerd, the kernel and the ledger have told; decides who holds what.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    num::NonZeroU64,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cowshed_gc::evict::{
    Bytes, ChainId, Fetch, Image, ImageName, Layer, Lease as Disk, MadeOf, Manifest, Name, Names, Occupancy,
    Pin, Pool, Room, Spare, SpareState, Target, Tenure, VolumeGroup,
};
use cowshed_leases::{Lease, LeaseId, Moment, State, UnixMicros};

use super::holds::{Holds, Labels, is_root};
use crate::{
    containerd::{Held, ImageRecord, SnapshotRecord},
    image::ImageRef,
    ledger::Marks,
    prefetch::job::Jobs,
};

/// What containerd and the kernel have told.
pub(super) struct Seen {
    pub(super) pool: Pool,
    pub(super) group: VolumeGroup,
    /// A block of the pool, in bytes.
    pub(super) block: NonZeroU64,
    pub(super) snapshotter: String,
    pub(super) snapshots: Vec<SnapshotRecord>,
    /// What each has besides its parent's, in bytes, as far as it is known.
    pub(super) sizes: HashMap<String, u64>,
    pub(super) blobs: HashMap<String, Labels>,
    pub(super) records: Vec<ImageRecord>,
    /// What containerd's leases hold, but for those of our leases.
    pub(super) held: Vec<Held>,
    /// Spares whose devices nobody has open.
    pub(super) closed: BTreeSet<LeaseId>,
}

/// Who wants what, asked last.
pub(super) struct Wanted {
    pub(super) leases: Vec<Lease>,
    pub(super) marks: Marks,
    pub(super) jobs: Jobs,
    pub(super) now: Moment,
    /// Spares that are being handed out.
    pub(super) in_hand: HashSet<LeaseId>,
    /// How many spares of a manifest are kept; of others, as many as of any.
    pub(super) spares_kept: HashMap<String, u32>,
    /// Names that are being pulled, or that somebody is asking for a disk of.
    pub(super) pulled: HashSet<String>,
    /// So long what a job has fetched is kept for who comes for it.
    pub(super) prefetched_for: Duration,
}

/// The same, by what it is looked up by.
struct Index<'a> {
    wanted: &'a Wanted,
    /// Names that jobs wait for.
    awaited: BTreeSet<&'a str>,
    /// Last grants, by manifest: of what was used before uses were written down, the leases tell.
    granted: HashMap<&'a str, UnixMicros>,
    /// What jobs have fetched, by name: the manifest, and until when it is kept.
    prefetched: HashMap<&'a str, Vec<(&'a str, UnixMicros)>>,
}

impl<'a> Index<'a> {
    fn of(wanted: &'a Wanted) -> Self {
        let mut granted: HashMap<&str, UnixMicros> = HashMap::new();
        for grant in wanted.leases.iter().filter(|lease| lease.vm.is_vm()).filter_map(Lease::grant) {
            let last = granted.entry(&grant.image_digest).or_insert(grant.at);
            *last = grant.at.max(*last);
        }
        let mut prefetched: HashMap<&str, Vec<(&str, UnixMicros)>> = HashMap::new();
        for (name, manifest, until) in wanted.jobs.fetched(wanted.prefetched_for) {
            prefetched.entry(name).or_default().push((manifest, until));
        }
        Self { wanted, awaited: wanted.jobs.awaited(), granted, prefetched }
    }

    fn last_use(&self, manifest: &str) -> Option<UnixMicros> {
        self.wanted.marks.last_use(manifest).max(self.granted.get(manifest).copied())
    }
}

/// Whether an image record is for us to remove: what another client has noted something on, or named as we name none, is its own.
pub(crate) fn is_ours(record: &ImageRecord) -> bool {
    let is_full = || ImageRef::parse(&record.name).is_ok_and(|name| name.to_string() == record.name);
    record.labels.is_empty() && is_full()
}

/// Puts it together.
pub(super) fn occupancy(seen: &Seen, wanted: &Wanted) -> Occupancy {
    let index = Index::of(wanted);
    let holds = Holds { blobs: &seen.blobs, snapshotter: &seen.snapshotter };
    // Of those that have failed and left nothing there is no disk.
    let is_there = |lease: &&Lease| !matches!(lease.state, State::Failed { cleared: true, .. });
    let leases: Vec<&Lease> = wanted.leases.iter().filter(is_there).collect();
    let images = by_target(&seen.records);
    let (ours, others): (Vec<_>, Vec<_>) =
        images.into_iter().partition(|(_, records)| records.iter().all(|record| is_ours(record)));
    let foreign = others.into_iter().map(|(target, _)| target);
    let on = Standing::of(seen);
    let (spares, disks) = disks(seen, wanted, &leases, &on);
    Occupancy {
        pool: seen.pool,
        group: seen.group,
        layers: layers(seen, holds, &leases, foreign),
        images: ours
            .into_iter()
            .filter_map(|(target, records)| {
                image(target, &records, holds, &index, &on).map(|image| (Target::from(target), image))
            })
            .collect(),
        leases: disks,
        spares,
    }
}

fn by_target(records: &[ImageRecord]) -> BTreeMap<&str, Vec<&ImageRecord>> {
    let mut images: BTreeMap<&str, Vec<&ImageRecord>> = BTreeMap::new();
    for record in records {
        images.entry(record.target.digest.as_str()).or_default().push(record);
    }
    images
}

/// Which snapshots there are, and on what they stand.
struct Standing<'a>(HashMap<&'a str, &'a SnapshotRecord>);

impl<'a> Standing<'a> {
    fn of(seen: &'a Seen) -> Self {
        Self(seen.snapshots.iter().map(|snapshot| (snapshot.name.as_str(), snapshot)).collect())
    }

    fn parent(&self, name: &str) -> Option<ChainId> {
        self.0.get(name)?.parent.as_deref().map(ChainId::from)
    }

    fn is_layer(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|snapshot| snapshot.committed)
    }
}

fn room(seen: &Seen, snapshot: &str) -> Room {
    let bytes = seen.sizes.get(snapshot).copied().unwrap_or_default();
    if bytes == 0 { Room::NONE } else { Room::of_mapped(Bytes(bytes), seen.block) }
}

/// The committed snapshots, and how much holds each that is neither an image of ours nor a disk.
fn layers<'a>(
    seen: &'a Seen,
    holds: Holds<'a>,
    leases: &[&Lease],
    foreign: impl Iterator<Item = &'a str>,
) -> BTreeMap<ChainId, Layer> {
    let of_disks: BTreeSet<String> = leases.iter().map(|lease| lease.id.snapshot_key()).collect();
    let mut others: BTreeMap<&str, u32> = BTreeMap::new();
    let mut hold = |name: &'a str| *others.entry(name).or_default() += 1;
    for snapshot in &seen.snapshots {
        match &snapshot.parent {
            Some(parent) if !snapshot.committed && !of_disks.contains(&snapshot.name) => hold(parent),
            _ => {}
        }
        if is_root(&snapshot.labels) {
            hold(&snapshot.name);
        }
        holds.snapshots_of(&snapshot.labels).into_iter().for_each(&mut hold);
    }
    for held in &seen.held {
        match held {
            Held::Snapshot(name) => hold(name),
            Held::Blob(digest) => holds.snapshots(digest).into_iter().for_each(&mut hold),
        }
    }
    let roots = seen.blobs.iter().filter(|(_, labels)| is_root(labels)).map(|(digest, _)| digest.as_str());
    for digest in foreign.chain(roots) {
        holds.snapshots(digest).into_iter().for_each(&mut hold);
    }
    let layer = |snapshot: &SnapshotRecord| {
        let layer = Layer {
            parent: snapshot.parent.as_deref().map(ChainId::from),
            own: room(seen, &snapshot.name),
            others: others.get(snapshot.name.as_str()).copied().unwrap_or_default(),
        };
        (ChainId::from(snapshot.name.as_str()), layer)
    };
    seen.snapshots.iter().filter(|snapshot| snapshot.committed).map(layer).collect()
}

fn image<'a>(
    target: &'a str,
    records: &[&ImageRecord],
    holds: Holds<'a>,
    index: &Index<'_>,
    on: &Standing<'_>,
) -> Option<Image> {
    let mut manifests = holds.manifests(target);
    for top in manifests.values_mut() {
        *top = top.take().filter(|ChainId(name)| on.is_layer(name));
    }
    let mut names = records.iter().map(|record| name(record, &manifests, index));
    let first = Names::of(names.next()?);
    let names = names.fold(first, Names::and);
    let since = records.iter().filter_map(|record| record.updated_at.max(record.created_at)).max();
    let used = manifests.keys().filter_map(|Manifest(digest)| index.last_use(digest));
    let kept = manifests.keys().filter_map(|Manifest(digest)| index.wanted.spares_kept.get(digest).copied());
    Some(Image {
        names,
        // What does not tell has just come.
        since: since.map_or(index.wanted.now.wall, micros),
        last_use: used.max(),
        spares_kept: kept.max(),
        manifests,
    })
}

fn name(record: &ImageRecord, manifests: &BTreeMap<Manifest, Option<ChainId>>, index: &Index<'_>) -> Name {
    let name = record.name.as_str();
    let pin = index.wanted.marks.pin(name, &index.wanted.now);
    let fetch = if index.wanted.pulled.contains(name) {
        Fetch::Pulled
    } else if index.awaited.contains(name) {
        Fetch::Awaited
    } else {
        Fetch::Idle
    };
    let fetched = index.prefetched.get(name).into_iter().flatten();
    let of_it = fetched.filter(|(digest, _)| manifests.contains_key(&Manifest::from(*digest)));
    Name {
        image: ImageName::from(name),
        pin: pin.map(|pin| pin.until.map_or(Pin::ForGood, Pin::Until)),
        prefetched_until: of_it.map(|(_, until)| *until).max(),
        fetch,
    }
}

type Disks = (BTreeMap<LeaseId, Spare>, BTreeMap<LeaseId, Disk>);

fn disks(seen: &Seen, wanted: &Wanted, leases: &[&Lease], on: &Standing<'_>) -> Disks {
    let (mut spares, mut disks) = (BTreeMap::new(), BTreeMap::new());
    for lease in leases {
        let key = lease.id.snapshot_key();
        let (top, own) = (on.parent(&key), room(seen, &key));
        match (lease.grant(), top) {
            (Some(grant), Some(top)) if lease.is_spare() => {
                let is_idle = seen.closed.contains(&lease.id) && !wanted.in_hand.contains(&lease.id);
                let state = if is_idle { SpareState::Idle } else { SpareState::Busy };
                let manifest = Manifest::from(grant.image_digest.as_str());
                spares.insert(lease.id.clone(), Spare { manifest, top, own, state });
            }
            // One that is being made, or has lost its snapshot, is somebody's.
            (grant, top) => {
                let made_of = match grant {
                    Some(grant) => MadeOf::Manifest(Manifest::from(grant.image_digest.as_str())),
                    None => MadeOf::Name(ImageName::from(lease.spec.image.as_str())),
                };
                let tenure = if lease.is_held() { Tenure::Held } else { Tenure::Releasing };
                disks.insert(lease.id.clone(), Disk { vm: lease.vm.clone(), made_of, top, own, tenure });
            }
        }
    }
    (spares, disks)
}

fn micros(at: SystemTime) -> UnixMicros {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMicros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

#[cfg(test)]
#[path = "occupancy_tests.rs"]
mod tests;
