//! Where the data of a sparse file belongs: the formats of GNU tar.

use std::io::Read;

use super::{LayerError, Result, archive::BLOCK, pax::Pax};

/// More pieces than this are refused: the list is kept in memory.
const PIECES_MAX: usize = 1 << 18;

/// A sparse file's pieces, in order and apart from one another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Map {
    /// Offset and length in bytes, of what is in the archive one after the other.
    pub(super) pieces: Vec<(u64, u64)>,
    /// Size of the file in bytes.
    pub(super) size: u64,
}

impl Map {
    /// Of pieces as an archive lists them, whose data are `stored` bytes.
    pub(super) fn new(pieces: Vec<(u64, u64)>, size: u64, stored: u64) -> Result<Self> {
        let (mut at, mut data) = (0_u64, 0_u64);
        for (offset, length) in &pieces {
            let end = offset
                .checked_add(*length)
                .filter(|end| *offset >= at && *end <= size)
                .ok_or_else(damaged)?;
            at = end;
            // No overflow: it is not more than `end`.
            data += length;
        }
        if data != stored {
            return Err(damaged());
        }
        Ok(Self { pieces: pieces.into_iter().filter(|(_, length)| *length > 0).collect(), size })
    }

    /// Of the formats 0.0, 0.1 and 1.0, of which the last has its list before the data. `None` if `pax` says of no sparse
    /// file; `data` are the member's `stored` bytes. Returns also how many of them the list has taken.
    pub(super) fn of_pax(pax: &Pax, data: &mut impl Read, stored: u64) -> Result<Option<(Self, u64)>> {
        let size = match pax.number("GNU.sparse.realsize")? {
            Some(size) => Some(size),
            None => pax.number("GNU.sparse.size")?,
        };
        if (pax.number("GNU.sparse.major")?, pax.number("GNU.sparse.minor")?) == (Some(1), Some(0)) {
            let size = size.ok_or_else(damaged)?;
            let (pieces, taken) = list_before_data(data, stored)?;
            return Self::new(pieces, size, stored - taken).map(|map| Some((map, taken)));
        }
        let numbers: Vec<u64> = if let Some(list) = pax.get("GNU.sparse.map") {
            let list = std::str::from_utf8(list).map_err(|_| damaged())?;
            list.split(',').map(|number| number.parse().map_err(|_| damaged())).collect::<Result<_>>()?
        } else {
            let listed =
                pax.records().filter(|(key, _)| ["GNU.sparse.offset", "GNU.sparse.numbytes"].contains(key));
            let number =
                |value: &[u8]| std::str::from_utf8(value).ok().and_then(|digits| digits.parse().ok());
            listed.map(|(_, value)| number(value).ok_or_else(damaged)).collect::<Result<_>>()?
        };
        let Some(size) = size.filter(|_| pax.get("GNU.sparse.numblocks").is_some() || !numbers.is_empty())
        else {
            return Ok(None);
        };
        if !numbers.len().is_multiple_of(2) || numbers.len() / 2 > PIECES_MAX {
            return Err(damaged());
        }
        let pieces = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Self::new(pieces, size, stored).map(|map| Some((map, 0)))
    }

    /// Of the older format: in the header, and in blocks that follow it, which do not count as data. Returns its pieces.
    pub(super) fn of_gnu(header: &tar::GnuHeader, input: &mut impl Read, stored: u64) -> Result<Self> {
        let mut pieces = Vec::new();
        let mut list = |entries: &[tar::GnuSparseHeader]| -> Result<()> {
            for entry in entries.iter().filter(|entry| !entry.is_empty()) {
                let piece = entry.offset().and_then(|offset| Ok((offset, entry.length()?)));
                pieces.push(piece.map_err(|_| damaged())?);
            }
            if pieces.len() > PIECES_MAX { Err(damaged()) } else { Ok(()) }
        };
        list(&header.sparse)?;
        let mut is_extended = header.is_extended();
        while is_extended {
            let mut more = tar::GnuExtSparseHeader::new();
            input.read_exact(more.as_mut_bytes()).map_err(|_| damaged())?;
            list(&more.sparse)?;
            is_extended = more.is_extended();
        }
        Self::new(pieces, header.real_size().map_err(|_| damaged())?, stored)
    }
}

/// Lines of numbers: how many pieces there are, then of each where it begins and how long it is; filled up to a block.
fn list_before_data(data: &mut impl Read, stored: u64) -> Result<(Vec<(u64, u64)>, u64)> {
    let (mut taken, mut block, mut at) = (0, [0; BLOCK as usize], BLOCK as usize);
    let mut number = || -> Result<u64> {
        let mut number = None;
        loop {
            if at == block.len() {
                if taken + BLOCK > stored {
                    return Err(damaged());
                }
                data.read_exact(&mut block).map_err(|_| damaged())?;
                (taken, at) = (taken + BLOCK, 0);
            }
            let byte = block[at];
            at += 1;
            match (byte, number) {
                (b'0'..=b'9', so_far) => {
                    let longer = so_far
                        .unwrap_or(0_u64)
                        .checked_mul(10)
                        .and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    number = Some(longer.ok_or_else(damaged)?);
                }
                (b'\n', Some(number)) => return Ok(number),
                _ => return Err(damaged()),
            }
        }
    };
    let count = number()?;
    if count > PIECES_MAX as u64 {
        return Err(damaged());
    }
    let pieces = (0..count).map(|_| Ok((number()?, number()?))).collect::<Result<Vec<_>>>()?;
    Ok((pieces, taken))
}

fn damaged() -> LayerError {
    LayerError::Damaged("the list of what is in one of its sparse files is damaged".to_owned())
}
