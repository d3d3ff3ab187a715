//! The snapshotter's store: the truth of name ↔ thin id ↔ parent ↔ state.

use std::path::Path;

use rusqlite::{Connection, Row, params};

use super::{
    Stored,
    again::IfMissing,
    file::{Format, OpenError},
};
use crate::{
    size::Bytes,
    tree::{Change, Kind, Snapshot, SnapshotId, State, ThinId, Tree, UnixNanos},
};

const FORMAT: Format = Format {
    noun: "snapshot store",
    application_id: 0x434f_5750, // "COWP"
    version: 3, // 1: without raw bases; 2: without heirs
    tables: "
CREATE TABLE snapshots (
    id      INTEGER PRIMARY KEY,   -- never used again; part of the device's name
    key     TEXT NOT NULL,         -- containerd's name; '' for what is ours
    kind    TEXT NOT NULL,         -- active, view, committed, blank, raw, grown, heir
    state   TEXT NOT NULL,         -- preparing, ready, removing
    parent  INTEGER,               -- a committed one's id
    thin    INTEGER NOT NULL UNIQUE,
    bytes   INTEGER NOT NULL,      -- size of the device
    mapped  INTEGER,               -- bytes of blocks that it maps, once it was committed and closed
    layer   INTEGER NOT NULL,      -- 1: unpacked from an image's layer; 2: not all of what was written is there; 3: both
    labels  TEXT NOT NULL,         -- JSON
    created INTEGER NOT NULL,      -- nanoseconds since 1970
    updated INTEGER NOT NULL
) STRICT;
CREATE TABLE facts (
    name  TEXT PRIMARY KEY,        -- next_id, store_id, pool
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO facts VALUES ('next_id', '1'), ('store_id', lower(hex(randomblob(4)))), ('pool', '');
",
    later_tables: "",
    changes: &[],
    advice: "it is all that says which snapshot is in which thin device. Put back a backup of it of the same time as \
             containerd's own; or, if no VM runs on this host, remove all images and snapshots of this snapshotter, move it \
             away and start with an empty pool",
};

/// Eight hexadecimal digits; part of every device's name.
pub(crate) type StoreId = String;

impl Stored for Tree {
    type Change = Change;

    fn apply(&mut self, change: Change) -> Change {
        Self::apply(self, change)
    }

    fn write(connection: &Connection, change: &Change) -> rusqlite::Result<()> {
        match change {
            Change::Put(snapshot) => put(connection, snapshot),
            Change::Delete(id) => connection
                .prepare_cached("DELETE FROM snapshots WHERE id = ?")?
                .execute([signed(id.0)])
                .map(drop),
            Change::Pool(uuid) => {
                connection.execute("UPDATE facts SET value = ? WHERE name = 'pool'", [uuid]).map(drop)
            }
        }
    }
}

fn put(connection: &Connection, s: &Snapshot) -> rusqlite::Result<()> {
    let labels =
        serde_json::to_string(&s.labels).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")?
        .execute(params![
            signed(s.id.0),
            s.key,
            s.kind.as_str(),
            s.state.as_str(),
            s.parent.map(|id| signed(id.0)),
            s.thin.0,
            signed(s.bytes.0),
            s.mapped.map(signed),
            i64::from(s.layer) | i64::from(s.torn) << 1,
            labels,
            s.created.0,
            s.updated.0,
        ])?;
    if s.state == State::Preparing {
        connection
            .prepare_cached("UPDATE facts SET value = max(CAST(value AS INTEGER), ?) WHERE name = 'next_id'")?
            .execute([signed(s.id.0 + 1)])?;
    }
    Ok(())
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Opens `path`, making it if it is not there.
pub(crate) fn open(path: &Path, if_missing: IfMissing) -> Result<(Connection, Tree, StoreId), OpenError> {
    let load = |connection: &Connection| load(connection, path);
    let (connection, (tree, store_id)) = match if_missing {
        IfMissing::Make => FORMAT.open(path, load)?,
        IfMissing::Refuse => FORMAT.open_there(path, load)?,
    };
    Ok((connection, tree, store_id))
}

/// Reads what can be read of a damaged store.
pub(crate) fn open_for_reading(path: &Path) -> Result<(Tree, StoreId), OpenError> {
    FORMAT.read(path, |connection| load(connection, path))
}

fn load(connection: &Connection, path: &Path) -> Result<(Tree, StoreId), OpenError> {
    let sqlite = |e: rusqlite::Error| FORMAT.sqlite(path, &e);
    let fact = |name: &str| {
        connection
            .query_row("SELECT value FROM facts WHERE name = ?", [name], |row| row.get::<_, String>(0))
            .map_err(sqlite)
    };
    let next: u64 =
        fact("next_id")?.parse().map_err(|e| FORMAT.damaged(path, format!("its next id: {e}")))?;
    let (store_id, pool) = (fact("store_id")?, fact("pool")?);
    let mut statement = connection.prepare("SELECT * FROM snapshots ORDER BY id").map_err(sqlite)?;
    let rows = statement.query_map([], read).map_err(sqlite)?;
    let snapshots = rows.collect::<rusqlite::Result<Vec<_>>>().map_err(sqlite)?;
    let snapshots: Result<Vec<_>, String> = snapshots.into_iter().collect();
    let tree = snapshots.and_then(|snapshots| Tree::load(snapshots, next, pool));
    Ok((tree.map_err(|what| FORMAT.damaged(path, what))?, store_id))
}

fn read(row: &Row<'_>) -> rusqlite::Result<Result<Snapshot, String>> {
    let id: u64 = row.get::<_, i64>("id")?.unsigned_abs();
    let (kind, state): (String, String) = (row.get("kind")?, row.get("state")?);
    let labels: String = row.get("labels")?;
    let thin: u32 = row.get("thin")?;
    let parent: Option<i64> = row.get("parent")?;
    let mapped: Option<i64> = row.get("mapped")?;
    let (key, layer): (_, i64) = (row.get("key")?, row.get("layer")?);
    let bytes: i64 = row.get("bytes")?;
    let (created, updated) = (UnixNanos(row.get("created")?), UnixNanos(row.get("updated")?));
    let parse = || {
        Ok(Snapshot {
            id: SnapshotId(id),
            key,
            kind: Kind::parse(&kind).ok_or_else(|| format!("snapshot {id}: kind {kind:?}"))?,
            state: State::parse(&state).ok_or_else(|| format!("snapshot {id}: state {state:?}"))?,
            parent: parent.map(|id| SnapshotId(id.unsigned_abs())),
            thin: ThinId(thin),
            bytes: Bytes(bytes.unsigned_abs()),
            mapped: mapped.map(i64::unsigned_abs),
            layer: layer & 1 != 0,
            torn: layer & 2 != 0,
            labels: serde_json::from_str(&labels).map_err(|e| format!("snapshot {id}: labels: {e}"))?,
            created,
            updated,
        })
    };
    Ok(parse())
}
