//! Stops the parts of a pull that run side by side as soon as one of them has failed, each at a point where it can
//! clear up behind itself: dropping them instead would leave half-written blobs and half-applied layers.

use std::future::Future;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// The first failure of a pull.
#[derive(Debug, Default)]
pub(super) struct Brake(watch::Sender<Option<Error>>);

impl Brake {
    /// Stops everything; the first error is the pull's.
    pub(super) fn pull(&self, error: Error) {
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(error);
            }
            is_first
        });
    }

    /// `work`, unless and until the brake is pulled. Only for work that may be dropped at any await.
    pub(super) async fn or<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let mut pulled = self.0.subscribe();
        let first =
            async move { pulled.wait_for(Option::is_some).await.ok().and_then(|first| first.clone()) };
        tokio::select! {
            biased;
            Some(first) = first => Err(first),
            done = work => Ok(done),
        }
    }

    /// `outcome`, unless the brake was pulled.
    pub(super) fn check<T>(&self, outcome: T) -> Result<T> {
        match &*self.0.borrow() {
            Some(first) => Err(first.clone()),
            None => Ok(outcome),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Reason;

    #[tokio::test]
    async fn the_first_failure_stops_all_and_is_the_one_that_counts() {
        let brake = Brake::default();
        assert!(matches!(brake.or(async { 1 }).await, Ok(1)));
        let (stopped, ()) = tokio::join!(brake.or(std::future::pending::<()>()), async {
            brake.pull(Error::new(Reason::ImageCorrupt, "first"));
            brake.pull(Error::new(Reason::NotReady, "second"));
        });
        assert_eq!(stopped.map_err(|e| e.reason()), Err(Reason::ImageCorrupt));
        assert!(brake.or(async { 1 }).await.is_err(), "nothing begins after it");
        assert_eq!(brake.check(()).map_err(|e| e.reason()), Err(Reason::ImageCorrupt));
    }
}
