//! Who stands on which layer, and so what comes back if some of them go.

use std::collections::{BTreeMap, BTreeSet};

use cowshed_leases::LeaseId;

use super::{ChainId, Image, Lease, MadeOf, Manifest, Occupancy, Room, Spare, SpareState, Target};

/// One of the tally's items. Images are in the order of their targets, spares and leases in that of their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct At(usize);

/// Something that stands on layers.
#[derive(Clone, Copy, Debug)]
pub(super) enum What<'a> {
    Image(&'a Target, &'a Image),
    Spare(&'a LeaseId, &'a Spare),
    Lease(&'a LeaseId, &'a Lease),
}

#[derive(Clone)]
struct Item<'a> {
    what: What<'a>,
    /// What it takes beyond its layers.
    own: Room,
    /// The layers that it stands on, each once, in order.
    layers: Vec<usize>,
    /// Of an image, its disks; of a disk, the images it is of.
    kin: Vec<At>,
    is_there: bool,
}

#[derive(Clone)]
struct Used {
    own: Room,
    /// How much stands on it, directly or not.
    by: usize,
}

/// Everything that stands on layers, and the layers.
#[derive(Clone)]
pub(super) struct Tally<'a> {
    layers: Vec<Used>,
    items: Vec<Item<'a>>,
}

impl<'a> Tally<'a> {
    pub(super) fn new(occupancy: &'a Occupancy) -> Self {
        let numbers: Numbers<'_> =
            occupancy.layers.keys().enumerate().map(|(number, layer)| (layer, number)).collect();
        let mut items = items(occupancy, &numbers);
        relate(&mut items);
        let mut layers: Vec<Used> =
            occupancy.layers.values().map(|layer| Used { own: layer.own, by: 0 }).collect();
        let stands = items.iter().map(|item| (1, item.layers.clone()));
        for (count, chain) in stands.chain(unknown(occupancy, &numbers)) {
            chain.into_iter().for_each(|layer| layers[layer].by += count);
        }
        let mut tally = Self { layers, items };
        tally.hold_unclaimed(occupancy, &numbers);
        tally
    }

    /// A layer on which nothing stands is somebody's who is not known here.
    fn hold_unclaimed(&mut self, occupancy: &Occupancy, numbers: &Numbers<'_>) {
        let unclaimed: Vec<&ChainId> = occupancy
            .layers
            .iter()
            .filter(|(id, _)| numbers.get(id).is_some_and(|number| self.layers[*number].by == 0))
            .map(|(id, _)| id)
            .collect();
        for layer in unclaimed {
            chain(occupancy, numbers, Some(layer)).into_iter().for_each(|number| self.layers[number].by += 1);
        }
    }

