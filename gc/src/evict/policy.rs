//! What an operator wants of the pool, and what asks for a plan.

use std::time::Duration;

use thiserror::Error;

use super::{Bytes, Kind, Room, Share, ShareError};

/// When something is reclaimed, how much, and what is left alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// For the pool's data.
    pub data: Limits,
    /// For the pool's metadata.
    pub metadata: Limits,
    /// Of the volume group, so much is left for metadata to grow into.
    pub kept_for_metadata: Bytes,
    /// An image that was used, or came, so short a time ago stays.
    pub min_age: Duration,
    /// What becomes of such an image in an emergency.
    pub in_emergency: Young,
    /// What was not used for so long goes without need; `None`: nothing does.
    pub retention: Option<Duration>,
    /// How many spares are kept.
    pub spares: Floor,
}

impl Policy {
    /// Of this kind of room.
    pub fn limits(&self, kind: Kind) -> &Limits {
        match kind {
            Kind::Data => &self.data,
            Kind::Metadata => &self.metadata,
        }
    }
}

/// How full the pool may be with one kind of room, and how it grows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// When pressure begins and ends.
    pub marks: Marks,
    /// The share that may be in use with what is admitted: the rest is the reserve, for disks that are there already.
    pub admits_up_to: Share,
    /// How it grows.
    pub growth: Growth,
}

/// The shares of the pool at which pressure begins and ends: low < high ≤ emergency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    low: Share,
    high: Share,
    emergency: Share,
}

/// Numbers that are no marks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MarksError {
    /// One of them is no percentage.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// They are not in order.
    #[error(
        "the low mark ({low} %) must be below the high one ({high} %), and that not above the emergency's ({emergency} %)"
    )]
    Order {
        /// Where pressure ends.
        low: u8,
        /// Where it begins.
        high: u8,
        /// Where an emergency begins.
        emergency: u8,
    },
}

impl Marks {
    /// Usual ones for the pool's data.
    pub const DATA: Self =
        Self { low: Share::literal(75), high: Share::literal(85), emergency: Share::literal(95) };
    /// Usual ones for its metadata, whose end is worse.
    pub const METADATA: Self =
        Self { low: Share::literal(65), high: Share::literal(75), emergency: Share::literal(90) };

    /// From percentages.
    ///
    /// # Errors
    /// If one is none, or they are not in order.
    pub fn new(low: u8, high: u8, emergency: u8) -> Result<Self, MarksError> {
        if low >= high || high > emergency {
            return Err(MarksError::Order { low, high, emergency });
        }
        Ok(Self { low: low.try_into()?, high: high.try_into()?, emergency: emergency.try_into()? })
    }

    /// Pressure ends here.
    pub fn low(self) -> Share {
        self.low
    }

    /// Pressure begins here.
    pub fn high(self) -> Share {
        self.high
    }

    /// An emergency begins here.
    pub fn emergency(self) -> Share {
        self.emergency
    }
}

/// How one kind of room grows from the volume group. It never shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// By an operator's hand only.
    Never,
    /// In steps, for each of them stalls all disks; a smaller one only where no more is to be had.
    UpTo {
        /// How much it grows by at a time, at the least.
        step: Bytes,
        /// How much it may be in all.
        ceiling: Bytes,
    },
}

/// What becomes, in an emergency, of an image that has not reached the least age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Young {
    /// It stays.
    Stay,
    /// It goes when nothing else is left to go, until the high mark.
    Go,
}

/// How many spares are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    /// Of each image that does not say otherwise.
    pub kept: u32,
    /// When these go as well.
    pub yields: Yields,
}

/// When the spares go that are to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Yields {
    /// Before any image: a spare is made again in a moment.
    BeforeImages,
    /// After all images that can go: spares are few bytes, and of images in use.
    AfterImages,
}

/// What asks for a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The pool is, or may be, above a mark.
    Pressure,
    /// This is to have room, beside the reserve.
    Admission(Room),
    /// Time has passed: what has not been used for too long goes, then as with pressure.
    Schedule,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_in_order() {
        let table = [
            (70, 80, 95, true),
            (1, 2, 2, true),
            (80, 80, 95, false),
            (70, 96, 95, false),
            (0, 80, 95, false),
            (70, 80, 101, false),
        ];
        for (low, high, emergency, is_good) in table {
            assert_eq!(Marks::new(low, high, emergency).is_ok(), is_good, "{low} {high} {emergency}");
        }
    }
}
