//! Damages dm-thin's metadata: as a power cut can, when one data block is in use, and nobody's; and as a bad disk can.
//!
//! The format is in the kernel's drivers/md: dm-thin-metadata.c (superblock), persistent-data/dm-btree-internal.h (nodes) and
//! dm-space-map-common.h (bitmaps). All numbers are little-endian.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use super::{Outcome, check, same};

const BLOCK: usize = 4096;

/// What the checksum of a block is salted with says what the block is.
const SUPERBLOCK: u32 = 160_774;
const NODE: u32 = 121_107;
const BITMAP: u32 = 240_779;

/// Of the superblock: blocks of data, those of them in use, and the node of their bitmaps.
const DATA_BLOCKS: usize = 64;
const DATA_ALLOCATED: usize = 72;
const DATA_BITMAPS: usize = 80;

/// A node's header and a bitmap's; the node's flags and numbers of entries.
const NODE_HEADER: usize = 32;
const BITMAP_HEADER: usize = 16;
const NODE_FLAGS: usize = 4;
const NODE_ENTRIES: usize = 16;
const NODE_MAX_ENTRIES: usize = 20;
const LEAF: u32 = 2;

/// Takes the last block of the data, which is free, and counts it as the kernel does. The pool is inactive and small enough
/// for one bitmap: at most 16320 blocks.
pub(crate) fn leak_a_block(metadata: &Path) -> Outcome {
    let file = File::options().read(true).write(true).open(metadata)?;
    let mut superblock = Block::read(&file, 0, SUPERBLOCK)?;
    let mut node = Block::read(&file, superblock.u64(DATA_BITMAPS), NODE)?;
    same!(
        (node.u32(NODE_FLAGS), node.u32(NODE_ENTRIES)),
        (LEAF, 1),
        "flags and entries of the bitmaps' node"
    );
    // Its one value: the bitmap's block (64 bits), how many are free in it, the first that may be (32 bits each).
    let value = NODE_HEADER + 8 * usize::try_from(node.u32(NODE_MAX_ENTRIES))?;
    let mut bitmap = Block::read(&file, node.u64(value), BITMAP)?;
    // Two bits a block, 32 blocks a word, the first one's in the lowest bits; of a block's bits the higher one is the ones'.
    let last = superblock.u64(DATA_BLOCKS) - 1;
    let (at, shift) = (BITMAP_HEADER + usize::try_from(last / 32)? * 8, last % 32 * 2);
    let word = bitmap.u64(at);
    check!(word >> shift & 3 == 0, "block {last} is in use: its word is {word:x}");
    bitmap.set_u64(at, word | 2 << shift);
    node.set_u32(value + 8, node.u32(value + 8) - 1);
    superblock.set_u64(DATA_ALLOCATED, superblock.u64(DATA_ALLOCATED) + 1);
    for block in [bitmap, node, superblock] {
        block.write(&file)?;
    }
    Ok(file.sync_all()?)
}

/// Overwrites the bitmap that says which blocks of the data are in use. Under the same conditions.
pub(crate) fn smash_the_bitmap(metadata: &Path) -> Outcome {
    let file = File::options().read(true).write(true).open(metadata)?;
    let superblock = Block::read(&file, 0, SUPERBLOCK)?;
    let node = Block::read(&file, superblock.u64(DATA_BITMAPS), NODE)?;
    let value = NODE_HEADER + 8 * usize::try_from(node.u32(NODE_MAX_ENTRIES))?;
    file.write_all_at(&[0x5a; BLOCK], node.u64(value) * BLOCK as u64)?;
    Ok(file.sync_all()?)
}

struct Block {
    number: u64,
    salt: u32,
    bytes: [u8; BLOCK],
}

impl Block {
    fn read(file: &File, number: u64, salt: u32) -> Outcome<Self> {
        let mut block = Self { number, salt, bytes: [0; BLOCK] };
        file.read_exact_at(&mut block.bytes, number * BLOCK as u64)?;
        same!(block.u32(0), block.checksum(), "the checksum of block {number}");
        Ok(block)
    }

    fn write(mut self, file: &File) -> Outcome {
        self.set_u32(0, self.checksum());
        Ok(file.write_all_at(&self.bytes, self.number * BLOCK as u64)?)
    }

    /// CRC32C of all but itself, without the inversion at its end.
    fn checksum(&self) -> u32 {
        let mut crc = u32::MAX;
        for byte in &self.bytes[4..] {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        crc ^ self.salt
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|n| self.bytes[at + n])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn set_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
}
