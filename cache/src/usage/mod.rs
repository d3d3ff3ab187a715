//! Who takes how much of the pool: VMs by the counters of their devices, images by their layers. Looked at only if somebody asks,
//! and then once for all who do at the time.

pub(crate) mod meter;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use cowshed_leases::Lease;
use futures_util::{StreamExt as _, stream};
use tokio::{sync::Mutex, time::Instant};

use meter::{Belows, Meters, Origin, first};
pub use meter::{Disk, Order, Rate};

use crate::{
    error::{Error, Reason, Result},
    evict::{AllTaken, Evictor},
    kernel::Devices,
    ledger::Ledger,
    metrics::Metrics,
    reclaim::ABREAST,
};

/// So long a look at the VMs' devices counts.
const DISKS_FRESH: Duration = Duration::from_secs(1);
/// The same of images, for which all of containerd is asked.
const IMAGES_FRESH: Duration = Duration::from_secs(10);
/// Who asks for images waits so long; what is learnt later is there for who asks next.
const IMAGES_LIMIT: Duration = Duration::from_secs(5);
/// What new disks have to begin with is asked of the snapshotter for so long in one look.
const LEARN_LIMIT: Duration = Duration::from_millis(500);
/// A scrape waits so long.
const COUNT_LIMIT: Duration = Duration::from_secs(2);

/// All disks of VMs at one look.
#[derive(Debug, Default)]
pub struct Disks {
    disks: Vec<Disk>,
    /// Over what time their rates are.
    pub over: Option<Duration>,
}

impl Disks {
    /// The first so many.
    pub fn first(&self, order: Order, count: usize) -> Vec<&Disk> {
        first(&self.disks, order, count)
    }

    /// All.
    pub fn all(&self) -> &[Disk] {
        &self.disks
    }

    /// Bytes that they have of their own, at the least.
    pub fn own(&self) -> u64 {
        self.disks.iter().filter_map(|disk| disk.own).sum()
    }
}

/// Looks. Who asks while somebody looks waits for that look.
pub struct Usage {
    ledger: Ledger,
    kernel: Devices,
    evictor: Arc<Evictor>,
    metrics: Metrics,
    disks: Mutex<DisksLately>,
    images: Arc<Mutex<ImagesLately>>,
    origin: Instant,
}

#[derive(Default)]
struct ImagesLately {
    known: Option<(Instant, Arc<AllTaken>)>,
}

#[derive(Default)]
struct DisksLately {
    known: Option<(Instant, Arc<Disks>)>,
    meters: Meters,
    belows: Belows,
}

impl Usage {
    /// Of these.
    pub fn new(ledger: Ledger, kernel: Devices, evictor: Arc<Evictor>, metrics: Metrics) -> Self {
        let (disks, images, origin) = (Mutex::default(), Arc::default(), Instant::now());
        Self { ledger, kernel, evictor, metrics, disks, images, origin }
    }

    /// The disks that VMs have of their own, as far as they are active; as they were a second ago at the most.
    ///
    /// # Errors
    /// If the kernel does not answer in time.
    pub async fn disks(&self) -> Result<Arc<Disks>> {
        let mut lately = self.disks.lock().await;
        if let Some((at, known)) = &lately.known
            && at.elapsed() < DISKS_FRESH
        {
            return Ok(known.clone());
        }
        let has_disk = |lease: &Lease| lease.vm.is_vm() && lease.own_device().is_some();
        let leases = self.ledger.gather(|lease| has_disk(lease).then(|| lease.clone()));
        let names =
            leases.iter().filter_map(Lease::own_device).map(|device| device.dm_name.clone()).collect();
        let loads =
            self.kernel.loads(names).await.map_err(|e| Error::new(Reason::NotReady, e.to_string()))?;
        let at = self.origin.elapsed();
        let DisksLately { known, meters, belows } = &mut *lately;
        let seen: Vec<_> =
            leases.into_iter().zip(loads).filter_map(|(lease, load)| Some((lease, load?))).collect();
        let origins: HashSet<Origin> = seen.iter().filter_map(|(lease, _)| Origin::of(lease)).collect();
        belows.keep(&origins);
        self.learn(belows, meters, &seen).await;
        let with_own = seen.into_iter().map(|(lease, load)| {
            let own = Origin::of(&lease).and_then(|origin| belows.own(&origin, load.mapped));
            (lease, load, own)
        });
        let (disks, over, written) = meters.look(with_own.collect(), at);
        let disks = Arc::new(Disks { disks, over });
        let largest = disks.disks.iter().filter_map(|disk| disk.own).max().unwrap_or_default();
        self.metrics.vm_disks(disks.disks.len(), disks.own(), largest, written);
        *known = Some((Instant::now(), disks.clone()));
        Ok(disks)
    }

