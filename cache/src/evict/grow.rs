//! Growing the pool from its volume group: the seam; who does it is told when the service is put together.

use std::{
    num::NonZeroU64,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cowshed_gc::evict::{Bytes, Growth, Kind, VolumeGroup};
use tokio::time::Instant;

use crate::{
    error::{Error, Reason, Result},
    provision::grow::{self, Part},
};

/// LVM2's own default, in bytes; where nothing is free it does not matter.
const EXTENT: NonZeroU64 = NonZeroU64::MIN.saturating_add((4 << 20) - 1);

/// Extends the pool.
#[async_trait::async_trait]
pub trait Grower: Send + Sync {
    /// How this kind of room may grow.
    fn growth(&self, kind: Kind) -> Growth;
    /// What the volume group has; asked before each plan, so it must not hang.
    ///
    /// # Errors
    /// If it cannot be told; then nothing is taken for free.
    async fn group(&self) -> Result<VolumeGroup>;
    /// Extends this kind of room to so much in all, which is more than it has. To be done when this returns.
    ///
    /// # Errors
    /// Why not; what there was is there.
    async fn extend(&self, kind: Kind, to: Bytes) -> Result<()>;
}

/// Of a service that cannot grow its pool.
pub struct NoGrower;

#[async_trait::async_trait]
impl Grower for NoGrower {
    fn growth(&self, _kind: Kind) -> Growth {
        Growth::Never
    }

    async fn group(&self) -> Result<VolumeGroup> {
        Ok(VolumeGroup { free: Bytes(0), extent: EXTENT })
    }

    async fn extend(&self, kind: Kind, to: Bytes) -> Result<()> {
        let message = format!("the pool's {kind} does not grow by itself: extend it to {to} (lvextend)");
        Err(Error::new(Reason::PoolFull, message))
    }
}

/// From this age on, what was learnt of the volume group is learnt again, behind the answer: LVM2 takes its time.
const FRESH: Duration = Duration::from_secs(30);

/// How the pool may grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Of its data.
    pub data: Growth,
    /// Of its metadata.
    pub metadata: Growth,
}

/// By LVM2. Clones share what is known of the volume group.
#[derive(Clone)]
pub struct ByLvm {
    lvm: Arc<dyn grow::Grower>,
    steps: Steps,
    lately: Arc<Mutex<Lately>>,
}

/// What the volume group had when it was last asked for, and whether it is being asked for again.
#[derive(Default)]
struct Lately {
    known: Option<(Instant, Result<VolumeGroup>)>,
    asking: bool,
}

impl ByLvm {
    /// Grows it so.
    pub fn new(lvm: Arc<dyn grow::Grower>, steps: Steps) -> Self {
        Self { lvm, steps, lately: Arc::default() }
    }

    async fn ask(&self) -> Result<VolumeGroup> {
        let group = self.lvm.room().await.map(|room| {
            let extent = NonZeroU64::new(room.group.extent_bytes).unwrap_or(EXTENT);
            VolumeGroup { free: Bytes(room.group.free_bytes), extent }
        });
        self.lately().known = Some((Instant::now(), group.clone()));
        group
    }

    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl Grower for ByLvm {
    fn growth(&self, kind: Kind) -> Growth {
        match kind {
            Kind::Data => self.steps.data,
            Kind::Metadata => self.steps.metadata,
        }
    }

    async fn group(&self) -> Result<VolumeGroup> {
        let known = self.lately().known.clone();
        let Some((at, group)) = known else { return self.ask().await };
        if at.elapsed() >= FRESH && !std::mem::replace(&mut self.lately().asking, true) {
            let this = self.clone();
            tokio::spawn(async move {
                let _known = this.ask().await;
                this.lately().asking = false;
            });
        }
        group
    }

    async fn extend(&self, kind: Kind, to: Bytes) -> Result<()> {
        let part = match kind {
            Kind::Data => Part::Data,
            Kind::Metadata => Part::Metadata,
        };
        let extended = self.lvm.extend(part, to.0).await.map(drop);
        // Whatever came of it, the group is not what it was.
        self.lately().known = None;
        extended
    }
}

/// What is taken for free when the volume group cannot be asked.
pub(super) fn nothing_free() -> VolumeGroup {
    VolumeGroup { free: Bytes(0), extent: EXTENT }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cowshed_pool::lvm::{Extended, Group, Room};

    use super::*;
    use crate::provision::fitness;

    /// Has so much less each time that it is asked.
    #[derive(Default)]
    struct Fake {
        asked: AtomicUsize,
        extended: Mutex<Vec<(Part, u64)>>,
    }

    #[async_trait::async_trait]
    impl grow::Grower for Fake {
        async fn room(&self) -> Result<Room> {
            let asked = self.asked.fetch_add(1, Ordering::SeqCst) as u64;
            if asked == 2 {
                return Err(Error::new(Reason::LvmUnusable, "it is locked"));
            }
            Ok(room(100 - asked))
        }

        async fn extend(&self, part: Part, to_bytes: u64) -> Result<Extended> {
            self.extended.lock().unwrap().push((part, to_bytes));
            Err(Error::new(Reason::PoolFull, "no room"))
        }
    }

    fn room(free_bytes: u64) -> Room {
        let Room { group, pool } = fitness::tests::room();
        Room { group: Group { free_bytes, ..group }, pool }
    }

    fn free(group: Result<VolumeGroup>) -> Option<u64> {
        group.ok().map(|group| group.free.0)
    }

    #[tokio::test(start_paused = true)]
    async fn the_volume_group_is_asked_behind_the_answer_and_anew_after_an_extension() {
        let (fake, step) = (Arc::new(Fake::default()), Bytes(8));
        let data = Growth::UpTo { step, ceiling: Bytes(64) };
        let grower = ByLvm::new(fake.clone(), Steps { data, metadata: Growth::Never });
        assert_eq!((grower.growth(Kind::Data), grower.growth(Kind::Metadata)), (data, Growth::Never));
        for _ in 0..3 {
            assert_eq!(free(grower.group().await), Some(100));
        }
        tokio::time::advance(FRESH).await;
        assert_eq!(free(grower.group().await), Some(100), "it was waited for");
        tokio::task::yield_now().await;
        assert_eq!(free(grower.group().await), Some(99));
        assert!(grower.extend(Kind::Metadata, Bytes(12)).await.is_err());
        assert_eq!(*fake.extended.lock().unwrap(), [(Part::Metadata, 12)]);
        assert_eq!(free(grower.group().await), None, "a group of before the extension");
        assert_eq!(fake.asked.load(Ordering::SeqCst), 3);
    }
}
