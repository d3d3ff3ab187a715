//! How long one has waited for something that is no work of one's own, by the runtime's clock.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// The time during which at least one waits.
#[derive(Debug, Default)]
pub(super) struct Waits(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: usize,
    /// Since when, if one waits.
    since: Option<Instant>,
    /// Before that.
    before: Duration,
}

/// One waits until this is dropped.
#[derive(Debug)]
pub(super) struct Wait<'a>(&'a Waits);

impl Waits {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) -> Wait<'_> {
        let mut state = self.state();
        state.waiting += 1;
        state.since.get_or_insert_with(Instant::now);
        Wait(self)
    }

    /// In all, until now.
    pub(super) fn total(&self) -> Duration {
        let state = self.state();
        state.before + state.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.waiting -= 1;
        if state.waiting == 0 {
            let waited = state.since.take().map_or(Duration::ZERO, |since| since.elapsed());
            state.before += waited;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_counts_once_and_only_while_one_waits() {
        let waits = Waits::default();
        let pass = async |seconds| tokio::time::advance(Duration::from_secs(seconds)).await;
        pass(1).await;
        let one = waits.begin();
        pass(2).await;
        let other = waits.begin();
        pass(4).await;
        drop(one);
        pass(8).await;
        assert_eq!(waits.total(), Duration::from_secs(14), "it still waits");
        drop(other);
        pass(16).await;
        drop(waits.begin());
        assert_eq!(waits.total(), Duration::from_secs(14));
    }
}
