//! A drive with a volatile write cache, for QEMU, over NBD (github.com/NetworkBlockDevice/nbd, doc/proto.md). What was
//! written is in the file when it was flushed, and not before. When QEMU dies the power is gone: of what was written since
//! the last flush all is lost, or some requests, or some sectors, whichever came later.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::{fs::FileExt as _, net::UnixListener},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// What the drive holds.
    #[arg(long)]
    disk: PathBuf,
    /// Where QEMU finds it.
    #[arg(long)]
    socket: PathBuf,
    /// While this file is there, flushes are not answered: what was promised before stays, and what comes is volatile.
    #[arg(long)]
    hold: PathBuf,
    /// Decides what is lost.
    #[arg(long)]
    seed: u64,
}

/// What a drive writes as a whole.
const SECTOR: usize = 512;
/// A cache that is fuller than this is written back, as a drive does by itself.
const CACHE: usize = 256 << 20;

const GREETING: [u64; 2] = [0x4e42_444d_4147_4943, 0x4948_4156_454f_5054]; // NBDMAGIC, IHAVEOPT
const FIXED_NEWSTYLE: u16 = 1;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_UNSUPPORTED: u32 = 0x8000_0001;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const INVALID: u32 = 22;
/// It has flags, and knows flushes; no FUA, so that each is a flush.
const FLAGS: u16 = 1 | 4;

/// xorshift: good enough to choose what is lost.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            dice.below(2);
        }
        dice
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

struct Drive {
    file: File,
    size: u64,
    /// Written since the last flush, in order.
    cache: Vec<(u64, Vec<u8>)>,
    cached: usize,
    /// Where the latest content of a sector is: the request, and the byte in it.
    latest: BTreeMap<u64, (usize, usize)>,
    requests: u64,
    flushes: u64,
}

impl Drive {
    fn open(path: &PathBuf) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            file,
            size,
            cache: Vec::new(),
            cached: 0,
            latest: BTreeMap::new(),
            requests: 0,
            flushes: 0,
        })
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)?;
        let end = at + bytes.len() as u64;
        for (sector, (request, byte)) in self.latest.range(at..end) {
            let to = usize::try_from(sector - at).map_err(io::Error::other)?;
            bytes[to..to + SECTOR].copy_from_slice(&self.cache[*request].1[*byte..*byte + SECTOR]);
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: Vec<u8>) -> io::Result<()> {
        for byte in (0..bytes.len()).step_by(SECTOR) {
            self.latest.insert(at + byte as u64, (self.cache.len(), byte));
        }
        self.requests += 1;
        self.cached += bytes.len();
        self.cache.push((at, bytes));
        if self.cached > CACHE { self.write_back() } else { Ok(()) }
    }

    fn write_back(&mut self) -> io::Result<()> {
        self.latest.clear();
        self.cached = 0;
        for (at, bytes) in self.cache.drain(..) {
            self.file.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// The power is gone.
    fn lose(&mut self, dice: &mut Dice) -> io::Result<String> {
        let how = dice.below(3);
        let (mut kept, mut torn, mut lost) = (0, 0, 0);
        for (at, bytes) in self.cache.drain(..) {
            let there = match how {
                0 => 0,
                1 => dice.below(2) * bytes.len() as u64,
                _ => {
                    let mut there = 0;
                    for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                        if dice.below(2) == 0 {
                            self.file.write_all_at(sector, at + (n * SECTOR) as u64)?;
                            there += sector.len() as u64;
                        }
                    }
                    there
                }
            };
            match there {
                0 => lost += 1,
                _ if there < bytes.len() as u64 => torn += 1,
                _ => {
                    self.file.write_all_at(&bytes, at)?;
                    kept += 1;
                }
            }
        }
        let (requests, flushes) = (self.requests, self.flushes);
        Ok(format!(
            "the drive had {requests} writes and {flushes} flushes; since the last one {kept} were kept, {torn} torn, {lost} lost"
        ))
    }
}

