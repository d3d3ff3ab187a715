//! The API's Unix socket: systemd's if it passed one, else our own with mode 0600.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
};

use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;

use super::ServeError;

pub(super) fn unix(path: &Path) -> Result<UnixListener, ServeError> {
    let refused = |error: io::Error| ServeError::Listen {
        address: path.display().to_string(),
        what: error.to_string(),
    };
    match inherited().map_err(refused)? {
        Some(listener) => Ok(listener),
        None => own(path),
    }
}

/// Makes the socket `path` with mode 0600.
pub(super) fn own(path: &Path) -> Result<UnixListener, ServeError> {
    bind(path).map_err(|e| ServeError::Listen { address: path.display().to_string(), what: e.to_string() })
}

/// The socket that systemd listens on for us.
fn inherited() -> io::Result<Option<UnixListener>> {
    use std::os::unix::net::UnixListener as StdListener;
    let mut passed = sd_notify::listen_fds()?;
    let Some(descriptor) = passed.next() else { return Ok(None) };
    // systemd hands descriptors over by number only.
    #[allow(unsafe_code, reason = "the one place where a number becomes a descriptor")]
    // SAFETY: LISTEN_FDS and LISTEN_PID, which listen_fds has checked and cleared, say that this descriptor is open and ours alone.
    let listener = unsafe { <StdListener as std::os::fd::FromRawFd>::from_raw_fd(descriptor) };
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener).map(Some)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    clear(path)?;
    // The socket must not be open to others even for a moment, so its mode is not mended afterwards only.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    bound
}

/// Removes the socket of a process that is gone. Anything else in its place is left alone.
fn clear(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is no socket"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there")),
        Err(_) => fs::remove_file(path),
    }
}
