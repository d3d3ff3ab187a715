//! All of the work, which begins when the ledger is open: puts its parts together, recovers, and starts what runs by
//! itself.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use cowshed_pool::Standing;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use super::{
    GOODBYE,
    front::Front,
    opening::{Opened, Opening},
    snapshotter::Served,
};
use crate::{
    acquire::Acquirer,
    admission::Admission,
    clock::Clock,
    config::Config,
    containerd::{Containerd, Snapshots},
    crowd::Crowd,
    drain::Drain,
    evict::{ByLvm, Evictor, Grower, MakesRoom, NoGrower, NoRoom, Parts},
    flights::Flights,
    image::{Images, PullLimits},
    keeping::Keeper,
    kernel::{DeviceMapper, Devices, Events},
    layer::Bounds,
    ledger::{Ledger, LedgerSlot},
    making::{Making, Wishes},
    metrics::Metrics,
    offer::{Latencies, Shareable},
    prefetch::{Permits, Prefetcher},
    provision::grow::{self, Lvm},
    reclaim::{Reclaimer, Waiting, Wake},
    registry::Registries,
    rescue::Hindrances,
    rpc::Api,
    spares::{Spares, refill::Refiller},
    status::StatusSource,
    tasks::Tasks,
    usage::Usage,
    writes::Writes,
};

const REACH_RETRY: Duration = Duration::from_secs(2);
const FIRST_SWEEP_RETRY: Duration = Duration::from_millis(500);
const LONGEST_SWEEP_RETRY: Duration = Duration::from_secs(10);
const BETWEEN_SWEEPS: Duration = Duration::from_secs(10);

/// What is there without a ledger.
pub(super) struct Ground {
    pub(super) config: Config,
    pub(super) source: Arc<StatusSource>,
    pub(super) metrics: Metrics,
    pub(super) tasks: Tasks,
    pub(super) clock: Clock,
    pub(super) front: Front,
    /// The one that this process serves, if it does.
    pub(super) snapshotter: Option<Standing>,
    /// What extensions of the pool tell.
    pub(super) extensions: grow::Metrics,
    pub(super) stopped: watch::Receiver<bool>,
}

/// What has to be ended in order.
pub(super) struct Work {
    reclaiming: JoinHandle<()>,
    ledger: Ledger,
}

impl Work {
    pub(super) async fn end(self) {
        let mut reclaiming = self.reclaiming;
        if tokio::time::timeout(GOODBYE, &mut reclaiming).await.is_err() {
            reclaiming.abort();
        }
        if tokio::time::timeout(GOODBYE, self.ledger.close()).await.is_err() {
            tracing::warn!("the ledger was still writing after {GOODBYE:?}");
        }
    }
}

impl Ground {
    /// Begins as soon as the ledger can be opened, unless the service is stopped before.
    pub(super) async fn begin_later(self, opening: Opening) -> Option<Work> {
        let mut stopped = self.stopped.clone();
        let reaching = tokio::spawn(reach_snapshotter(self.source.containerd.clone()));
        let opened = tokio::select! {
            opened = opening.wait() => opened?,
            _ = stopped.wait_for(|stop| *stop) => return None,
        };
        reaching.abort();
        Some(self.begin(opened).await)
    }

    fn grower(&self) -> Arc<dyn Grower> {
        let Some(steps) = self.config.gc_steps() else { return Arc::new(NoGrower) };
        let lvm = Lvm::new(self.config.pool.name.clone(), self.snapshotter.clone(), self.extensions.clone());
        Arc::new(ByLvm::new(Arc::new(lvm), steps))
    }

