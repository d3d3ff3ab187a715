//! Applies an archive to a directory: what containerd's differ does on a filesystem that has the layers below.

use std::{
    collections::{HashMap, HashSet, hash_map::RandomState},
    hash::BuildHasher as _,
    os::fd::OwnedFd,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags},
    io::Errno,
};

use super::{
    Inflated, LayerError, Result, Root, Stop,
    archive::{Archive, Kind, Member, Time},
    root::{Directory, components, each_name, join, kind},
    shown,
    sparse::Map,
};

/// What stands before the name of what is to be removed.
const WHITEOUT: &[u8] = b".wh.";
/// In a directory: nothing of it from the layers below is left.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes that are written, or found to be zeros, at once.
const PIECE: usize = 64 << 10;
/// What an entry of a map takes besides its name.
const ENTRY: usize = 64;

/// How much a layer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of its files, holes and zeros included.
    pub bytes: u64,
    /// Members.
    pub members: u64,
    /// Bytes of memory for what is remembered of it while it is applied: hashes of all paths, and the names of directories.
    pub memory: usize,
}

impl Bounds {
    /// What such a layer can have when it is inflated, headers and all.
    pub fn inflated(self) -> u64 {
        const HEADERS: u64 = 4096;
        self.bytes.saturating_add(self.members.saturating_mul(HEADERS))
    }
}

/// Applies the layer to `root`, and reads it to its end.
///
/// # Errors
/// [`LayerError`]; what was applied is not taken back.
pub fn apply(root: Root, layer: Inflated, bounds: Bounds) -> Result<Inflated> {
    let mut archive = Archive::new(layer);
    let mut layer = Layer {
        root,
        made: HashSet::new(),
        hasher: RandomState::new(),
        cleared: HashSet::new(),
        directories: HashMap::new(),
        remembered: 0,
        memory: bounds.memory,
    };
    let (mut members, mut bytes) = (0_u64, 0_u64);
    while let Some(member) = archive.next()? {
        layer.root.stop().check()?;
        members += 1;
        bytes = bytes.saturating_add(member.size());
        if members > bounds.members || bytes > bounds.bytes {
            return Err(LayerError::Refused(format!(
                "it has more than {} bytes or {} members, which are the bounds of the configuration ([images] \
                 layer_size_max, layer_members_max)",
                bounds.bytes, bounds.members
            )));
        }
        layer.member(&member, &mut archive)?;
    }
    layer.times_of_directories()?;
    Ok(archive.into_rest())
}

struct Layer {
    root: Root,
    /// Hashes of the paths that this layer has made: an opaque directory keeps them. (That two have the same is as likely as
    /// that memory forgets a bit.)
    made: HashSet<u64>,
    hasher: RandomState,
    /// Opaque directories that were cleared.
    cleared: HashSet<Vec<u8>>,
    /// Their times are set last: whatever is made in them changes them.
    directories: HashMap<Vec<u8>, Times>,
    /// Bytes of all of that.
    remembered: usize,
    /// How many there may be.
    memory: usize,
}

#[derive(Clone, Copy)]
struct Times {
    accessed: Time,
    modified: Time,
}

