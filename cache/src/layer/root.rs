//! A directory as the root of all paths: links in it lead to what is in it, and nothing leads out.

use std::{collections::VecDeque, os::fd::OwnedFd};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{LayerError, Result, Stop, shown};

/// As many links as Linux follows in one path.
const LINKS_MAX: usize = 40;
/// Components of a path: removing goes so deep, with a directory open for each.
const DEPTH_MAX: usize = 400;

/// The root directory of an image.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    stop: Stop,
    /// The last directory that was asked for.
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    /// As it was written.
    path: Vec<u8>,
    directory: std::sync::Arc<Directory>,
}

/// A directory of the image.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) fd: OwnedFd,
    /// From the root, without links, "." and "..".
    pub(super) path: Vec<u8>,
}

impl Root {
    /// Of this directory. What takes long ends when it is stopped.
    pub fn new(fd: OwnedFd, stop: &Stop) -> Self {
        Self { fd, stop: stop.clone(), last: None }
    }

    pub(super) fn stop(&self) -> &Stop {
        &self.stop
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The directory `path`; if need be, made, with all above it.
    pub(super) fn directory(&mut self, path: &[u8]) -> Result<std::sync::Arc<Directory>> {
        if let Some(last) = self.last.as_ref().filter(|last| last.path == path) {
            return Ok(last.directory.clone());
        }
        let resolved = self.resolve(path)?;
        let fd = match self.open(&resolved) {
            Err(Errno::NOENT) => {
                self.make(&resolved)?;
                self.open(&resolved)
            }
            opened => opened,
        };
        let fd = fd.map_err(|errno| LayerError::at("opening the directory", &resolved, errno))?;
        let directory = std::sync::Arc::new(Directory { fd, path: resolved });
        self.last = Some(Last { path: path.to_vec(), directory: directory.clone() });
        Ok(directory)
    }

    /// Where `path` leads, from the root, without links; what is not there is taken as it is written.
    pub(super) fn resolve(&self, path: &[u8]) -> Result<Vec<u8>> {
        let mut left: VecDeque<Vec<u8>> = components(path).map(<[u8]>::to_vec).collect();
        let (mut at, mut depth, mut links) = (Vec::new(), 0, 0);
        while let Some(component) = left.pop_front() {
            if component == b".." {
                at.truncate(at.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                depth = usize::saturating_sub(depth, 1);
                continue;
            }
            let next = join(&at, &component);
            match rustix::fs::readlinkat(&self.fd, next.as_slice(), Vec::new()) {
                Ok(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(LayerError::Refused(format!(
                            "{:?} leads through links without end",
                            shown(path)
                        )));
                    }
                    let target = target.into_bytes();
                    if target.starts_with(b"/") {
                        (at, depth) = (Vec::new(), 0);
                    }
                    for component in components(&target).collect::<Vec<_>>().into_iter().rev() {
                        left.push_front(component.to_vec());
                    }
                }
                // It is no link, or not there.
                Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => (at, depth) = (next, depth + 1),
                Err(errno) => return Err(LayerError::at("looking at", &next, errno)),
            }
            if depth > DEPTH_MAX {
                return Err(LayerError::Refused(format!(
                    "{:?} is deeper than {DEPTH_MAX} directories",
                    shown(path)
                )));
            }
        }
        Ok(at)
    }

    /// A directory without links in its path.
    fn open(&self, resolved: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if resolved.is_empty() { b"." } else { resolved };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), within)
    }

    /// What no member has said, as containerd makes it: mode 0755, of root.
    fn make(&self, resolved: &[u8]) -> Result<()> {
        let mode = Mode::from_raw_mode(0o755);
        let ends = resolved.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in ends.chain([resolved.len()]) {
            let path = &resolved[..end];
            match rustix::fs::mkdirat(&self.fd, path, mode) {
                Ok(()) => rustix::fs::chmodat(&self.fd, path, mode, AtFlags::empty())
                    .map_err(|errno| LayerError::at("making the directory", path, errno))?,
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(LayerError::at("making the directory", path, errno)),
            }
        }
        Ok(())
    }

    /// Removes `name` of `directory`, and all below it. Succeeds if it is not there.
    pub(super) fn remove(&mut self, directory: &Directory, name: &[u8]) -> Result<()> {
        let path = join(&directory.path, name);
        if self.remove_all(&directory.fd, name, &path)? {
            // It may have been what was remembered, or a link on the way to it.
            self.last = None;
        }
        Ok(())
    }

    /// Whether there was something.
    fn remove_all(&self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> Result<bool> {
        self.stop.check()?;
        let failed = |errno| LayerError::at("removing", path, errno);
        match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) => return Ok(true),
            Err(Errno::NOENT) => return Ok(false),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inner = rustix::fs::openat(directory, name, flags, Mode::empty()).map_err(failed)?;
        each_name(&inner, path, |name| self.remove_all(&inner, name, path).map(drop))?;
        drop(inner);
        rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR).map_err(failed)?;
        Ok(true)
    }
}

/// Does `each` to everything in a directory, one after the other: it may be a crowd. What it makes there is not seen for sure.
pub(super) fn each_name(
    directory: &OwnedFd,
    path: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let failed = |errno| LayerError::at("listing", path, errno);
    for entry in Dir::read_from(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            each(name)?;
        }
    }
    Ok(())
}

/// What `name` of `directory` is, if it is there; links are not followed.
pub(super) fn kind(directory: &OwnedFd, name: &[u8]) -> Result<Option<FileType>, Errno> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|component| !component.is_empty() && *component != b".")
}

pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}
