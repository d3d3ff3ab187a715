//! Serves Cowshed's own snapshotter to containerd.

use std::{sync::Arc, time::Duration};

use cowshed_pool::{Api, Health, Metrics, SnapshotsServer, Snapshotter};
use prometheus::Registry;
use tokio::{net::UnixListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::{GOODBYE, ServeError};
use crate::config::Config;

/// How long the service waits for the snapshotter before it starts without.
const SETTLE: Duration = Duration::from_secs(20);

/// A snapshotter that is served.
pub(super) struct Served {
    snapshotter: Snapshotter,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

/// Opens the store, serves, and waits until snapshots can be made (or not).
pub(super) async fn start(
    config: &Config,
    registry: &Registry,
    listener: UnixListener,
) -> Result<Served, ServeError> {
    let metrics = Metrics::register(registry).map_err(|e| ServeError::Broke(e.to_string()))?;
    let snapshotter = Snapshotter::start(config.snapshotter_settings(), metrics)?;
    let (stop, mut stopped) = watch::channel(false);
    let until = async move {
        let _stopped = stopped.wait_for(|stop| *stop).await;
    };
    let router = Server::builder().add_service(SnapshotsServer::new(Api::new(snapshotter.clone())));
    let server = tokio::spawn(router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), until));
    if let Health::Waiting(why) = snapshotter.settled(SETTLE).await {
        tracing::warn!(why, "the snapshotter is not ready");
    }
    Ok(Served { snapshotter, stop, server })
}

impl Served {
    /// Brings its metrics up to date.
    pub(super) fn looker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let snapshotter = self.snapshotter.clone();
        Arc::new(move || snapshotter.look())
    }

    /// Answers what was asked already, and closes the store.
    pub(super) async fn stop(self) {
        self.stop.send_replace(true);
        // containerd keeps its connection open for as long as it is let.
        let _served = tokio::time::timeout(GOODBYE, self.server).await;
        self.snapshotter.close().await;
    }
}
