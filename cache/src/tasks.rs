//! Work that has to be finished although nobody waits for it any more.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::sync::watch;

/// Counts such work, so that a stop can wait for it. Clones share the count.
#[derive(Clone, Debug)]
pub struct Tasks(Arc<watch::Sender<Count>>);

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    running: usize,
    closed: bool,
}

impl Default for Tasks {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Count::default())))
    }
}

/// Counts down, also if the work panics.
struct Running(Tasks);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| count.running -= 1);
    }
}

impl Tasks {
    /// Starts `work`, unless the service is stopping; says whether it did.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> bool {
        let mut closed = false;
        self.0.send_modify(|count| {
            closed = count.closed;
            if !closed {
                count.running += 1;
            }
        });
        if !closed {
            self.go(work);
        }
        !closed
    }

    /// Starts what work that is under way needs to be finished: also while the service is stopping.
    pub fn spawn_for_another(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.send_modify(|count| count.running += 1);
        self.go(work);
    }

    /// Runs what is counted.
    fn go(&self, work: impl Future<Output = ()> + Send + 'static) {
        let running = Running(self.clone());
        tokio::spawn(async move {
            work.await;
            drop(running);
        });
    }

    /// Whether nothing more is started.
    pub fn is_closed(&self) -> bool {
        self.0.borrow().closed
    }

    /// Waits until nothing more is started.
    pub async fn closing(&self) {
        let mut changes = self.0.subscribe();
        // The sender is this.
        let _closed = changes.wait_for(|count| count.closed).await;
    }

    /// Starts nothing more, and waits for what runs, for `limit` at the most. Says how much is still running.
    pub async fn close(&self, limit: Duration) -> usize {
        self.0.send_modify(|count| count.closed = true);
        let mut changes = self.0.subscribe();
        let idle = changes.wait_for(|count| count.running == 0);
        let _timed_out = tokio::time::timeout(limit, idle).await;
        self.0.borrow().running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stop_waits_for_what_runs_and_starts_nothing_more() {
        let tasks = Tasks::default();
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        assert!(tasks.spawn(async { drop(finished.await) }));
        assert_eq!(tasks.close(Duration::ZERO).await, 1, "it is still running");
        assert!(!tasks.spawn(async {}));
        assert!(finish.send(()).is_ok());
        assert_eq!(tasks.close(Duration::from_secs(60)).await, 0);
    }
}
