//! Mounts that are in no directory and no namespace: nobody comes across them, and with the process that has made them they
//! are gone, however it ends.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{Mode, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    },
};

use super::{LayerError, Result, Root, Stop};

/// What a snapshotter says of how its snapshot is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Filesystem.
    pub kind: String,
    /// Block device.
    pub source: String,
    /// As for mount(8).
    pub options: Vec<String>,
}

/// A mounted filesystem.
#[derive(Debug)]
pub struct Detached(OwnedFd);

impl Detached {
    /// Mounts it.
    ///
    /// # Errors
    /// [`LayerError::Filesystem`], by the kernel's word.
    pub fn mount(point: &MountPoint) -> Result<Self> {
        let failed = |errno: rustix::io::Errno| LayerError::Filesystem {
            doing: format!("mounting {} ({}, {})", point.source, point.kind, point.options.join(",")),
            source: errno.into(),
        };
        let filesystem = fsopen(point.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        fsconfig_set_string(&filesystem, "source", point.source.as_str()).map_err(failed)?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        for option in &point.options {
            match (option.as_str(), option.split_once('=')) {
                ("rw" | "defaults" | "relatime" | "nodev" | "nosuid" | "noexec" | "noatime", _) => {}
                ("ro", _) => {
                    attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
                    fsconfig_set_flag(&filesystem, "ro").map_err(failed)?;
                }
                (_, Some((key, value))) => {
                    fsconfig_set_string(&filesystem, key, value).map_err(failed)?;
                }
                (flag, None) => fsconfig_set_flag(&filesystem, flag).map_err(failed)?,
            }
        }
        fsconfig_create(&filesystem).map_err(failed)?;
        fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map(Self).map_err(failed)
    }

    /// Its root directory.
    ///
    /// # Errors
    /// [`LayerError::Filesystem`], by the kernel's word.
    pub fn root(&self, stop: &Stop) -> Result<Root> {
        self.open().map(|fd| Root::new(fd, stop))
    }

    fn open(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.0, ".", flags, Mode::empty())
            .map_err(|errno| LayerError::at("opening", b"/", errno))
    }

    /// Bytes that the filesystem has in all.
    ///
    /// # Errors
    /// [`LayerError::Filesystem`], by the kernel's word.
    pub fn size(&self) -> Result<u64> {
        let stat =
            rustix::fs::fstatvfs(&self.0).map_err(|errno| LayerError::at("looking at", b"/", errno))?;
        Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
    }

    /// Writes everything back and unmounts. Nothing of it may be open any more.
    ///
    /// # Errors
    /// What could not be written is told only here.
    pub fn unmount(self) -> Result<()> {
        rustix::fs::syncfs(self.open()?).map_err(|errno| LayerError::at("writing back", b"/", errno))
    }
}
