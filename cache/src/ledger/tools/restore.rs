//! Puts a backup in the ledger's place. Nothing is ever deleted but what an interrupted restore had prepared.
//!
//! ```text
//!   backup ── checked ──► private copy, counters raised ──► ledger.db.restoring, checked, durable
//!   ledger.db ──► ledger.db.before-restore-T          then the same for its -wal and its -shm
//!   ledger.db.restoring ──► ledger.db
//! ```
//!
//! Each step is durable before the next. Until the first renaming, the old ledger is in place, with its log; after the
//! last, the new one is, and no log of another's beside it. In between there is none, and the service makes no new one
//! (`Format::open`): the restore has to be run again, which first finishes moving aside what the other one has begun to
//! move.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use cowshed_pool::store::file::{BEFORE_RESTORE, RESTORING, before_restores, beside};
use nix::fcntl::Flock;
use rusqlite::{Connection, params};

use super::{
    super::schema::FORMAT,
    Findings, ToolError,
    check::{check, examine},
    copy::PrivateCopy,
    sync_directory_of,
};
use crate::serve::lock;

/// What the counters of a restored ledger are raised by, above all that is known to have been given out: what was given
/// out and is not known, because it is in a damaged ledger or in none, is not so much.
pub const MARGIN: i64 = 1_000_000;
/// The counter that says when the ledger was restored, in seconds since the Unix epoch: what containerd has, and the
/// ledger does not know, may be from between the backup and then.
pub const RESTORED_AT: &str = "restored_at";

const MAKE_ROOM: &str =
    "make the state directory writable and free space there, then run the same command again";
/// The files of a ledger, the first without which the others are nothing.
const PARTS: [&str; 3] = ["", "-wal", "-shm"];

/// A file that has another name now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its name before.
    pub from: PathBuf,
    /// Its name.
    pub to: PathBuf,
}

/// What a restore has done.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Where the restored ledger is.
    pub ledger: PathBuf,
    /// What is in it.
    pub findings: Findings,
    /// What was there before.
    pub moved: Vec<Moved>,
    /// Earlier ledgers whose counters cannot be read, by the names that they had at the beginning, and why.
    pub unread: Vec<(PathBuf, String)>,
}

/// Puts `backup` in the place of `directory/ledger.db`. `now` is in seconds since the Unix epoch.
///
/// # Errors
/// If the backup is not sound, if a service has the directory, or if something cannot be written.
pub fn restore(directory: &Path, backup: &Path, now: i64) -> Result<Restored, ToolError> {
    let (effects, restored) = prepare(directory, backup, now)?;
    effects.carry_out(&restored.ledger)?;
    Ok(restored)
}

/// One step, durable or repeatable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Rename(Moved),
    /// Makes all renamings before it durable.
    Sync,
}

/// What is left to do, and nobody else may do meanwhile.
pub(super) struct Effects {
    pub(super) steps: Vec<Effect>,
    _lock: Flock<File>,
}

impl Effects {
    fn carry_out(&self, ledger: &Path) -> Result<(), ToolError> {
        self.steps.iter().try_for_each(|step| carry_out(step, ledger)).map_err(|e| not_moved(ledger, &e))
    }
}

fn not_moved(ledger: &Path, error: &io::Error) -> ToolError {
    let (path, what) = (ledger.display().to_string(), error.to_string());
    // Either of the two is in place, or none.
    if ledger.exists() {
        return ToolError::NotWritten { path, what, way_out: MAKE_ROOM };
    }
    ToolError::HalfDone { path, what }
}

pub(super) fn carry_out(step: &Effect, ledger: &Path) -> io::Result<()> {
    match step {
        Effect::Rename(Moved { from, to }) => fs::rename(from, to),
        Effect::Sync => sync_directory_of(ledger),
    }
}

/// Does all but putting the backup in place: up to its end, the ledger that is there is the old one.
pub(super) fn prepare(directory: &Path, backup: &Path, now: i64) -> Result<(Effects, Restored), ToolError> {
    let ledger = directory.join("ledger.db");
    let (copy, connection) = sound_copy(backup)?;
    let lock = lock::take_patiently(directory)?;
    let aside = free_name(&ledger, now);
    let mut moved = finish_moving(&ledger, &aside)?;
    let (known, unread) = known_counters(&ledger)?;
    raise(&connection, &known, aside.time).map_err(|e| not_restorable(backup, &e))?;
    connection.close().map_err(|(_, e)| not_restorable(backup, &e))?;
    let restoring = beside(&ledger, RESTORING);
    write_durably(&copy.path(), &restoring).map_err(|e| ToolError::NotWritten {
        path: restoring.display().to_string(),
        what: e.to_string(),
        way_out: MAKE_ROOM,
    })?;
    let findings = check(&restoring)?;
    if let Some(problem) = findings.problems.first() {
        return Err(not_restorable(backup, &problem.what));
    }
    let there = PARTS.map(|part| beside(&ledger, part).exists());
    let steps = steps(&ledger, &aside.path, there);
    moved.extend(steps.iter().filter_map(|step| match step {
        Effect::Rename(moved) if moved.to != ledger => Some(moved.clone()),
        _ => None,
    }));
    Ok((Effects { steps, _lock: lock }, Restored { ledger, findings, moved, unread }))
}

/// The steps that put the prepared ledger in place; `there` says which parts of the old one are there.
fn steps(ledger: &Path, aside: &Path, there: [bool; 3]) -> Vec<Effect> {
    let mut steps = Vec::new();
    for (part, _) in PARTS.iter().zip(there).filter(|(_, there)| *there) {
        let (from, to) = (beside(ledger, part), beside(aside, part));
        // Before its log: without that the ledger would be opened as of an earlier time.
        steps.extend([Effect::Rename(Moved { from, to }), Effect::Sync]);
    }
    let restored = Moved { from: beside(ledger, RESTORING), to: ledger.to_owned() };
    steps.extend([Effect::Rename(restored), Effect::Sync]);
    steps
}

