//! A tar archive as a stream of members: names of any length and bytes, extended attributes, sparse files, as containerd
//! reads them. The fields of a header are the `tar` crate's; that crate's own iteration takes extended headers of any size
//! into memory, and ends an attribute at its first newline.

use std::io::{BufRead, Read};

use super::{Inflated, LayerError, Result, pax::Pax, shown, sparse::Map};

/// Bytes per block.
pub(super) const BLOCK: u64 = 512;
/// Extended headers and long names of one member may have so many bytes: an attribute has 64 KiB at the most.
const EXTENSION_MAX: u64 = 4 << 20;
/// Linux has no longer paths.
const NAME_MAX: usize = 4095;

/// What a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File(Option<Map>),
    HardLink,
    Symlink,
    BlockDevice,
    CharDevice,
    Fifo,
}

/// Seconds and nanoseconds since 1970.
pub(super) type Time = (i64, u32);

/// A member of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    /// Of a link, where it leads.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// Permissions, with set-user-id, set-group-id and sticky bit.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    pub(super) accessed: Option<Time>,
    /// Bytes of its data in the archive.
    pub(super) stored: u64,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) attributes: Vec<(String, Vec<u8>)>,
}

impl Member {
    /// Bytes of the file.
    pub(super) fn size(&self) -> u64 {
        match &self.kind {
            Kind::File(Some(map)) => map.size,
            _ => self.stored,
        }
    }
}

/// An archive that is read.
pub(super) struct Archive {
    input: Inflated,
    /// Of the member's data, what is not read yet, and what fills its last block.
    left: u64,
    padding: u64,
}

impl Archive {
    pub(super) fn new(input: Inflated) -> Self {
        Self { input, left: 0, padding: 0 }
    }