impl Layer {
    fn member(&mut self, member: &Member, archive: &mut Archive) -> Result<()> {
        let Some((parent, name)) = place(&member.name)? else { return Ok(()) };
        let directory = self.root.directory(&parent)?;
        if name == OPAQUE {
            return self.clear(&directory);
        }
        if let Some(removed) = name.strip_prefix(WHITEOUT) {
            if removed.is_empty() || removed == b"." || removed == b".." {
                return Err(LayerError::Damaged(format!("it removes nothing by {:?}", shown(&member.name))));
            }
            return self.root.remove(&directory, removed);
        }
        let path = join(&directory.path, &name);
        let refused = |doing: &str, errno: Errno| LayerError::at(doing, &path, errno);
        let mut file = None;
        match &member.kind {
            Kind::Directory => {
                match rustix::fs::mkdirat(&directory.fd, name.as_slice(), Mode::from_raw_mode(0o700)) {
                    Ok(()) => {}
                    Err(Errno::EXIST) => {
                        let there = kind(&directory.fd, &name).map_err(|e| refused("looking at", e))?;
                        if there != Some(FileType::Directory) {
                            self.root.remove(&directory, &name)?;
                            rustix::fs::mkdirat(&directory.fd, name.as_slice(), Mode::from_raw_mode(0o700))
                                .map_err(|e| refused("making the directory", e))?;
                        }
                    }
                    Err(errno) => return Err(refused("making the directory", errno)),
                }
            }
            Kind::File(map) => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = self.anew(&directory, &name, || {
                    rustix::fs::openat(&directory.fd, name.as_slice(), flags, Mode::from_raw_mode(0o600))
                })?;
                let made = made.map_err(|e| refused("making the file", e))?;
                write(&made, &path, archive, member.stored, map.as_ref(), self.root.stop())?;
                file = Some(made);
            }
            Kind::HardLink => self.hard_link(&directory, &name, member)?,
            Kind::Symlink => self
                .anew(&directory, &name, || {
                    rustix::fs::symlinkat(member.link.as_slice(), &directory.fd, name.as_slice())
                })?
                .map_err(|e| refused("making the symbolic link", e))?,
            Kind::BlockDevice | Kind::CharDevice | Kind::Fifo => {
                let kind = match member.kind {
                    Kind::BlockDevice => FileType::BlockDevice,
                    Kind::CharDevice => FileType::CharacterDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(member.major, member.minor);
                self.anew(&directory, &name, || {
                    rustix::fs::mknodat(
                        &directory.fd,
                        name.as_slice(),
                        kind,
                        Mode::from_raw_mode(0o600),
                        device,
                    )
                })?
                .map_err(|e| refused("making the device", e))?;
            }
        }
        let times = Times::of(member);
        dress(&directory.fd, &name, &path, member, file.as_ref(), times)?;
        if member.kind == Kind::Directory {
            // By where it is: an archive may name it in as many ways as it likes.
            if self.directories.insert(path.clone(), times).is_none() {
                self.remember(path.len() + ENTRY)?;
            }
        }
        self.note(&path)
    }

    fn remember(&mut self, bytes: usize) -> Result<()> {
        self.remembered += bytes;
        if self.remembered > self.memory {
            let what = format!(
                "to remember its directories and files takes more than {} bytes of memory",
                self.memory
            );
            return Err(LayerError::Refused(what));
        }
        Ok(())
    }

    /// Remembers what an opaque directory keeps: what this layer has in it, and the directories that lead there.
    fn note(&mut self, mut path: &[u8]) -> Result<()> {
        while self.made.insert(self.hasher.hash_one(path)) {
            self.remember(2 * size_of::<u64>())?;
            match path.iter().rposition(|byte| *byte == b'/') {
                Some(end) => path = &path[..end],
                None => break,
            }
        }
        Ok(())
    }

    /// Makes what may be there already: that goes first.
    fn anew<T>(
        &mut self,
        directory: &Directory,
        name: &[u8],
        make: impl Fn() -> Result<T, Errno>,
    ) -> Result<Result<T, Errno>> {
        match make() {
            Err(Errno::EXIST) => {
                self.root.remove(directory, name)?;
                Ok(make())
            }
            made => Ok(made),
        }
    }

