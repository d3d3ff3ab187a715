//! How far a pull fetches ahead of what it unpacks.
//!
//! Unpacking is a chain, each layer on the one below, and fetching is not. A processor that fetches what is not needed yet is
//! missing for the chain, and the chain cannot make up for it later, when the other processors have nothing left to do. So
//! while the chain has its layer's bytes, what is far ahead of it waits. While it waits for the registry itself, nothing does.

use tokio::sync::watch;

/// Layers that are fetched ahead of the one that is unpacked.
const AHEAD: usize = 4;

/// Of one pull.
pub(super) struct Window {
    start: usize,
    state: watch::Sender<State>,
}

struct State {
    /// The layer that is being unpacked; `None` when no more is.
    head: Option<usize>,
    fetched: Vec<bool>,
}

impl State {
    fn reaches(&self, at: usize) -> bool {
        self.head.is_none_or(|head| at <= head.saturating_add(AHEAD) || !self.fetched[head])
    }
}

impl Window {
    /// Of so many layers, the first `start` of which are unpacked already.
    pub(super) fn of(layers: usize, start: usize) -> Self {
        let head = Some(start).filter(|start| *start < layers);
        Self { start, state: watch::Sender::new(State { head, fetched: vec![false; layers] }) }
    }

    /// The first layer that is to be unpacked.
    pub(super) fn start(&self) -> usize {
        self.start
    }

    /// Waits until the layer is to be fetched.
    pub(super) async fn reach(&self, at: usize) {
        let mut state = self.state.subscribe();
        // Its sender is here.
        let _open = state.wait_for(|state| state.reaches(at)).await;
    }

    /// The layer is in the content store.
    pub(super) fn fetched(&self, at: usize) {
        self.state.send_modify(|state| state.fetched[at] = true);
    }

    /// The layer is unpacked from now on.
    pub(super) fn unpacking(&self, at: usize) {
        self.state.send_modify(|state| state.head = Some(at));
    }

    /// No more is unpacked.
    pub(super) fn open(&self) {
        self.state.send_modify(|state| state.head = None);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn is_open(window: &Window, at: usize) -> bool {
        window.reach(at).now_or_never().is_some()
    }

    #[test]
    fn waits_for_the_chain_and_never_for_itself() {
        let window = Window::of(20, 3);
        assert!(is_open(&window, 19), "the chain waits for its first layer: nothing is held back");
        window.fetched(3);
        assert!(is_open(&window, 0), "what is unpacked already may be wanted compressed");
        assert!(is_open(&window, 3 + AHEAD));
        assert!(!is_open(&window, 3 + AHEAD + 1));
        window.unpacking(4);
        assert!(is_open(&window, 19), "it waits for the registry again");
        window.fetched(4);
        assert!(is_open(&window, 4 + AHEAD));
        assert!(!is_open(&window, 4 + AHEAD + 1));
        window.open();
        assert!(is_open(&window, 19));
    }

    #[test]
    fn holds_nothing_back_if_all_is_unpacked() {
        assert!(is_open(&Window::of(7, 7), 6));
    }
}
