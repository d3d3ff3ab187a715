//! Sizes of disks, as people write them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, de};

/// The smallest disk: a smaller one has no room for a filesystem with a journal.
pub(crate) const SMALLEST: Bytes = Bytes(16 << 20);
/// The largest that dm-thin's 64 KiB blocks and ext4 both reach without trouble.
pub(crate) const LARGEST: Bytes = Bytes(16 << 40);

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    /// "10 GiB", "10GB", "10g" are all 10 × 2^30, as in containerd's configuration; "4096" is bytes.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("{text:?} is no size: write bytes, or a number with K, M, G or T, such as \"10GiB\"");
        let digits = text.trim().find(|c: char| !c.is_ascii_digit()).unwrap_or(text.trim().len());
        let (number, unit) = text.trim().split_at(digits);
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(bad()),
        };
        let number: u64 = number.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl Bytes {
    /// A size that a disk can have: between the smallest and the largest, rounded up to whole MiB.
    ///
    /// # Errors
    /// Says what would do.
    pub fn of_disk(self) -> Result<Self, String> {
        if self < SMALLEST || self > LARGEST {
            return Err(format!("a disk has between {SMALLEST} and {LARGEST}, not {self}"));
        }
        Ok(Self(self.0.next_multiple_of(1 << 20)))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 >= 1 << shift && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("10GiB", 10 << 30),
            ("10 GB", 10 << 30),
            ("512m", 512 << 20),
            ("4096", 4096),
            (" 2 T ", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "10 X", "99999999999T", "1 G B"] {
            assert!(text.parse::<Bytes>().unwrap_err().contains(&format!("{text:?}")), "{text}");
        }
        for (bytes, text) in [(10 << 30, "10 GiB"), (1536 << 20, "1536 MiB"), (5, "5 bytes"), (0, "0 bytes")]
        {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(Bytes((16 << 20) + 1).of_disk(), Ok(Bytes(17 << 20)));
        assert!(Bytes(1).of_disk().unwrap_err().contains("16 MiB"));
        assert!(Bytes(u64::MAX).of_disk().is_err());
    }
}