    /// Also to a file of a layer below. A link to what is replaced by it leads nowhere, as with containerd.
    fn hard_link(&mut self, directory: &Directory, name: &[u8], member: &Member) -> Result<()> {
        let Some((parent, target)) = place(&member.link)? else {
            let what = format!("{:?} is a hard link to the root directory", shown(&member.name));
            return Err(LayerError::Damaged(what));
        };
        let target = join(&self.root.resolve(&parent)?, &target);
        if target == join(&directory.path, name) {
            return Err(LayerError::Damaged(format!("{:?} is a hard link to itself", shown(&member.name))));
        }
        let root = self.root.fd().try_clone().map_err(|e| LayerError::at("opening", b"/", e))?;
        let linked = self.anew(directory, name, || {
            rustix::fs::linkat(&root, target.as_slice(), &directory.fd, name, AtFlags::empty())
        })?;
        linked.map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::PERM | Errno::ISDIR => LayerError::Damaged(format!(
                "{:?} is a hard link to {:?}, which is no file of it or of a layer below",
                shown(&member.name),
                shown(&member.link)
            )),
            errno => LayerError::at("linking", &member.name, errno),
        })
    }

    /// Removes what the layers below have in it.
    fn clear(&mut self, directory: &Directory) -> Result<()> {
        if self.cleared.insert(directory.path.clone()) {
            self.remember(directory.path.len() + ENTRY)?;
            self.clear_below(&directory.path)?;
        }
        Ok(())
    }

    fn clear_below(&mut self, path: &[u8]) -> Result<()> {
        let directory = self.root.directory(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listed = rustix::fs::openat(&directory.fd, ".", flags, Mode::empty());
        let listed = listed.map_err(|errno| LayerError::at("listing", path, errno))?;
        each_name(&listed, path, |name| {
            let inner = join(path, name);
            if !self.made.contains(&self.hasher.hash_one(inner.as_slice())) {
                return self.root.remove(&directory, name);
            }
            match kind(&directory.fd, name).map_err(|e| LayerError::at("looking at", &inner, e))? {
                Some(FileType::Directory) => self.clear_below(&inner),
                _ => Ok(()),
            }
        })
    }

    fn times_of_directories(&mut self) -> Result<()> {
        for (path, times) in std::mem::take(&mut self.directories) {
            self.root.stop().check()?;
            // It may have been removed again, or be something else.
            let parent = path.iter().rposition(|byte| *byte == b'/').map_or(&b""[..], |end| &path[..end]);
            if self.root.resolve(parent)? != parent {
                continue;
            }
            match times.set(self.root.fd(), &path) {
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(errno) => return Err(LayerError::at("setting the time of", &path, errno)),
            }
        }
        Ok(())
    }
}

/// Directory and name of a path that may begin with "/" or "./". `None`: it is the root.
fn place(path: &[u8]) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
    let mut cleaned: Vec<&[u8]> = Vec::new();
    for component in components(path) {
        if component != b".." {
            cleaned.push(component);
        } else if cleaned.pop().is_none() {
            return Err(LayerError::Refused(format!("{:?} leads out of the image", shown(path))));
        }
    }
    Ok(cleaned.pop().map(|name| (cleaned.join(&b'/'), name.to_vec())))
}

/// Writes a file's data; zeros stay holes.
fn write(
    file: &OwnedFd,
    path: &[u8],
    archive: &mut Archive,
    stored: u64,
    map: Option<&Map>,
    stop: &Stop,
) -> Result<()> {
    let whole = [(0, stored)];
    let (pieces, size) = map.map_or((&whole[..], stored), |map| (&map.pieces[..], map.size));
    let mut buffer = vec![0; PIECE.min(usize::try_from(stored).unwrap_or(PIECE))];
    let mut end = 0;
    for (offset, length) in pieces {
        let (mut at, piece_end) = (*offset, offset + length);
        while at < piece_end {
            stop.check()?;
            // Pieces end where blocks do.
            let room = PIECE as u64 - at % PIECE as u64;
            let now = room.min(piece_end - at).min(buffer.len() as u64) as usize;
            archive.data().fill(&mut buffer[..now])?;
            if buffer[..now].iter().any(|byte| *byte != 0) {
                write_at(file, &buffer[..now], at).map_err(|errno| LayerError::at("writing", path, errno))?;
                end = at + now as u64;
            }
            at += now as u64;
        }
    }
    if end < size {
        rustix::fs::ftruncate(file, size).map_err(|errno| match errno {
            Errno::FBIG | Errno::INVAL => LayerError::Refused(format!(
                "{:?} has {size} bytes, more than the filesystem has",
                shown(path)
            )),
            errno => LayerError::at("writing", path, errno),
        })?;
    }
    Ok(())
}