    pub(super) fn what(&self, at: At) -> What<'a> {
        self.items[at.0].what
    }

    /// Of an image, its disks that are there; of a disk, the images of it that are.
    pub(super) fn kin(&self, at: At) -> impl Iterator<Item = At> + '_ {
        self.items[at.0].kin.iter().copied().filter(|kin| self.items[kin.0].is_there)
    }

    /// What is there, all of it.
    pub(super) fn there(&self) -> impl Iterator<Item = (At, What<'a>)> + '_ {
        let items = self.items.iter().enumerate().filter(|(_, item)| item.is_there);
        items.map(|(number, item)| (At(number), item.what))
    }

    /// The spares that can be dropped.
    pub(super) fn idle_spares(&self) -> impl Iterator<Item = (At, &'a Spare)> + '_ {
        self.there().filter_map(|(at, what)| match what {
            What::Spare(_, spare) if spare.state == SpareState::Idle => Some((at, spare)),
            _ => None,
        })
    }

    /// What comes back, at the least, if these go.
    pub(super) fn gain(&self, going: &[At]) -> Room {
        let own: Room = going.iter().map(|at| self.items[at.0].own).sum();
        own.plus(self.layers_of(going))
    }

    /// The layers on which nothing but these stands.
    pub(super) fn layers_of(&self, going: &[At]) -> Room {
        let mut left: Vec<usize> =
            going.iter().flat_map(|at| self.items[at.0].layers.iter().copied()).collect();
        left.sort_unstable();
        let freed = left
            .chunk_by(|a, b| a == b)
            .filter(|users| self.layers[users[0]].by == users.len())
            .map(|users| self.layers[users[0]].own);
        freed.sum()
    }

    /// The layers that it stands on, whoever else does.
    pub(super) fn layers_below(&self, at: At) -> Room {
        self.items[at.0].layers.iter().map(|layer| self.layers[*layer].own).sum()
    }

    /// It goes; says what comes back.
    pub(super) fn remove(&mut self, at: At) -> Room {
        let gain = self.gain(&[at]);
        let item = &mut self.items[at.0];
        item.is_there = false;
        item.layers.iter().for_each(|layer| self.layers[*layer].by -= 1);
        gain
    }

    /// The idle spares that nobody could ask for if these images went.
    pub(super) fn spares_of_all(&self, images: &[At]) -> Vec<At> {
        let candidates: BTreeSet<At> = images.iter().flat_map(|image| self.kin(*image)).collect();
        let is_idle =
            |at: &At| matches!(self.what(*at), What::Spare(_, spare) if spare.state == SpareState::Idle);
        let is_left = |at: &At| self.kin(*at).all(|image| images.contains(&image));
        candidates.into_iter().filter(|at| is_idle(at) && is_left(at)).collect()
    }

    /// Of the images that may go, those that stand on one layer together: one alone, or several of which the layer comes
    /// back only with the last.
    pub(super) fn groups(&self, may_go: impl Fn(At) -> bool) -> Vec<Vec<At>> {
        let mut users: Vec<Vec<At>> = vec![Vec::new(); self.layers.len()];
        for (at, _) in self.there().filter(|(at, what)| matches!(what, What::Image(..)) && may_go(*at)) {
            self.items[at.0].layers.iter().for_each(|layer| users[*layer].push(at));
        }
        users.sort_unstable();
        users.dedup();
        users
    }
}

type Numbers<'a> = BTreeMap<&'a ChainId, usize>;

fn items<'a>(occupancy: &'a Occupancy, numbers: &Numbers<'_>) -> Vec<Item<'a>> {
    let item = |what, own, tops: Vec<Option<&ChainId>>| {
        let layers: BTreeSet<usize> =
            tops.into_iter().flat_map(|top| chain(occupancy, numbers, top)).collect();
        Item { what, own, layers: layers.into_iter().collect(), kin: Vec::new(), is_there: true }
    };
    let images = occupancy.images.iter().map(|(target, image)| {
        let tops = image.manifests.values().map(Option::as_ref).collect();
        item(What::Image(target, image), Room::NONE, tops)
    });
    let spares = occupancy
        .spares
        .iter()
        .map(|(id, spare)| item(What::Spare(id, spare), spare.own, vec![Some(&spare.top)]));
    let leases = occupancy
        .leases
        .iter()
        .map(|(id, lease)| item(What::Lease(id, lease), lease.own, vec![lease.top.as_ref()]));
    images.chain(spares).chain(leases).collect()
}

/// Finds which disks are of which images.
fn relate(items: &mut [Item<'_>]) {
    let mut by_manifest: BTreeMap<&Manifest, Vec<At>> = BTreeMap::new();
    let mut by_name = BTreeMap::new();
    for (number, item) in items.iter().enumerate() {
        let What::Image(_, image) = item.what else { continue };
        image.manifests.keys().for_each(|manifest| by_manifest.entry(manifest).or_default().push(At(number)));
        by_name.extend(image.names.iter().map(|name| (&name.image, At(number))));
    }
    for number in 0..items.len() {
        let of = match items[number].what {
            What::Image(..) => continue,
            What::Spare(_, Spare { manifest, .. })
            | What::Lease(_, Lease { made_of: MadeOf::Manifest(manifest), .. }) => {
                by_manifest.get(manifest).cloned().unwrap_or_default()
            }
            What::Lease(_, Lease { made_of: MadeOf::Name(name), .. }) => {
                by_name.get(name).copied().into_iter().collect()
            }
        };
        of.iter().for_each(|image| items[image.0].kin.push(At(number)));
        items[number].kin = of;
    }
}

/// What others stand on, and how many they are.
fn unknown<'a>(
    occupancy: &'a Occupancy,
    numbers: &'a Numbers<'_>,
) -> impl Iterator<Item = (usize, Vec<usize>)> + 'a {
    let held = occupancy.layers.iter().filter(|(_, layer)| layer.others > 0);
    held.map(|(id, layer)| {
        let count = usize::try_from(layer.others).unwrap_or(usize::MAX);
        (count, chain(occupancy, numbers, Some(id)))
    })
}

/// A layer and all below it, as far as they are known. A loop, which cannot be, ends.
fn chain(occupancy: &Occupancy, numbers: &Numbers<'_>, top: Option<&ChainId>) -> Vec<usize> {
    let mut found = Vec::new();
    let mut next = top;
    while let Some((layer, number)) = next.and_then(|id| occupancy.layers.get(id).zip(numbers.get(id))) {
        if found.len() >= numbers.len() {
            break;
        }
        found.push(*number);
        next = layer.parent.as_ref();
    }
    found
}