fn u16_of(from: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    from.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn u32_of(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u64_of(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn option_reply(to: &mut impl Write, option: u32, kind: u32, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&OPTION_REPLY.to_be_bytes())?;
    for word in [option, kind, u32::try_from(bytes.len()).map_err(io::Error::other)?] {
        to.write_all(&word.to_be_bytes())?;
    }
    to.write_all(bytes)?;
    to.flush()
}

/// Agrees on the one export there is.
fn shake_hands(from: &mut impl Read, to: &mut impl Write, size: u64) -> io::Result<()> {
    for word in GREETING {
        to.write_all(&word.to_be_bytes())?;
    }
    to.write_all(&FIXED_NEWSTYLE.to_be_bytes())?;
    to.flush()?;
    let _client_flags = u32_of(from)?;
    loop {
        if u64_of(from)? != GREETING[1] {
            return Err(io::Error::other("this is no client of NBD"));
        }
        let (option, length) = (u32_of(from)?, u32_of(from)?);
        let mut data = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        from.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME => {
                to.write_all(&size.to_be_bytes())?;
                to.write_all(&FLAGS.to_be_bytes())?;
                to.write_all(&[0; 124])?;
                return to.flush();
            }
            OPT_INFO | OPT_GO => {
                let export: Vec<u8> =
                    [&0_u16.to_be_bytes()[..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
                option_reply(to, option, REP_INFO, &export)?;
                option_reply(to, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(());
                }
            }
            OPT_ABORT => return Err(io::Error::other("the client does not want it")),
            _ => option_reply(to, option, REP_UNSUPPORTED, &[])?,
        }
    }
}

/// Until the client says that it ends, in order.
fn serve(from: &mut impl Read, to: &mut impl Write, drive: &mut Drive, hold: &Path) -> io::Result<()> {
    loop {
        if u32_of(from)? != REQUEST {
            return Err(io::Error::other("no request where one should be"));
        }
        let (_flags, kind, cookie) = (u16_of(from)?, u16_of(from)?, u64_of(from)?);
        let (at, length) = (u64_of(from)?, u32_of(from)?);
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        let mut error = 0;
        match kind {
            READ => drive.read(at, &mut bytes)?,
            WRITE => {
                from.read_exact(&mut bytes)?;
                drive.write(at, std::mem::take(&mut bytes))?;
            }
            FLUSH if hold.exists() => continue,
            FLUSH => {
                drive.write_back()?;
                drive.flushes += 1;
            }
            DISCONNECT => return drive.write_back(),
            _ => error = INVALID,
        }
        to.write_all(&REPLY.to_be_bytes())?;
        to.write_all(&error.to_be_bytes())?;
        to.write_all(&cookie.to_be_bytes())?;
        if kind == READ {
            to.write_all(&bytes)?;
        }
        to.flush()?;
    }
}

fn run(arguments: &Arguments) -> io::Result<String> {
    let mut drive = Drive::open(&arguments.disk)?;
    let listener = UnixListener::bind(&arguments.socket)?;
    loop {
        let (stream, _) = listener.accept()?;
        let (mut from, mut to) = (BufReader::new(stream.try_clone()?), BufWriter::new(stream));
        let ended = shake_hands(&mut from, &mut to, drive.size)
            .and_then(|()| serve(&mut from, &mut to, &mut drive, &arguments.hold));
        match ended {
            Ok(()) => return Ok("the drive was switched off in order".to_owned()),
            Err(error) if !is_gone(&error) => return Err(error),
            // A host that did not start was killed, and is started again.
            Err(_) if drive.requests == 0 => {}
            Err(_) => return drive.lose(&mut Dice::new(arguments.seed)),
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (text, code) = match run(&arguments) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("the drive {}: {error}", arguments.disk.display()), ExitCode::FAILURE),
    };
    let _gone = writeln!(io::stdout(), "{text}");
    code
}
