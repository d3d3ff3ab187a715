//! zstd, frame by frame: each says in its header how large a window it needs, and that memory is asked for before it is taken.

use std::io::{self, BufRead as _, BufReader, Read};

use zstd::stream::raw::{Decoder, Operation as _};

use super::inflate::Source;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Bytes of a header up to the one that says how long it is.
const BEGINNING: usize = MAGIC.len() + 1;

/// Whether something begins with a frame, or with one that is skipped.
pub(super) fn is_zstd(first: &[u8]) -> bool {
    first.starts_with(&MAGIC) || matches!(first, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// What the frames of a source are when they are inflated.
pub(super) struct Frames<'a> {
    source: BufReader<Source<'a>>,
    context: Decoder<'static>,
    /// What was read of the frame's header, and not inflated yet.
    header: Vec<u8>,
    /// The largest window so far, in bytes: the context keeps it.
    window: u64,
    is_within: bool,
}

impl<'a> Frames<'a> {
    pub(super) fn of(source: BufReader<Source<'a>>) -> io::Result<Self> {
        Ok(Self { source, context: Decoder::new()?, header: Vec::new(), window: 0, is_within: false })
    }

    /// Takes the memory for the next frame, if there is one.
    fn begin(&mut self) -> io::Result<bool> {
        self.read_header(BEGINNING)?;
        let window = match self.header.strip_prefix(&MAGIC) {
            Some(&[descriptor]) => {
                self.read_header(rest_of_header(descriptor))?;
                window(descriptor, &self.header[BEGINNING..])
            }
            // One that is skipped, or none, as the context will say.
            _ => 0,
        };
        if window > self.window {
            // Nobody is waited for with memory that is not counted.
            self.context = Decoder::new()?;
            self.source.get_mut().memory(window)?;
            self.window = window;
        }
        Ok(!self.header.is_empty())
    }

    /// So many bytes more, or as many as there are.
    fn read_header(&mut self, more: usize) -> io::Result<()> {
        (&mut self.source).take(more as u64).read_to_end(&mut self.header).map(drop)
    }
}

impl Read for Frames<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.is_within && !self.begin()? {
                return Ok(0);
            }
            let is_header = !self.header.is_empty();
            let input = if is_header { &self.header } else { self.source.fill_buf()? };
            let is_end = input.is_empty();
            let done = self.context.run_on_buffers(input, into)?;
            if is_header {
                self.header.drain(..done.bytes_read);
            } else {
                self.source.consume(done.bytes_read);
            }
            self.is_within = done.remaining > 0;
            match done.bytes_written {
                0 if is_end && self.is_within => return Err(io::ErrorKind::UnexpectedEof.into()),
                0 => {}
                bytes => return Ok(bytes),
            }
        }
    }
}

/// How many bytes the dictionary's id and the content's size take.
fn fields(descriptor: u8) -> (usize, usize) {
    let is_single = descriptor & 0x20 != 0;
    let size = match descriptor >> 6 {
        0 => usize::from(is_single),
        power => 1 << power,
    };
    ([0, 1, 2, 4][usize::from(descriptor & 3)], size)
}

/// How many bytes of a header come after its descriptor (RFC 8878, 3.1.1.1).
fn rest_of_header(descriptor: u8) -> usize {
    let (dictionary, size) = fields(descriptor);
    usize::from(descriptor & 0x20 == 0) + dictionary + size
}

/// The window that a header asks for, in bytes. One that is cut short asks for nothing: it is damaged.
fn window(descriptor: u8, rest: &[u8]) -> u64 {
    let (dictionary, size) = fields(descriptor);
    if descriptor & 0x20 == 0 {
        let Some(window) = rest.first() else { return 0 };
        let base = 1_u64 << (10 + (window >> 3));
        return base + base / 8 * u64::from(window & 7);
    }
    // The window is all of it.
    let Some(bytes) = rest.get(dictionary..dictionary + size) else { return 0 };
    let content = bytes.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte));
    if size == 2 { content + 256 } else { content }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_headers_say() {
        // Descriptor, the rest of the header, and the window.
        let table: [(u8, &[u8], u64); 10] = [
            (0x00, &[0], 1 << 10),
            (0x04, &[0x88], 128 << 20),
            (0x00, &[0x89], 144 << 20),
            (0x80, &[0x50, 1, 2, 3, 4], 1 << 20),
            (0x03, &[0x51, 1, 2, 3, 4], 9 << 17),
            (0x00, &[0xff], (1 << 41) + (7 << 38)),
            (0x20, &[7], 7),
            (0x60, &[0, 1], 512),
            (0xa1, &[9, 0, 0, 0, 8], 128 << 20),
            (0xe0, &[0xff; 8], u64::MAX),
        ];
        for (descriptor, rest, bytes) in table {
            assert_eq!(rest_of_header(descriptor), rest.len(), "{descriptor:#x}");
            assert_eq!(window(descriptor, rest), bytes, "{descriptor:#x} {rest:?}");
        }
        assert_eq!((window(0x00, &[]), window(0xe0, &[1])), (0, 0), "they are cut short");
    }
}
