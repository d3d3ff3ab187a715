//! How much of the pool each image takes.

use std::collections::BTreeMap;

use super::{
    Occupancy, Room, Target,
    tally::{Tally, What},
};

/// What an image takes, at the least, without what its disks have of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    /// Layers on which nothing stands but this image and its disks.
    pub alone: Room,
    /// All its layers, also those that others stand on.
    pub layers: Room,
    /// Its disks, spares included.
    pub disks: usize,
}

/// Of each image.
pub fn takes(occupancy: &Occupancy) -> BTreeMap<Target, Takes> {
    let tally = Tally::new(occupancy);
    let of = |(at, what)| {
        let What::Image(target, _) = what else { return None };
        let all: Vec<_> = std::iter::once(at).chain(tally.kin(at)).collect();
        let takes =
            Takes { alone: tally.layers_of(&all), layers: tally.layers_below(at), disks: all.len() - 1 };
        Some((target.clone(), takes))
    };
    tally.there().filter_map(of).collect()
}
