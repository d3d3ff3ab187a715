//! The ledger's file: its tables, how it is read, and how a change is written.

use std::{collections::BTreeMap, path::Path};

use cowshed_leases::{
    Book, Generation, Lease, LeaseId, Request, RequestId, Revision, State, Tombstone, VmId,
};
use cowshed_pool::store::{
    Stored,
    file::{Format, OpenError},
};
use rusqlite::{Connection, params};

use super::marks::{self, Mark, Marks};
use crate::{
    prefetch::job::{self, Job, JobId, Jobs},
    promises::{Leads, lease_of},
};

/// What ledgers of earlier versions lack: of version 3, of version 4, and of version 5.
const LATER_TABLES: &str = "
CREATE TABLE IF NOT EXISTS pins (
    image TEXT PRIMARY KEY,        -- full reference
    until INTEGER                  -- microseconds since 1970; NULL: until it is unpinned
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS uses (
    manifest TEXT PRIMARY KEY,     -- its digest
    at       INTEGER NOT NULL      -- when a disk was last made of it, microseconds since 1970
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (
    id   TEXT PRIMARY KEY,
    body TEXT NOT NULL             -- the prefetch job, JSON
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pinned_spares (
    image TEXT PRIMARY KEY,        -- of a pin
    count INTEGER NOT NULL         -- at least so many are kept ready
) STRICT, WITHOUT ROWID;
";

const LEASES_WITH_ROWIDS: &str = "
CREATE TABLE leases_of_6 (
    id TEXT NOT NULL UNIQUE, vm TEXT NOT NULL, generation INTEGER NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL
) STRICT;
INSERT INTO leases_of_6 SELECT id, vm, generation, state, body FROM leases;
DROP TABLE leases;
ALTER TABLE leases_of_6 RENAME TO leases;
";

pub(super) const FORMAT: Format = Format {
    noun: "ledger",
    application_id: 0x434f_5753, // "COWS"
    // 1: without what VMs share; 2: without pins and uses; 3: without prefetch jobs; 4: without spares; 5: leases without rowid
    version: 6,
    tables: "
-- With rowids, for a lease then is on one page, and so is what a commit writes of it.
CREATE TABLE leases (
    id         TEXT NOT NULL UNIQUE, -- 32 hexadecimal digits
    vm         TEXT NOT NULL,
    generation INTEGER NOT NULL,
    state      TEXT NOT NULL,        -- preparing, granted, …: for people; the body decides
    body       TEXT NOT NULL         -- the lease, JSON
) STRICT;
CREATE TABLE pulls (
    lease TEXT PRIMARY KEY,        -- containerd lease of a pull under way
    image TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE gone (
    revision   INTEGER PRIMARY KEY, -- in which the lease went
    id         TEXT NOT NULL,
    vm         TEXT NOT NULL,
    generation INTEGER NOT NULL
) STRICT;
CREATE TABLE requests (
    id   TEXT PRIMARY KEY,         -- as the client named it
    body TEXT NOT NULL             -- what was answered, JSON
) STRICT, WITHOUT ROWID;
CREATE TABLE counters (
    name  TEXT PRIMARY KEY,        -- last_generation, last_revision: those up to it may have been given out; horizon: nothing is forgotten after it
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO counters VALUES ('last_generation', 0), ('last_revision', 0), ('horizon', 0);
",
    later_tables: LATER_TABLES,
    changes: &[(6, LEASES_WITH_ROWIDS)],
    advice: "it is all that says which VM holds which disk: put back a backup (`cowshed ledger restore`), or, only if no VM runs on this host, move \
             it away and start with none",
};

/// Which version of the format has brought the jobs.
const JOBS_SINCE: i64 = 4;

/// So many generations and revisions are reserved at a time: of most leases that change, nothing else is then to be written.
/// Those that were not given out when the ledger is opened again are skipped.
pub(super) const RESERVE: u64 = 100;

/// What may be given out without another write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reserved {
    generation: u64,
    revision: u64,
}

/// What is in it.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub(super) book: Book,
    pub(super) reserved: Reserved,
    /// Pulls under way: containerd lease → image.
    pub(super) pulls: BTreeMap<String, String>,
    /// Of images.
    pub(super) marks: Marks,
    /// Prefetch jobs.
    pub(super) jobs: Jobs,
    /// Who hears of each lease that changes.
    pub(super) leads: Leads,
}

/// A change of it.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Lease(cowshed_leases::Change),
    /// Generations and revisions up to these may be given out.
    Reserved(Reserved),
    /// The pull that has this containerd lease is of this image; `None`: it is over.
    Pull(String, Option<String>),
    Image(Mark),
    Job(job::Change),
}

impl Records {
    /// What is to be reserved, if that is due.
    pub(super) fn to_reserve(&self) -> Option<Reserved> {
        let (generation, revision) = (self.book.last_generation(), self.book.last_revision().0);
        let covers =
            |reserved: u64, last: u64| if last > reserved { last.saturating_add(RESERVE) } else { reserved };
        let reserved = Reserved {
            generation: covers(self.reserved.generation, generation),
            revision: covers(self.reserved.revision, revision),
        };
        (reserved != self.reserved).then_some(reserved)
    }
}

impl Stored for Records {
    type Change = Change;

    fn apply(&mut self, change: Change) -> Change {
        match change {
            Change::Lease(change) => {
                let lease = lease_of(&change);
                let undo = self.book.apply(change);
                self.leads.changed(&self.book, lease.as_ref());
                Change::Lease(undo)
            }
            Change::Reserved(reserved) => Change::Reserved(std::mem::replace(&mut self.reserved, reserved)),
            Change::Pull(lease, Some(image)) => {
                let before = self.pulls.insert(lease.clone(), image);
                Change::Pull(lease, before)
            }
            Change::Pull(lease, None) => {
                let before = self.pulls.remove(&lease);
                Change::Pull(lease, before)
            }
            Change::Image(mark) => Change::Image(self.marks.apply(mark)),
            Change::Job(job) => Change::Job(self.jobs.apply(job)),
        }
    }

    fn write(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
        let execute = |sql: &str, values: &[&str]| {
            connection.prepare_cached(sql)?.execute(rusqlite::params_from_iter(values)).map(drop)
        };
        match change {
            Change::Lease(change) => write_lease(connection, change),
            Change::Reserved(reserved) => {
                count(connection, "last_generation", reserved.generation)?;
                count(connection, "last_revision", reserved.revision)
            }
            Change::Pull(lease, Some(image)) => {
                execute("INSERT OR REPLACE INTO pulls VALUES (?, ?)", &[lease, image])
            }
            Change::Pull(lease, None) => execute("DELETE FROM pulls WHERE lease = ?", &[lease]),
            Change::Image(mark) => marks::write(connection, mark),
            Change::Job((id, Some(job))) => {
                execute("INSERT OR REPLACE INTO jobs VALUES (?, ?)", &[&id.to_string(), &json(&**job)?])
            }
            Change::Job((id, None)) => execute("DELETE FROM jobs WHERE id = ?", &[&id.to_string()]),
        }
    }
}

fn write_lease(connection: &Connection, change: &cowshed_leases::Change) -> rusqlite::Result<()> {
    use cowshed_leases::Change::{Bury, Delete, Expunge, Put, Request, Undelete, Unmake};
    let forget = |id: &LeaseId| {
        connection.prepare_cached("DELETE FROM leases WHERE id = ?")?.execute([id.as_str()]).map(drop)
    };
    let unbury = |revision: &Revision| {
        connection
            .prepare_cached("DELETE FROM gone WHERE revision = ?")?
            .execute([integer(revision.0)])
            .map(drop)
    };
    match change {
        Put(lease) => put(connection, lease),
        Unmake(id) => forget(id),
        Delete(tombstone) => forget(&tombstone.id).and_then(|()| bury(connection, tombstone)),
        Bury(tombstone) => bury(connection, tombstone),
        Undelete(lease, revision) => unbury(revision).and_then(|()| put(connection, lease)),
        Expunge(revision) => unbury(revision).and_then(|()| count(connection, "horizon", revision.0)),
        Request(id, Some(request)) => connection
            .prepare_cached("INSERT OR REPLACE INTO requests VALUES (?, ?)")?
            .execute([id.as_str(), &json(request)?])
            .map(drop),
        Request(id, None) => {
            connection.prepare_cached("DELETE FROM requests WHERE id = ?")?.execute([id.as_str()]).map(drop)
        }
    }
}

fn put(connection: &Connection, lease: &Lease) -> rusqlite::Result<()> {
    connection
        .prepare_cached(PUT)?
        .execute(params![
            lease.id.as_str(),
            lease.vm.as_str(),
            integer(lease.generation.0),
            state_name(&lease.state),
            json(lease)?
        ])
        .map(drop)
}

/// In its place, if it is there: its id's index stays as it is.
const PUT: &str = "INSERT INTO leases VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
    vm = excluded.vm, generation = excluded.generation, state = excluded.state, body = excluded.body";

fn bury(connection: &Connection, tombstone: &Tombstone) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO gone VALUES (?, ?, ?, ?)")?
        .execute(params![
            integer(tombstone.revision.0),
            tombstone.id.as_str(),
            tombstone.vm.as_str(),
            integer(tombstone.generation.0)
        ])
        .map(drop)
}

/// A counter only ever grows.
fn count(connection: &Connection, name: &str, value: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE counters SET value = max(value, ?) WHERE name = ?")?
        .execute(params![integer(value), name])
        .map(drop)
}

fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn json(value: &impl serde::Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))
}