    pub(super) async fn begin(self, Opened { ledger, .. }: Opened) -> Work {
        ledger.count_transactions(self.metrics.transactions());
        let api = self.assemble(&ledger);
        let reclaimer = api.reclaimer.clone();
        if let Err(error) = reclaimer.recover().await {
            // Each pass of the reclaimer tries again; what has to be known meanwhile is.
            tracing::warn!(%error, "what the last run has left cannot be marked yet");
        }
        let (prefetcher, evictor) = (api.prefetcher.clone(), api.evictor.clone());
        let refiller = Refiller {
            spares: api.spares.clone(),
            acquirer: api.acquirer.clone(),
            metrics: self.metrics.clone(),
        };
        tokio::spawn(api.images.clone().follow_changes());
        self.front.open(api);
        prefetcher.resume();
        let warm_set = self.config.prefetch.warm_set.clone();
        if !warm_set.as_os_str().is_empty() {
            tokio::spawn(async move { prefetcher.follow(warm_set).await });
        }
        // From now on the snapshotter knows what is held, and the status that all is served.
        self.source.ledger.put(ledger.clone());
        let reclaiming = tokio::spawn({
            let (reclaimer, stopped) = (reclaimer.clone(), self.stopped.clone());
            async move { reclaimer.run(stopped).await }
        });
        tokio::spawn(Arc::new(refiller).run(self.stopped.clone()));
        tokio::spawn(evictor.watch(Events::listen(), self.stopped.clone()));
        let stopped = self.stopped.clone();
        let writes = reclaimer.writes.clone();
        tokio::spawn(async move { reclaimer.watch_time(stopped).await });
        let every = Duration::from_secs(self.config.admission.look_seconds);
        tokio::spawn(writes.watch(every, self.stopped.clone()));
        // It makes containerd connect to the snapshotter, if nothing else does.
        tokio::spawn(keep_sweeping(self.source.containerd.clone(), self.tasks.clone()));
        Work { reclaiming, ledger }
    }

    fn assemble(&self, ledger: &Ledger) -> Api {
        let StatusSource { containerd, kernel, admission, drain, .. } = &*self.source;
        let images = images(&self.config, containerd, ledger, &self.metrics);
        // There is one ledger, and so one of these.
        let _first = self.source.images.set(images.clone());
        let (wake, waiting, making) = (Wake::default(), Waiting::default(), Making::default());
        let wishes = Wishes::default();
        let spares = Spares::new(self.config.spares());
        let _first = self.source.spares.set(spares.clone());
        let snapshots: Arc<dyn Snapshots> = containerd.clone();
        let writes = Arc::new(Writes::new(
            ledger.clone(),
            kernel.clone(),
            containerd.clone(),
            admission.limits.clone(),
        ));
        let reclaimer = Reclaimer {
            ledger: ledger.clone(),
            snapshots: snapshots.clone(),
            kernel: kernel.clone(),
            running_pulls: Arc::new(images.clone()),
            making: making.clone(),
            writes: writes.clone(),
            wake: wake.clone(),
            clock: self.clock.clone(),
            grace: self.config.grace(),
            waiting: waiting.clone(),
            metrics: self.metrics.clone(),
            retry: Duration::from_secs(self.config.reclaim.retry_seconds),
            interval: Duration::from_secs(self.config.reclaim.interval_seconds),
            suspects: Mutex::default(),
            closed: Mutex::default(),
            collected: Mutex::default(),
        };
        let keeper = Arc::new(Keeper {
            catalogue: Arc::new(images.clone()),
            ledger: ledger.clone(),
            hindrances: admission.hindrances.clone(),
            clock: self.clock.clone(),
            tasks: self.tasks.clone(),
            spares: spares.clone(),
            wishes: wishes.clone(),
            wake: wake.clone(),
            turn: tokio::sync::Mutex::default(),
        });
        let evictor = Arc::new(Evictor::new(Parts {
            policy: self.config.gc_policy(),
            settings: self.config.gc_settings(),
            keeper: keeper.clone(),
            survey: containerd.clone(),
            kernel: kernel.clone(),
            admission: admission.clone(),
            grower: self.grower(),
            metrics: self.metrics.clone(),
            tasks: self.tasks.clone(),
        }));
        // As for the images.
        let _first = self.source.evictor.set(evictor.clone());
        let usage =
            Arc::new(Usage::new(ledger.clone(), kernel.clone(), evictor.clone(), self.metrics.clone()));
        let _first = self.source.usage.set(usage.clone());
        let room: Arc<dyn MakesRoom> =
            if self.config.gc.enabled { Arc::new(evictor.clone()) } else { Arc::new(NoRoom) };
        let acquirer = Acquirer {
            ledger: ledger.clone(),
            images: Arc::new(images.clone()),
            snapshots,
            kernel: kernel.clone(),
            admission: admission.clone(),
            room,
            drain: drain.clone(),
            wake: wake.clone(),
            making,
            wishes,
            clock: self.clock.clone(),
            tasks: self.tasks.clone(),
            flights: Flights::default(),
            crowd: Crowd::new(self.config.leases.parallel, self.config.leases.waiting_max),
            spares: spares.clone(),
            sharing: Flights::default(),
        };
        let permits = Permits { drain: drain.clone(), admission: admission.clone(), kernel: kernel.clone() };
        let prefetcher = Prefetcher::new(
            ledger.clone(),
            Arc::new(images.clone()),
            Arc::new(permits),
            self.clock.clone(),
            self.tasks.clone(),
            wake.clone(),
            self.metrics.clone(),
        );
        // As for the images.
        let _first = self.source.prefetcher.set(prefetcher.clone());
        Api {
            reclaimer: Arc::new(reclaimer),
            acquirer: Arc::new(acquirer),
            ledger: ledger.clone(),
            images,
            keeper,
            evictor,
            prefetcher,
            admission: admission.clone(),
            kernel: kernel.clone(),
            containerd: Containerd::clone(containerd),
            stopped: self.stopped.clone(),
            status: self.source.clone(),
            waiting,
            spares,
            latencies: Latencies::default(),
            shareable: Shareable::of(&self.config.containerd.snapshotter),
            usage,
            metrics: self.metrics.clone(),
        }
    }
}

