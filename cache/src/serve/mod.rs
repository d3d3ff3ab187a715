//! `cowshed serve`: puts the parts together, listens, and stops in order. No behaviour of its own.

mod front;
mod http;
mod listen;
pub(crate) mod lock;
mod monitor;
mod opening;
mod snapshotter;
mod work;

pub(crate) use snapshotter::Connected;

use std::{sync::Arc, time::Duration};

use cowshed_proto::v1;
use futures_util::future::BoxFuture;
use thiserror::Error as ThisError;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use tonic_health::pb::health_server::{Health, HealthServer};

use self::{front::Front, monitor::Reporter, opening::Opening, work::Ground};
use crate::{
    clock::Clock,
    config::{Config, ConfigError},
    exit,
    ledger::LedgerSlot,
    metrics::Metrics,
    provision,
    rescue::Cause,
    status::StatusSource,
    tasks::Tasks,
};

/// Why the service does not run.
#[derive(Debug, ThisError)]
pub enum ServeError {
    /// See there.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another process has the state directory.
    #[error(
        "another `cowshed serve` (pid {pid}) has the state directory {directory}; stop it, or give this one another [state] directory"
    )]
    InUse {
        /// Its process id, or "unknown".
        pid: String,
        /// The directory.
        directory: String,
    },
    /// The state directory cannot be used.
    #[error(
        "the state directory {directory} cannot be used: {what}; [state] directory has to be a writable directory on a disk with free space"
    )]
    State {
        /// The directory.
        directory: String,
        /// What the system said.
        what: String,
    },
    /// Somebody else listens there, or it cannot be made.
    #[error("cannot listen on {address}: {what}")]
    Listen {
        /// Path or address.
        address: String,
        /// What the system said.
        what: String,
    },
    /// It ran, and broke.
    #[error("the service stopped: {0}")]
    Broke(String),
}

impl ServeError {
    /// The process's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) => exit::CONFIGURATION,
            Self::InUse { .. } => exit::STATE_IN_USE,
            Self::State { .. } => exit::STATE_UNUSABLE,
            Self::Listen { .. } => exit::LISTEN,
            Self::Broke(_) => exit::FAILURE,
        }
    }
}

/// How long replies under way and the reclaimer's step may take once everything else has stopped.
const GOODBYE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT, then finishes what has begun, within the configured time. A ledger, snapshot store, pool
/// or containerd that cannot be used keeps it in rescue mode, and ends nothing.
///
/// # Errors
/// If it cannot start; nothing was changed then.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    // The TLS library wants to know whose cryptography to use; that it was told before is no error.
    let _told_before = rustls::crypto::ring::default_provider().install_default();
    let slot = LedgerSlot::default();
    let mut opening = Opening::begin(config.state.directory.clone(), slot.clone())?;
    let sockets = Sockets::open(&config).await?;
    let clock =
        Clock::host().map_err(|e| ServeError::Broke(format!("the host does not tell its boot: {e}")))?;
    let metrics = Metrics::new().map_err(|e| ServeError::Broke(e.to_string()))?;
    let opened = opening.attempt();
    metrics.rescue(Cause::Ledger, opened.is_none());
    // containerd asks it when we ask containerd: it is the first to start, and the last to stop.
    let plugin = match sockets.plugin {
        Some(listener) => {
            let is_held = snapshotter::held_in(slot.clone());
            Some(snapshotter::start(&config, metrics.registry(), listener, is_held).await?)
        }
        None => None,
    };
    let (stop, stopped) = watch::channel(false);
    let source = work::source(&config, slot.clone(), plugin.as_ref());
    let (tasks, front) = (Tasks::default(), Front::new(source.clone(), metrics.clone()));
    let ground = Ground {
        config: config.clone(),
        source: source.clone(),
        metrics: metrics.clone(),
        tasks: tasks.clone(),
        clock,
        front: front.clone(),
        snapshotter: plugin.as_ref().map(snapshotter::Served::snapshotter),
        extensions: provision::grow::Metrics::register(metrics.registry())
            .map_err(|e| ServeError::Broke(e.to_string()))?,
        stopped: stopped.clone(),
    };
    let work = match opened {
        Some(opened) => {
            // No call is answered before it has begun.
            let begun = ground.begin(opened).await;
            tokio::spawn(std::future::ready(Some(begun)))
        }
        None => tokio::spawn(ground.begin_later(opening)),
    };
    if let Some(http) = sockets.http {
        let look = plugin.as_ref().map(snapshotter::Served::looker);
        tokio::spawn(http::serve(http, scrape(&source, &metrics, look), stopped.clone()));
    }
    let (reporter, health) = tonic_health::server::health_reporter();
    let reporter = Reporter(reporter);
    reporter.say(false).await;
    let monitoring = tokio::spawn(monitor::run(source, reporter.clone(), metrics, stopped.clone()));
    let limit = Duration::from_secs(config.server.stop_timeout_seconds);
    tokio::spawn(provision::see_to_waiting(config.pool.name.clone()));
    tokio::spawn(announce(config, slot, plugin.as_ref().map(snapshotter::Served::connected)));
    let serving = listen_until_stopped(front, health, sockets.unix, sockets.tcp, stopped);
    let stopping = async {
        wait_for_signal().await?;
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping: finishing what has begun");
        monitoring.abort();
        // It may be about to say something else.
        let _ended = monitoring.await;
        reporter.say(false).await;
        let unfinished = tasks.close(limit).await;
        if unfinished > 0 {
            tracing::warn!(
                unfinished,
                "requests were still running after {limit:?}; the next start clears them away"
            );
        }
        stop.send_replace(true);
        Ok::<_, ServeError>(())
    };
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        broken = &mut serving => return broken,
        signalled = stopping => signalled?,
    }
    // Open streams must not hold the stop up for ever.
    let served = tokio::time::timeout(GOODBYE, serving).await.unwrap_or(Ok(()));
    if let Ok(Ok(Some(work))) = tokio::time::timeout(GOODBYE, work).await {
        work.end().await;
    }
    if let Some(plugin) = plugin {
        plugin.stop().await;
    }
    served
}

