//! The time, where effects need it; decisions take it as an argument.

use std::time::{SystemTime, UNIX_EPOCH};

use cowshed_leases::UnixMicros;

/// Now, by the wall clock.
pub(crate) fn now() -> UnixMicros {
    from_system(SystemTime::now())
}

/// The same instant in the ledger's unit.
pub(crate) fn from_system(time: SystemTime) -> UnixMicros {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMicros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
