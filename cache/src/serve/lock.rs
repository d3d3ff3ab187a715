//! One `cowshed serve` for a state directory.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};

use super::ServeError;

/// A try to open a ledger takes no longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Held until it is dropped, at the latest by the process's end; the kernel lets go of it then, however that comes.
pub(crate) fn take(directory: &Path) -> Result<Flock<File>, ServeError> {
    let unusable = |what: String| ServeError::State { directory: directory.display().to_string(), what };
    fs::create_dir_all(directory).map_err(|e| unusable(e.to_string()))?;
    let path = directory.join("lock");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(|e| unusable(format!("{}: {e}", path.display())))?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(file, _)| {
        ServeError::InUse { pid: holder(file), directory: directory.display().to_string() }
    })?;
    let written =
        lock.set_len(0).and_then(|()| lock.rewind()).and_then(|()| writeln!(lock, "{}", std::process::id()));
    written.map_err(|e| unusable(format!("{}: {e}", path.display())))?;
    Ok(lock)
}

/// The same, and waits a moment for a service that tries to open its ledger and lets go again.
pub(crate) fn take_patiently(directory: &Path) -> Result<Flock<File>, ServeError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match take(directory) {
            Err(ServeError::InUse { .. }) if Instant::now() < deadline => pause(),
            outcome => return outcome,
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "for commands, which have no runtime's thread to hold up")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

fn holder(mut file: File) -> String {
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_second_is_refused_and_told_who_is_first() {
        let directory = tempfile::tempdir().unwrap();
        let first = take(directory.path()).unwrap();
        let refused = take(directory.path()).unwrap_err().to_string();
        assert!(refused.contains(&std::process::id().to_string()), "{refused}");
        assert!(refused.contains(&directory.path().display().to_string()), "{refused}");
        drop(first);
        assert!(take(directory.path()).is_ok());
    }
}