    /// Asks what new disks have besides their origins, a disk or two of each, as far as there is time.
    async fn learn(&self, belows: &mut Belows, meters: &Meters, seen: &[(Lease, crate::kernel::Load)]) {
        let mut asked: HashMap<Origin, (&Lease, u64)> = HashMap::new();
        for (lease, load) in seen {
            if let Some(origin) = Origin::of(lease)
                && belows.wants(&origin)
                && (!meters.knows(&lease.id) || belows.own(&origin, load.mapped).is_none())
            {
                asked.entry(origin).or_insert((lease, load.mapped));
            }
        }
        let ask = |(origin, (lease, mapped)): (Origin, (&Lease, u64))| {
            let (key, name) =
                (lease.id.snapshot_key(), lease.own_device().map(|device| device.dm_name.clone()));
            async move {
                let own = self.evictor.usage_of(&key).await.ok()??;
                // What was written meanwhile is not to be taken for the disk's own.
                let after = self.kernel.loads(name.into_iter().collect()).await.ok()?;
                let after = after.into_iter().flatten().map(|load| load.mapped).max();
                Some((origin, mapped.max(after?), own))
            }
        };
        let asked: Vec<_> = asked.into_iter().map(ask).collect();
        let mut answers = stream::iter(asked).buffer_unordered(ABREAST);
        let learning = async {
            while let Some(answer) = answers.next().await {
                if let Some((origin, mapped, own)) = answer {
                    belows.learn(origin, mapped, own);
                }
            }
        };
        // What is not learnt now is asked at the next look.
        let _in_time = tokio::time::timeout(LEARN_LIMIT, learning).await;
    }

    /// What images take, as it was ten seconds ago at the most.
    ///
    /// # Errors
    /// If nobody tells, or not in time.
    pub async fn images(&self) -> Result<Arc<AllTaken>> {
        let (evictor, images) = (self.evictor.clone(), self.images.clone());
        // To its end, whoever waits for it.
        let looking = tokio::spawn(async move {
            let mut lately = images.lock().await;
            if let Some((at, known)) = &lately.known
                && at.elapsed() < IMAGES_FRESH
            {
                return Ok(known.clone());
            }
            let taken = Arc::new(evictor.taken().await?);
            lately.known = Some((Instant::now(), taken.clone()));
            Ok(taken)
        });
        match tokio::time::timeout(IMAGES_LIMIT, looking).await {
            Ok(looked) => looked.map_err(|e| Error::new(Reason::InternalError, e.to_string()))?,
            Err(_) => {
                let message = format!(
                    "containerd has not told within {} s what there is; ask again in a moment",
                    IMAGES_LIMIT.as_secs()
                );
                Err(Error::new(Reason::NotReady, message))
            }
        }
    }

    /// Looks for the metrics.
    pub async fn count(&self) {
        let counted = tokio::time::timeout(COUNT_LIMIT, self.disks()).await;
        if !matches!(counted, Ok(Ok(_))) {
            tracing::debug!("what VMs' disks have could not be counted in time");
        }
    }
}

#[cfg(test)]
mod tests;