    /// The next member; what was not read of the last one is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let (mut long_name, mut long_link, mut pax) = (None, None, None);
        loop {
            self.pass(self.left + self.padding)?;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else {
                return match (long_name, long_link, pax) {
                    (None, None, None) => Ok(None),
                    _ => Err(damaged("it ends where a member should follow")),
                };
            };
            match header.as_bytes()[156] {
                b'L' => long_name = Some(until_nul(self.extension(&header)?)),
                b'K' => long_link = Some(until_nul(self.extension(&header)?)),
                b'x' => pax = Some(Pax::parse(&self.extension(&header)?)?),
                // containerd takes what is said for all members for a comment.
                b'g' => drop(self.extension(&header)?),
                _ => return self.member(&header, long_name, long_link, pax.unwrap_or_default()).map(Some),
            }
        }
    }

    fn member(
        &mut self,
        header: &tar::Header,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        pax: Pax,
    ) -> Result<Member> {
        let named = |long: Option<Vec<u8>>, key: &str, short: Vec<u8>| {
            long.or_else(|| pax.get(key).map(<[u8]>::to_vec)).unwrap_or(short)
        };
        let link = named(long_link, "linkpath", header.link_name_bytes().unwrap_or_default().into_owned());
        let mut name = named(long_name, "path", header.path_bytes().into_owned());
        if let Some(real) = pax.get("GNU.sparse.name") {
            name = real.to_vec();
        }
        if name.contains(&0) || link.contains(&0) {
            return Err(damaged("a name in it has a NUL"));
        }
        if name.len() > NAME_MAX || link.len() > NAME_MAX {
            return Err(LayerError::Refused(format!(
                "a name in it is longer than {NAME_MAX} bytes: {:?}",
                shown(&name)
            )));
        }
        let field = |what: &str, value: std::io::Result<u64>| {
            value.map_err(|_| damaged(&format!("the {what} of {:?} is no number", shown(&name))))
        };
        let owner = |what: &str, key: &str, value: std::io::Result<u64>| -> Result<u32> {
            let number = match pax.number(key)? {
                Some(number) => number,
                None => field(what, value)?,
            };
            // The highest one means "unchanged" to chown.
            u32::try_from(number).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
                LayerError::Refused(format!(
                    "the {what} of {:?} is {number}, more than Linux has",
                    shown(&name)
                ))
            })
        };
        let mut kind = match header.as_bytes()[156] {
            // As the first of all tars said it.
            0 if name.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'S' => Kind::File(None),
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                let what =
                    format!("{:?} is of a kind that no image has ({:?})", shown(&name), char::from(other));
                return Err(LayerError::Refused(what));
            }
        };
        let mut stored = 0;
        if let Kind::File(map) = &mut kind {
            stored = match pax.number("size")? {
                Some(size) => size,
                None => field("size", header.entry_size())?,
            };
            (self.left, self.padding) = (stored, stored.wrapping_neg() % BLOCK);
            if header.as_bytes()[156] == b'S' {
                let header =
                    header.as_gnu().ok_or_else(|| damaged("a sparse file in it has no such header"))?;
                *map = Some(Map::of_gnu(header, &mut self.input, stored)?);
            } else if let Some((found, taken)) = Map::of_pax(&pax, &mut self.data(), stored)? {
                stored -= taken;
                *map = Some(found);
            }
        }
        let (major, minor) = match kind {
            Kind::BlockDevice | Kind::CharDevice => (
                header.device_major().ok().flatten().unwrap_or_default(),
                header.device_minor().ok().flatten().unwrap_or_default(),
            ),
            _ => (0, 0),
        };
        let modified = match pax.time("mtime")? {
            Some(time) => time,
            None => (i64::try_from(field("time", header.mtime())?).unwrap_or(i64::MAX), 0),
        };
        let attributes = pax.beginning("SCHILY.xattr.");
        Ok(Member {
            mode: u32::try_from(field("mode", header.mode().map(u64::from))?).unwrap_or_default() & 0o7777,
            uid: owner("owner", "uid", header.uid())?,
            gid: owner("group", "gid", header.gid())?,
            modified,
            accessed: pax.time("atime")?,
            attributes: attributes
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_vec()))
                .collect(),
            name,
            link,
            kind,
            stored,
            major,
            minor,
        })
    }

    /// The data of the last member.
    pub(super) fn data(&mut self) -> Data<'_> {
        Data(self)
    }

    /// What is behind the archive's end belongs to the layer all the same.
    pub(super) fn into_rest(self) -> Inflated {
        self.input
    }

    /// A header whose sum is right; `None` at the end: a block of zeros, or no block.
    fn header(&mut self) -> Result<Option<tar::Header>> {
        let mut header = tar::Header::new_old();
        let bytes = header.as_mut_bytes();
        let mut length = 0;
        while length < bytes.len() {
            match self.input.read(&mut bytes[length..]) {
                Ok(0) if length == 0 => return Ok(None),
                Ok(0) => return Err(cut_off()),
                Ok(more) => length += more,
                Err(error) => return Err(self.input.why(&error)),
            }
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let others = bytes[..148].iter().chain(&bytes[156..]);
        let unsigned: u32 = 256 + others.clone().map(|byte| u32::from(*byte)).sum::<u32>();
        // Some tars have summed up signed bytes.
        let signed: i64 = 256 + others.map(|byte| i64::from(byte.cast_signed())).sum::<i64>();
        let sum = header.cksum().map_err(|_| damaged("it is no tar archive"))?;
        if sum != unsigned && i64::from(sum) != signed {
            return Err(damaged("the sum of one of its headers is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, header: &tar::Header) -> Result<Vec<u8>> {
        let size = header.entry_size().map_err(|_| damaged("the size of an extended header is no number"))?;
        if size > EXTENSION_MAX {
            let what = format!("one of its extended headers has {size} bytes; {EXTENSION_MAX} are allowed");
            return Err(LayerError::Refused(what));
        }
        (self.left, self.padding) = (size, size.wrapping_neg() % BLOCK);
        let mut bytes = vec![0; size as usize];
        self.data().fill(&mut bytes)?;
        Ok(bytes)
    }

    fn pass(&mut self, mut bytes: u64) -> Result<()> {
        while bytes > 0 {
            let there = match self.input.fill_buf() {
                Ok([]) => return Err(cut_off()),
                Ok(there) => there.len(),
                Err(error) => return Err(self.input.why(&error)),
            };
            let now = there.min(usize::try_from(bytes).unwrap_or(usize::MAX));
            self.input.consume(now);
            bytes -= now as u64;
        }
        Ok(())
    }
}

/// The data of a member.
pub(super) struct Data<'a>(&'a mut Archive);

impl Data<'_> {
    /// Fills `into`.
    pub(super) fn fill(&mut self, into: &mut [u8]) -> Result<()> {
        match self.read_exact(into) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(cut_off()),
            Err(error) => Err(self.0.input.why(&error)),
        }
    }
}

impl Read for Data<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let most = into.len().min(usize::try_from(self.0.left).unwrap_or(usize::MAX));
        let length = self.0.input.read(&mut into[..most])?;
        self.0.left -= length as u64;
        Ok(length)
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(nul) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(nul);
    }
    bytes
}

fn damaged(what: &str) -> LayerError {
    LayerError::Damaged(what.to_owned())
}

fn cut_off() -> LayerError {
    damaged("it ends in the middle of a member")
}