/// Whom the status asks.
pub(super) fn source(config: &Config, ledger: LedgerSlot, plugin: Option<&Served>) -> Arc<StatusSource> {
    let admission = Admission {
        data_headroom_percent: config.pool.data_headroom_percent,
        metadata_headroom_percent: config.pool.metadata_headroom_percent,
        allow_unzeroed: config.pool.allow_unzeroed,
        limits: Arc::new(config.limits()),
        hindrances: Hindrances::of(plugin.map(Served::snapshotter)),
    };
    Arc::new(StatusSource {
        ledger,
        containerd: containerd(config),
        kernel: Devices::new(Arc::new(DeviceMapper::new(config.pool.name.clone()))),
        admission,
        drain: Drain::default(),
        images: std::sync::OnceLock::new(),
        prefetcher: std::sync::OnceLock::new(),
        spares: std::sync::OnceLock::new(),
        evictor: std::sync::OnceLock::new(),
        usage: std::sync::OnceLock::new(),
        connected: plugin.map(Served::connected),
        started_at: SystemTime::now(),
    })
}

pub(super) fn containerd(config: &Config) -> Arc<Containerd> {
    let c = &config.containerd;
    Arc::new(Containerd::new(
        c.address.clone(),
        c.namespace.clone(),
        c.snapshotter.clone(),
        config.call_timeout(),
    ))
}

fn images(config: &Config, containerd: &Arc<Containerd>, ledger: &Ledger, metrics: &Metrics) -> Images {
    let r = &config.registry;
    let registries = Registries::new(
        r.config_path.clone(),
        r.docker_config.clone(),
        Duration::from_secs(r.connect_timeout_seconds),
        Duration::from_secs(r.read_timeout_seconds),
        r.rate_min.0,
    );
    let limits = PullLimits {
        concurrent_downloads: r.concurrent_downloads,
        unpack_timeout: Duration::from_secs(config.containerd.unpack_timeout_seconds),
        unpacker: config.images.unpacker,
        image_bytes: config.images.image_size_max.0,
        layer: Bounds {
            bytes: config.images.layer_size_max.0,
            members: config.images.layer_members_max,
            ..PullLimits::default().layer
        },
        disk: config.disk_bytes(),
        keep_layers: config.images.keep_layers,
        access_check: Duration::from_secs(r.access_check_seconds),
        revalidate: Duration::from_secs(config.images.revalidate_seconds),
        ..PullLimits::default()
    };
    let (journal, observer) = (Arc::new(ledger.clone()), Arc::new(metrics.clone()));
    Images::new(containerd.clone(), registries, journal, observer, limits, config.checks())
}

/// Has containerd connect to the snapshotter, which it does when it is asked for what only that knows. The sweep does so
/// as well, but changes something.
async fn reach_snapshotter(containerd: Arc<Containerd>) {
    while let Err(error) = containerd.any_committed().await {
        tracing::debug!(%error, "containerd does not reach the snapshotter yet");
        tokio::time::sleep(REACH_RETRY).await;
    }
}

/// Sweeps up what our last end has left, and each end of containerd's.
pub(super) async fn keep_sweeping(containerd: Arc<Containerd>, tasks: Tasks) {
    loop {
        sweep(containerd.clone(), tasks.clone()).await;
        let swept = Instant::now();
        containerd.ended().await;
        // One that comes and goes is not asked for more and more.
        tokio::time::sleep(BETWEEN_SWEEPS.saturating_sub(swept.elapsed())).await;
    }
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