/// A copy of the backup, opened, and as this version writes it.
fn sound_copy(backup: &Path) -> Result<(PrivateCopy, Connection), ToolError> {
    let copy = PrivateCopy::of(backup, "backup")?;
    let (findings, connection) = examine(&copy, backup).map_err(|e| not_restorable(backup, &e))?;
    match (connection, findings.problems.first()) {
        (Some(connection), _) => Ok((copy, connection)),
        (None, problem) => {
            let what = problem.map_or_else(String::new, |problem| format!("it is damaged: {}", problem.what));
            Err(not_restorable(backup, &what))
        }
    }
}

fn not_restorable(backup: &Path, what: &dyn std::fmt::Display) -> ToolError {
    ToolError::NotRestorable { path: backup.display().to_string(), what: what.to_string() }
}

/// What the present ledger is to be called.
struct Aside {
    path: PathBuf,
    time: i64,
}

/// The first name from `now` on that nothing has.
fn free_name(ledger: &Path, now: i64) -> Aside {
    let named = |time: i64| Aside { path: beside(ledger, &format!("{BEFORE_RESTORE}{time}")), time };
    let mut aside = named(now.max(0));
    while PARTS.iter().any(|part| beside(&aside.path, part).symlink_metadata().is_ok()) {
        aside = named(aside.time + 1);
    }
    aside
}

/// Moves a log and an index aside whose ledger an interrupted restore has moved: to where that is.
fn finish_moving(ledger: &Path, aside: &Aside) -> Result<Vec<Moved>, ToolError> {
    let mut moved = Vec::new();
    if ledger.symlink_metadata().is_ok() {
        return Ok(moved);
    }
    let interrupted = beside(ledger, RESTORING);
    let begun = counters(&interrupted).ok().and_then(|counters| counters.get(RESTORED_AT).copied());
    let begun =
        begun.map(|time| beside(ledger, &format!("{BEFORE_RESTORE}{time}"))).filter(|path| path.exists());
    for part in &PARTS[1..] {
        let from = beside(ledger, part);
        // If it is not known whose it is, it gets a name of its own.
        let to = begun.iter().map(|begun| beside(begun, part)).find(|to| to.symlink_metadata().is_err());
        let to = to.unwrap_or_else(|| beside(&aside.path, part));
        if from.symlink_metadata().is_ok() {
            fs::rename(&from, &to)
                .and_then(|()| sync_directory_of(ledger))
                .map_err(|e| not_moved(ledger, &e))?;
            moved.push(Moved { from, to });
        }
    }
    Ok(moved)
}

type Counters = BTreeMap<String, i64>;

/// The greatest of each counter in the present ledger and in all that were moved aside, and those that cannot be read.
fn known_counters(ledger: &Path) -> Result<(Counters, Vec<(PathBuf, String)>), ToolError> {
    let mut earlier = before_restores(ledger).map_err(|e| FORMAT.io(ledger, e))?;
    earlier.extend(ledger.exists().then(|| ledger.to_owned()));
    let (mut known, mut unread) = (Counters::new(), Vec::new());
    for path in earlier {
        match counters(&path) {
            Ok(counters) => {
                for (name, value) in counters {
                    let greatest = known.entry(name).or_insert(value);
                    *greatest = value.max(*greatest);
                }
            }
            Err(error) => unread.push((path, error.to_string())),
        }
    }
    Ok((known, unread))
}

/// The counters of a ledger, which may be damaged.
fn counters(path: &Path) -> Result<Counters, ToolError> {
    let copy = PrivateCopy::of(path, FORMAT.noun)?;
    let read = || -> rusqlite::Result<Counters> {
        let connection = Connection::open(copy.path())?;
        let mut statement = connection.prepare("SELECT name, value FROM counters")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    };
    let mut counters = read().map_err(|e| FORMAT.sqlite(path, &e))?;
    // Nobody has counted as far as that: it is damage, and would leave nothing to give out.
    counters.retain(|_, value| (0..i64::MAX / 2).contains(value));
    Ok(counters)
}

/// The same for revisions.
const REVISIONS: i64 = 1 << 40;

/// Raises all counters of the restored ledger above what they, and those that are known, have counted.
fn raise(connection: &Connection, known: &Counters, restored_at: i64) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    let raise =
        "INSERT INTO counters VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = max(value, excluded.value)";
    for (name, value) in known {
        transaction.execute(raise, params![name, value])?;
    }
    transaction.execute("UPDATE counters SET value = value + ?", [MARGIN])?;
    // What was a spare when the backup was made may have been handed out since: like all that was acquired since, it is nobody's
    // that is known, and is left alone.
    transaction.execute("DELETE FROM leases WHERE vm LIKE '+%'", [])?;
    // Revisions are spent quickly, and watchers that know some of another history have to begin anew.
    transaction.execute("UPDATE counters SET value = value + ? WHERE name = 'last_revision'", [REVISIONS])?;
    let horizon = "UPDATE counters SET value = (SELECT value FROM counters WHERE name = 'last_revision') WHERE name = 'horizon'";
    transaction.execute(horizon, [])?;
    transaction
        .execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", params![RESTORED_AT, restored_at])?;
    transaction.commit()
}

fn write_durably(from: &Path, to: &Path) -> io::Result<()> {
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut File::open(from)?, &mut file)?;
    file.sync_all()?;
    sync_directory_of(to)
}
