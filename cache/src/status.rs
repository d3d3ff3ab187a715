//! What the service says of itself: versions, problems, pool, counts.

use std::{sync::Arc, time::SystemTime};

use cowshed_leases::State;
use cowshed_proto::v1;

use crate::{
    admission::Admission,
    containerd::Containerd,
    drain::Drain,
    image::Images,
    kernel::{Devices, PoolUsage},
    ledger::Ledger,
    serve::Connected,
};

/// What `GetStatus` asks.
pub struct StatusSource {
    /// Who holds what.
    pub ledger: Ledger,
    /// The containerd in use.
    pub containerd: Arc<Containerd>,
    /// The devices.
    pub kernel: Devices,
    /// Whether there is room.
    pub admission: Admission,
    /// Whether anything new is taken on.
    pub drain: Drain,
    /// The images.
    pub images: Images,
    /// Whether containerd has found the snapshotter that this process serves, if it does.
    pub(crate) connected: Option<Connected>,
    /// Start of this process.
    pub started_at: SystemTime,
}

impl StatusSource {
    /// Asks everybody. Never fails: what does not answer is a problem in the answer.
    pub async fn look(&self) -> v1::GetStatusResponse {
        let mut problems = Vec::new();
        let containerd = self.containerd_status(&mut problems).await;
        let pool = self.kernel.pool().await;
        if let Err(error) = self.admission.judge(&pool) {
            problems.push(error.to_string());
        }
        if let Err(error) = self.drain.admit() {
            problems.push(error.to_string());
        }
        v1::GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            serving: problems.is_empty(),
            problems,
            containerd,
            pool: pool.ok().map(pool_status),
            leases: Some(count_leases(&self.ledger)),
            pulls_in_flight: u32::try_from(self.images.pulls_in_flight()).unwrap_or(u32::MAX),
            started_at: Some(self.started_at.into()),
        }
    }

    async fn containerd_status(&self, problems: &mut Vec<String>) -> Option<v1::ContainerdStatus> {
        let version = match self.containerd.version().await {
            Ok(version) => version,
            Err(error) => {
                problems.push(error.to_string());
                return None;
            }
        };
        // Any call that names the snapshotter tells whether it is there.
        if let Err(error) = self.containerd.has_snapshot("cowshed-status").await {
            problems.push(self.containerd.explain(error).to_string());
        }
        if let Some(connected) = &self.connected {
            problems.extend(connected.problem().await);
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
        for lease in book.after(None).filter(|lease| !lease.vm.is_image()) {
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

fn pool_status(pool: PoolUsage) -> v1::PoolStatus {
    v1::PoolStatus {
        name: pool.name,
        data_used_bytes: pool.data_used,
        data_total_bytes: pool.data_total,
        metadata_used_bytes: pool.metadata_used,
        metadata_total_bytes: pool.metadata_total,
        mode: pool.mode.to_string(),
    }
}
