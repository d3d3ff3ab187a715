//! The client of the local containerd: one lazily connected channel, a deadline on every call, and containerd's errors
//! told apart into those that are about it and those that are about what was asked.

mod call;
mod content;
mod diff;
mod events;
mod images;
mod leases;
mod snapshots;
mod sweep;

use std::{path::PathBuf, time::Duration};

use containerd_client::services::v1::version_client::VersionClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

pub use call::CallError;
pub use content::{ContentReader, ContentWriter};
pub use events::ImageEvents;
pub use images::ImageRecord;
pub use leases::{ContainerdLease, Held};
pub use snapshots::{LEASE_LABEL, Mount, SnapshotRecord, Snapshots};

use crate::error::Result;

/// Messages up to this size are accepted from containerd, in bytes (its own default limit is 16 MiB).
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A containerd, as one namespace of it is seen.
#[derive(Clone, Debug)]
pub struct Containerd {
    channel: Channel,
    address: PathBuf,
    namespace: String,
    snapshotter: String,
    call_timeout: Duration,
}

impl Containerd {
    /// Does not connect: the first call does, and every call after a broken connection tries again.
    ///
    /// `call_timeout` bounds every call except the unpacking of a layer.
    pub fn new(address: PathBuf, namespace: String, snapshotter: String, call_timeout: Duration) -> Self {
        let path = address.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The URI is not used by the connector, but has to be one.
        let channel = Endpoint::from_static("http://containerd").connect_with_connector_lazy(connector);
        Self { channel, address, namespace, snapshotter, call_timeout }
    }

    /// Path of containerd's socket.
    pub fn address(&self) -> &PathBuf {
        &self.address
    }

    /// The namespace that every call is made in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The snapshotter's name, as configured.
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// containerd's version, as it reports it.
    pub async fn version(&self) -> Result<String> {
        let mut client = VersionClient::new(self.channel.clone());
        let reply =
            self.call("Version", client.version(self.request(()))).await.map_err(|e| self.explain(e))?;
        Ok(reply.version)
    }
}
