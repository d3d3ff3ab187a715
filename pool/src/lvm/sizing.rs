//! How large a pool's metadata has to be, and how its volume group is divided: arithmetic.

use crate::size::Bytes;

/// dm-thin maps at most this much with each 4 KiB node of 252 entries, which are at least half full: 33 bytes a block.
const BYTES_PER_MAPPING: u64 = 33;
/// For each block of the pool, whoever maps it: LVM2's own rule. Its mapping, its counts, and their maps.
const BYTES_PER_CHUNK: u64 = 64;
/// LVM2's least.
pub const METADATA_MIN: u64 = 64 << 20;
/// dm-thin uses no more than 15.8 GiB.
pub const METADATA_MAX: u64 = 15 << 30;
/// A disk, unless something else is said: what its image takes, and what it writes itself.
pub const IMAGE: Bytes = Bytes(1 << 30);
/// See [`IMAGE`].
pub const WRITTEN: Bytes = Bytes(512 << 20);
/// Unless it is said how many disks there will be, as many as there are data for; more than so many are not provided for.
const SNAPSHOTS_MAX: u64 = 10_000;

/// What a pool is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Snapshots (disks and images' layers) at one time.
    pub snapshots: u64,
    /// Bytes that each shares with its image.
    pub image: Bytes,
    /// Bytes that each writes itself.
    pub written: Bytes,
}

impl Expected {
    /// Of a pool with so much data, if nothing is said.
    pub fn of(data_bytes: u64, image: Bytes, written: Bytes) -> Self {
        let snapshots = (data_bytes / written.0.max(1)).clamp(16, SNAPSHOTS_MAX);
        Self { snapshots, image, written }
    }
}

/// The size of a pool's metadata, and how it comes about. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Blocks of the pool's data.
    pub chunks: u64,
    /// For the blocks, whoever maps them.
    pub for_chunks: u64,
    /// Blocks that each snapshot maps, its image's too.
    pub mappings: u64,
    /// For what snapshots map: in the end each has a tree of its own.
    pub for_snapshots: u64,
    /// What is taken: the sum, within what LVM2 and dm-thin allow, in whole extents.
    pub bytes: u64,
}

/// Sizes the metadata of a pool with `data_bytes` in blocks of `chunk_bytes`, in a volume group with such extents.
pub fn metadata(data_bytes: u64, chunk_bytes: u64, expected: Expected, extent_bytes: u64) -> Metadata {
    let chunk = chunk_bytes.max(1);
    let chunks = data_bytes.div_ceil(chunk);
    let mappings = expected.image.0.div_ceil(chunk) + expected.written.0.div_ceil(chunk);
    let for_chunks = chunks.saturating_mul(BYTES_PER_CHUNK);
    let for_snapshots = mappings.saturating_mul(BYTES_PER_MAPPING).saturating_mul(expected.snapshots);
    let wanted = for_chunks.saturating_add(for_snapshots).clamp(METADATA_MIN, METADATA_MAX);
    Metadata { chunks, for_chunks, mappings, for_snapshots, bytes: up(wanted, extent_bytes) }
}

impl Metadata {
    /// The arithmetic, for people.
    pub fn story(&self, expected: Expected, chunk_bytes: u64) -> String {
        let Expected { snapshots, image, written } = expected;
        let (chunk, chunks, mappings) = (Bytes(chunk_bytes), self.chunks, self.mappings);
        format!(
            "{chunks} blocks of {chunk} × {BYTES_PER_CHUNK} bytes = {}\n{snapshots} snapshots × {mappings} blocks ({image} of the image, \
             {written} written) × {BYTES_PER_MAPPING} bytes = {}\ntogether, between {} and {}, in whole extents: {}",
            mib(self.for_chunks),
            mib(self.for_snapshots),
            Bytes(METADATA_MIN),
            Bytes(METADATA_MAX),
            mib(self.bytes)
        )
    }
}

/// How the free part of a volume group is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// Bytes of the pool's data.
    pub data: u64,
    /// The metadata.
    pub metadata: Metadata,
    /// For how many snapshots.
    pub expected: Expected,
    /// Bytes that stay free, for growing.
    pub left: u64,
}

/// What is wished of a pool that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolWish {
    /// Bytes of data; `None`: nine tenths of what is free.
    pub data: Option<Bytes>,
    /// Bytes of metadata; `None`: as the arithmetic says.
    pub metadata: Option<Bytes>,
    /// Snapshots at one time; `None`: as many as there are data for.
    pub snapshots: Option<u64>,
    /// See [`Expected`].
    pub image: Bytes,
    /// See [`Expected`].
    pub written: Bytes,
    /// Bytes of a block.
    pub chunk: Bytes,
}

