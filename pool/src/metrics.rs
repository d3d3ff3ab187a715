//! What the snapshotter tells Prometheus.

use std::time::Duration;

use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, core::Collector,
};

use crate::{
    error::Result,
    tree::{Kind, State, Tree, UnixNanos},
};

/// Counters and gauges of one snapshotter. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    operations: IntCounterVec,
    seconds: HistogramVec,
    snapshots: IntGaugeVec,
    thin_ids: IntGauge,
    creations: IntGauge,
    backlog: IntGauge,
    oldest: IntGauge,
    reclaimed: Counter,
    reclaim_age: Histogram,
    trimmed: IntCounter,
    transactions: Histogram,
    healthy: IntGauge,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// If they are registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        fn on<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
            registry.register(Box::new(collector.clone()))?;
            Ok(collector)
        }
        let gauge = |name: &str, help: &str| on(registry, IntGauge::new(name, help)?);
        Ok(Self {
            operations: on(
                registry,
                IntCounterVec::new(
                    Opts::new("cowshed_snapshotter_operations_total", "Operations, by kind and result"),
                    &["operation", "result"],
                )?,
            )?,
            seconds: on(
                registry,
                HistogramVec::new(
                    HistogramOpts::new("cowshed_snapshotter_operation_seconds", "How long operations took")
                        .buckets(prometheus::exponential_buckets(0.0005, 2.0, 16)?),
                    &["operation"],
                )?,
            )?,
            snapshots: on(
                registry,
                IntGaugeVec::new(
                    Opts::new("cowshed_snapshotter_snapshots", "Snapshots, by kind"),
                    &["kind"],
                )?,
            )?,
            thin_ids: gauge("cowshed_snapshotter_thin_ids_used", "Thin ids in use, of 16777215")?,
            creations: gauge(
                "cowshed_snapshotter_pool_creation_time",
                "Snapshots ever made in the pool; at 16777216 its mappings are corrupted",
            )?,
            backlog: gauge(
                "cowshed_snapshotter_reclaim_backlog",
                "Removed snapshots that are still in the pool",
            )?,
            oldest: gauge(
                "cowshed_snapshotter_reclaim_oldest_seconds",
                "How long ago the oldest of them was removed",
            )?,
            reclaimed: on(
                registry,
                Counter::new(
                    "cowshed_snapshotter_deleted_bytes_total",
                    "Bytes that deleted snapshots mapped, shared ones too",
                )?,
            )?,
            reclaim_age: on(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "cowshed_snapshotter_reclaim_age_seconds",
                        "How long ago snapshots had been removed when they were deleted from the pool",
                    )
                    .buckets(prometheus::exponential_buckets(0.01, 4.0, 10)?),
                )?,
            )?,
            trimmed: on(
                registry,
                IntCounter::new(
                    "cowshed_snapshotter_trimmed_bytes_total",
                    "Bytes that snapshots were made to forget before they were deleted, so that the disk below forgets what was \
                     theirs alone",
                )?,
            )?,
            transactions: on(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "cowshed_snapshotter_transaction_seconds",
                        "How long transactions of the snapshot store took, fsync included",
                    )
                    .buckets(prometheus::exponential_buckets(0.0005, 2.0, 16)?),
                )?,
            )?,
            healthy: gauge(
                "cowshed_snapshotter_up",
                "1 when it has found its pool and store good, 0 as long as it waits or refuses",
            )?,
        })
    }

    pub(crate) fn operation<T>(&self, name: &str, took: Duration, result: &Result<T>) {
        let outcome = match result {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{:?}", error.code),
        };
        self.operations.with_label_values(&[name, outcome.as_str()]).inc();
        self.seconds.with_label_values(&[name]).observe(took.as_secs_f64());
    }

    pub(crate) fn creations(&self, time: u32) {
        self.creations.set(i64::from(time));
    }

    pub(crate) fn deleted(&self, bytes: u64) {
        #[allow(clippy::cast_precision_loss)]
        self.reclaimed.inc_by(bytes as f64);
    }

    /// A snapshot that was removed then is deleted now.
    pub(crate) fn reclaimed(&self, removed: UnixNanos, now: UnixNanos) {
        let age = u64::try_from(now.0 - removed.0).unwrap_or_default();
        self.reclaim_age.observe(Duration::from_nanos(age).as_secs_f64());
    }

    pub(crate) fn trimmed(&self, bytes: u64) {
        self.trimmed.inc_by(bytes);
    }

    /// Where the store counts its transactions.
    pub(crate) fn transactions(&self) -> Histogram {
        self.transactions.clone()
    }

    pub(crate) fn healthy(&self, healthy: bool) {
        self.healthy.set(i64::from(healthy));
    }

    /// To be called before a scrape.
    pub(crate) fn look_at(&self, tree: &Tree, now_nanos: i64) {
        for kind in
            [Kind::Active, Kind::View, Kind::Committed, Kind::Blank, Kind::Raw, Kind::Grown, Kind::Heir]
        {
            let count = tree.all().filter(|s| s.state == State::Ready && s.kind == kind).count();
            self.snapshots.with_label_values(&[kind.as_str()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.thin_ids.set(i64::try_from(tree.thin_ids_used()).unwrap_or(i64::MAX));
        let removing: Vec<i64> = tree.removing().map(|s| s.updated.0).collect();
        self.backlog.set(i64::try_from(removing.len()).unwrap_or(i64::MAX));
        let oldest = removing.iter().min().map_or(0, |since| (now_nanos - since).max(0) / 1_000_000_000);
        self.oldest.set(oldest);
    }
}
