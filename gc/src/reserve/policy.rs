//! Whether one more disk may be promised its room: the operator's limits over what is promised by now.

use cowshed_leases::{LeaseId, Tenant};

use super::{Claim, Quotas, Reserve, Whose};
use crate::evict::Bytes;

/// What an operator allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What is expected of a disk of whose image nothing is known.
    pub expected: Bytes,
    /// Whether it is learnt what disks of an image write.
    pub learns: bool,
    /// So much of what is free may be promised, in percent; `None`: there is no limit.
    pub overcommit_percent: Option<u32>,
    /// What tenants may have.
    pub quotas: Quotas,
}

/// One more disk.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// For whom, and what is expected of it.
    pub claim: &'a Claim,
    /// The lease that goes when this one comes, if any.
    pub instead_of: Option<&'a LeaseId>,
    /// What is free of the pool's data beyond what has to stay free; `None` if nobody knows.
    pub free: Option<Bytes>,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The pool has promised what it has.
    Pool {
        /// What is free.
        free: Bytes,
        /// What was promised of it, and is not written yet.
        reserved: Bytes,
        /// What is expected of the new disk.
        expected: Bytes,
        /// What would have to be free.
        needed: Bytes,
    },
    /// The tenant has as many leases as it may.
    Leases {
        /// Whose quota it is.
        whose: Whose,
        /// Who has them.
        tenant: Tenant,
        /// How many.
        has: u64,
        /// How many it may have.
        limit: u64,
    },
    /// The tenant's disks have written, or are expected to, what they may; or would by this one.
    Bytes {
        /// Whose quota it is.
        whose: Whose,
        /// Whose disks.
        tenant: Tenant,
        /// How much.
        has: Bytes,
        /// What is expected of the new disk.
        expected: Bytes,
        /// How much it may be.
        limit: Bytes,
    },
}

impl Policy {
    /// Decides.
    ///
    /// # Errors
    /// What stands against it: the tenant's quota before the pool, for that is not helped by room.
    pub fn admit(&self, reserve: &Reserve, asked: &Asked<'_>) -> Result<(), Refusal> {
        let Asked { claim: Claim { tenant, expected }, instead_of, free } = asked;
        let gone = reserve.part(*instead_of);
        if let Some((whose, quota)) = self.quotas.of(tenant) {
            let of_it = gone.filter(|gone| gone.claim.tenant == *tenant);
            let used = reserve.of(tenant);
            let has = used.leases.saturating_sub(u64::from(of_it.is_some()));
            if let Some(limit) = quota.leases.filter(|limit| has >= *limit) {
                return Err(Refusal::Leases { whose, tenant: tenant.clone(), has, limit });
            }
            let has = used.bytes.less(of_it.map(super::Held::uses).unwrap_or_default());
            if let Some(limit) = quota.bytes.filter(|limit| has.plus(*expected) > *limit) {
                let (tenant, expected) = (tenant.clone(), *expected);
                return Err(Refusal::Bytes { whose, tenant, has, expected, limit });
            }
        }
        let (Some(percent), Some(free)) = (self.overcommit_percent, *free) else { return Ok(()) };
        // Who writes nothing takes nothing.
        if expected.0 == 0 {
            return Ok(());
        }
        let reserved = reserve.reserved().less(gone.map(super::Held::reserved).unwrap_or_default());
        let needed = needed(reserved.plus(*expected), percent);
        if needed > free {
            return Err(Refusal::Pool { free, reserved, expected: *expected, needed });
        }
        Ok(())
    }
}

/// What has to be free for so much to be promised.
fn needed(promised: Bytes, percent: u32) -> Bytes {
    let needed = (u128::from(promised.0) * 100).div_ceil(u128::from(percent.max(1)));
    Bytes(u64::try_from(needed).unwrap_or(u64::MAX))
}