fn write_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Owner, attributes, mode and times, in this order: a new owner takes the set-user-id bit and capabilities away.
fn dress(
    directory: &OwnedFd,
    name: &[u8],
    path: &[u8],
    member: &Member,
    file: Option<&OwnedFd>,
    times: Times,
) -> Result<()> {
    let refused = |doing: &str, errno: Errno| LayerError::at(doing, path, errno);
    let (owner, group) = (rustix::fs::Uid::from_raw(member.uid), rustix::fs::Gid::from_raw(member.gid));
    let mode = Mode::from_raw_mode(member.mode);
    if let Some(file) = file {
        rustix::fs::fchown(file, Some(owner), Some(group))
            .map_err(|e| refused("changing the owner of", e))?;
        for (key, value) in &member.attributes {
            set_attribute(
                path,
                key,
                member,
                rustix::fs::fsetxattr(file, key.as_str(), value, XattrFlags::empty()),
            )?;
        }
        rustix::fs::fchmod(file, mode).map_err(|e| refused("changing the mode of", e))?;
        return rustix::fs::futimens(file, &times.stamps()).map_err(|e| refused("setting the time of", e));
    }
    rustix::fs::chownat(directory, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| refused("changing the owner of", e))?;
    if !member.attributes.is_empty() {
        // There is no call for an attribute of a link's own by directory and name.
        let here =
            std::path::PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory)));
        let here = here.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name));
        for (key, value) in &member.attributes {
            set_attribute(
                path,
                key,
                member,
                rustix::fs::lsetxattr(&here, key.as_str(), value, XattrFlags::empty()),
            )?;
        }
    }
    let is_link = match member.kind {
        Kind::Symlink => true,
        Kind::HardLink => {
            kind(directory, name).map_err(|e| refused("looking at", e))? == Some(FileType::Symlink)
        }
        _ => false,
    };
    if !is_link {
        rustix::fs::chmodat(directory, name, mode, AtFlags::empty())
            .map_err(|e| refused("changing the mode of", e))?;
    }
    times.set(directory, name).map_err(|e| refused("setting the time of", e))
}

/// What a filesystem does not have is left out, as containerd does.
fn set_attribute(path: &[u8], key: &str, member: &Member, set: Result<(), Errno>) -> Result<()> {
    match set {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => Ok(()),
        // Not the disk: a file has one block for them.
        Err(Errno::NOSPC) => Err(LayerError::Refused(format!(
            "the attributes of {:?} are more than a file can have",
            shown(path)
        ))),
        // Only files and directories have such.
        Err(Errno::PERM)
            if key.starts_with("user.") && !matches!(member.kind, Kind::File(_) | Kind::Directory) =>
        {
            Ok(())
        }
        Err(errno) => Err(LayerError::at(&format!("setting {key:?} of"), path, errno)),
    }
}

impl Times {
    fn of(member: &Member) -> Self {
        let accessed = member.accessed.map_or(member.modified, |accessed| accessed.max(member.modified));
        Self { accessed: bound(accessed), modified: bound(member.modified) }
    }

    fn stamps(self) -> Timestamps {
        let stamp = |(seconds, nanos): Time| Timespec { tv_sec: seconds, tv_nsec: i64::from(nanos) };
        Timestamps { last_access: stamp(self.accessed), last_modification: stamp(self.modified) }
    }

    fn set(self, directory: &OwnedFd, path: &[u8]) -> Result<(), Errno> {
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::utimensat(directory, path, &self.stamps(), AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// Times that containerd does not take either are 1970.
fn bound(time: Time) -> Time {
    const LAST: i64 = i64::MAX / 1_000_000_000;
    if (0..LAST).contains(&time.0) { time } else { (0, 0) }
}
