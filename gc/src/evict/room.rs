//! Room in a thin pool, of both kinds, and shares of it.

use std::{fmt, num::NonZeroU64};

use thiserror::Error;

/// Mappings that one block of the pool's metadata can hold: dm-thin's B-trees have 32 bytes of header and 16 an entry, and
/// a multiple of three entries.
const MAPPINGS_MAX: u64 = 252;
/// A block of metadata, in bytes.
const METADATA_BLOCK: u64 = 4096;

/// So many bytes. Sums and differences end at what can be counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    /// With these.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }

    /// Without these; none if there are not so many.
    #[must_use]
    pub fn less(self, fewer: Self) -> Self {
        Self(self.0.saturating_sub(fewer.0))
    }

    /// The next multiple.
    pub(super) fn rounded_up(self, unit: NonZeroU64) -> Self {
        Self(self.0.div_ceil(unit.get()).saturating_mul(unit.get()))
    }

    /// The multiple before it.
    pub(super) fn rounded_down(self, unit: NonZeroU64) -> Self {
        Self(self.0 - self.0 % unit)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match UNITS.iter().find(|(_, shift)| self.0 >> shift > 0) {
            Some((unit, shift)) => write!(f, "{:.2} {unit}", self.0 as f64 / (1_u64 << shift) as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

/// What a thin pool has room of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// What is on the disks.
    Data,
    /// Which block is whose.
    Metadata,
}

impl Kind {
    /// Both; the one whose end is worse first.
    pub const ALL: [Self; 2] = [Self::Metadata, Self::Data];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
        })
    }
}

/// Room of both kinds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Room {
    /// For what is on the disks.
    pub data: Bytes,
    /// For which block is whose; in the pool, blocks of 4 KiB.
    pub metadata: Bytes,
}

impl Room {
    /// None.
    pub const NONE: Self = Self { data: Bytes(0), metadata: Bytes(0) };

    /// What comes back, at the least, when a thin device goes that alone maps so many bytes, in blocks of the pool of
    /// `block` bytes: the blocks, and the metadata that has nothing but their mappings.
    pub fn of_mapped(data: Bytes, block: NonZeroU64) -> Self {
        let blocks = data.0.div_ceil(block.get());
        Self { data, metadata: Bytes(blocks.div_ceil(MAPPINGS_MAX).saturating_mul(METADATA_BLOCK)) }
    }

    /// Room as `of` has it of each kind.
    pub fn each(of: impl Fn(Kind) -> Bytes) -> Self {
        Self { data: of(Kind::Data), metadata: of(Kind::Metadata) }
    }

    /// Room of one kind only.
    pub fn only(kind: Kind, bytes: Bytes) -> Self {
        Self::each(|each| if each == kind { bytes } else { Bytes(0) })
    }

    /// Of this kind.
    pub fn of(self, kind: Kind) -> Bytes {
        match kind {
            Kind::Data => self.data,
            Kind::Metadata => self.metadata,
        }
    }

    /// With this.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self::each(|kind| self.of(kind).plus(more.of(kind)))
    }

    /// Without this.
    #[must_use]
    pub fn less(self, fewer: Self) -> Self {
        Self::each(|kind| self.of(kind).less(fewer.of(kind)))
    }

    /// Of each kind, the less.
    pub(super) fn min(self, other: Self) -> Self {
        Self::each(|kind| self.of(kind).min(other.of(kind)))
    }

    /// Whether there is none of it.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// Whether it has some of what is lacking.
    pub(super) fn helps(self, lack: Self) -> bool {
        Kind::ALL.iter().any(|kind| self.of(*kind).0 > 0 && lack.of(*kind).0 > 0)
    }

    /// How many times it has what is lacking, of each kind, together; once is 2^32. What is not lacking counts for nothing.
    pub(super) fn measured_by(self, lack: Self) -> u128 {
        let of = |kind: &Kind| {
            let (has, lacks) = (u128::from(self.of(*kind).0), u128::from(lack.of(*kind).0));
            (has << 32).checked_div(lacks).unwrap_or_default()
        };
        Kind::ALL.iter().map(of).sum()
    }
}

