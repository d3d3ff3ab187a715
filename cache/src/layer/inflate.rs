//! Inflating, and the digest of what comes out, in a thread of its own, ahead of whoever applies it. It takes memory, and goes
//! on, only as its warden lets it.

use std::{
    io::{self, BufRead, BufReader, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use sha2::{Digest as _, Sha256};

use super::{
    LayerError, Result,
    frames::{self, Frames},
};
use crate::image::Digest;

/// Bytes per chunk, and chunks that may wait: 4 MiB a layer.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 16;
/// Bytes asked of the source at once.
const INPUT: usize = 64 << 10;
/// Bytes of memory that every inflater takes: its chunks, and what it has beside them.
pub const LEAST_MEMORY: u64 = 5 << 20;
/// The largest window of a zstd frame, in bytes; zstd by itself takes no larger ones either.
pub(super) const WINDOW_MAX: u64 = 128 << 20;

/// Who is asked by an inflater, on its thread, which may wait there.
pub trait Warden: Send {
    /// For so many bytes of memory in place of those that it has.
    ///
    /// # Errors
    /// [`LayerError::Stopped`], or what keeps it from being inflated.
    fn memory(&mut self, bytes: u64) -> Result<()>;
    /// Whether it is to go on; before each part of the source.
    ///
    /// # Errors
    /// As [`Self::memory`].
    fn go_on(&mut self) -> Result<()>;
    /// Of what it has, it needs so many bytes and no more, until it is dropped: what was inflated is still to be read.
    fn keep(&mut self, bytes: u64);
}

/// Tells the threads of a layer to end.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(LayerError::Stopped) } else { Ok(()) }
    }
}

enum Part {
    Bytes(Vec<u8>),
    /// There are no more; the digest of all of them. Who is asked for memory lets go of it when this has been read, or dropped:
    /// what comes before it takes memory until then.
    Last(Result<Digest>, Box<dyn Warden>),
}

/// The layer as it comes out of the inflater.
#[derive(Debug)]
pub struct Inflated {
    parts: Receiver<Part>,
    chunk: Vec<u8>,
    at: usize,
    end: Option<Digest>,
    failed: Option<LayerError>,
    stop: Stop,
}

/// What inflates a source, on the thread that calls it, until `Inflated` was read to its end or dropped. What the source is
/// compressed with, its first bytes say: media types are often wrong about it. More than `most` bytes are refused.
pub fn inflate(
    most: u64,
    stop: &Stop,
    mut warden: Box<dyn Warden>,
) -> (impl FnOnce(Box<dyn Read + Send>) + Send + use<>, Inflated) {
    let (sender, parts) = sync_channel(CHUNKS);
    let source_stop = stop.clone();
    let work = move |from: Box<dyn Read + Send>| {
        let copied = copy(Source { from, stop: source_stop, warden: &mut *warden }, most, &sender);
        warden.keep(LEAST_MEMORY);
        // Nobody may be there to read it.
        let _read = sender.send(Part::Last(copied, warden));
    };
    (work, Inflated { parts, chunk: Vec::new(), at: 0, end: None, failed: None, stop: stop.clone() })
}

fn copy(source: Source<'_>, most: u64, sender: &SyncSender<Part>) -> Result<Digest> {
    let mut inflater = inflater(source)?;
    let mut digest = Sha256::new();
    let mut total = 0_u64;
    loop {
        let mut chunk = vec![0; CHUNK];
        let length = fill(&mut *inflater, &mut chunk)?;
        chunk.truncate(length);
        total = total.saturating_add(length as u64);
        if total > most {
            let what = format!("it has more than {most} bytes when it is inflated ([images] layer_size_max)");
            return Err(LayerError::Refused(what));
        }
        digest.update(&chunk);
        if length > 0 && sender.send(Part::Bytes(chunk)).is_err() {
            return Err(LayerError::Stopped);
        }
        if length < CHUNK {
            return Ok(Digest::of_hash(&digest.finalize()));
        }
    }
}

