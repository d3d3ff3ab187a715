//! Whether the service takes on anything new. Not remembered: a restarted service serves.

use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Reason, Result};

/// A switch. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Drain(Arc<watch::Sender<bool>>);

impl Default for Drain {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Drain {
    /// Takes on nothing new from now on, or does again.
    pub fn set(&self, draining: bool) {
        let changed = self.0.send_replace(draining) != draining;
        match (changed, draining) {
            (true, true) => tracing::warn!("draining: nothing new is acquired or pulled"),
            (true, false) => tracing::info!("no longer draining"),
            (false, _) => {}
        }
    }

    /// Whether it takes on nothing new.
    pub fn is_on(&self) -> bool {
        *self.0.borrow()
    }

    /// Told of each change.
    pub fn changes(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    /// Refuses what is new while it is on.
    ///
    /// # Errors
    /// While it is on.
    pub fn admit(&self) -> Result<()> {
        if !self.is_on() {
            return Ok(());
        }
        let message =
            "the service is draining: it takes on nothing new; use another host, or `cowshed drain --undo`";
        Err(Error::new(Reason::Draining, message))
    }
}
