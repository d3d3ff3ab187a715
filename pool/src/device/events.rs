//! That device-mapper has something to tell: a pool is low on room, or works in another way than before; also that any device
//! was made or removed.

use std::{fs::File, io};

use tokio::io::unix::AsyncFd;

use super::ioctl;

/// What the kernel tells of all its devices, not of which.
pub struct Events(Option<AsyncFd<File>>);

impl Events {
    /// Begins to listen. Where that is not possible, nothing is ever told.
    pub fn listen() -> Self {
        let heard = ioctl::control().and_then(ioctl::readable);
        Self(
            heard.inspect_err(|error| tracing::debug!(%error, "device-mapper's events cannot be heard")).ok(),
        )
    }

    /// Returns when something was told since it last returned.
    pub async fn next(&self) {
        if let Some(events) = &self.0
            && told(events).await.is_ok()
        {
            return;
        }
        std::future::pending::<()>().await;
    }
}

async fn told(events: &AsyncFd<File>) -> io::Result<()> {
    events.readable().await?.clear_ready();
    // From here on: whoever is told looks after this.
    ioctl::arm_poll(events.get_ref()).map_err(io::Error::from)
}