/// Divides what is free. Metadata counts twice: LVM2 keeps as much in reserve, to repair it into.
///
/// # Errors
/// What does not fit, and what would.
pub fn divide(wish: &PoolWish, free_bytes: u64, extent_bytes: u64) -> Result<Division, String> {
    let chunk = wish.chunk.0;
    if !(65_536..=1 << 30).contains(&chunk) || !chunk.is_multiple_of(65_536) {
        return Err(format!("--chunk {}: blocks are multiples of 64 KiB, up to 1 GiB", wish.chunk));
    }
    let extent = extent_bytes.max(1);
    let sized = |data: u64| {
        let expected = match wish.snapshots {
            Some(snapshots) => Expected { snapshots, image: wish.image, written: wish.written },
            None => Expected::of(data, wish.image, wish.written),
        };
        let mut metadata = metadata(data, chunk, expected, extent);
        if let Some(bytes) = wish.metadata {
            metadata.bytes = up(bytes.0, extent);
        }
        (expected, metadata)
    };
    let data = match wish.data {
        Some(data) => up(data.0, extent),
        None => {
            let most = free_bytes / 10 * 9;
            let (_, metadata) = sized(most);
            // Less data want no more metadata.
            most.saturating_sub(2 * metadata.bytes) / extent * extent
        }
    };
    let (expected, metadata) = sized(data);
    let needed = data.saturating_add(2 * metadata.bytes);
    if data < 2 * chunk.max(extent) || needed > free_bytes {
        return Err(format!(
            "{} are free, and {} of data with 2 × {} of metadata (LVM2 keeps as much in reserve) are {}: ask for less (--size, \
             --snapshots, --metadata), or give the volume group a disk",
            mib(free_bytes),
            mib(data),
            mib(metadata.bytes),
            mib(needed)
        ));
    }
    Ok(Division { data, metadata, expected, left: free_bytes - needed })
}

/// Rounded up to whole extents.
pub fn up(bytes: u64, extent_bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(extent_bytes.max(1)).unwrap_or(u64::MAX)
}

/// "1536 MiB", for what is not a round number of anything larger.
pub fn mib(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{bytes} bytes"),
        mib if mib >= 10 << 10 => format!("{}.{} GiB", mib >> 10, ((mib & 1023) * 10) >> 10),
        mib => format!("{mib} MiB"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;
    const EXTENT: u64 = 4 << 20;

    fn wish() -> PoolWish {
        PoolWish {
            data: None,
            metadata: None,
            snapshots: None,
            image: IMAGE,
            written: WRITTEN,
            chunk: Bytes(65_536),
        }
    }

    #[test]
    fn metadata_grows_with_data_and_with_snapshots() {
        let sized = |data, snapshots| {
            metadata(data, 65_536, Expected { snapshots, image: IMAGE, written: WRITTEN }, EXTENT)
        };
        let hundred = sized(100 * GIB, 1000);
        assert_eq!((hundred.chunks, hundred.for_chunks), (1_638_400, 100 << 20));
        // 1.5 GiB of 64 KiB blocks, for each of a thousand.
        assert_eq!((hundred.mappings, hundred.for_snapshots), (24_576, 24_576 * 33 * 1000));
        assert_eq!(hundred.bytes, up((100 << 20) + 811_008_000, EXTENT));
        assert_eq!(sized(GIB, 1).bytes, METADATA_MIN);
        assert_eq!(sized(100 << 40, 1_000_000).bytes, METADATA_MAX);
        assert!(sized(GIB, 500).bytes < sized(GIB, 1000).bytes);
    }

    #[test]
    fn what_is_free_is_divided() {
        let all = divide(&wish(), 100 * GIB, EXTENT).unwrap();
        assert_eq!(all.data % EXTENT, 0);
        assert!(all.data + 2 * all.metadata.bytes + all.left == 100 * GIB && all.left >= 10 * GIB, "{all:?}");
        let exact = PoolWish { data: Some(Bytes(10 * GIB)), metadata: Some(Bytes(128 << 20)), ..wish() };
        let exact = divide(&exact, 20 * GIB, EXTENT).unwrap();
        assert_eq!((exact.data, exact.metadata.bytes), (10 * GIB, 128 << 20));
        assert_eq!(exact.left, 10 * GIB - (256 << 20));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let too_much = PoolWish { data: Some(Bytes(10 * GIB)), ..wish() };
        let said = divide(&too_much, 10 * GIB, EXTENT).unwrap_err();
        assert!(said.contains("10.0 GiB are free") && said.contains("--size"), "{said}");
        assert!(divide(&wish(), 100 << 20, EXTENT).is_err());
        for chunk in [4096, 65_537, 2 << 30] {
            let said = divide(&PoolWish { chunk: Bytes(chunk), ..wish() }, GIB, EXTENT).unwrap_err();
            assert!(said.contains("--chunk"), "{said}");
        }
        assert_eq!(
            divide(&PoolWish { data: Some(Bytes(u64::MAX)), ..wish() }, GIB, EXTENT).map(drop).ok(),
            None
        );
    }

    #[test]
    fn the_arithmetic_is_shown() {
        let expected = Expected { snapshots: 1000, image: IMAGE, written: WRITTEN };
        let story = metadata(100 * GIB, 65_536, expected, EXTENT).story(expected, 65_536);
        for part in
            ["1638400 blocks of 64 KiB × 64 bytes = 100 MiB", "1000 snapshots × 24576 blocks", "876 MiB"]
        {
            assert!(story.contains(part), "{part}: {story}");
        }
    }
}
