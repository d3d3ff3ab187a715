//! What disks of an image write, learnt from those that were given back.

use std::collections::HashMap;

use cowshed_leases::Tenant;

use crate::evict::Bytes;

/// So many images are remembered.
const REMEMBERED: usize = 10_000;
/// After a disk that has written less, so much of the difference is forgotten: one part of this many.
const FORGETS: u64 = 16;
/// So much of the difference is forgotten when nothing was learnt for a while: one part of this many.
const FADES: u64 = 8;

/// A high estimate for each tenant's disks of an image: what the last one has written, if it was more than expected; otherwise what
/// was expected, and a little less. What one tenant's disks write says nothing of another's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(HashMap<(Tenant, String), Bytes>);

impl History {
    /// What such a disk is expected to write; `None` if none was given back yet.
    pub fn expects(&self, tenant: &Tenant, image: &str) -> Option<Bytes> {
        self.0.get(&(tenant.clone(), image.to_owned())).copied()
    }

    /// A disk was given back, and had written so much. What was expected of it counts where nothing is known: one that has written
    /// nothing, because its VM never ran, does not mean that none does.
    pub fn learn(&mut self, tenant: &Tenant, image: &str, expected: Bytes, written: Bytes) {
        let key = (tenant.clone(), image.to_owned());
        let expected = self.0.get(&key).copied().unwrap_or(expected);
        let less = expected.less(written).0;
        let next = if less == 0 { written } else { Bytes(expected.0 - less.div_ceil(FORGETS)) };
        // Any of them: it is learnt again.
        if self.0.len() >= REMEMBERED
            && !self.0.contains_key(&key)
            && let Some(one) = self.0.keys().next().cloned()
        {
            self.0.remove(&one);
        }
        self.0.insert(key, next);
    }

    /// Some time has gone by. What is expected comes nearer to `usual`: an image of which so much is expected that no disk of it is
    /// let in would keep that for ever otherwise, for none is given back.
    pub fn fade(&mut self, usual: Bytes) {
        for known in self.0.values_mut() {
            let more = known.less(usual).0;
            *known = Bytes(known.0 - more.div_ceil(FADES));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let (mut history, red) = (History::default(), Tenant::default());
        let blue: Tenant = "blue".parse().unwrap();
        assert_eq!(history.expects(&red, "a"), None);
        history.learn(&red, "a", Bytes(10), Bytes(100));
        history.learn(&red, "a", Bytes(10), Bytes(3200));
        assert_eq!(history.expects(&red, "a"), Some(Bytes(3200)));
        history.learn(&red, "a", Bytes(9000), Bytes(0));
        assert_eq!(history.expects(&red, "a"), Some(Bytes(3000)));
        (0..1_000).for_each(|_| history.learn(&red, "a", Bytes(9000), Bytes(7)));
        assert_eq!(history.expects(&red, "a"), Some(Bytes(7)), "to the end");
        assert_eq!(history.expects(&red, "b"), None, "each by itself");
        assert_eq!(history.expects(&blue, "a"), None, "of each tenant");
        history.learn(&red, "b", Bytes(1600), Bytes(0));
        assert_eq!(history.expects(&red, "b"), Some(Bytes(1500)), "one that was never used");
    }

    #[test]
    fn what_was_learnt_is_not_for_ever() {
        let (mut history, red) = (History::default(), Tenant::default());
        history.learn(&red, "much", Bytes(0), Bytes(900));
        history.learn(&red, "little", Bytes(0), Bytes(50));
        history.fade(Bytes(100));
        assert_eq!(history.expects(&red, "much"), Some(Bytes(800)));
        (0..100).for_each(|_| history.fade(Bytes(100)));
        assert_eq!(history.expects(&red, "much"), Some(Bytes(100)));
        assert_eq!(history.expects(&red, "little"), Some(Bytes(50)), "less than usual stays");
    }

    #[test]
    fn it_does_not_grow_for_ever() {
        let (mut history, red) = (History::default(), Tenant::default());
        (0..2 * REMEMBERED).for_each(|n| history.learn(&red, &n.to_string(), Bytes(1), Bytes(1)));
        assert_eq!(history.0.len(), REMEMBERED);
        let latest = (2 * REMEMBERED - 1).to_string();
        assert_eq!(history.expects(&red, &latest), Some(Bytes(1)), "the latest is known");
    }
}