impl std::iter::Sum for Room {
    fn sum<I: Iterator<Item = Self>>(rooms: I) -> Self {
        rooms.fold(Self::NONE, Self::plus)
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.data.0, self.metadata.0) {
            (0, 0) => f.write_str("nothing"),
            (_, 0) => write!(f, "{} data", self.data),
            (0, _) => write!(f, "{} metadata", self.metadata),
            (_, _) => write!(f, "{} data, {} metadata", self.data, self.metadata),
        }
    }
}

/// A share of the pool, in whole percent: 1 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u8);

/// A number that is no share.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0} is not a percentage from 1 to 100")]
pub struct ShareError(pub u8);

impl TryFrom<u8> for Share {
    type Error = ShareError;

    fn try_from(percent: u8) -> Result<Self, ShareError> {
        if (1..=100).contains(&percent) { Ok(Self(percent)) } else { Err(ShareError(percent)) }
    }
}

impl Share {
    /// For constants from 1 to 100.
    pub(super) const fn literal(percent: u8) -> Self {
        Self(percent)
    }

    /// So much of it, or less by a fraction of a byte.
    pub fn of(self, total: Bytes) -> Bytes {
        Bytes(narrow(u128::from(total.0) * u128::from(self.0) / 100))
    }

    /// The least total of which this share is so much.
    pub(super) fn total_for(self, part: Bytes) -> Bytes {
        Bytes(narrow((u128::from(part.0) * 100).div_ceil(u128::from(self.0))))
    }

    /// Whether so much is this share of the total, or more.
    pub(super) fn is_reached(self, used: Bytes, total: Bytes) -> bool {
        u128::from(used.0) * 100 >= u128::from(total.0) * u128::from(self.0)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

fn narrow(wide: u128) -> u64 {
    u64::try_from(wide).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn room_is_told_as_people_read_it() {
        let table = [
            ((0, 0), "nothing"),
            ((1023, 0), "1023 B data"),
            ((0, 1 << 10), "1.00 KiB metadata"),
            ((3 << 29, 4096), "1.50 GiB data, 4.00 KiB metadata"),
            ((u64::MAX, 0), "16384.00 PiB data"),
        ];
        for ((data, metadata), text) in table {
            assert_eq!(Room { data: Bytes(data), metadata: Bytes(metadata) }.to_string(), text);
        }
    }

    #[test]
    fn shares_are_exact() {
        let share = |percent: u8| Share::try_from(percent).unwrap();
        for (percent, total, part) in [(1, 99, 0), (1, 100, 1), (80, 99, 79), (100, u64::MAX, u64::MAX)] {
            assert_eq!(share(percent).of(Bytes(total)), Bytes(part));
            assert!(share(percent).total_for(Bytes(part)) <= Bytes(total));
            assert!(share(percent).of(share(percent).total_for(Bytes(part))) >= Bytes(part));
        }
        let table = [(79, 100, false), (80, 100, true), (79, 99, false), (80, 99, true), (0, 0, true)];
        for (used, total, is_reached) in table {
            assert_eq!(share(80).is_reached(Bytes(used), Bytes(total)), is_reached, "{used} of {total}");
        }
        assert_eq!([0, 101].map(Share::try_from), [Err(ShareError(0)), Err(ShareError(101))]);
    }

    #[test]
    fn so_many_mappings_are_in_a_block_of_metadata() {
        let block = NonZeroU64::new(65_536).unwrap();
        for (blocks, metadata) in [(0, 0), (1, 4096), (252, 4096), (253, 8192)] {
            assert_eq!(Room::of_mapped(Bytes(blocks * 65_536), block).metadata, Bytes(metadata), "{blocks}");
        }
        assert_eq!(Room::of_mapped(Bytes(1), block), Room { data: Bytes(1), metadata: Bytes(4096) });
    }
}
