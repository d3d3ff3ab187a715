//! `cowshed serve`: puts the parts together, listens, and stops in order. No behaviour of its own.

mod http;
mod listen;
pub(crate) mod lock;
mod snapshotter;

pub(crate) use snapshotter::Connected;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use cowshed_pool::store::file::OpenError;
use cowshed_proto::v1::{self, cowshed_server::CowshedServer};
use thiserror::Error as ThisError;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;

use crate::{
    acquire::Acquirer,
    admission::Admission,
    clock::Clock,
    config::{Config, ConfigError},
    containerd::{Containerd, Snapshots},
    drain::Drain,
    exit,
    flights::Flights,
    image::{Images, PullLimits},
    kernel::{DeviceMapper, Devices},
    ledger::Ledger,
    making::Making,
    metrics::Metrics,
    reclaim::{Reclaimer, Waiting, Wake},
    registry::Registries,
    rpc::Api,
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
    /// The ledger or the snapshot store cannot be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
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
            Self::State { .. } | Self::Store(OpenError::Io { .. }) => exit::STATE_UNUSABLE,
            Self::Store(
                OpenError::Damaged { .. } | OpenError::Newer { .. } | OpenError::Restoring { .. },
            ) => exit::LEDGER_DAMAGED,
            Self::Listen { .. } => exit::LISTEN,
            Self::Broke(_) => exit::FAILURE,
        }
    }
}

/// How long replies under way and the reclaimer's step may take once everything else has stopped.
const GOODBYE: Duration = Duration::from_secs(5);
const FIRST_SWEEP_RETRY: Duration = Duration::from_millis(500);
const LONGEST_SWEEP_RETRY: Duration = Duration::from_secs(10);

/// The parts, put together.
struct Parts {
    api: Api,
    containerd: Arc<Containerd>,
    reclaimer: Arc<Reclaimer>,
    tasks: Tasks,
    ledger: Ledger,
    kernel: Devices,
    metrics: Metrics,
}

/// Runs until SIGTERM or SIGINT, then finishes what has begun, within the configured time.
///
/// # Errors
/// If it cannot start; nothing was changed then.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    // The TLS library wants to know whose cryptography to use; that it was told before is no error.
    let _told_before = rustls::crypto::ring::default_provider().install_default();
    let _lock = lock::take(&config.state.directory)?;
    let listener = listen::unix(&config.server.socket)?;
    let plugin =
        if config.serves_snapshotter() { Some(listen::own(&config.snapshotter.socket)?) } else { None };
    let tcp = bind(config.server.tcp).await?;
    let http = bind(config.metrics_address()?).await?;
    let ledger = Ledger::open(&config.state.directory)?;
    let metrics = Metrics::new().map_err(|e| ServeError::Broke(e.to_string()))?;
    // containerd asks it when we ask containerd: it is the first to start, and the last to stop.
    let plugin = match plugin {
        Some(listener) => {
            let is_held = snapshotter::held_in(ledger.clone());
            Some(snapshotter::start(&config, metrics.registry(), listener, is_held).await?)
        }
        None => None,
    };
    let connected = plugin.as_ref().map(snapshotter::Served::connected);
    let clock =
        Clock::host().map_err(|e| ServeError::Broke(format!("the host does not tell its boot: {e}")))?;
    let (stop, stopped) = watch::channel(false);
    let parts = assemble(&config, ledger, metrics, connected.clone(), clock, stopped.clone());
    if let Err(error) = parts.reclaimer.recover().await {
        // Each pass of the reclaimer tries again; what has to be known meanwhile is.
        tracing::warn!(%error, "what the last run has left cannot be marked yet");
    }

    let reclaiming = tokio::spawn({
        let (reclaimer, stopped) = (parts.reclaimer.clone(), stopped.clone());
        async move { reclaimer.run(stopped).await }
    });
    tokio::spawn({
        let (reclaimer, stopped) = (parts.reclaimer.clone(), stopped.clone());
        async move { reclaimer.watch_time(stopped).await }
    });
    if let Some(http) = http {
        let (metrics, ledger, kernel) = (parts.metrics.clone(), parts.ledger.clone(), parts.kernel.clone());
        let look = plugin.as_ref().map(snapshotter::Served::looker);
        let scrape = move || {
            look.iter().for_each(|look| look());
            let (metrics, ledger, kernel) = (metrics.clone(), ledger.clone(), kernel.clone());
            async move { metrics.scrape(&ledger, kernel.pool().await.ok().as_ref()) }
        };
        tokio::spawn(http::serve(http, scrape, stopped.clone()));
    }
    // It makes containerd connect to the snapshotter, if nothing else does.
    tokio::spawn(sweep(parts.containerd, parts.tasks.clone()));
    tokio::spawn(announce(config.clone(), parts.ledger.clone(), connected));
    let limit = Duration::from_secs(config.server.stop_timeout_seconds);
    let (tasks, ledger) = (parts.tasks.clone(), parts.ledger.clone());
    let serving = listen_until_stopped(parts.api, listener, tcp, stopped);
    let stopping = async {
        wait_for_signal().await?;
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping: finishing what has begun");
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
    let _cancelled = tokio::time::timeout(GOODBYE, reclaiming).await;
    if tokio::time::timeout(GOODBYE, ledger.close()).await.is_err() {
        tracing::warn!("the ledger was still writing after {GOODBYE:?}");
    }
    if let Some(plugin) = plugin {
        plugin.stop().await;
    }
    served
}

