//! What the service says of itself: versions, problems, pool, counts.

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use cowshed_leases::State;
use cowshed_proto::v1;
use tokio::time::{Instant, timeout_at};

use crate::{
    admission::Admission,
    containerd::{CallError, Containerd},
    drain::Drain,
    error::{Error, Reason},
    evict::{Evictor, Outlook, Trend},
    image::Images,
    kernel::{Devices, PoolUsage},
    ledger::{Ledger, LedgerSlot},
    prefetch::Prefetcher,
    rescue::Cause,
    serve::Connected,
    spares::Spares,
    usage::Usage,
};

/// containerd has so long to say how it is.
const CONTAINERD_LIMIT: Duration = Duration::from_secs(4);

/// What `GetStatus` asks.
pub struct StatusSource {
    /// Who holds what.
    pub ledger: LedgerSlot,
    /// The containerd in use.
    pub containerd: Arc<Containerd>,
    /// The devices.
    pub kernel: Devices,
    /// Whether there is room.
    pub admission: Admission,
    /// Whether anything new is taken on.
    pub drain: Drain,
    /// The images; not before the ledger is open.
    pub images: OnceLock<Images>,
    /// Prefetch jobs; not before the ledger is open.
    pub prefetcher: OnceLock<Prefetcher>,
    /// Disks that are ready; not before the ledger is open.
    pub spares: OnceLock<Spares>,
    /// Where the pool is going; not before the ledger is open.
    pub evictor: OnceLock<Arc<Evictor>>,
    /// Who takes how much of it; not before the ledger is open.
    pub usage: OnceLock<Arc<Usage>>,
    /// Whether containerd has found the snapshotter that this process serves, if it does.
    pub(crate) connected: Option<Connected>,
    /// Start of this process.
    pub started_at: SystemTime,
}

/// What everybody has said.
pub struct Look {
    /// What keeps Acquire from being served.
    pub problems: Vec<Error>,
    containerd: Option<v1::ContainerdStatus>,
    pool: Option<PoolUsage>,
}

impl StatusSource {
    /// Asks everybody. Never fails: what does not answer is a problem in the answer.
    pub async fn look(&self) -> v1::GetStatusResponse {
        let look = self.ask().await;
        let spares = self.spares.get().map(Spares::total).unwrap_or_default();
        let pulls = self.images.get().map_or(0, Images::pulls_in_flight);
        let outlook = self.evictor.get().map(|evictor| evictor.outlook()).unwrap_or_default();
        let rescue: BTreeSet<Cause> =
            look.problems.iter().filter_map(|problem| Cause::of(problem.reason())).collect();
        v1::GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            serving: look.problems.is_empty(),
            problems: look.problems.iter().map(ToString::to_string).collect(),
            containerd: look.containerd,
            pool: look.pool.map(|pool| pool_status(pool, &outlook)),
            leases: self.ledger.get().ok().map(|ledger| count_leases(&ledger)),
            pulls_in_flight: u32::try_from(pulls).unwrap_or(u32::MAX),
            prefetch_jobs: u32::try_from(self.prefetcher.get().map_or(0, Prefetcher::running))
                .unwrap_or(u32::MAX),
            warm_set_problems: self.prefetcher.get().map(Prefetcher::warm_set_problems).unwrap_or_default(),
            spares: spares.ready,
            spares_in_the_making: spares.making,
            spares_off: self.spares.get().is_some_and(|spares| !spares.are_kept()),
            started_at: Some(self.started_at.into()),
            rescue: rescue.into_iter().map(|cause| cause.as_str().to_owned()).collect(),
        }
    }

    /// The same for the service itself. Takes seconds at the most.
    pub async fn ask(&self) -> Look {
        let mut problems: Vec<Error> = self.ledger.get().err().into_iter().collect();
        let containerd = self.containerd_status(&mut problems).await;
        problems.extend(self.admission.hindrances.snapshotter());
        let pool = self.kernel.pool().await;
        problems.extend(self.admission.judge(&pool).err());
        problems.extend(self.drain.admit().err());
        Look { problems, containerd, pool: pool.ok() }
    }

    async fn containerd_status(&self, problems: &mut Vec<Error>) -> Option<v1::ContainerdStatus> {
        let deadline = Instant::now() + CONTAINERD_LIMIT;
        let late = |call| self.containerd.explain(CallError::Timeout { call, after: CONTAINERD_LIMIT });
        let version = timeout_at(deadline, self.containerd.version()).await;
        let version = match version.unwrap_or_else(|_| Err(late("Version"))) {
            Ok(version) => version,
            Err(error) => {
                problems.push(error);
                return None;
            }
        };
        // Any call that names the snapshotter tells whether it is there.
        match timeout_at(deadline, self.containerd.snapshot_labels("cowshed-status")).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => problems.push(self.containerd.explain(error)),
            Err(_) => problems.push(late("Snapshots.Stat")),
        }
        if let Some(connected) = &self.connected {
            let problem = connected.problem().await;
            problems.extend(problem.map(|problem| Error::new(Reason::SnapshotterMissing, problem)));
        }
        Some(v1::ContainerdStatus {
            address: self.containerd.address().display().to_string(),
            version,
            namespace: self.containerd.namespace().to_owned(),
            snapshotter: self.containerd.snapshotter().to_owned(),
        })
    }
}

/// Leases by state.
pub fn count_leases(ledger: &Ledger) -> v1::LeaseCounts {
    ledger.read(|book| {
        let mut counts = v1::LeaseCounts::default();
        for lease in book.after(None).filter(|lease| lease.vm.is_vm()) {
            match lease.state {
                State::Preparing => counts.preparing += 1,
                State::Granted(_) => counts.granted += 1,
                State::Suspect { .. } => counts.suspect += 1,
                State::Releasing { .. } => counts.releasing += 1,
                State::Failed { .. } => counts.failed += 1,
            }
        }
        counts
    })
}

fn pool_status(pool: PoolUsage, outlook: &Outlook) -> v1::PoolStatus {
    let full_in = |trend: &Trend| {
        let seconds = trend.full_in?.as_secs();
        Some(prost_types::Duration { seconds: i64::try_from(seconds).unwrap_or(i64::MAX), nanos: 0 })
    };
    v1::PoolStatus {
        name: pool.name,
        data_used_bytes: pool.data_used,
        data_total_bytes: pool.data_total,
        metadata_used_bytes: pool.metadata_used,
        metadata_total_bytes: pool.metadata_total,
        mode: pool.mode.to_string(),
        data_bytes_per_second: outlook.data.rate,
        metadata_bytes_per_second: outlook.metadata.rate,
        data_full_in: full_in(&outlook.data),
        metadata_full_in: full_in(&outlook.metadata),
        group_free_bytes: outlook.group_free,
    }
}
