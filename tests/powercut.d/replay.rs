//! Makes of a disk as it was before a boot, and of QEMU's log of the writes to it (`blklogwrites`, the format of
//! dm-log-writes), a disk as a power cut leaves it that takes what was in the drive's volatile cache with it: what was
//! written before the last flush is there, and of what came later some is lost, and some is torn.

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
struct Arguments {
    /// The disk as it was before the boot; changed in place.
    #[arg(long)]
    disk: PathBuf,
    /// QEMU's log.
    #[arg(long)]
    log: PathBuf,
    /// Decides what is lost.
    #[arg(long)]
    seed: u64,
}

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
/// What a drive writes as a whole.
const SECTOR: u64 = 512;

/// One request; `data` is where its bytes are in the log.
#[derive(Clone, Copy)]
struct Entry {
    at: u64,
    bytes: u64,
    flags: u64,
    data: u64,
}

impl Entry {
    fn is(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }
}

fn number(bytes: &[u8], at: usize) -> Outcome<u64> {
    Ok(u64::from_le_bytes(bytes.get(at..at + 8).ok_or("a short log")?.try_into()?))
}

fn entries(log: &File) -> Outcome<Vec<Entry>> {
    let mut sector = [0; 32];
    log.read_exact_at(&mut sector, 0)?;
    if number(&sector, 0)? != MAGIC {
        return Err("this is no log of writes".into());
    }
    let (count, size) = (number(&sector, 16)?, number(&sector, 24)? & 0xffff_ffff);
    if size != SECTOR {
        return Err(format!("the log has sectors of {size} bytes").into());
    }
    let mut all = Vec::new();
    let mut position = size;
    for _ in 0..count {
        log.read_exact_at(&mut sector, position)?;
        let (at, bytes) = (number(&sector, 0)? * size, number(&sector, 8)? * size);
        let entry = Entry { at, bytes, flags: number(&sector, 16)?, data: position + size };
        position = entry.data + if entry.is(DISCARD) { 0 } else { bytes };
        all.push(entry);
    }
    Ok(all)
}

/// xorshift: good enough to choose what is lost.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// How a drive loses its cache.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// Nothing of it was written.
    All,
    /// Some requests were, whichever came later.
    Requests,
    /// Some sectors were.
    Sectors,
}

fn apply(disk: &File, log: &File, entry: Entry) -> Outcome {
    if entry.is(DISCARD) {
        // What was discarded reads as anything; as zeros is the worst for who still needs it.
        return zero(disk, entry);
    }
    let mut bytes = vec![0; usize::try_from(entry.bytes)?];
    log.read_exact_at(&mut bytes, entry.data)?;
    Ok(disk.write_all_at(&bytes, entry.at)?)
}

fn zero(disk: &File, entry: Entry) -> Outcome {
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < entry.bytes {
        let now = (entry.bytes - done).min(1 << 20);
        // Sparse where it was: most of what is discarded was never written.
        let mut there = vec![0; usize::try_from(now)?];
        disk.read_exact_at(&mut there, entry.at + done)?;
        if there != zeros[..there.len()] {
            disk.write_all_at(&zeros[..there.len()], entry.at + done)?;
        }
        done += now;
    }
    Ok(())
}

fn replay(disk: &Path, log: &Path, seed: u64) -> Outcome<String> {
    let disk = File::options().read(true).write(true).open(disk)?;
    let log = File::open(log)?;
    let mut all = entries(&log)?;
    // QEMU's own, when it was told to end.
    while all.last().is_some_and(|entry| entry.is(FLUSH)) {
        all.pop();
    }
    let flushed = all.iter().rposition(|entry| entry.is(FLUSH)).map_or(0, |last| last + 1);
    let flushes = all.iter().filter(|entry| entry.is(FLUSH)).count();
    if flushes == 0 {
        return Err("the log has no flush: the host's disk has no volatile cache to lose".into());
    }
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let _warm_up = (0..8).map(|_| dice.below(2)).count();
    let loss = [Loss::All, Loss::Requests, Loss::Sectors][usize::try_from(dice.below(3))?];
    let (mut whole, mut torn, mut lost) = (0, 0, 0);
    for (n, entry) in all.iter().enumerate() {
        if n < flushed || entry.is(FUA) {
            apply(&disk, &log, *entry)?;
            continue;
        }
        match loss {
            Loss::Sectors if !entry.is(DISCARD) => {
                torn += 1;
                for sector in (0..entry.bytes).step_by(usize::try_from(SECTOR)?) {
                    if dice.below(2) == 0 {
                        let part = Entry {
                            at: entry.at + sector,
                            bytes: SECTOR,
                            data: entry.data + sector,
                            ..*entry
                        };
                        apply(&disk, &log, part)?;
                    }
                }
            }
            Loss::Requests | Loss::Sectors if dice.below(2) == 0 => {
                whole += 1;
                apply(&disk, &log, *entry)?;
            }
            _ => lost += 1,
        }
    }
    disk.sync_data()?;
    Ok(format!(
        "{} requests and {flushes} flushes; of the {} after the last flush {whole} kept, {torn} torn, {lost} lost",
        all.len() - flushes,
        all.len() - flushed
    ))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (text, code) = match replay(&arguments.disk, &arguments.log, arguments.seed) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("{}: {error}", arguments.log.display()), ExitCode::FAILURE),
    };
    let _gone = writeln!(std::io::stdout(), "{text}");
    code
}