fn containerd(config: &Config) -> Arc<Containerd> {
    let c = &config.containerd;
    Arc::new(Containerd::new(
        c.address.clone(),
        c.namespace.clone(),
        c.snapshotter.clone(),
        config.call_timeout(),
    ))
}

fn assemble(
    config: &Config,
    ledger: Ledger,
    metrics: Metrics,
    connected: Option<Connected>,
    clock: Clock,
    stopped: watch::Receiver<bool>,
) -> Parts {
    let containerd = containerd(config);
    let kernel = Devices::new(Arc::new(DeviceMapper::new(config.pool.name.clone())));
    let admission = Admission {
        data_headroom_percent: config.pool.data_headroom_percent,
        metadata_headroom_percent: config.pool.metadata_headroom_percent,
        allow_unzeroed: config.pool.allow_unzeroed,
    };
    let images = images(config, &containerd, &ledger, &metrics);
    let (wake, tasks, waiting) = (Wake::default(), Tasks::default(), Waiting::default());
    let (making, drain) = (Making::default(), Drain::default());
    let snapshots: Arc<dyn Snapshots> = containerd.clone();
    let reclaimer = Reclaimer {
        ledger: ledger.clone(),
        snapshots: snapshots.clone(),
        kernel: kernel.clone(),
        running_pulls: Arc::new(images.clone()),
        making: making.clone(),
        wake: wake.clone(),
        clock: clock.clone(),
        grace: config.grace(),
        waiting: waiting.clone(),
        metrics: metrics.clone(),
        retry: Duration::from_secs(config.reclaim.retry_seconds),
        interval: Duration::from_secs(config.reclaim.interval_seconds),
        suspects: Mutex::default(),
        closed: Mutex::default(),
        collected: Mutex::default(),
    };
    let acquirer = Acquirer {
        ledger: ledger.clone(),
        images: Arc::new(images.clone()),
        snapshots,
        kernel: kernel.clone(),
        admission,
        drain: drain.clone(),
        wake,
        making,
        clock,
        tasks: tasks.clone(),
        flights: Flights::default(),
        sharing: Flights::default(),
    };
    let status = Arc::new(StatusSource {
        ledger: ledger.clone(),
        containerd: containerd.clone(),
        kernel: kernel.clone(),
        admission,
        drain,
        images: images.clone(),
        connected,
        started_at: SystemTime::now(),
    });
    let reclaimer = Arc::new(reclaimer);
    let api = Api {
        reclaimer: reclaimer.clone(),
        acquirer: Arc::new(acquirer),
        ledger: ledger.clone(),
        images,
        admission,
        kernel: kernel.clone(),
        containerd: Containerd::clone(&containerd),
        stopped,
        status,
        waiting,
        metrics: metrics.clone(),
    };
    Parts { api, containerd, reclaimer, tasks, ledger, kernel, metrics }
}

fn images(config: &Config, containerd: &Arc<Containerd>, ledger: &Ledger, metrics: &Metrics) -> Images {
    let r = &config.registry;
    let registries = Registries::new(
        r.config_path.clone(),
        Duration::from_secs(r.connect_timeout_seconds),
        Duration::from_secs(r.read_timeout_seconds),
    );
    let limits = PullLimits {
        concurrent_downloads: r.concurrent_downloads,
        unpack_timeout: Duration::from_secs(config.containerd.unpack_timeout_seconds),
        ..PullLimits::default()
    };
    Images::new(containerd.clone(), registries, Arc::new(ledger.clone()), Arc::new(metrics.clone()), limits)
}

async fn listen_until_stopped(
    api: Api,
    unix: tokio::net::UnixListener,
    tcp: Option<TcpListener>,
    stopped: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let broke = |e: &dyn std::fmt::Display| ServeError::Broke(e.to_string());
    let (health_reporter, health) = tonic_health::server::health_reporter();
    // That the process answers; whether it can serve is GetStatus' to say.
    health_reporter.set_serving::<CowshedServer<Api>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| broke(&e))?;
    let router =
        Server::builder().add_service(health).add_service(reflection).add_service(CowshedServer::new(api));
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

/// Sweeps up what a crash has left, once containerd answers: again until it succeeds. A stop waits for the one under way,
/// so that nothing of it is left.
async fn sweep(containerd: Arc<Containerd>, tasks: Tasks) {
    let mut pause = FIRST_SWEEP_RETRY;
    loop {
        let (done, outcome) = oneshot::channel();
        let containerd = containerd.clone();
        let begun = tasks.spawn(async move {
            // The receiver waits below.
            let _ = done.send(containerd.sweep().await);
        });
        match outcome.await {
            Ok(Err(error)) => tracing::debug!(%error, "the sweep after the start cannot be made yet"),
            Ok(Ok(())) => return,
            Err(_) if begun => tracing::error!("the sweep after the start panicked"),
            Err(_) => return,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_SWEEP_RETRY);
    }
}

async fn bind(address: Option<std::net::SocketAddr>) -> Result<Option<TcpListener>, ServeError> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await;
    listener.map(Some).map_err(|e| ServeError::Listen { address: address.to_string(), what: e.to_string() })
}

/// Says that it is ready, when containerd finds the snapshotter or does not for a while.
async fn announce(config: Config, ledger: Ledger, connected: Option<Connected>) {
    if let Some(connected) = connected {
        connected.wait().await;
    }
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
    say_ready();
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
    let tasks = Tasks::default();
    tokio::spawn(sweep(containerd(&config), tasks.clone()));
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
