//! What tenants may have.

use std::{collections::BTreeMap, fmt};

use cowshed_leases::Tenant;

use crate::evict::Bytes;

/// What one tenant may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// So many leases that are held, or being made; `None`: as many as it likes.
    pub leases: Option<u64>,
    /// So much that their disks have written, or are expected to; `None`: as much as there is. Not their sizes: those of thin disks
    /// say what a guest could write at the most, and are mostly the same for all.
    pub bytes: Option<Bytes>,
}

/// Whose quota is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The tenant's own.
    Own,
    /// That of each tenant without one of its own.
    AnyOther,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "its own",
            Self::AnyOther => "that of any other tenant, \"*\"",
        })
    }
}

/// All quotas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Of tenants by name.
    pub own: BTreeMap<Tenant, Quota>,
    /// Of each other one.
    pub any_other: Option<Quota>,
}

impl Quotas {
    /// The tenant's, if it has one.
    pub fn of(&self, tenant: &Tenant) -> Option<(Whose, Quota)> {
        let own = self.own.get(tenant).map(|quota| (Whose::Own, *quota));
        own.or_else(|| self.any_other.map(|quota| (Whose::AnyOther, quota)))
    }
}
