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
            self.pass(self.left, false)?;
            // What was never closed ends without.
            self.pass(self.padding, true)?;
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
        let mut name = named(long_name, "path", short_name(header.as_bytes()));
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
        let bytes = header.as_bytes();
        let field = |what: &str, at: std::ops::Range<usize>| {
            number(&bytes[at])
                .ok_or_else(|| damaged(&format!("the {what} of {:?} is no number", shown(&name))))
        };
        let owner = |what: &str, key: &str, at: std::ops::Range<usize>| -> Result<u32> {
            let number = match pax.number(key)? {
                Some(number) => i64::try_from(number).unwrap_or(i64::MAX),
                None => field(what, at)?,
            };
            // -2 is "nobody" of some; -1 means "unchanged" to chown.
            let id = i32::try_from(number).map(i32::cast_unsigned).ok().or(u32::try_from(number).ok());
            id.filter(|id| *id != u32::MAX).ok_or_else(|| {
                LayerError::Refused(format!(
                    "the {what} of {:?} is {number}, more than Linux has",
                    shown(&name)
                ))
            })
        };
        let mut kind = match bytes[156] {
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
                None => u64::try_from(field("size", SIZE)?)
                    .map_err(|_| damaged("the size of a member is negative"))?,
            };
            (self.left, self.padding) = (stored, stored.wrapping_neg() % BLOCK);
            if bytes[156] == b'S' {
                let header =
                    header.as_gnu().ok_or_else(|| damaged("a sparse file in it has no such header"))?;
                let found = Map::of_gnu(header, &mut self.input, stored);
                *map = Some(found.map_err(|error| self.input.failed().unwrap_or(error))?);
            } else {
                let found = Map::of_pax(&pax, &mut self.data(), stored);
                if let Some((found, taken)) = found.map_err(|error| self.input.failed().unwrap_or(error))? {
                    stored -= taken;
                    *map = Some(found);
                }
            }
        }
        let (major, minor) = match kind {
            Kind::BlockDevice | Kind::CharDevice => {
                let part = |what: &str, at| {
                    u32::try_from(field(what, at)?).map_err(|_| damaged("a device number in it is none"))
                };
                (part("device", 329..337)?, part("device", 337..345)?)
            }
            _ => (0, 0),
        };
        let modified = match pax.time("mtime")? {
            Some(time) => time,
            None => (field("time", 136..148)?, 0),
        };
        let mut attributes = pax.beginning("SCHILY.xattr.");
        // Those of overlayfs are among them, which would mean something to a guest's own; containerd sets none either.
        attributes.retain(|key, _| !key.starts_with("trusted."));
        Ok(Member {
            mode: (field("mode", 100..108)? & 0o7777) as u32,
            uid: owner("owner", "uid", 108..116)?,
            gid: owner("group", "gid", 116..124)?,
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
        let sum = number(&header.as_bytes()[148..156]).ok_or_else(|| damaged("it is no tar archive"))?;
        if sum != i64::from(unsigned) && sum != signed {
            return Err(damaged("the sum of one of its headers is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, header: &tar::Header) -> Result<Vec<u8>> {
        let size = number(&header.as_bytes()[SIZE]).and_then(|size| u64::try_from(size).ok());
        let size = size.ok_or_else(|| damaged("the size of an extended header is no number"))?;
        if size > EXTENSION_MAX {
            let what = format!("one of its extended headers has {size} bytes; {EXTENSION_MAX} are allowed");
            return Err(LayerError::Refused(what));
        }
        (self.left, self.padding) = (size, size.wrapping_neg() % BLOCK);
        let mut bytes = vec![0; size as usize];
        self.data().fill(&mut bytes)?;
        Ok(bytes)
    }

    fn pass(&mut self, mut bytes: u64, may_end: bool) -> Result<()> {
        while bytes > 0 {
            let there = match self.input.fill_buf() {
                Ok([]) if may_end => return Ok(()),
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

/// Where a header has the size.
const SIZE: std::ops::Range<usize> = 124..136;

/// A number as tars write it: octal digits between blanks and NULs, none being 0, or base 256 with its sign.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        // The first bit is only a mark; the second is the sign.
        let first = i64::from((field[0] << 1).cast_signed() >> 1);
        return field[1..].iter().try_fold(first, |number, byte| {
            number.checked_mul(256).and_then(|number| number.checked_add(i64::from(*byte)))
        });
    }
    let is_blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let begin = field.iter().position(|byte| !is_blank(byte)).unwrap_or(field.len());
    let digits = field[begin..].split(is_blank).next().unwrap_or_default();
    if digits.is_empty() {
        return Some(0);
    }
    i64::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok().filter(|number| *number >= 0)
}

/// The name in a header, with the prefix that POSIX has given it: whatever version the header says it is of, and not if it is
/// GNU's, which has other things there.
fn short_name(header: &[u8]) -> Vec<u8> {
    let name = until_nul(header[..100].to_vec());
    let prefix = match &header[257..263] {
        b"ustar\0" if &header[508..512] == b"tar\0" => until_nul(header[345..476].to_vec()),
        b"ustar\0" => until_nul(header[345..500].to_vec()),
        _ => Vec::new(),
    };
    if prefix.is_empty() { name } else { [prefix, b"/".to_vec(), name].concat() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let table: [(&[u8], Option<i64>); 13] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"00000000001\0", Some(1)),
            (b"777 junk", Some(0o777)),
            (b"0000648\0", None),
            (b"-1\0\0\0\0\0\0", None),
            (b"\x80\0\0\0\0\x01\x86\xa0", Some(100_000)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x02\0\0\0\0\0\0\0", Some(1 << 57)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (field, expected) in table {
            assert_eq!(number(field), expected, "{field:?}");
        }
    }

    #[test]
    fn names_with_a_prefix() {
        let mut header = [0; 512];
        header[..4].copy_from_slice(b"name");
        header[345..350].copy_from_slice(b"a/dir");
        for (magic, expected) in [
            (&b"ustar\x0000"[..], &b"a/dir/name"[..]),
            (b"ustar\0  ", b"a/dir/name"),
            (b"ustar  \0", b"name"),
            (b"\0\0\0", b"name"),
        ] {
            header[257..257 + magic.len()].copy_from_slice(magic);
            assert_eq!(short_name(&header), expected, "{magic:?}");
        }
    }
}
