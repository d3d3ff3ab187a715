//! What is the best to go: what gives much of what is lacking, was not used for long, and is little to get again.

use std::{cmp::Reverse, time::Duration};

use super::Room;

/// The greater goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    worth: u128,
    /// Of equal ones, that of which less is lost.
    count: Reverse<usize>,
    gives: Reverse<(u64, u64)>,
}

/// Bytes × age, for each of so many things that have to go for it together. Bytes count only as far as they are lacking, so
/// that the largest is not the first to go when a smaller one is enough. `None`: it does not help.
pub(super) fn rank(gives: Room, lack: Room, unused: Duration, count: usize) -> Option<Rank> {
    if !gives.helps(lack) {
        return None;
    }
    let age = u128::from(unused.as_secs()) + 1;
    let worth = gives.min(lack).measured_by(lack).saturating_mul(age)
        / u128::try_from(count.max(1)).unwrap_or(u128::MAX);
    Some(Rank { worth, count: Reverse(count), gives: Reverse((gives.data.0, gives.metadata.0)) })
}