/// Reads until `chunk` is full, or the end.
fn fill(from: &mut dyn Read, chunk: &mut [u8]) -> Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match from.read(&mut chunk[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
    Ok(length)
}

fn inflater(source: Source<'_>) -> Result<Box<dyn Read + '_>> {
    let mut source = BufReader::with_capacity(INPUT, source);
    let first = source.fill_buf().map_err(unreadable)?;
    let (is_zstd, is_gzip) = (frames::is_zstd(first), first.starts_with(&[0x1f, 0x8b]));
    source.get_mut().warden.memory(LEAST_MEMORY)?;
    Ok(match (is_zstd, is_gzip) {
        (true, _) => Box::new(Frames::of(source).map_err(unreadable)?),
        (_, true) => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        _ => Box::new(source),
    })
}

/// Marks errors of the source, which are no errors of the compression; ends when it is told to.
pub(super) struct Source<'a> {
    from: Box<dyn Read + Send>,
    stop: Stop,
    warden: &'a mut dyn Warden,
}

impl Source<'_> {
    /// For a zstd frame with a window of so many bytes.
    pub(super) fn memory(&mut self, window: u64) -> io::Result<()> {
        if window > WINDOW_MAX {
            let what = format!(
                "it takes {} MiB of memory to inflate it (the window of its zstd frame), {} are allowed: compress it anew",
                window >> 20,
                WINDOW_MAX >> 20
            );
            return Err(passed_on(LayerError::Refused(what)));
        }
        self.warden.memory(LEAST_MEMORY + window).map_err(passed_on)
    }
}

/// Through [`Read`], and whatever inflates.
fn passed_on(error: LayerError) -> io::Error {
    io::Error::other(SourceError(io::Error::other(error)))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct SourceError(io::Error);

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stop.check().and_then(|()| self.warden.go_on()).map_err(passed_on)?;
        self.from.read(into).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            _ => io::Error::other(SourceError(error)),
        })
    }
}

fn unreadable(error: io::Error) -> LayerError {
    match error.downcast::<SourceError>() {
        Ok(SourceError(error)) => match error.downcast::<LayerError>() {
            Ok(passed_on) => passed_on,
            Err(error) => LayerError::Source(error),
        },
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            LayerError::Damaged("it ends in the middle of its compressed data".to_owned())
        }
        Err(error) => LayerError::Damaged(format!("it cannot be inflated: {error}")),
    }
}

impl Inflated {
    /// Reads what is left, and returns the digest of everything.
    ///
    /// # Errors
    /// What the inflater has failed with.
    pub fn finish(mut self) -> Result<Digest> {
        loop {
            self.at = self.chunk.len();
            if self.more()? == 0 {
                break;
            }
        }
        self.end.ok_or_else(vanished)
    }

    /// How many bytes are there to be read; 0 at the end.
    fn more(&mut self) -> Result<usize> {
        self.stop.check()?;
        while self.at == self.chunk.len() && self.end.is_none() {
            match self.parts.recv() {
                Ok(Part::Bytes(chunk)) => (self.chunk, self.at) = (chunk, 0),
                Ok(Part::Last(outcome, _warden)) => {
                    (self.chunk, self.at) = (Vec::new(), 0);
                    self.end = Some(outcome?);
                }
                Err(_) => return Err(vanished()),
            }
        }
        Ok(self.chunk.len() - self.at)
    }

    /// The error behind one that came through [`Read`].
    pub(super) fn why(&mut self, error: &io::Error) -> LayerError {
        self.failed().unwrap_or_else(|| LayerError::Damaged(error.to_string()))
    }

    /// What reading has failed with, if it has.
    pub(super) fn failed(&mut self) -> Option<LayerError> {
        self.failed.take()
    }
}

fn vanished() -> LayerError {
    LayerError::Source(io::Error::other("the inflater has ended without a word"))
}

impl Read for Inflated {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let from = self.fill_buf()?;
        let length = from.len().min(into.len());
        into[..length].copy_from_slice(&from[..length]);
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Inflated {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        match self.more() {
            Ok(_) => Ok(&self.chunk[self.at..]),
            Err(error) => {
                let told = io::Error::other(error.to_string());
                self.failed = Some(error);
                Err(told)
            }
        }
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}
