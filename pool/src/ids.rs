//! Decides which thin id is next: the lowest that is free.

use std::collections::BTreeSet;

use crate::tree::ThinId;

/// dm-thin's device ids have 24 bits.
pub(crate) const LAST: u32 = (1 << 24) - 1;

/// Thin ids in use. 0 is left alone: LVM and people's first experiments use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ThinIds {
    /// Free ones below `next`.
    gaps: BTreeSet<u32>,
    /// All from here on are free, but for those that are avoided.
    next: u32,
    /// Somebody else's.
    avoided: BTreeSet<u32>,
}

impl Default for ThinIds {
    fn default() -> Self {
        Self { gaps: BTreeSet::new(), next: 1, avoided: BTreeSet::new() }
    }
}

impl ThinIds {
    /// The lowest free id; `None` if all 2^24 are in use.
    pub(crate) fn lowest_free(&self) -> Option<ThinId> {
        let free = |id: &u32| !self.avoided.contains(id);
        let id = self.gaps.iter().copied().find(free).or_else(|| (self.next..=LAST).find(free));
        id.map(ThinId)
    }

    /// Never gives out `id`.
    pub(crate) fn avoid(&mut self, id: ThinId) {
        self.avoided.insert(id.0);
    }

    /// Marks `id` as in use; says whether it was free.
    pub(crate) fn take(&mut self, id: ThinId) -> bool {
        if id.0 < self.next {
            return self.gaps.remove(&id.0);
        }
        self.gaps.extend(self.next..id.0);
        self.next = id.0 + 1;
        true
    }

    /// Marks `id` as free.
    pub(crate) fn free(&mut self, id: ThinId) {
        if id.0 == 0 || id.0 >= self.next {
            return;
        }
        self.gaps.insert(id.0);
        while self.next > 1 && self.gaps.remove(&(self.next - 1)) {
            self.next -= 1;
        }
    }

    /// How many are in use, by us and by others.
    pub(crate) fn used(&self) -> usize {
        self.next as usize - 1 - self.gaps.len() + self.avoided.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_as_a_plain_set(steps in prop::collection::vec((any::<bool>(), 1u32..40), 0..200)) {
            let (mut ids, mut oracle) = (ThinIds::default(), BTreeSet::new());
            for (take, id) in steps {
                if take {
                    prop_assert_eq!(ids.take(ThinId(id)), oracle.insert(id));
                } else {
                    ids.free(ThinId(id));
                    oracle.remove(&id);
                }
                let lowest = (1..).find(|id| !oracle.contains(id)).unwrap();
                prop_assert_eq!(ids.lowest_free(), Some(ThinId(lowest)));
                prop_assert_eq!(ids.used(), oracle.len());
            }
        }
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let mut ids = ThinIds { next: LAST, ..ThinIds::default() };
        assert!(ids.take(ids.lowest_free().unwrap()));
        assert_eq!(ids.lowest_free(), None);
        ids.free(ThinId(7));
        assert_eq!(ids.lowest_free(), Some(ThinId(7)));
    }
}
