//! When a store that could not be opened is tried again, and whether it may be made.
//!
//! A store is made only if no try has found anything of it, and the system alone was in the way: what was there once is
//! never taken for a new one that is empty. What was found to be wrong in itself is not read again before it changes.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::file::{OpenError, beside};

/// What a try may do if the store is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfMissing {
    /// Make it.
    Make,
    /// Fail.
    Refuse,
}

/// Names, inodes, sizes and times of all files of a store but its index, which those who only look may write.
type Looks = Vec<(OsString, u64, u64, i64, i64)>;

/// The tries to open one store.
#[derive(Debug)]
pub struct Tries {
    path: PathBuf,
    if_missing: IfMissing,
    /// What was there when it was found to be wrong in itself.
    wrong: Option<Looks>,
}

impl Tries {
    /// None was made yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, if_missing: IfMissing::Make, wrong: None }
    }

    /// It was open: if it has gone since, it is not made anew.
    pub(crate) fn was_open(&mut self) {
        self.if_missing = IfMissing::Refuse;
    }

    /// Whether another try can come to something else.
    pub fn is_due(&self) -> bool {
        self.wrong.is_none() || self.wrong != looks(&self.path).ok()
    }

    /// Looks whether there is anything of it, for a try that comes to nothing before it is opened.
    pub fn see(&mut self) {
        use io::ErrorKind::{NotADirectory, NotFound};
        let lock = beside(&self.path, ".lock");
        let is_of_it = |(found, ..): &(OsString, _, _, _, _)| Some(found.as_os_str()) != lock.file_name();
        let seen = match looks(&self.path) {
            Ok(looks) => looks.iter().any(is_of_it),
            // What cannot be looked at may be there.
            Err(error) => !matches!(error.kind(), NotFound | NotADirectory),
        };
        if seen {
            self.if_missing = IfMissing::Refuse;
        }
    }

    /// One try.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn go<T>(&mut self, open: impl FnOnce(IfMissing) -> Result<T, OpenError>) -> Result<T, OpenError> {
        // Before it is read: what changes meanwhile is another reason to try.
        let before = looks(&self.path).ok();
        let absent = fs::symlink_metadata(&self.path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        let outcome = open(self.if_missing);
        match &outcome {
            Ok(_) => {}
            Err(OpenError::Io { .. }) => {
                self.wrong = None;
                if !absent {
                    self.if_missing = IfMissing::Refuse;
                }
            }
            Err(_) => {
                self.wrong = before;
                self.if_missing = IfMissing::Refuse;
            }
        }
        outcome
    }
}

fn looks(path: &Path) -> io::Result<Looks> {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let mut looks = Looks::new();
    for entry in fs::read_dir(path.parent().unwrap_or(Path::new(".")))? {
        let entry = entry?;
        let found = entry.file_name();
        let bytes = found.as_encoded_bytes();
        if bytes.starts_with(name) && !bytes.ends_with(b"-shm") {
            let data = entry.metadata()?;
            looks.push((found, data.ino(), data.len(), data.mtime(), data.mtime_nsec()));
        }
    }
    looks.sort();
    Ok(looks)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn damaged() -> OpenError {
        OpenError::Damaged { noun: "herd book", path: String::new(), what: String::new(), advice: "" }
    }

    fn io_error() -> OpenError {
        OpenError::Io { noun: "herd book", path: String::new(), what: String::new() }
    }

    /// What the next try may do.
    fn next(tries: &mut Tries) -> IfMissing {
        tries.go(Ok).unwrap()
    }

    #[test]
    fn a_store_is_made_only_if_nothing_of_it_was_ever_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("herd.db");
        let mut tries = Tries::new(path.clone());
        assert_eq!(next(&mut tries), IfMissing::Make);
        tries.go(|_| Err::<(), _>(io_error())).unwrap_err();
        assert_eq!(next(&mut tries), IfMissing::Make, "a directory that cannot be written, say");
        fs::write(&path, "cows").unwrap();
        tries.go(|_| Err::<(), _>(io_error())).unwrap_err();
        fs::remove_file(&path).unwrap();
        assert_eq!(next(&mut tries), IfMissing::Refuse);
        // The log of one that is missing, or the traces of a restore.
        let mut tries = Tries::new(path);
        tries.go(|_| Err::<(), _>(damaged())).unwrap_err();
        assert_eq!(next(&mut tries), IfMissing::Refuse);
    }

    #[test]
    fn what_is_wrong_in_itself_is_read_again_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("herd.db");
        fs::write(&path, "cows").unwrap();
        let mut tries = Tries::new(path.clone());
        assert!(tries.is_due());
        tries.go(|_| Err::<(), _>(damaged())).unwrap_err();
        fs::write(directory.path().join("herd.db-shm"), "index").unwrap();
        assert!(!tries.is_due());
        fs::write(directory.path().join("herd.db.restoring"), "cows").unwrap();
        assert!(tries.is_due());
        tries.go(|_| Err::<(), _>(damaged())).unwrap_err();
        assert!(!tries.is_due());
        fs::write(&path, "cows and more").unwrap();
        assert!(tries.is_due());
        tries.go(|_| Err::<(), _>(io_error())).unwrap_err();
        assert!(tries.is_due(), "the system can change its mind");
    }
}
