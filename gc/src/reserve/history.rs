//! What disks of an image write, learnt from those that were given back.

use std::collections::HashMap;

use crate::evict::Bytes;

/// So many images are remembered.
const REMEMBERED: usize = 10_000;
/// After a disk that has written less, so much of the difference is forgotten: one part of this many.
const FORGETS: u64 = 16;

/// A high estimate for each image: what the last disk has written, if it was more than expected; otherwise what was expected,
/// and a little less.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History(HashMap<String, Bytes>);

impl History {
    /// What a disk of the image is expected to write; `None` if none was given back yet.
    pub fn expects(&self, image: &str) -> Option<Bytes> {
        self.0.get(image).copied()
    }

    /// A disk of the image was given back, and had written so much. What was expected of it counts where nothing is known: one that
    /// has written nothing, because its VM never ran, does not mean that none does.
    pub fn learn(&mut self, image: &str, expected: Bytes, written: Bytes) {
        let expected = self.expects(image).unwrap_or(expected);
        let less = expected.less(written).0;
        let next = if less == 0 { written } else { Bytes(expected.0 - less.div_ceil(FORGETS)) };
        if let Some(known) = self.0.get_mut(image) {
            *known = next;
            return;
        }
        // Any of them: it is learnt again.
        if self.0.len() >= REMEMBERED
            && let Some(one) = self.0.keys().next().cloned()
        {
            self.0.remove(&one);
        }
        self.0.insert(image.to_owned(), next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        let mut history = History::default();
        assert_eq!(history.expects("a"), None);
        history.learn("a", Bytes(10), Bytes(100));
        history.learn("a", Bytes(10), Bytes(3200));
        assert_eq!(history.expects("a"), Some(Bytes(3200)));
        history.learn("a", Bytes(9000), Bytes(0));
        assert_eq!(history.expects("a"), Some(Bytes(3000)));
        (0..1_000).for_each(|_| history.learn("a", Bytes(9000), Bytes(7)));
        assert_eq!(history.expects("a"), Some(Bytes(7)), "to the end");
        assert_eq!(history.expects("b"), None, "each by itself");
        history.learn("b", Bytes(1600), Bytes(0));
        assert_eq!(history.expects("b"), Some(Bytes(1500)), "one that was never used");
    }

    #[test]
    fn it_does_not_grow_for_ever() {
        let mut history = History::default();
        (0..2 * REMEMBERED).for_each(|n| history.learn(&n.to_string(), Bytes(1), Bytes(1)));
        assert_eq!(history.0.len(), REMEMBERED);
        assert_eq!(history.expects(&(2 * REMEMBERED - 1).to_string()), Some(Bytes(1)), "the latest is known");
    }
}
