//! A connection to a service of Cowshed's.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Error};

/// Where the host's service listens.
pub(crate) const SOCKET: &str = "/run/cowshed/cowshed.sock";

/// A connection to the service on a socket.
pub(crate) async fn channel(socket: &Path) -> Result<Channel, Error> {
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The URI is not used by the connector, but has to be one.
    Endpoint::from_static("http://cowshed").connect_with_connector(connector).await
}
