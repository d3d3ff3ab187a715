//! Growing the pool from its volume group: the seam; who does it is told when the service is put together.

use std::num::NonZeroU64;

use cowshed_gc::evict::{Bytes, Growth, Kind, VolumeGroup};

use crate::error::{Error, Reason, Result};

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

/// What is taken for free when the volume group cannot be asked.
pub(super) fn nothing_free() -> VolumeGroup {
    VolumeGroup { free: Bytes(0), extent: EXTENT }
}
