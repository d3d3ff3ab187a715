//! The ledger's file: its tables, how it is read, and how a change is written.

use std::{collections::BTreeMap, path::Path};

use cowshed_leases::{Book, Lease, State};
use cowshed_pool::store::{
    Stored,
    file::{Format, OpenError},
};
use rusqlite::{Connection, params};

pub(super) const FORMAT: Format = Format {
    noun: "ledger",
    application_id: 0x434f_5753, // "COWS"
    version: 1,
    tables: "
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
",
    advice: "it is all that says which VM holds which disk: put back a backup (`cowshed ledger restore`), or, only if no VM runs on this host, move \
             it away and start with none",
};

/// What is in it.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub(super) book: Book,
    /// Pulls under way: containerd lease → image.
    pub(super) pulls: BTreeMap<String, String>,
}

/// A change of it.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Lease(cowshed_leases::Change),
    /// The pull that has this containerd lease is of this image; `None`: it is over.
    Pull(String, Option<String>),
}

impl Stored for Records {
    type Change = Change;

    fn apply(&mut self, change: Change) -> Change {
        match change {
            Change::Lease(change) => Change::Lease(self.book.apply(change)),
            Change::Pull(lease, Some(image)) => {
                let before = self.pulls.insert(lease.clone(), image);
                Change::Pull(lease, before)
            }
            Change::Pull(lease, None) => {
                let before = self.pulls.remove(&lease);
                Change::Pull(lease, before)
            }
        }
    }

    fn write(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
        use cowshed_leases::Change::{Delete, Put};
        let execute = |sql: &str, values: &[&str]| {
            connection.prepare_cached(sql)?.execute(rusqlite::params_from_iter(values)).map(drop)
        };
        match change {
            Change::Lease(Put(lease)) => put(connection, lease),
            Change::Lease(Delete(id)) => execute("DELETE FROM leases WHERE id = ?", &[id.as_str()]),
            Change::Pull(lease, Some(image)) => {
                execute("INSERT OR REPLACE INTO pulls VALUES (?, ?)", &[lease, image])
            }
            Change::Pull(lease, None) => execute("DELETE FROM pulls WHERE lease = ?", &[lease]),
        }
    }
}

fn put(connection: &Connection, lease: &Lease) -> rusqlite::Result<()> {
    let body = serde_json::to_string(lease).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))?;
    let generation = i64::try_from(lease.generation.0).unwrap_or(i64::MAX);
    connection.prepare_cached("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)")?.execute(params![
        lease.id.as_str(),
        lease.vm.as_str(),
        generation,
        state_name(&lease.state),
        body
    ])?;
    connection
        .prepare_cached("UPDATE counters SET value = max(value, ?) WHERE name = 'last_generation'")?
        .execute([generation])?;
    Ok(())
}

/// The state's name in the `state` column.
fn state_name(state: &State) -> &'static str {
    match state {
        State::Preparing => "preparing",
        State::Granted(_) => "granted",
        State::Releasing { .. } => "releasing",
    }
}

/// Reads everything.
pub(super) fn load(connection: &Connection, path: &Path) -> Result<Records, OpenError> {
    let rows = |sql: &str| -> rusqlite::Result<Vec<(String, String)>> {
        let mut statement = connection.prepare(sql)?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    };
    let sqlite = |e: rusqlite::Error| FORMAT.sqlite(path, &e);
    let damaged = |what: String| FORMAT.damaged(path, what);
    let last = connection
        .query_row("SELECT value FROM counters WHERE name = 'last_generation'", [], |row| {
            row.get::<_, i64>(0)
        })
        .map_err(sqlite)?;
    let leases = rows("SELECT id, body FROM leases ORDER BY id").map_err(sqlite)?;
    let leases: Result<Vec<Lease>, String> = leases.iter().map(|(id, body)| parse(id, body)).collect();
    let book = leases.and_then(|leases| Book::load(leases, last.unsigned_abs())).map_err(damaged)?;
    let pulls = rows("SELECT lease, image FROM pulls").map_err(sqlite)?.into_iter().collect();
    Ok(Records { book, pulls })
}

fn parse(id: &str, body: &str) -> Result<Lease, String> {
    let lease: Lease = serde_json::from_str(body).map_err(|error| format!("lease {id}: {error}"))?;
    if lease.id.as_str() == id { Ok(lease) } else { Err(format!("lease {id} says that it is {}", lease.id)) }
}
