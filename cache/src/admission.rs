//! Whether another disk can be made, and the pool has room for it: refused at once, with the reason, never queued into a timeout.

use std::sync::Arc;

use cowshed_gc::{evict::Bytes, reserve::Policy};
use cowshed_pool::device::REPAIR;

use crate::{
    error::{Error, Reason, Result},
    kernel::{Devices, KernelError, PoolMode, PoolUsage},
    rescue::Hindrances,
};

/// What has to stay free.
#[derive(Clone)]
pub struct Admission {
    /// Of the pool's data, in percent.
    pub data_headroom_percent: u8,
    /// Of the pool's metadata, in percent.
    pub metadata_headroom_percent: u8,
    /// Whether a pool that does not zero new blocks is used all the same.
    pub allow_unzeroed: bool,
    /// What may be promised to disks, and to tenants.
    pub limits: Arc<Policy>,
    /// What else has to do its work.
    pub hindrances: Hindrances,
}

impl Admission {
    /// Asks the kernel and decides.
    pub async fn admit(&self, kernel: &Devices) -> Result<()> {
        self.judge(&kernel.pool().await)?;
        self.hindrances.admit()
    }

    /// The same on what the kernel has said a moment ago, if that speaks for it: nobody is refused for what is over.
    pub async fn admit_lately(&self, kernel: &Devices) -> Result<()> {
        match self.judge(&kernel.pool_lately().await) {
            Ok(()) => self.hindrances.admit(),
            Err(_) => self.admit(kernel).await,
        }
    }

    /// Decides on what the kernel has said.
    pub fn judge(&self, pool: &Result<PoolUsage, KernelError>) -> Result<()> {
        self.decide(pool.as_ref().map_err(unknown)?)
    }

    fn decide(&self, pool: &PoolUsage) -> Result<()> {
        let name = &pool.name;
        match pool.mode {
            PoolMode::ReadWrite => {}
            PoolMode::OutOfDataSpace => return Err(full(name, "it is out of data space")),
            PoolMode::ReadOnly | PoolMode::NeedsCheck | PoolMode::Failed => {
                let message =
                    format!("the thin pool {name} does not write (its state is {}): {REPAIR}", pool.mode);
                return Err(Error::new(Reason::PoolUnusable, message)
                    .with("pool", name)
                    .with("mode", pool.mode));
            }
        }
        if !pool.zeroing && !self.allow_unzeroed {
            let message = format!(
                "the thin pool {name} does not zero new blocks, so bytes of one disk could be read from another: \
                 `lvchange --zero y`, or allow it with [pool] allow_unzeroed"
            );
            return Err(Error::new(Reason::PoolUnzeroed, message).with("pool", name));
        }
        self.room(pool)
    }

    /// What is free of data and of metadata beyond what has to stay free, in bytes.
    pub fn free(&self, pool: &PoolUsage) -> (u64, u64) {
        let beyond = |used: u64, total: u64, headroom_percent: u8| {
            let kept = u128::from(total) * u128::from(headroom_percent) / 100;
            total.saturating_sub(used).saturating_sub(u64::try_from(kept).unwrap_or(u64::MAX))
        };
        (
            beyond(pool.data_used, pool.data_total, self.data_headroom_percent),
            beyond(pool.metadata_used, pool.metadata_total, self.metadata_headroom_percent),
        )
    }

    /// What disks can be promised of it.
    pub fn to_promise(&self, pool: &PoolUsage) -> Bytes {
        Bytes(self.free(pool).0)
    }

    fn room(&self, pool: &PoolUsage) -> Result<()> {
        let parts = [
            ("data", pool.data_used, pool.data_total, self.data_headroom_percent, "data_headroom_percent"),
            (
                "metadata",
                pool.metadata_used,
                pool.metadata_total,
                self.metadata_headroom_percent,
                "metadata_headroom_percent",
            ),
        ];
        for (part, used, total, headroom, option) in parts {
            if is_short(used, total, headroom) {
                let free = total.saturating_sub(used) >> 20;
                let why = format!(
                    "{free} MiB of {} MiB {part} are free, [pool] {option} is {headroom}",
                    total >> 20
                );
                return Err(full(&pool.name, &why));
            }
        }
        Ok(())
    }
}

fn is_short(used: u64, total: u64, headroom_percent: u8) -> bool {
    let free = u128::from(total.saturating_sub(used));
    free == 0 || free * 100 < u128::from(total) * u128::from(headroom_percent)
}

fn full(pool: &str, why: &str) -> Error {
    let message = format!(
        "the thin pool {pool} is full: {why}; release disks, remove images, or extend it (cowshed pool extend)"
    );
    Error::new(Reason::PoolFull, message).with("pool", pool)
}

/// As it is told when nobody knows how full the pool is.
pub(crate) fn unknown(error: &KernelError) -> Error {
    match error {
        KernelError::Slow { .. } => Error::new(Reason::NotReady, format!("{error}; try again")),
        KernelError::NoPool(_)
        | KernelError::Missing(_)
        | KernelError::NotThin { .. }
        | KernelError::Refused { .. } => Error::new(Reason::PoolMissing, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn room_and_no_room() {
        let admission = |data_headroom_percent, metadata_headroom_percent, allow_unzeroed| Admission {
            data_headroom_percent,
            metadata_headroom_percent,
            allow_unzeroed,
            limits: Arc::default(),
            hindrances: Hindrances::default(),
        };
        let none = admission(0, 0, true);
        let admission = admission(5, 10, false);
        let pool = |data_used, metadata_used, mode| PoolUsage {
            name: "vg-pool".into(),
            data_used,
            data_total: 1000,
            metadata_used,
            metadata_total: 100,
            block_bytes: 1,
            mode,
            zeroing: true,
        };
        let rw = PoolMode::ReadWrite;
        let table = [
            (pool(0, 0, rw), None, ""),
            (pool(950, 90, rw), None, ""),
            (pool(951, 0, rw), Some(Reason::PoolFull), "data_headroom_percent"),
            (pool(0, 91, rw), Some(Reason::PoolFull), "metadata_headroom_percent"),
            (pool(0, 0, PoolMode::OutOfDataSpace), Some(Reason::PoolFull), "out of data space"),
            (pool(0, 0, PoolMode::ReadOnly), Some(Reason::PoolUnusable), "thin_check"),
            (pool(0, 0, PoolMode::NeedsCheck), Some(Reason::PoolUnusable), "needs_check"),
        ];
        for (usage, reason, says) in table {
            let refused = admission.decide(&usage).err();
            assert_eq!(refused.as_ref().map(Error::reason), reason, "{usage:?}");
            let text = refused.map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains(says), "{text}");
        }
        let slow = KernelError::Slow { what: "looking".into(), after: std::time::Duration::from_secs(2) };
        assert_eq!(admission.judge(&Err(slow)).unwrap_err().reason(), Reason::NotReady);
        let gone = KernelError::NoPool("there is no thin pool".into());
        assert_eq!(admission.judge(&Err(gone)).unwrap_err().reason(), Reason::PoolMissing);
        assert_eq!(none.decide(&pool(1000, 0, rw)).unwrap_err().reason(), Reason::PoolFull);
        assert!(none.decide(&pool(999, 99, rw)).is_ok());

        let careless = PoolUsage { zeroing: false, ..pool(0, 0, rw) };
        let refused = admission.decide(&careless).unwrap_err();
        assert_eq!(refused.reason(), Reason::PoolUnzeroed);
        assert!(refused.to_string().contains("allow_unzeroed"), "{refused}");
        assert!(none.decide(&careless).is_ok());
    }
}
