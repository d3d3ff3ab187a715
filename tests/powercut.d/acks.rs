//! What was promised: a line before each operation and one after its reply, written to where a power cut does not reach
//! (a virtio port), so that the audit knows what must be there and what must be gone.
//!
//! `? KEY` is written before an operation on KEY, `= KEY STATE` after its success. The last line about a key counts; a key
//! whose last line is the first kind may be in either state.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

pub(crate) const GONE: &str = "gone";

/// Where the lines go, if anywhere.
#[derive(Clone, Default)]
pub(crate) struct Acks(Option<Arc<Mutex<File>>>);

impl Acks {
    pub(crate) fn open(path: Option<&Path>) -> std::io::Result<Self> {
        let file = path.map(|path| File::options().create(true).append(true).open(path)).transpose()?;
        Ok(Self(file.map(|file| Arc::new(Mutex::new(file)))))
    }

    /// An operation on `keys` begins.
    pub(crate) fn begin(&self, keys: &[&str]) -> std::io::Result<()> {
        self.write(keys.iter().map(|key| format!("? {key}\n")).collect())
    }

    /// It was answered: so it is now.
    pub(crate) fn done(&self, states: &[(&str, &str)]) -> std::io::Result<()> {
        self.write(states.iter().map(|(key, state)| format!("= {key} {state}\n")).collect())
    }

    fn write(&self, lines: String) -> std::io::Result<()> {
        let Some(file) = &self.0 else { return Ok(()) };
        file.lock().unwrap_or_else(PoisonError::into_inner).write_all(lines.as_bytes())
    }
}

/// What must be so of each key whose state is certain.
pub(crate) fn promised(lines: &str) -> BTreeMap<&str, &str> {
    let mut all = BTreeMap::new();
    // A line that was cut off says nothing but that something had begun; its beginning was a line before.
    for line in lines.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["?", key] => _ = all.remove(key),
            ["=", key, state] => _ = all.insert(key, state),
            _ => {}
        }
    }
    all
}

/// The keys whose operation had begun.
pub(crate) fn uncertain(lines: &str) -> usize {
    let mut open = std::collections::BTreeSet::new();
    for line in lines.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["?", key] => _ = open.insert(key),
            ["=", key, _] => _ = open.remove(key),
            _ => {}
        }
    }
    open.len()
}
