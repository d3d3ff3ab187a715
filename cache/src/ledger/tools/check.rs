//! Whether a ledger is sound: what the service would say of it, and all that there is to say of a damaged one.

use std::{collections::BTreeMap, path::Path};

use cowshed_leases::Lease;
use cowshed_pool::store::file::OpenError;
use rusqlite::Connection;

use super::{
    super::schema::{self, FORMAT, Records},
    ToolError,
    copy::PrivateCopy,
};

/// So many of SQLite's own findings are listed at most.
const LISTED: usize = 100;

/// What a ledger is found to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The format's number.
    pub format: i64,
    /// How many leases it has, by their state's name.
    pub leases: BTreeMap<String, u64>,
    /// How many pins of images it has.
    pub pins: usize,
    /// No greater generation was ever given out.
    pub last_generation: u64,
    /// What is wrong with it; if anything is, the other fields say nothing.
    pub problems: Vec<Problem>,
}

/// Something that is wrong with a ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What.
    pub what: String,
    /// What to do.
    pub way_out: &'static str,
}

const STRUCTURE: &str = "its disk or memory may be failing, see dmesg; then, with the service stopped, \
                         `cowshed ledger restore BACKUP`";
const RECORD: &str = "if a later version has written it, install that one; otherwise, with the service stopped, \
                      `cowshed ledger restore BACKUP`";
const FIT: &str = "no service has written that: with the service stopped, `cowshed ledger restore BACKUP`";

/// Looks at the ledger `path`, of which nothing is changed, its log and index included; the service may run.
///
/// # Errors
/// If there is none, it cannot be read, or a later version has written it. Damage is no error, but what is found.
pub fn check(path: &Path) -> Result<Findings, ToolError> {
    Ok(examine(&PrivateCopy::of_ledger(path)?, path)?.0)
}

/// Looks at a copy of `path`, and leaves it open if it is sound.
pub(super) fn examine(copy: &PrivateCopy, path: &Path) -> Result<(Findings, Option<Connection>), OpenError> {
    if std::fs::metadata(copy.path()).is_ok_and(|copied| copied.len() == 0) {
        let problem = Problem { what: "it is empty".to_owned(), way_out: STRUCTURE };
        return Ok((Findings { problems: vec![problem], ..Findings::default() }, None));
    }
    // As it is, before it is opened in the way that may bring it to this version's.
    let format = FORMAT.open_for_reading(&copy.path()).map(|c| format_of(&c));
    match FORMAT.open_copy(&copy.path(), path, |connection| schema::load(connection, path)) {
        Ok((connection, records)) => {
            let sound = sound(format?.unwrap_or_default(), &connection, &records);
            Ok((sound.map_err(|e| FORMAT.sqlite(path, &e))?, Some(connection)))
        }
        Err(OpenError::Damaged { what, .. }) => {
            Ok((Findings { problems: problems(copy, what), ..Findings::default() }, None))
        }
        Err(other) => Err(other),
    }
}

fn format_of(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn sound(format: i64, connection: &Connection, records: &Records) -> rusqlite::Result<Findings> {
    let mut statement = connection.prepare("SELECT state, count(*) FROM leases GROUP BY state")?;
    let leases = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs())))?;
    let leases = leases.collect::<rusqlite::Result<_>>()?;
    let (pins, last_generation) = (records.marks.pins(), records.book.last_generation());
    Ok(Findings { format, leases, pins, last_generation, problems: Vec::new() })
}

/// All that is wrong; `what` is what the service would say.
fn problems(copy: &PrivateCopy, what: String) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::new();
    if let Ok(connection) = FORMAT.open_for_reading(&copy.path()) {
        let broken = broken_structure(&connection).into_iter();
        problems.extend(broken.map(|what| Problem { what, way_out: STRUCTURE }));
        let unread = unread_leases(&connection).into_iter();
        problems.extend(unread.map(|what| Problem { what, way_out: RECORD }));
    }
    if problems.is_empty() {
        // The structure is whole and each lease can be read.
        problems.push(Problem { what, way_out: FIT });
    } else if !problems.iter().any(|problem| problem.what.contains(&what) || what.contains(&problem.what)) {
        problems.push(Problem { what, way_out: FIT });
    }
    problems
}

/// SQLite's own verdict, up to where it cannot go on; nothing if that is "ok".
fn broken_structure(connection: &Connection) -> Vec<String> {
    let mut broken = Vec::new();
    let mut look = || -> rusqlite::Result<()> {
        let mut statement = connection.prepare(&format!("PRAGMA integrity_check({LISTED})"))?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            broken.push(row.get(0)?);
        }
        Ok(())
    };
    if let Err(error) = look() {
        broken.push(error.to_string());
    }
    broken.retain(|row| row != "ok");
    broken
}

/// The leases whose records cannot be read.
fn unread_leases(connection: &Connection) -> Vec<String> {
    let Ok(mut statement) = connection.prepare("SELECT id, body FROM leases ORDER BY id") else {
        // Of a table that is not there the structure says more.
        return Vec::new();
    };
    let Ok(rows) = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))) else { return Vec::new() };
    rows.map_while(Result::ok).filter_map(|(id, body): (String, String)| unread(&id, &body)).collect()
}

fn unread(id: &str, body: &str) -> Option<String> {
    match serde_json::from_str::<Lease>(body) {
        Err(error) => Some(format!("lease {id}: {error}")),
        Ok(lease) if lease.id.as_str() != id => Some(format!("lease {id} says that it is {}", lease.id)),
        Ok(_) => None,
    }
}
