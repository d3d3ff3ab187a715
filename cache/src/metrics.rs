//! The numbers that Prometheus scrapes: what they are called, and where they come from.
//!
//! Counters and histograms are fed as things happen; gauges are read from the ledger, and from what the
//! kernel has said of the pool, at each scrape.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use cowshed_gc::{
    Foreign,
    evict::{Kind, Outcome, Step},
    reserve::Policy,
};
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder, core::Collector,
};

use crate::{
    acquire::Acquired,
    error::{Error, Result},
    evict::{Fate, Report},
    image::{Cache, PullObserver},
    kernel::{PoolMode, PoolUsage},
    ledger::Ledger,
    offer::{Got, Offered},
    promises::Promises,
    rescue::Cause,
    spares::Count,
};

/// From half a millisecond (a spare on a fast disk) to minutes (a large image over a slow line), in seconds.
const LATENCY_BUCKETS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0,
];

/// All metrics of the process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    acquires: IntCounterVec,
    acquire_seconds: HistogramVec,
    acquire_stage_seconds: HistogramVec,
    releases: IntCounterVec,
    leases: IntGaugeVec,
    pulls_in_flight: IntGauge,
    pulls: IntCounterVec,
    pull_seconds: HistogramVec,
    pull_bytes: IntCounter,
    layer_unpack_seconds: HistogramVec,
    reclaimed: IntCounter,
    reclaim_failures: IntCounter,
    reclaim_age: Histogram,
    foreign: IntGaugeVec,
    transactions: Histogram,
    vm_disks: IntGauge,
    vm_own_bytes: GaugeVec,
    vm_written: IntCounter,
    spares: IntGaugeVec,
    spare_seconds: HistogramVec,
    spares_dropped: IntCounterVec,
    expected: HistogramVec,
    offered: IntCounterVec,
    gc_runs: IntCounterVec,
    gc_steps: IntCounterVec,
    gc_freed: IntCounterVec,
    gc_lacking: GaugeVec,
    pool_full_in: GaugeVec,
    group_free: Gauge,
    reserved: Gauge,
    quota_leases: GaugeVec,
    quota_bytes: GaugeVec,
    prefetch_jobs: IntGauge,
    prefetched: IntCounterVec,
    warm_set_errors: IntGauge,
    rescue: IntGaugeVec,
    pool_up: IntGauge,
    pool_bytes: GaugeVec,
    grpc_calls: IntCounterVec,
    grpc_seconds: HistogramVec,
    start_time: Gauge,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// If two metrics have the same name, which a test rules out.
    pub fn new() -> prometheus::Result<Self> {
        let r = Registry::new();
        let inner = Inner {
            acquires: counters(
                &r,
                "cowshed_acquires_total",
                "Acquire calls, by result (ok or the error's reason) and how warm the disk was: spare, hit (the image was there), \
                 miss, or none if refused",
                &["result", "cache"],
            )?,
            acquire_seconds: histograms(
                &r,
                "cowshed_acquire_duration_seconds",
                "Time from request to reply of granted new leases",
                &["cache"],
            )?,
            acquire_stage_seconds: histograms(
                &r,
                "cowshed_acquire_stage_duration_seconds",
                "Time that granted new leases spent in each stage",
                &["stage"],
            )?,
            releases: counters(
                &r,
                "cowshed_releases_total",
                "Release calls, by result (ok or the error's reason)",
                &["result"],
            )?,
            leases: int_gauges(&r, "cowshed_leases", "Leases in the ledger, by state", &["state"])?,
            pulls_in_flight: register(&r, IntGauge::new("cowshed_pulls_in_flight", "Pulls under way")?)?,
            pulls: counters(
                &r,
                "cowshed_pulls_total",
                "Finished pulls, by result (hit, miss or the error's reason)",
                &["result"],
            )?,
            pull_seconds: histograms(
                &r,
                "cowshed_pull_duration_seconds",
                "Duration of successful pulls",
                &["cache"],
            )?,
            pull_bytes: register(
                &r,
                IntCounter::new("cowshed_pull_bytes_total", "Bytes fetched from registries")?,
            )?,
            layer_unpack_seconds: histograms(
                &r,
                "cowshed_layer_unpack_duration_seconds",
                "Time to unpack one layer",
                &[],
            )?,
            reclaimed: register(
                &r,
                IntCounter::new("cowshed_reclaimed_snapshots_total", "Released disks that are gone")?,
            )?,
            reclaim_failures: register(
                &r,
                IntCounter::new(
                    "cowshed_reclaim_failures_total",
                    "Removals of released disks that have to be tried again",
                )?,
            )?,
            reclaim_age: histogram(
                &r,
                "cowshed_reclaim_age_seconds",
                "How long ago disks had been released when they were gone",
                &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0],
            )?,
            foreign: int_gauges(
                &r,
                "cowshed_leaked",
                "Things that look like Cowshed's, are in no record, and are left alone, by kind (lease or snapshot of containerd's)",
                &["kind"],
            )?,
            transactions: histogram(
                &r,
                "cowshed_ledger_transaction_seconds",
                "How long transactions of the ledger took, fsync included",
                LATENCY_BUCKETS,
            )?,
            vm_disks: register(&r, IntGauge::new("cowshed_vm_disks", "Active disks of VMs' own")?)?,
            vm_own_bytes: gauges(
                &r,
                "cowshed_vm_disk_bytes",
                "Bytes of the pool that VMs' disks have, by measure: own (at the least, all disks together) and largest (the disk \
                 that has most)",
                &["measure"],
            )?,
            vm_written: register(
                &r,
                IntCounter::new(
                    "cowshed_vm_written_bytes_total",
                    "Bytes that were written to VMs' disks, as far as they were seen: from scrape to scrape, and GetUsage",
                )?,
            )?,
            spares: int_gauges(
                &r,
                "cowshed_spares",
                "Disks made ahead of need: ready, being made, and how many are wanted",
                &["state"],
            )?,
            spare_seconds: histograms(
                &r,
                "cowshed_spare_make_duration_seconds",
                "Time to make a disk ahead of need",
                &[],
            )?,
            spares_dropped: counters(
                &r,
                "cowshed_spares_dropped_total",
                "Spares given up before anybody got them, by reason (surplus, lost, room)",
                &["reason"],
            )?,
            expected: register(
                &r,
                HistogramVec::new(
                    HistogramOpts::new(
                        "cowshed_acquire_expected_ratio",
                        "Time of granted new leases by what Offer would have said just before, by the warmth that it would have said",
                    )
                    .buckets(vec![0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 10.0, 100.0]),
                    &["warmth"],
                )?,
            )?,
            offered: counters(
                &r,
                "cowshed_acquire_offered_total",
                "Acquire calls that were refused or granted anew, by what Offer would have said just before (spare, base, partial, \
                 cold or refused) and what was got (spare, base, cold or refused)",
                &["offered", "got"],
            )?,
            gc_runs: counters(
                &r,
                "cowshed_gc_runs_total",
                "Runs that make room in the pool, by trigger (pressure, admission, schedule) and outcome (met, short or the \
                 error's reason)",
                &["trigger", "outcome"],
            )?,
            gc_steps: counters(
                &r,
                "cowshed_gc_steps_total",
                "Steps of these runs, by reason and outcome (done, skipped, failed, not_needed)",
                &["reason", "outcome"],
            )?,
            gc_freed: counters(
                &r,
                "cowshed_gc_freed_bytes_total",
                "Bytes that come back by steps that were done, at the least, by part (data or metadata) and reason",
                &["part", "reason"],
            )?,
            gc_lacking: gauges(
                &r,
                "cowshed_gc_lacking_bytes",
                "Bytes that were lacking after the last run, by part (data or metadata)",
                &["part"],
            )?,
            pool_full_in: gauges(
                &r,
                "cowshed_pool_full_in_seconds",
                "How long it takes at the present rate until the pool is full, by part (data or metadata); +Inf if it does not fill",
                &["part"],
            )?,
            group_free: register(
                &r,
                Gauge::new(
                    "cowshed_volume_group_free_bytes",
                    "Bytes that are free in the pool's volume group, if the pool grows by itself; NaN if that is not known",
                )?,
            )?,
            reserved: register(
                &r,
                Gauge::new(
                    "cowshed_reserved_bytes",
                    "What disks of VMs are expected to write yet, beyond what they have written, in bytes",
                )?,
            )?,
            quota_leases: gauges(
                &r,
                "cowshed_quota_leases",
                "Leases of tenants that have a quota by name, by measure (used or limit)",
                &["tenant", "measure"],
            )?,
            quota_bytes: gauges(
                &r,
                "cowshed_quota_bytes",
                "What disks of tenants that have a quota by name have written or are expected to, whichever is more, in bytes, by \
                 measure (used or limit)",
                &["tenant", "measure"],
            )?,
            prefetch_jobs: register(
                &r,
                IntGauge::new("cowshed_prefetch_jobs", "Prefetch jobs that have not ended")?,
            )?,
            prefetched: counters(
                &r,
                "cowshed_prefetched_images_total",
                "Images that prefetch jobs are done with, by result (hit, miss or the error's reason)",
                &["result"],
            )?,
            warm_set_errors: register(
                &r,
                IntGauge::new("cowshed_warm_set_errors", "Files of the warm set that cannot be used")?,
            )?,
            rescue: int_gauges(
                &r,
                "cowshed_rescue",
                "1 while this cause keeps the service from all of its work: ledger, snapshotter, containerd or pool",
                &["cause"],
            )?,
            pool_up: register(&r, IntGauge::new("cowshed_pool_up", "1 if the thin pool reads and writes")?)?,
            pool_bytes: gauges(
                &r,
                "cowshed_pool_bytes",
                "Size and use of the thin pool in bytes, by part (data or metadata) and measure (used or size)",
                &["part", "measure"],
            )?,
            grpc_calls: counters(
                &r,
                "cowshed_grpc_calls_total",
                "gRPC calls, by method and code",
                &["method", "code"],
            )?,
            grpc_seconds: histograms(
                &r,
                "cowshed_grpc_call_duration_seconds",
                "Duration of gRPC calls, by method",
                &["method"],
            )?,
            start_time: register(
                &r,
                Gauge::new(
                    "cowshed_start_time_seconds",
                    "When the process started, in seconds since the epoch",
                )?,
            )?,
            registry: r,
        };
        let version = int_gauges(
            &inner.registry,
            "cowshed_build_info",
            "Always 1; the version is in the label",
            &["version"],
        )?;
        version.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        inner.start_time.set(now.as_secs_f64());
        // There from the first scrape on: an alert on a rate must not miss the first event.
        for cache in [Cache::Hit, Cache::Miss].map(Cache::as_str) {
            inner.acquires.with_label_values(&["ok", cache]);
            inner.acquire_seconds.with_label_values(&[cache]);
            inner.pulls.with_label_values(&[cache]);
            inner.pull_seconds.with_label_values(&[cache]);
            inner.prefetched.with_label_values(&[cache]);
        }
        for cause in Cause::ALL {
            inner.rescue.with_label_values(&[cause.as_str()]);
        }
        inner.releases.with_label_values(&["ok"]);
        for kind in Foreign::KINDS {
            inner.foreign.with_label_values(&[kind]);
        }
        for trigger in ["pressure", "admission", "schedule"] {
            inner.gc_runs.with_label_values(&[trigger, "met"]);
            inner.gc_runs.with_label_values(&[trigger, "short"]);
        }
        for kind in Kind::ALL {
            inner.gc_lacking.with_label_values(&[&kind.to_string()]);
        }
        for offered in Offered::ALL {
            Got::ALL.iter().for_each(|got| {
                inner.offered.with_label_values(&[offered.as_str(), got.as_str()]);
            });
        }
        inner.layer_unpack_seconds.with_label_values::<&str>(&[]);
        Ok(Self(Arc::new(inner)))
    }

    /// An Acquire call has been answered after `took`.
    pub fn acquired(&self, outcome: &Result<Arc<Acquired>>, took: Duration) {
        let m = &self.0;
        match outcome {
            Ok(done) => {
                let cache = if done.spare { "spare" } else { done.cache.as_str() };
                m.acquires.with_label_values(&["ok", cache]).inc();
                if !done.existing {
                    m.acquire_seconds.with_label_values(&[cache]).observe(took.as_secs_f64());
                    for (stage, took) in done.stages.iter() {
                        m.acquire_stage_seconds
                            .with_label_values(&[stage.as_str()])
                            .observe(took.as_secs_f64());
                    }
                }
            }
            Err(error) => m.acquires.with_label_values(&[result(error), "none"]).inc(),
        }
    }

    /// A Release call has been answered.
    pub fn released(&self, error: Option<&Error>) {
        self.0.releases.with_label_values(&[error.map_or("ok", result)]).inc();
    }

    /// An Acquire took so many times what was expected.
    pub fn expected(&self, offered: Offered, ratio: f64) {
        self.0.expected.with_label_values(&[offered.as_str()]).observe(ratio);
    }

    /// An Acquire has come to this, when Offer would have said that.
    pub fn offered(&self, offered: Offered, got: Got) {
        self.0.offered.with_label_values(&[offered.as_str(), got.as_str()]).inc();
    }

    /// So many spares there are.
    pub fn spares(&self, count: Count) {
        for (state, count) in [("ready", count.ready), ("making", count.making), ("wanted", count.wanted)] {
            self.0.spares.with_label_values(&[state]).set(count.into());
        }
    }

    /// A spare was made in this time.
    pub fn spare_made(&self, took: Duration) {
        self.0.spare_seconds.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    /// Spares were given up.
    pub fn spares_dropped(&self, count: usize, why: &str) {
        self.0.spares_dropped.with_label_values(&[why]).inc_by(count as u64);
    }

    /// A run that makes room has come to this.
    pub fn gc_ran(&self, trigger: &str, ran: &Result<Report>) {
        let outcome = match ran {
            Ok(Report { outcome: Outcome::Met, .. }) => "met",
            Ok(Report { outcome: Outcome::Short { .. }, .. }) => "short",
            Err(error) => result(error),
        };
        self.0.gc_runs.with_label_values(&[trigger, outcome]).inc();
        let Ok(report) = ran else { return };
        let lacking = match &report.outcome {
            Outcome::Met => cowshed_gc::evict::Room::NONE,
            Outcome::Short { lacking, .. } => *lacking,
        };
        for kind in Kind::ALL {
            self.0.gc_lacking.with_label_values(&[&kind.to_string()]).set(lacking.of(kind).0 as f64);
        }
    }

    /// A step of such a run has come to this.
    pub fn gc_step(&self, step: &Step, fate: &Fate) {
        let reason = step.reason.code().to_ascii_lowercase();
        let outcome = fate.code().to_ascii_lowercase();
        self.0.gc_steps.with_label_values(&[&reason, &outcome]).inc();
        if *fate == Fate::Done && reason != "growth" {
            for kind in Kind::ALL {
                let freed = self.0.gc_freed.with_label_values(&[&kind.to_string(), &reason]);
                freed.inc_by(step.gives.of(kind).0);
            }
        }
    }

    /// So long it takes until the pool is full; `None`: it does not fill.
    pub fn pool_full_in(&self, kind: Kind, time: Option<Duration>) {
        let seconds = time.map_or(f64::INFINITY, |time| time.as_secs_f64());
        self.0.pool_full_in.with_label_values(&[&kind.to_string()]).set(seconds);
    }

    /// So much is free in the pool's volume group; `None`: it does not matter, or is not known.
    pub fn group_free(&self, bytes: Option<u64>) {
        self.0.group_free.set(bytes.map_or(f64::NAN, |bytes| bytes as f64));
    }

    /// So many prefetch jobs run.
    pub fn prefetch_jobs(&self, count: usize) {
        self.0.prefetch_jobs.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// So many files of the warm set cannot be used.
    pub fn warm_set_errors(&self, count: usize) {
        self.0.warm_set_errors.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A prefetch job is done with an image.
    pub fn prefetched(&self, outcome: Result<Cache, &Error>) {
        self.0.prefetched.with_label_values(&[outcome.map_or_else(result, Cache::as_str)]).inc();
    }

    /// Disks are gone.
    pub fn reclaimed(&self, disks: usize) {
        self.0.reclaimed.inc_by(disks as u64);
    }

    /// Disks should be gone and are not.
    pub fn reclaim_failures(&self, disks: usize) {
        self.0.reclaim_failures.inc_by(disks as u64);
    }

    /// A disk that was released so long ago is gone.
    pub fn reclaimed_after(&self, age: Duration) {
        self.0.reclaim_age.observe(age.as_secs_f64());
    }

    /// These are there without a record.
    pub fn leaked(&self, foreign: &BTreeSet<Foreign>) {
        for kind in Foreign::KINDS {
            let count = foreign.iter().filter(|what| what.kind() == kind).count();
            self.0.foreign.with_label_values(&[kind]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Where the ledger counts its transactions.
    pub fn transactions(&self) -> Histogram {
        self.0.transactions.clone()
    }

    /// What VMs' disks have: how many there are, what they and the largest have of their own, in bytes, and what was written since
    /// the look before.
    pub fn vm_disks(&self, count: usize, own: u64, largest: u64, written: u64) {
        self.0.vm_disks.set(i64::try_from(count).unwrap_or(i64::MAX));
        self.0.vm_own_bytes.with_label_values(&["own"]).set(own as f64);
        self.0.vm_own_bytes.with_label_values(&["largest"]).set(largest as f64);
        self.0.vm_written.inc_by(written);
    }

    /// Whether this keeps the service from all of its work.
    pub fn rescue(&self, cause: Cause, does: bool) {
        self.0.rescue.with_label_values(&[cause.as_str()]).set(i64::from(does));
    }

    /// A gRPC call has been answered.
    pub fn called(&self, method: &str, code: tonic::Code, took: Duration) {
        let code = format!("{code:?}");
        self.0.grpc_calls.with_label_values(&[method, &code]).inc();
        self.0.grpc_seconds.with_label_values(&[method]).observe(took.as_secs_f64());
    }

    /// What a scrape gets, in Prometheus' text format; `pool` as the kernel has just said, `ledger` if it is open, `limits` as
    /// configured.
    ///
    /// # Errors
    /// If a metric cannot be encoded.
    pub fn scrape(
        &self,
        ledger: Option<&Ledger>,
        pool: Option<&PoolUsage>,
        limits: &Policy,
    ) -> prometheus::Result<Vec<u8>> {
        if let Some(ledger) = ledger {
            self.read_ledger(ledger);
            self.read_promises(ledger.promises(), limits);
        }
        self.read_pool(pool);
        encode(&self.0.registry)
    }

    fn read_ledger(&self, ledger: &Ledger) {
        let counts = crate::status::count_leases(ledger);
        for (state, count) in [
            ("preparing", counts.preparing),
            ("granted", counts.granted),
            ("suspect", counts.suspect),
            ("releasing", counts.releasing),
            ("failed", counts.failed),
        ] {
            self.0.leases.with_label_values(&[state]).set(i64::from(count));
        }
    }

    fn read_promises(&self, promises: &Promises, limits: &Policy) {
        let m = &self.0;
        m.reserved.set(promises.reserved().0 as f64);
        for (tenant, quota) in &limits.quotas.own {
            let used = promises.used_by(tenant);
            let leases = (&m.quota_leases, used.leases as f64, quota.leases.map(|limit| limit as f64));
            let bytes = (&m.quota_bytes, used.bytes.0 as f64, quota.bytes.map(|limit| limit.0 as f64));
            for (gauge, used, limit) in [leases, bytes] {
                gauge.with_label_values(&[tenant.as_str(), "used"]).set(used);
                if let Some(limit) = limit {
                    gauge.with_label_values(&[tenant.as_str(), "limit"]).set(limit);
                }
            }
        }
    }

    /// For the metrics of other parts.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    fn read_pool(&self, pool: Option<&PoolUsage>) {
        let m = &self.0;
        m.pool_bytes.reset();
        m.pool_up.set(i64::from(pool.is_some_and(|pool| pool.mode == PoolMode::ReadWrite)));
        let Some(pool) = pool else { return };
        let rows = [
            ("data", "used", pool.data_used),
            ("data", "size", pool.data_total),
            ("metadata", "used", pool.metadata_used),
            ("metadata", "size", pool.metadata_total),
        ];
        for (part, measure, bytes) in rows {
            m.pool_bytes.with_label_values(&[part, measure]).set(bytes as f64);
        }
    }
}

impl PullObserver for Metrics {
    fn started(&self) {
        self.0.pulls_in_flight.inc();
    }

    fn fetched(&self, bytes: u64) {
        self.0.pull_bytes.inc_by(bytes);
    }

    fn layer_unpacked(&self, took: Duration) {
        self.0.layer_unpack_seconds.with_label_values::<&str>(&[]).observe(took.as_secs_f64());
    }

    fn ended(&self) {
        self.0.pulls_in_flight.dec();
    }

    fn finished(&self, outcome: &Result<Cache>, took: Duration) {
        match outcome {
            Ok(cache) => {
                self.0.pulls.with_label_values(&[cache.as_str()]).inc();
                self.0.pull_seconds.with_label_values(&[cache.as_str()]).observe(took.as_secs_f64());
            }
            Err(error) => self.0.pulls.with_label_values(&[result(error)]).inc(),
        }
    }
}

fn result(error: &Error) -> &'static str {
    error.reason().as_str()
}

/// All of a registry, as Prometheus reads it.
///
/// # Errors
/// If a metric cannot be encoded.
pub fn encode(registry: &Registry) -> prometheus::Result<Vec<u8>> {
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text)?;
    Ok(text)
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn int_gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntGaugeVec> {
    register(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
    register(registry, GaugeVec::new(Opts::new(name, help), labels)?)
}

fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<HistogramVec> {
    let options = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec());
    register(registry, HistogramVec::new(options, labels)?)
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, Histogram::with_opts(options)?)
}