/// The state's name, in the `state` column and in metrics.
pub(crate) fn state_name(state: &State) -> &'static str {
    match state {
        State::Preparing => "preparing",
        State::Granted(_) => "granted",
        State::Suspect { .. } => "suspect",
        State::Releasing { .. } => "releasing",
        State::Failed { .. } => "failed",
    }
}

/// Reads everything.
pub(super) fn load(connection: &Connection, path: &Path) -> Result<Records, OpenError> {
    let rows = |sql: &str| -> Result<Vec<(String, String)>, OpenError> {
        let read = || -> rusqlite::Result<Vec<(String, String)>> {
            let mut statement = connection.prepare(sql)?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        read().map_err(|e| FORMAT.sqlite(path, &e))
    };
    let counter = |name: &str| {
        let sql = "SELECT value FROM counters WHERE name = ?";
        let value = connection.query_row(sql, [name], |row| row.get::<_, i64>(0));
        value.map(i64::unsigned_abs).map_err(|e| FORMAT.sqlite(path, &e))
    };
    let damaged = |what: String| FORMAT.damaged(path, what);
    let leases = rows("SELECT id, body FROM leases ORDER BY id")?;
    let leases = leases.iter().map(|(id, body)| parse_lease(id, body));
    let requests = rows("SELECT id, body FROM requests ORDER BY id")?;
    let requests = requests.iter().map(|(id, body)| parse_request(id, body));
    let stored = cowshed_leases::Stored {
        leases: leases.collect::<Result<_, _>>().map_err(damaged)?,
        gone: tombstones(connection, path)?,
        requests: requests.collect::<Result<_, _>>().map_err(damaged)?,
        horizon: Revision(counter("horizon")?),
        last_generation: counter("last_generation")?,
        last_revision: Revision(counter("last_revision")?),
    };
    let book = Book::load(stored).map_err(damaged)?;
    let pulls = rows("SELECT lease, image FROM pulls")?.into_iter().collect();
    let format = connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0));
    let format = format.map_err(|e| FORMAT.sqlite(path, &e))?;
    let jobs = if format < JOBS_SINCE { Vec::new() } else { rows("SELECT id, body FROM jobs")? };
    let jobs = jobs.iter().map(|(id, body)| parse_job(id, body)).collect::<Result<_, _>>();
    let jobs = jobs.and_then(Jobs::load).map_err(damaged)?;
    let reserved = Reserved { generation: book.last_generation(), revision: book.last_revision().0 };
    Ok(Records {
        book,
        reserved,
        pulls,
        marks: Marks::load(connection, path)?,
        jobs,
        leads: Leads::default(),
    })
}

