//! How much room unpacked images take, by the snapshotter's own account.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Digest, Shared, facts::Facts};
use crate::error::Result;

/// Calls to containerd at a time.
const ABREAST: usize = 8;
/// Layers whose size is remembered: more than a host has.
const REMEMBERED: usize = 100_000;

/// The room that an unpacked image takes in the snapshotter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnDisk {
    /// Of all its layers, in bytes.
    pub bytes: u64,
    /// Of those that no other image has: what comes back if it goes, by all its names.
    pub exclusive: u64,
}

/// Sizes of committed snapshots, which do not change.
#[derive(Debug, Default)]
pub(super) struct Sizes(Mutex<HashMap<Digest, u64>>);

impl Shared {
    /// Of each of these; of those that are not unpacked, nothing is known.
    pub(super) async fn on_disk(&self, images: &[Option<Arc<Facts>>]) -> Result<Vec<Option<OnDisk>>> {
        let chains: Vec<&[Digest]> = images.iter().flatten().map(|facts| &facts.chain[..]).collect();
        let users = users(&chains);
        let layers: Vec<Digest> = users.keys().map(|layer| (*layer).clone()).collect();
        let sizes: HashMap<Digest, u64> = stream::iter(layers)
            .map(|layer| async move { self.size_of(&layer).await.map(|size| (layer, size)) })
            .buffer_unordered(ABREAST)
            .try_collect()
            .await?;
        let size = |facts: &Arc<Facts>| measure(&facts.chain, &users, &sizes);
        Ok(images.iter().map(|facts| facts.as_ref().map(size)).collect())
    }

    /// Nothing for one that has gone meanwhile.
    async fn size_of(&self, layer: &Digest) -> Result<u64> {
        if let Some(size) = self.sizes.0.lock().unwrap_or_else(PoisonError::into_inner).get(layer) {
            return Ok(*size);
        }
        let usage = self.containerd.snapshot_usage(layer.as_str()).await;
        let Some(size) = usage.map_err(|e| self.containerd.explain(e))? else { return Ok(0) };
        let mut remembered = self.sizes.0.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(layer.clone(), size);
        Ok(size)
    }
}

/// How many different images have each layer: names of the same one count once.
fn users<'a>(chains: &[&'a [Digest]]) -> HashMap<&'a Digest, usize> {
    let mut tops: Vec<&Digest> = Vec::new();
    let mut users = HashMap::new();
    for chain in chains {
        let Some(top) = chain.last().filter(|top| !tops.contains(top)) else { continue };
        tops.push(top);
        chain.iter().for_each(|layer| *users.entry(layer).or_insert(0) += 1);
    }
    users
}

fn measure(chain: &[Digest], users: &HashMap<&Digest, usize>, sizes: &HashMap<Digest, u64>) -> OnDisk {
    chain.iter().fold(OnDisk::default(), |sum, layer| {
        let size = sizes.get(layer).copied().unwrap_or_default();
        let is_own = users.get(layer) == Some(&1);
        OnDisk {
            bytes: sum.bytes.saturating_add(size),
            exclusive: sum.exclusive.saturating_add(if is_own { size } else { 0 }),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_images_share_is_nobodys_alone() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|text| Digest::of(text.as_bytes()));
        let (one, two) = ([a.clone(), b.clone()], [a.clone(), c.clone(), d.clone()]);
        // The first has two names.
        let chains = [&one[..], &two[..], &one[..]];
        let users = users(&chains);
        let sizes = HashMap::from([(a, 1), (b, 10), (c, 100), (d, u64::MAX)]);
        assert_eq!(measure(&one, &users, &sizes), OnDisk { bytes: 11, exclusive: 10 });
        assert_eq!(measure(&two, &users, &sizes), OnDisk { bytes: u64::MAX, exclusive: u64::MAX });
        assert_eq!(measure(&[], &users, &sizes), OnDisk::default());
    }
}
