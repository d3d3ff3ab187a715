//! The time, where effects need it; decisions take it as an argument.

use std::{
    fs, io,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cowshed_leases::{BootId, Moment, UnixMicros, Uptime};
use nix::time::{ClockId, clock_gettime};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Tells the time. Clones tell the same.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Moment + Send + Sync>);

impl Clock {
    /// The host's.
    ///
    /// # Errors
    /// If the kernel does not tell which boot this is, or how long ago that was.
    pub fn host() -> io::Result<Self> {
        let text = fs::read_to_string(BOOT_ID)?;
        let boot: BootId = text.trim().parse().map_err(|e| io::Error::other(format!("{BOOT_ID}: {e}")))?;
        uptime()?;
        // The clock that was there a moment ago is there.
        Ok(Self::of(move || Moment { wall: wall(), boot, up: uptime().unwrap_or_default() }))
    }

    /// This one.
    pub(crate) fn of(tell: impl Fn() -> Moment + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Now.
    pub fn now(&self) -> Moment {
        (self.0)()
    }
}

fn uptime() -> io::Result<Uptime> {
    let since = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
    Ok(Uptime(u64::try_from(since.as_micros()).unwrap_or(u64::MAX)))
}

/// As protobuf has it, and as people read it.
pub(crate) fn timestamp(at: UnixMicros) -> prost_types::Timestamp {
    let since = Duration::from_micros(u64::try_from(at.0).unwrap_or_default());
    (UNIX_EPOCH + since).into()
}

/// Now, by the wall clock.
pub(crate) fn wall() -> UnixMicros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMicros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
