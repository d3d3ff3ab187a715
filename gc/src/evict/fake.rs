//! A pool that does what a plan says, and refuses what must not be done. What is freed it finds as containerd does: by what
//! can be reached, each time anew.

use std::collections::{BTreeMap, BTreeSet};

use cowshed_leases::{LeaseId, UnixMicros};

use super::{
    Action, Bytes, ChainId, Fetch, Image, ImageName, Kind, MadeOf, Manifest, Occupancy, Pin, Room,
    SpareState, Step, Target,
};

/// When the tests are.
pub(super) const NOW: UnixMicros = UnixMicros(1000 * SECOND);
const SECOND: i64 = 1_000_000;

pub(super) fn at(seconds: i64) -> UnixMicros {
    UnixMicros(seconds * SECOND)
}

pub(super) fn lease_id(n: usize) -> LeaseId {
    LeaseId::from_random(n as u128)
}

pub(super) fn layer_id(n: usize) -> ChainId {
    ChainId(format!("layer-{n:02}"))
}

pub(super) fn manifest(n: usize) -> Manifest {
    Manifest(format!("manifest-{n}"))
}

/// What there is, as the planner sees it, and what layers take beyond what it knows.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fake {
    pub(super) seen: Occupancy,
    hidden: BTreeMap<ChainId, Room>,
    /// Layers that somebody holds of whom nobody knows.
    unclaimed: BTreeSet<ChainId>,
    now: UnixMicros,
}

impl Fake {
    /// With so much in use beside all that is in the inventory.
    pub(super) fn new(
        mut seen: Occupancy,
        hidden: BTreeMap<ChainId, Room>,
        rest: Room,
        now: UnixMicros,
    ) -> Self {
        let layers = seen.layers.values().map(|layer| layer.own);
        let disks = seen.leases.values().map(|lease| lease.own);
        let spares = seen.spares.values().map(|spare| spare.own);
        seen.pool.used = layers.chain(disks).chain(spares).chain(hidden.values().copied()).sum();
        seen.pool.used = seen.pool.used.plus(rest);
        let mut fake = Self { seen, hidden, unclaimed: BTreeSet::new(), now };
        let reached = fake.reached();
        fake.unclaimed = fake.seen.layers.keys().filter(|layer| !reached.contains(*layer)).cloned().collect();
        fake
    }

    /// Does the step; says how much more is free then.
    pub(super) fn run(&mut self, step: &Step) -> Result<Room, String> {
        let before = self.free();
        match &step.action {
            Action::Extend { kind, to, .. } => self.extend(*kind, *to)?,
            Action::DropSpare { id, .. } => self.drop_spare(id)?,
            Action::RemoveImage { target, names } => self.remove_image(target, names)?,
        }
        self.sweep();
        Ok(self.free().less(before))
    }

    pub(super) fn free(&self) -> Room {
        self.seen.pool.total.less(self.seen.pool.used)
    }

    fn extend(&mut self, kind: Kind, to: Bytes) -> Result<(), String> {
        let (group, total) = (&mut self.seen.group, &mut self.seen.pool.total);
        let by = to.less(total.of(kind));
        if by > group.free || by.0 % group.extent != 0 {
            return Err(format!("{kind} by {by:?} from {group:?}"));
        }
        group.free = group.free.less(by);
        *total = total.plus(Room::only(kind, by));
        Ok(())
    }

    fn drop_spare(&mut self, id: &LeaseId) -> Result<(), String> {
        match self.seen.spares.get(id) {
            Some(spare) if spare.state == SpareState::Busy => Err(format!("{id} is at work")),
            Some(spare) => {
                self.seen.pool.used = self.seen.pool.used.less(spare.own);
                self.seen.spares.remove(id);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn remove_image(&mut self, target: &Target, names: &[ImageName]) -> Result<(), String> {
        let Some(image) = self.seen.images.get(target) else { return Ok(()) };
        let has: BTreeSet<&ImageName> = image.names.iter().map(|name| &name.image).collect();
        if has != names.iter().collect() {
            return Err(format!("{target} is called {has:?}, not {names:?}"));
        }
        if let Some(why) = self.hinders(target, image) {
            return Err(format!("{target}: {why}"));
        }
        self.seen.images.remove(target);
        Ok(())
    }

    /// What keeps it from being removed, as whoever removes it would find.
    fn hinders(&self, target: &Target, image: &Image) -> Option<String> {
        for name in image.names.iter() {
            let is_pinned = match name.pin {
                Some(Pin::ForGood) => true,
                Some(Pin::Until(until)) => until > self.now,
                None => false,
            };
            let is_wanted = name.prefetched_until.is_some_and(|until| until > self.now);
            if is_pinned || is_wanted || name.fetch != Fetch::Idle {
                return Some(format!("{name:?}"));
            }
        }
        let is_leased = self.seen.leases.values().any(|lease| match &lease.made_of {
            MadeOf::Manifest(manifest) => image.manifests.contains_key(manifest),
            MadeOf::Name(name) => image.names.iter().any(|own| own.image == *name),
        });
        let others: Vec<&Image> =
            self.seen.images.iter().filter(|(other, _)| *other != target).map(|(_, other)| other).collect();
        let is_others =
            |manifest: &Manifest| others.iter().any(|other| other.manifests.contains_key(manifest));
        let has_spares = self.seen.spares.values().any(|spare| {
            let is_left = spare.state == SpareState::Busy || !is_others(&spare.manifest);
            image.manifests.contains_key(&spare.manifest) && is_left
        });
        let is_held = image.manifests.values().flatten().any(|top| self.seen.layers[top].others > 0);
        let hindrances = [(is_leased, "leased"), (has_spares, "has spares"), (is_held, "others hold it")];
        hindrances.iter().find(|(is_so, _)| *is_so).map(|(_, what)| (*what).to_owned())
    }

    fn sweep(&mut self) {
        let reached = self.reached();
        let gone: Vec<ChainId> =
            self.seen.layers.keys().filter(|layer| !reached.contains(*layer)).cloned().collect();
        for layer in gone {
            let own = self.seen.layers.remove(&layer).map(|layer| layer.own).unwrap_or_default();
            let hidden = self.hidden.remove(&layer).unwrap_or_default();
            self.seen.pool.used = self.seen.pool.used.less(own).less(hidden);
        }
    }

    fn reached(&self) -> BTreeSet<ChainId> {
        let seen = &self.seen;
        let held = seen.layers.iter().filter(|(_, layer)| layer.others > 0).map(|(id, _)| id);
        let images = seen.images.values().flat_map(|image| image.manifests.values().flatten());
        let leases = seen.leases.values().filter_map(|lease| lease.top.as_ref());
        let spares = seen.spares.values().map(|spare| &spare.top);
        let mut left: Vec<&ChainId> =
            held.chain(images).chain(leases).chain(spares).chain(&self.unclaimed).collect();
        let mut reached = BTreeSet::new();
        while let Some(layer) = left.pop() {
            if reached.insert(layer.clone()) {
                left.extend(seen.layers.get(layer).and_then(|layer| layer.parent.as_ref()));
            }
        }
        reached
    }
}