fn parse_job(id: &str, body: &str) -> Result<Job, String> {
    let job: Job = serde_json::from_str(body).map_err(|error| format!("prefetch job {id}: {error}"))?;
    let name: JobId = id.parse().map_err(|error| format!("prefetch job {id}: {error}"))?;
    if job.id == name { Ok(job) } else { Err(format!("prefetch job {id} says that it is {}", job.id)) }
}

fn tombstones(connection: &Connection, path: &Path) -> Result<Vec<Tombstone>, OpenError> {
    type Row = (i64, String, String, i64);
    let read = || -> rusqlite::Result<Vec<Row>> {
        let mut statement =
            connection.prepare("SELECT revision, id, vm, generation FROM gone ORDER BY revision")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
        rows.collect()
    };
    let rows = read().map_err(|e| FORMAT.sqlite(path, &e))?;
    let parse = |(revision, id, vm, generation): Row| {
        let wrong = |error: String| FORMAT.damaged(path, format!("the lease {id} that has gone: {error}"));
        Ok(Tombstone {
            id: id.parse().map_err(|e: cowshed_leases::LeaseIdError| wrong(e.to_string()))?,
            vm: VmId::try_from(vm).map_err(|e| wrong(e.to_string()))?,
            generation: Generation(generation.unsigned_abs()),
            revision: Revision(revision.unsigned_abs()),
        })
    };
    rows.into_iter().map(parse).collect()
}

fn parse_lease(id: &str, body: &str) -> Result<Lease, String> {
    let lease: Lease = serde_json::from_str(body).map_err(|error| format!("lease {id}: {error}"))?;
    if lease.id.as_str() == id { Ok(lease) } else { Err(format!("lease {id} says that it is {}", lease.id)) }
}

fn parse_request(id: &str, body: &str) -> Result<(RequestId, Request), String> {
    let request = serde_json::from_str(body).map_err(|error| format!("request {id}: {error}"))?;
    let id = id.parse().map_err(|error| format!("request {id}: {error}"))?;
    Ok((id, request))
}
