//! The ledger's file: how it is made, recognised and read.

use std::{fs, io, path::Path};

use cowshed_leases::{Book, Lease, State};
use rusqlite::{Connection, OpenFlags};

use super::{OpenError, Published};

/// "COWS": tells a ledger from any other SQLite file.
const APPLICATION_ID: i64 = 0x434f_5753;
/// Counts incompatible changes of the format.
const FORMAT: i64 = 1;

const TABLES: &str = "
CREATE TABLE leases (
    id         TEXT PRIMARY KEY,   -- 32 hexadecimal digits
    vm         TEXT NOT NULL,
    generation INTEGER NOT NULL,
    state      TEXT NOT NULL,      -- preparing, granted, releasing: for people; the body decides
    body       TEXT NOT NULL       -- the lease, JSON
) STRICT, WITHOUT ROWID;
CREATE TABLE pulls (
    lease TEXT PRIMARY KEY,        -- containerd lease of a pull under way
    image TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE counters (
    name  TEXT PRIMARY KEY,        -- last_generation
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO counters VALUES ('last_generation', 0);
";

/// Opens the ledger, making it if the file is not there. A file without contents is damaged, not new.
pub(super) fn open(path: &Path) -> Result<Connection, OpenError> {
    match fs::metadata(path) {
        Ok(found) if found.len() == 0 => return Err(OpenError::damaged(path, "it is empty")),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path)?,
        Err(error) => return Err(OpenError::io(path, error)),
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|e| OpenError::sqlite(path, &e))?;
    check(&connection, path)?;
    settings(&connection).map_err(|e| OpenError::sqlite(path, &e))?;
    // Finds out now, not at the first Acquire, that nothing can be written.
    connection
        .execute_batch("BEGIN IMMEDIATE; UPDATE counters SET value = value; COMMIT")
        .map_err(|e| OpenError::sqlite(path, &e))?;
    Ok(connection)
}

/// Made whole beside its name and then renamed: a crash leaves either no ledger or a good one.
fn create(path: &Path) -> Result<(), OpenError> {
    let fresh = path.with_extension("db.new");
    for leftover in [fresh.clone(), path.with_extension("db.new-journal")] {
        match fs::remove_file(&leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(OpenError::io(path, error)),
            _ => {}
        }
    }
    let made = Connection::open(&fresh).and_then(|connection| {
        connection.execute_batch(&format!(
            "PRAGMA synchronous = FULL; BEGIN; {TABLES} \
             PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;"
        ))
    });
    made.map_err(|e| OpenError::sqlite(path, &e))?;
    fs::rename(&fresh, path).map_err(|e| OpenError::io(path, e))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::File::open(directory).and_then(|d| d.sync_all()).map_err(|e| OpenError::io(path, e))
}

fn check(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    let number = |pragma: &str| {
        connection
            .pragma_query_value(None, pragma, |row| row.get::<_, i64>(0))
            .map_err(|e| OpenError::sqlite(path, &e))
    };
    if number("application_id")? != APPLICATION_ID {
        return Err(OpenError::damaged(path, "it is a SQLite file, but not a ledger"));
    }
    let found = number("user_version")?;
    if found > FORMAT {
        return Err(OpenError::Newer { path: path.display().to_string(), found, known: FORMAT });
    }
    let verdict: String = connection
        .pragma_query_value(None, "integrity_check", |row| row.get(0))
        .map_err(|e| OpenError::sqlite(path, &e))?;
    if verdict == "ok" { Ok(()) } else { Err(OpenError::damaged(path, verdict)) }
}

fn settings(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "busy_timeout", 5000)
}

/// Reads everything.
pub(super) fn load(connection: &Connection, path: &Path) -> Result<Published, OpenError> {
    let rows = |sql: &str| -> rusqlite::Result<Vec<(String, String)>> {
        let mut statement = connection.prepare(sql)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    };
    let sqlite = |e: rusqlite::Error| OpenError::sqlite(path, &e);
    let last = connection
        .query_row("SELECT value FROM counters WHERE name = 'last_generation'", [], |row| {
            row.get::<_, i64>(0)
        })
        .map_err(sqlite)?;
    let leases = rows("SELECT id, body FROM leases ORDER BY id").map_err(sqlite)?;
    let leases =
        leases.into_iter().map(|(id, body)| parse(&id, &body).map_err(|what| OpenError::damaged(path, what)));
    let leases = leases.collect::<Result<Vec<_>, _>>()?;
    let book = Book::load(leases, last.unsigned_abs()).map_err(|what| OpenError::damaged(path, what))?;
    let pulls = rows("SELECT lease, image FROM pulls").map_err(sqlite)?.into_iter().collect();
    Ok(Published { book, pulls })
}

fn parse(id: &str, body: &str) -> Result<Lease, String> {
    let lease: Lease = serde_json::from_str(body).map_err(|error| format!("lease {id}: {error}"))?;
    if lease.id.as_str() == id { Ok(lease) } else { Err(format!("lease {id} says that it is {}", lease.id)) }
}

/// The state's name in the `state` column.
pub(super) fn state_name(state: &State) -> &'static str {
    match state {
        State::Preparing => "preparing",
        State::Granted(_) => "granted",
        State::Releasing { .. } => "releasing",
    }
}