/// Where others reach the service.
struct Sockets {
    unix: UnixListener,
    plugin: Option<UnixListener>,
    tcp: Option<TcpListener>,
    http: Option<TcpListener>,
}

impl Sockets {
    async fn open(config: &Config) -> Result<Self, ServeError> {
        let unix = listen::unix(&config.server.socket)?;
        let plugin =
            if config.serves_snapshotter() { Some(listen::own(&config.snapshotter.socket)?) } else { None };
        let tcp = bind(config.server.tcp).await?;
        let http = bind(config.metrics_address()?).await?;
        Ok(Self { unix, plugin, tcp, http })
    }
}

/// What a scrape gets.
fn scrape(
    source: &Arc<StatusSource>,
    metrics: &Metrics,
    look: Option<Arc<dyn Fn() + Send + Sync>>,
) -> impl Fn() -> BoxFuture<'static, prometheus::Result<Vec<u8>>> + Clone + Send + Sync + 'static {
    let (source, metrics) = (source.clone(), metrics.clone());
    move || {
        look.iter().for_each(|look| look());
        let (source, metrics) = (source.clone(), metrics.clone());
        Box::pin(async move {
            if let Some(usage) = source.usage.get() {
                usage.count().await;
            }
            let pool = source.kernel.pool().await;
            let ledger = source.ledger.get().ok();
            metrics.scrape(ledger.as_ref(), pool.ok().as_ref(), &source.admission.limits)
        })
    }
}

async fn listen_until_stopped(
    front: Front,
    health: HealthServer<impl Health>,
    unix: UnixListener,
    tcp: Option<TcpListener>,
    stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let broke = |e: &dyn std::fmt::Display| ServeError::Broke(e.to_string());
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| broke(&e))?;
    let router = Server::builder().add_service(health).add_service(reflection).add_service(front);
    let until = |mut stopped: watch::Receiver<bool>| async move {
        // The sender lives as long as the service: an error means that it has stopped as well.
        let _stopped = stopped.wait_for(|stop| *stop).await;
    };
    let over_unix =
        router.clone().serve_with_incoming_shutdown(UnixListenerStream::new(unix), until(stopped.clone()));
    let Some(tcp) = tcp else {
        return over_unix.await.map_err(|e| broke(&e));
    };
    let over_tcp = router.serve_with_incoming_shutdown(TcpListenerStream::new(tcp), until(stopped));
    tokio::try_join!(over_unix, over_tcp).map(|_| ()).map_err(|e| broke(&e))
}

async fn bind(address: Option<std::net::SocketAddr>) -> Result<Option<TcpListener>, ServeError> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    listener.map(Some).map_err(|e| ServeError::Listen { address: address.to_string(), what: e.to_string() })
}

/// Says that it is ready, when containerd finds the snapshotter or does not for a while; and that it serves, when it has
/// its ledger.
async fn announce(config: Config, slot: LedgerSlot, connected: Option<Connected>) {
    if let Some(connected) = connected {
        connected.wait().await;
    }
    say_ready();
    let mut changes = slot.changes();
    let Ok(Ok(ledger)) = changes.wait_for(Result::is_ok).await.map(|ledger| ledger.clone()) else { return };
    let leases = ledger.read(|book| book.after(None).count());
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %config.server.socket.display(),
        state = %config.state.directory.display(),
        containerd = %config.containerd.address.display(),
        snapshotter = %config.containerd.snapshotter,
        leases,
        "serving"
    );
}

fn say_ready() {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
}

/// `cowshed snapshotter`: only the snapshotter, for containerd's other clients.
///
/// # Errors
/// If it cannot start; nothing was changed then.
pub async fn serve_snapshotter(config: Config) -> Result<(), ServeError> {
    let _lock = lock::take(&config.state.directory)?;
    let listener = listen::own(&config.snapshotter.socket)?;
    let http = bind(config.metrics_address()?).await?;
    let registry = prometheus::Registry::new();
    // It has no leases of its own.
    let plugin = snapshotter::start(&config, &registry, listener, Arc::new(|_| false)).await?;
    let (stop, stopped) = watch::channel(false);
    if let Some(http) = http {
        let look = plugin.looker();
        let scrape = move || {
            look();
            std::future::ready(crate::metrics::encode(&registry))
        };
        tokio::spawn(http::serve(http, scrape, stopped));
    }
    tokio::spawn(provision::see_to_waiting(config.pool.name.clone()));
    let tasks = Tasks::default();
    tokio::spawn(work::keep_sweeping(work::containerd(&config), tasks.clone()));
    let connected = plugin.connected();
    tokio::spawn(async move {
        connected.wait().await;
        say_ready();
    });
    wait_for_signal().await?;
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
    let _unfinished = tasks.close(Duration::from_secs(config.server.stop_timeout_seconds)).await;
    stop.send_replace(true);
    plugin.stop().await;
    Ok(())
}

async fn wait_for_signal() -> Result<(), ServeError> {
    let broke = |e: std::io::Error| ServeError::Broke(format!("signals cannot be handled: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(broke)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(broke)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
