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
    /// What else is in use.
    rest: Room,
    /// Layers that somebody holds of whom nobody knows.
    unclaimed: BTreeSet<ChainId>,
    now: UnixMicros,
}

impl Fake {
    /// With so much in use beside all that is in the inventory.
    pub(super) fn new(seen: Occupancy, hidden: BTreeMap<ChainId, Room>, rest: Room, now: UnixMicros) -> Self {
        let mut fake = Self { seen, hidden, rest, unclaimed: BTreeSet::new(), now };
        fake.seen.pool.used = fake.takes();
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

    /// What there is takes so much, summed up anew.
    fn takes(&self) -> Room {
        let layers = self.seen.layers.values().map(|layer| layer.own);
        let disks = self.seen.leases.values().map(|lease| lease.own);
        let spares = self.seen.spares.values().map(|spare| spare.own);
        let known: Room = layers.chain(disks).chain(spares).sum();
        known.plus(self.hidden.values().copied().sum()).plus(self.rest)
    }

    /// What is not consistent: of this fake by itself, and by what it was before anything was done.
    pub(super) fn audit(&self, before: &Self) -> Vec<String> {
        let (seen, was) = (&self.seen, &before.seen);
        let mut found = self.audit_layers();
        for (id, lease) in &was.leases {
            if seen.leases.get(id) != Some(lease) {
                found.push(format!("{id} of {} is not what it was", lease.vm));
            } else if was.is_asked_for(&lease.made_of) && !seen.is_asked_for(&lease.made_of) {
                found.push(format!("{id} of {} has lost its image", lease.vm));
            }
        }
        for (id, spare) in &seen.spares {
            let made_of = MadeOf::Manifest(spare.manifest.clone());
            if was.is_asked_for(&made_of) && !seen.is_asked_for(&made_of) {
                found.push(format!("{id} is a spare of what is gone"));
            }
        }
        let is_held = |layer: &ChainId| was.layers[layer].others > 0 || before.unclaimed.contains(layer);
        let lost = was.layers.keys().filter(|layer| is_held(layer) && !seen.layers.contains_key(*layer));
        found.extend(lost.map(|layer| format!("{layer} is gone, which others hold")));
        if seen.pool.used != self.takes() {
            found.push(format!("{} are in use, {} by what there is", seen.pool.used, self.takes()));
        }
        let extents = |of: &Occupancy| of.group.free.plus(of.pool.total.data).plus(of.pool.total.metadata);
        if extents(seen) != extents(was) {
            found.push("what the volume group gave is not what the pool has got".to_owned());
        }
        found
    }

    /// Layers on which nothing stands, and what stands on none.
    fn audit_layers(&self) -> Vec<String> {
        let seen = &self.seen;
        let of_images = seen.images.iter().flat_map(|(target, image)| {
            image.manifests.values().flatten().map(move |top| (target.to_string(), top))
        });
        let of_leases =
            seen.leases.iter().filter_map(|(id, lease)| Some((id.to_string(), lease.top.as_ref()?)));
        let of_spares = seen.spares.iter().map(|(id, spare)| (id.to_string(), &spare.top));
        let of_layers =
            seen.layers.iter().filter_map(|(id, layer)| Some((id.to_string(), layer.parent.as_ref()?)));
        let stand = of_images.chain(of_leases).chain(of_spares).chain(of_layers);
        let hang = stand.filter(|(_, layer)| !seen.layers.contains_key(*layer));
        let hang = hang.map(|(what, layer)| format!("{what} stands on {layer}, which is gone"));
        let reached = self.reached();
        let left = seen.layers.keys().filter(|layer| !reached.contains(*layer));
        hang.chain(left.map(|layer| format!("{layer} is left, and nothing stands on it"))).collect()
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

impl Occupancy {
    /// Whether an image leads to it.
    fn is_asked_for(&self, made_of: &MadeOf) -> bool {
        self.images.values().any(|image| match made_of {
            MadeOf::Manifest(manifest) => image.manifests.contains_key(manifest),
            MadeOf::Name(name) => image.names.iter().any(|own| own.image == *name),
        })
    }
}
