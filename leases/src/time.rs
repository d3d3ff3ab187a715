//! Two clocks: the wall's, which people read and which jumps, and the host's own, which deadlines are measured by.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use thiserror::Error;

const MICROS_PER_SECOND: u64 = 1_000_000;

/// Microseconds since the Unix epoch: for people. No lease depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UnixMicros(pub i64);

/// Microseconds since the host was booted, its sleep included (`CLOCK_BOOTTIME`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uptime(pub u64);

impl Uptime {
    /// So much later.
    pub fn after(self, ttl: Ttl) -> Self {
        Self(self.0.saturating_add(ttl.micros()))
    }
}

/// Names one boot of the host, as `/proc/sys/kernel/random/boot_id` does: a UUID. An [`Uptime`] means something only
/// together with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BootId(u128);

/// A string that is no boot id.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("a boot id is a UUID")]
pub struct BootIdError;

impl BootId {
    /// From the 128 bits of a UUID.
    pub fn from_bits(bits: u128) -> Self {
        Self(bits)
    }
}

impl FromStr for BootId {
    type Err = BootIdError;

    fn from_str(text: &str) -> Result<Self, BootIdError> {
        let hex: String = text.chars().filter(|c| *c != '-').collect();
        let digits = hex.chars().all(|c| c.is_ascii_hexdigit());
        let bits = if digits && hex.len() == 32 { u128::from_str_radix(&hex, 16).ok() } else { None };
        bits.map(Self).ok_or(BootIdError)
    }
}

impl TryFrom<String> for BootId {
    type Error = BootIdError;

    fn try_from(text: String) -> Result<Self, BootIdError> {
        text.parse()
    }
}

impl From<BootId> for String {
    fn from(id: BootId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bits) = self;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            bits >> 96,
            (bits >> 80) & 0xffff,
            (bits >> 64) & 0xffff,
            (bits >> 48) & 0xffff,
            bits & 0xffff_ffff_ffff
        )
    }
}

/// An instant, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// For people.
    pub wall: UnixMicros,
    /// In which boot.
    pub boot: BootId,
    /// How long after it.
    pub up: Uptime,
}

/// How long something lasts if nobody asks for more: a second to a hundred years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Ttl(u64);

/// A time that is too short or too long.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("it is a time of 1 s to 100 years")]
pub struct TtlError;

impl Ttl {
    /// A second.
    pub const SHORTEST: Self = Self(MICROS_PER_SECOND);
    const LONGEST_SECONDS: u64 = 100 * 366 * 24 * 3600;

    /// From microseconds.
    ///
    /// # Errors
    /// If that is less than a second or more than a hundred years.
    pub fn from_micros(micros: u64) -> Result<Self, TtlError> {
        let fits = (MICROS_PER_SECOND..=Self::LONGEST_SECONDS * MICROS_PER_SECOND).contains(&micros);
        if fits { Ok(Self(micros)) } else { Err(TtlError) }
    }

    /// From seconds.
    ///
    /// # Errors
    /// If that is less than one or more than a hundred years.
    pub fn from_seconds(seconds: u64) -> Result<Self, TtlError> {
        Self::from_micros(seconds.saturating_mul(MICROS_PER_SECOND))
    }

    /// In microseconds.
    pub fn micros(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for Ttl {
    type Error = TtlError;

    fn try_from(micros: u64) -> Result<Self, TtlError> {
        Self::from_micros(micros)
    }
}

impl From<Ttl> for u64 {
    fn from(ttl: Ttl) -> Self {
        ttl.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn boot_ids_are_read_as_the_kernel_writes_them() {
        let text = "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0";
        assert_eq!(text.parse::<BootId>().unwrap().to_string(), text);
        for bad in
            ["", "0b1c2d3e", "zb1c2d3e-4f50-6172-8394-a5b6c7d8e9f0", "+b1c2d3e4f5061728394a5b6c7d8e9f0"]
        {
            assert_eq!(bad.parse::<BootId>(), Err(BootIdError), "{bad}");
        }
    }

    #[test]
    fn a_time_is_neither_too_short_nor_too_long() {
        for (seconds, fits) in
            [(0, false), (1, true), (86_400, true), (4_000_000_000, false), (u64::MAX, false)]
        {
            assert_eq!(Ttl::from_seconds(seconds).is_ok(), fits, "{seconds} s");
        }
        assert_eq!(Ttl::from_micros(999_999), Err(TtlError));
        assert_eq!(Uptime(u64::MAX - 5).after(Ttl::from_seconds(1).unwrap()), Uptime(u64::MAX));
    }
}
