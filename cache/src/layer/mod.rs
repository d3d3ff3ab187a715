//! Layers: inflated, checked and applied to a filesystem that nobody else sees.
//!
//! ```text
//!  compressed bytes ─► inflate + digest (a thread) ─► chunks, so many and no more ─► archive ─► apply ─► a detached mount
//! ```
//!
//! What comes out is what containerd's own differ makes of the same layer, file by file; that one is the oracle of the
//! tests. What differs: an archive whose names lead out of the image is refused, and memory is bounded whatever a layer
//! says of itself. Zeros are not written: holes take no blocks of the pool.

mod apply;
mod archive;
mod frames;
mod inflate;
mod mount;
mod pax;
mod root;
mod sparse;
#[cfg(test)]
mod tests;

use std::{io, path::Path};

pub use apply::{Bounds, apply};
pub use inflate::{Inflated, LEAST_MEMORY, Stop, Warden, inflate};
pub use mount::{Detached, MountPoint};
pub use root::Root;

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It is no layer, or not all of one.
    #[error("{0}")]
    Damaged(String),
    /// It is more than is allowed, or asks for what is never done.
    #[error("{0}")]
    Refused(String),
    /// Its bytes do not come.
    #[error("its bytes cannot be read: {0}")]
    Source(#[source] io::Error),
    /// It is larger than the filesystem.
    #[error("it does not fit")]
    Full,
    /// Nobody wants it any more, or it took too long.
    #[error("it was given up")]
    Stopped,
    /// The filesystem, or the kernel.
    #[error("{doing}: {source}")]
    Filesystem {
        /// What was tried.
        doing: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

impl LayerError {
    /// The system's refusal of what was done to `path` of the layer.
    fn at(doing: &str, path: &[u8], error: impl Into<io::Error>) -> Self {
        let source = error.into();
        match source.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => Self::Full,
            // What no image of the kernel's making would ask for.
            Some(
                rustix::io::Errno::NAMETOOLONG
                | rustix::io::Errno::LOOP
                | rustix::io::Errno::NOTDIR
                | rustix::io::Errno::NOENT
                | rustix::io::Errno::INVAL
                | rustix::io::Errno::RANGE
                | rustix::io::Errno::TOOBIG
                | rustix::io::Errno::MLINK,
            ) => Self::Refused(format!("{doing} {:?}: {source}", shown(path))),
            _ => Self::Filesystem { doing: format!("{doing} {:?}", shown(path)), source },
        }
    }
}

/// A name as it is shown: images have a say in it.
fn shown(name: &[u8]) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    const MOST: usize = 200;
    let name = Path::new(std::ffi::OsStr::from_bytes(name)).display().to_string();
    match name.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &name[..at]),
        None => name,
    }
}

type Result<T, E = LayerError> = std::result::Result<T, E>;
