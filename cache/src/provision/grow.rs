//! How the service extends its pool: the seam, and LVM2 behind it.

use std::time::Duration;

use async_trait::async_trait;
use cowshed_pool::{
    Standing,
    lvm::{self, LvmError, Runner},
};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry};

pub use cowshed_pool::lvm::{Extended, Part, Room};

use super::facts;
use crate::error::{Error, Reason, Result};

/// So long what has begun may keep an extension from having the pool alone; then it goes on beside it, and the kernel refuses
/// for a moment to activate anything, which is tried again.
const ALONE: Duration = Duration::from_secs(5);

/// LVM2 has to answer a question within this time: who asks has others who wait.
const ANSWER: Duration = Duration::from_secs(15);

/// So long at the most what would be asked of the pool waits for an extension.
const HELD: Duration = Duration::from_secs(10);

/// What can make the pool larger; tests put a fake here.
#[async_trait]
pub trait Grower: Send + Sync {
    /// How far it can grow.
    async fn room(&self) -> Result<Room>;
    /// Extends a part of it to so many bytes, rounded up to whole extents; to have as much already is success.
    async fn extend(&self, part: Part, to_bytes: u64) -> Result<Extended>;
}

/// LVM2, in a short-lived child.
pub struct Lvm {
    runner: Runner,
    /// The pool's device-mapper name.
    pool: String,
    /// Who would ask something of the pool meanwhile.
    snapshotter: Option<Standing>,
    metrics: Metrics,
    /// One extension at a time.
    alone: tokio::sync::Mutex<()>,
}

impl Lvm {
    /// Extends this pool, by its device-mapper name; "" means the only one there is. What the snapshotter would do in it waits
    /// meanwhile.
    pub fn new(pool: String, snapshotter: Option<Standing>, metrics: Metrics) -> Self {
        let runner = Runner::default().with_answer_within(ANSWER);
        Self { runner, pool, snapshotter, metrics, alone: tokio::sync::Mutex::default() }
    }
}

#[async_trait]
impl Grower for Lvm {
    async fn room(&self) -> Result<Room> {
        let name = self.name().await?;
        lvm::room(&self.runner, &name).await.map_err(|error| self.failed(&error))
    }

    async fn extend(&self, part: Part, to_bytes: u64) -> Result<Extended> {
        let _alone = self.alone.lock().await;
        let name = self.name().await?;
        // Who has LVM2 locked keeps nobody but us waiting.
        self.room().await?;
        let begun = tokio::time::Instant::now();
        let held = match &self.snapshotter {
            Some(snapshotter) => snapshotter.hold(ALONE).await,
            None => None,
        };
        let is_held = held.is_some();
        let mut extending = std::pin::pin!(lvm::extend(&self.runner, &name, part, to_bytes));
        let in_time = tokio::time::timeout(HELD, &mut extending).await;
        drop(held);
        let waited = begun.elapsed();
        let extended = match in_time {
            Ok(extended) => extended,
            // LVM2 hangs, or its disks are slow: what works all the same is not kept from it.
            Err(_) => extending.await,
        };
        self.metrics.extended(part, waited, &extended);
        let pool = name.as_str();
        match extended {
            Ok(Extended { from_bytes, to_bytes, stall, .. }) => {
                tracing::info!(
                    pool, %part, from_bytes, to_bytes, ?stall, ?waited, is_held,
                    "the pool was extended; its disks stood still for the stall, activations waited"
                );
            }
            Err(ref error) => {
                tracing::error!(pool, %part, to_bytes, %error, ?waited, "the pool could not be extended");
            }
        }
        extended.map_err(|error| self.failed(&error))
    }
}

impl Lvm {
    async fn name(&self) -> Result<String> {
        let name = facts::resolve(&self.runner, None, &self.pool).await;
        name.map_err(|refusal| Error::new(Reason::PoolMissing, refusal.message))
    }

    fn failed(&self, error: &LvmError) -> Error {
        let reason =
            if matches!(error, LvmError::NoRoom { .. }) { Reason::PoolFull } else { Reason::LvmUnusable };
        Error::new(reason, format!("extending the thin pool {}: {error}", self.pool)).with("pool", &self.pool)
    }
}

/// What extensions tell Prometheus. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    extensions: IntCounterVec,
    stall: HistogramVec,
    wait: HistogramVec,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// If they are registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let seconds = |name: &str, help: &str| {
            let options =
                HistogramOpts::new(name, help).buckets(prometheus::exponential_buckets(0.005, 2.0, 14)?);
            HistogramVec::new(options, &["part"])
        };
        let metrics = Self {
            extensions: IntCounterVec::new(
                Opts::new("cowshed_pool_extensions_total", "Extensions of the pool, by part and result"),
                &["part", "result"],
            )?,
            stall: seconds(
                "cowshed_pool_extension_stall_seconds",
                "How long the pool and all its disks stood still for an extension",
            )?,
            wait: seconds(
                "cowshed_pool_extension_wait_seconds",
                "How long activations of disks had to wait for an extension",
            )?,
        };
        registry.register(Box::new(metrics.extensions.clone()))?;
        registry.register(Box::new(metrics.stall.clone()))?;
        registry.register(Box::new(metrics.wait.clone()))?;
        Ok(metrics)
    }

    fn extended(&self, part: Part, waited: Duration, extended: &std::result::Result<Extended, LvmError>) {
        let part = part.to_string();
        let result = match extended {
            Ok(_) => "ok",
            Err(LvmError::NoRoom { .. }) => "no_room",
            Err(LvmError::Locked { .. }) => "locked",
            Err(LvmError::TimedOut { .. } | LvmError::Killed { .. }) => "killed",
            Err(_) => "failed",
        };
        self.extensions.with_label_values(&[part.as_str(), result]).inc();
        self.wait.with_label_values(&[&part]).observe(waited.as_secs_f64());
        if let Ok(extended) = extended {
            self.stall.with_label_values(&[&part]).observe(extended.stall.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn failures_are_counted_and_get_a_reason() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let lvm = Lvm::new("vg-pool".to_owned(), None, metrics.clone());
        let no_room = LvmError::NoRoom { group: "vg".to_owned(), free: 0, needed: 1 };
        let locked = LvmError::Locked { holder: None, after: Duration::from_secs(10) };
        for (error, reason) in [(no_room, Reason::PoolFull), (locked, Reason::LvmUnusable)] {
            let failed = lvm.failed(&error);
            assert_eq!(failed.reason(), reason);
            assert!(failed.to_string().contains("vg-pool"), "{failed}");
            metrics.extended(Part::Data, Duration::from_secs(1), &Err(error));
        }
        let text = String::from_utf8(crate::metrics::encode(&registry).unwrap()).unwrap();
        for line in [
            "cowshed_pool_extensions_total{part=\"data\",result=\"no_room\"} 1",
            "cowshed_pool_extensions_total{part=\"data\",result=\"locked\"} 1",
            "cowshed_pool_extension_wait_seconds_count{part=\"data\"} 2",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
