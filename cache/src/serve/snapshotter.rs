//! Serves Cowshed's own snapshotter to containerd.

use std::{path::PathBuf, sync::Arc, time::Duration};

use cowshed_leases::{Book, Lease, LeaseId};
use cowshed_pool::{Api, Health, IsHeld, Metrics, SnapshotsServer, Standing};
use futures_util::TryStreamExt as _;
use prometheus::Registry;
use tokio::{net::UnixListener, sync::watch, task::JoinHandle, time::Instant};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::{GOODBYE, ServeError};
use crate::{config::Config, ledger::LedgerSlot};

/// How long the service waits for the snapshotter before it starts without.
const SETTLE: Duration = Duration::from_secs(20);
/// How long it waits for containerd's connection before it says that it is ready. containerd tries every three seconds.
const CONNECT: Duration = Duration::from_secs(5);

/// A snapshotter that is served.
pub(super) struct Served {
    snapshotter: Standing,
    stop: watch::Sender<bool>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    connected: Connected,
}

/// Whether containerd has connected since the start: before that, it refuses what is asked of the snapshotter.
#[derive(Clone, Debug)]
pub(crate) struct Connected {
    socket: PathBuf,
    seen: watch::Receiver<bool>,
    /// Until then it is waited for.
    until: Instant,
}

impl Connected {
    /// What is wrong if it has not, when it should have. Waits in the first seconds after the start.
    pub(crate) async fn problem(&self) -> Option<String> {
        // The sender goes with the server.
        if self.seen.has_changed().is_err() {
            return Some(format!(
                "nobody serves the snapshotter's socket {} any more: restart",
                self.socket.display()
            ));
        }
        if self.clone().arrives().await {
            return None;
        }
        Some(format!(
            "containerd has not connected to the snapshotter's socket {} yet: its configuration has to name it as the \
             address of a proxy plugin",
            self.socket.display()
        ))
    }

    async fn arrives(mut self) -> bool {
        tokio::time::timeout_at(self.until, self.seen.wait_for(|seen| *seen))
            .await
            .is_ok_and(|seen| seen.is_ok())
    }

    /// Waits for it, for a while.
    pub(super) async fn wait(self) {
        if !self.clone().arrives().await {
            tracing::warn!(socket = %self.socket.display(), "containerd has not connected to the snapshotter yet");
        }
    }
}

/// Serves, opens the store if it can, and waits until snapshots can be made (or not).
pub(super) async fn start(
    config: &Config,
    registry: &Registry,
    listener: UnixListener,
    is_held: IsHeld,
) -> Result<Served, ServeError> {
    let metrics = Metrics::register(registry).map_err(|e| ServeError::Broke(e.to_string()))?;
    let snapshotter = Standing::start(config.snapshotter_settings(), metrics);
    let (stop, mut stopped) = watch::channel(false);
    let until = async move {
        let _stopped = stopped.wait_for(|stop| *stop).await;
    };
    let (connects, seen) = watch::channel(false);
    let connections = UnixListenerStream::new(listener).inspect_ok(move |_| {
        connects.send_replace(true);
    });
    let router =
        Server::builder().add_service(SnapshotsServer::new(Api::guarded(snapshotter.clone(), is_held)));
    let server = tokio::spawn(router.serve_with_incoming_shutdown(connections, until));
    if let Health::Waiting(why) = snapshotter.settled(SETTLE).await {
        tracing::warn!(why, "the snapshotter is not ready");
    }
    let until = Instant::now() + CONNECT;
    let connected = Connected { socket: config.snapshotter.socket.clone(), seen, until };
    Ok(Served { snapshotter, stop, server, connected })
}

/// Whether the ledger says that a VM holds the disk: containerd's keys are namespace/number/key. As long as the ledger is
/// not known, everything may be held.
pub(super) fn held_in(ledger: LedgerSlot) -> IsHeld {
    Arc::new(move |key| {
        let Ok(ledger) = ledger.get() else { return true };
        let id = key.rsplit('/').next().and_then(LeaseId::from_snapshot_key);
        // One that is still being made is taken back by containerd if that fails.
        let held = |book: &Book, lease: &Lease| {
            (lease.is_held() || book.sharers(&lease.id) > 0) && lease.grant().is_some()
        };
        id.is_some_and(|id| ledger.read(|book| book.get(&id).is_some_and(|lease| held(book, lease))))
    })
}

impl Served {
    /// Whether containerd has found it.
    pub(super) fn connected(&self) -> Connected {
        self.connected.clone()
    }

    /// The snapshotter itself.
    pub(super) fn snapshotter(&self) -> Standing {
        self.snapshotter.clone()
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    fn waited_for() -> (watch::Sender<bool>, Connected, Instant) {
        let ((connects, seen), begun) = (watch::channel(false), Instant::now());
        let socket = "/run/cow/snapshotter".into();
        (connects, Connected { socket, seen, until: begun + CONNECT }, begun)
    }

    /// Whether a snapshot of the key is held, before the ledger is known and when it is.
    #[tokio::test]
    async fn everything_is_held_until_the_ledger_says_what_is() {
        let directory = tempfile::tempdir().unwrap();
        let slot = LedgerSlot::default();
        let is_held = held_in(slot.clone());
        let id = LeaseId::from_random(7);
        for refused in [false, true] {
            if refused {
                slot.refuse("it is damaged");
            }
            for key in [format!("default/1/{}", id.snapshot_key()), "default/2/sha256:layer".to_owned()] {
                assert!(is_held(&key), "{key}");
            }
        }
        slot.put(Ledger::open(directory.path()).unwrap());
        slot.refuse("too late");
        assert!(!is_held(&format!("default/1/{}", id.snapshot_key())));
    }

    #[tokio::test(start_paused = true)]
    async fn containerd_that_has_not_connected_is_told_of_when_it_had_its_time() {
        let (connects, connected, begun) = waited_for();
        let problem = connected.problem().await.unwrap();
        assert!(problem.contains("/run/cow/snapshotter"), "{problem}");
        assert_eq!(begun.elapsed(), CONNECT);
        // Later nobody waits any more; and what was late is no problem.
        assert!(connected.problem().await.is_some());
        assert_eq!(begun.elapsed(), CONNECT);
        connects.send_replace(true);
        assert_eq!(connected.problem().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_the_waiting() {
        let (connects, connected, begun) = waited_for();
        let (problem, ()) = tokio::join!(connected.problem(), async {
            tokio::time::sleep(CONNECT / 5).await;
            connects.send_replace(true);
        });
        assert_eq!(problem, None);
        assert_eq!(begun.elapsed(), CONNECT / 5);
    }
}
