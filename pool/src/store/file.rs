//! A store's file: how it is made, recognised and checked.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OpenFlags, config::DbConfig};
use thiserror::Error as ThisError;

/// Added to a store's name: what is about to be put in its place.
pub const RESTORING: &str = ".restoring";
/// Added to a store's name, with the time after it: what was there before something else was put in its place.
pub const BEFORE_RESTORE: &str = ".before-restore-";

/// What a kind of store is.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// What people call it.
    pub noun: &'static str,
    /// Tells it from any other SQLite file.
    pub application_id: i64,
    /// Counts incompatible changes.
    pub version: i64,
    /// SQL that makes its tables.
    pub tables: &'static str,
    /// SQL that makes those that stores of earlier versions lack, unless they are there.
    pub later_tables: &'static str,
    /// SQL that brings a store of any version before this one to it, in their order.
    pub changes: &'static [(i64, &'static str)],
    /// Why it is precious, and what to do if it is damaged; a clause.
    pub advice: &'static str,
}

/// A store that cannot be opened. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum OpenError {
    /// Its contents are not what was written.
    #[error(
        "the {noun} {path} is damaged: {what}. It is left as it is, for {advice}. {path}-wal and {path}-shm are part of \
         it: move all three away together, and leave none of them beside a backup that is put back"
    )]
    Damaged {
        /// What kind of store.
        noun: &'static str,
        /// The file.
        path: String,
        /// What was found.
        what: String,
        /// What to do.
        advice: &'static str,
    },
    /// A later version has written it.
    #[error(
        "the {noun} {path} has format {found}, this version knows {known}: install the version that wrote it"
    )]
    Newer {
        /// What kind of store.
        noun: &'static str,
        /// The file.
        path: String,
        /// Its format.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// It was moved aside, and nothing was put in its place.
    #[error(
        "the {noun} {path} is missing and {left} is there: a restore was interrupted. A new {noun} is not made: the old \
         one says which disks are in use. Run `cowshed {noun} restore BACKUP` again, with the backup or with \
         {path}{BEFORE_RESTORE}…, which is what was there before; only if no VM runs on this host and an empty {noun} is \
         wanted, move {path}{RESTORING} and {path}{BEFORE_RESTORE}… out of the directory"
    )]
    Restoring {
        /// What kind of store.
        noun: &'static str,
        /// The file.
        path: String,
        /// What the restore has left.
        left: String,
    },
    /// It was there a while ago.
    #[error(
        "the {noun} {path} is missing, and something of it was there when the service started. No new {noun} is made: \
         put it, or a backup of it, back; only if no VM runs on this host and an empty {noun} is wanted, restart the service"
    )]
    Missing {
        /// What kind of store.
        noun: &'static str,
        /// The file.
        path: String,
    },
    /// The operating system refused.
    #[error("the {noun} {path} cannot be opened: {what}; check that its directory is writable and not full")]
    Io {
        /// What kind of store.
        noun: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        what: String,
    },
}

impl Format {
    /// The error for contents that are not what was written.
    pub fn damaged(&self, path: &Path, what: impl ToString) -> OpenError {
        OpenError::Damaged {
            noun: self.noun,
            path: path.display().to_string(),
            what: what.to_string(),
            advice: self.advice,
        }
    }

    /// The error for a file that cannot be reached.
    pub fn io(&self, path: &Path, source: impl ToString) -> OpenError {
        OpenError::Io { noun: self.noun, path: path.display().to_string(), what: source.to_string() }
    }

    /// Tells a damaged file from one that cannot be reached.
    pub fn sqlite(&self, path: &Path, error: &rusqlite::Error) -> OpenError {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match error.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) | None => self.damaged(path, error),
            Some(_) => self.io(path, error),
        }
    }

    /// Opens the store and lets `load` read it, making it if the file is not there. A file without contents is damaged,
    /// not new.
    ///
    /// # Errors
    /// If it is damaged, newer, of another kind, or cannot be read and written, and if `load` refuses it. File and log
    /// then are as they were.
    pub fn open<T>(
        &self,
        path: &Path,
        load: impl FnOnce(&Connection) -> Result<T, OpenError>,
    ) -> Result<(Connection, T), OpenError> {
        if fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            self.expect_nothing_left(path)?;
            self.create(path)?;
        }
        self.open_there(path, load)
    }

    /// The same of a store that is there: none is made.
    ///
    /// # Errors
    /// As there, and if it is missing.
    pub fn open_there<T>(
        &self,
        path: &Path,
        load: impl FnOnce(&Connection) -> Result<T, OpenError>,
    ) -> Result<(Connection, T), OpenError> {
        match fs::metadata(path) {
            Ok(found) if found.len() == 0 => return Err(self.damaged(path, "it is empty")),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.expect_nothing_left(path)?;
                return Err(OpenError::Missing { noun: self.noun, path: path.display().to_string() });
            }
            Err(error) => return Err(self.io(path, error)),
        }
        let made_room = make_room_for_log(path);
        let opened = self.open_copy(path, path, load);
        if opened.is_err() && made_room {
            let _none = fs::remove_file(log_of(path));
        }
        opened
    }

    /// Opens `copy` as [`Format::open`] opens what is there; `path`, of which errors speak, is what it is a copy of.
    ///
    /// # Errors
    /// As there. What is not there is not made.
    pub fn open_copy<T>(
        &self,
        copy: &Path,
        path: &Path,
        load: impl FnOnce(&Connection) -> Result<T, OpenError>,
    ) -> Result<(Connection, T), OpenError> {
        let sqlite = |e| self.sqlite(path, &e);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(copy, flags).map_err(sqlite)?;
        // Closing moves the log into the file, and removes it: not before all is found good.
        let keep_log = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;
        connection.set_db_config(keep_log, true).map_err(sqlite)?;
        let version = self.check(&connection, path)?;
        let loaded = load(&connection)?;
        settings(&connection).map_err(sqlite)?;
        // Finds out now, not at the first request, that nothing can be written.
        let changes = self.changes.iter().filter(|(to, _)| version < *to).map(|(_, sql)| *sql);
        let written = connection.execute_batch(&format!(
            "BEGIN IMMEDIATE; {} {} PRAGMA user_version = {}; COMMIT",
            changes.collect::<String>(),
            self.later_tables,
            self.version
        ));
        written.map_err(sqlite)?;
        connection.set_db_config(keep_log, false).map_err(sqlite)?;
        Ok((connection, loaded))
    }

    /// Opens a store to read what can be read of it.
    ///
    /// # Errors
    /// If it is no SQLite file.
    pub fn open_for_reading(&self, path: &Path) -> Result<Connection, OpenError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Connection::open_with_flags(path, flags).map_err(|e| self.sqlite(path, &e))
    }

    /// The same at once, with nothing left of that but an index.
    ///
    /// # Errors
    /// If it is no SQLite file, and if `load` refuses it.
    pub fn read<T>(
        &self,
        path: &Path,
        load: impl FnOnce(&Connection) -> Result<T, OpenError>,
    ) -> Result<T, OpenError> {
        let log = log_of(path);
        let had_log = log.symlink_metadata().is_ok();
        let loaded = self.open_for_reading(path).and_then(|connection| load(&connection));
        // SQLite makes one also for reading.
        if !had_log && fs::metadata(&log).is_ok_and(|made| made.len() == 0) {
            let _none = fs::remove_file(&log);
        }
        loaded
    }

    /// Whether a store that is not there may be made.
    ///
    /// # Errors
    /// If something of an earlier one is left.
    pub fn expect_nothing_left(&self, path: &Path) -> Result<(), OpenError> {
        // The first, for what it says covers the log too.
        self.expect_no_restore(path)?;
        self.expect_no_log(path)
    }

    fn expect_no_restore(&self, path: &Path) -> Result<(), OpenError> {
        let left = before_restores(path).map_err(|e| self.io(path, e))?.pop();
        match left.or_else(|| Some(beside(path, RESTORING)).filter(|restoring| restoring.exists())) {
            None => Ok(()),
            Some(left) => Err(OpenError::Restoring {
                noun: self.noun,
                path: path.display().to_string(),
                left: left.display().to_string(),
            }),
        }
    }

    /// SQLite would replay a log that was left behind into the file that is made beside it.
    fn expect_no_log(&self, path: &Path) -> Result<(), OpenError> {
        match fs::metadata(log_of(path)) {
            Ok(found) if found.len() > 0 => {
                Err(self.damaged(path, "its write-ahead log is there, the file is not"))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.io(path, error)),
        }
    }

    /// Made whole beside its name and then renamed: a crash leaves either no store or a good one.
    fn create(&self, path: &Path) -> Result<(), OpenError> {
        let fresh = path.with_extension("db.new");
        let beside = ["db.new", "db.new-journal", "db.new-wal", "db.new-shm"];
        for leftover in beside.map(|extension| path.with_extension(extension)) {
            match fs::remove_file(&leftover) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.io(path, error)),
                _ => {}
            }
        }
        let made = Connection::open(&fresh).and_then(|connection| {
            connection.execute_batch(&format!(
                "PRAGMA synchronous = FULL; BEGIN; {} {} PRAGMA application_id = {}; PRAGMA user_version = {}; COMMIT;",
                self.tables, self.later_tables, self.application_id, self.version
            ))?;
            // Written into the file's header, so that others who open it know.
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.close().map_err(|(_, error)| error)
        });
        made.map_err(|e| self.sqlite(path, &e))?;
        fs::rename(&fresh, path).map_err(|e| self.io(path, e))?;
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::File::open(directory).and_then(|d| d.sync_all()).map_err(|e| self.io(path, e))
    }

    /// Says of which version it is.
    fn check(&self, connection: &Connection, path: &Path) -> Result<i64, OpenError> {
        let number = |pragma: &str| {
            connection
                .pragma_query_value(None, pragma, |row| row.get::<_, i64>(0))
                .map_err(|e| self.sqlite(path, &e))
        };
        if number("application_id")? != self.application_id {
            return Err(self.damaged(path, format!("it is a SQLite file, but not a {}", self.noun)));
        }
        let found = number("user_version")?;
        if found > self.version {
            let path = path.display().to_string();
            return Err(OpenError::Newer { noun: self.noun, path, found, known: self.version });
        }
        let verdict: String = connection
            .pragma_query_value(None, "integrity_check", |row| row.get(0))
            .map_err(|e| self.sqlite(path, &e))?;
        if verdict == "ok" { Ok(found) } else { Err(self.damaged(path, verdict)) }
    }
}

/// The file whose name is that of `path` with `suffix` after it.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What restores have moved aside, in the order of their names; without logs.
///
/// # Errors
/// If the directory cannot be read.
pub fn before_restores(path: &Path) -> io::Result<Vec<PathBuf>> {
    let prefix = format!("{}{BEFORE_RESTORE}", path.file_name().unwrap_or_default().to_string_lossy());
    let directory = path.parent().unwrap_or(Path::new("."));
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<String>>>()?;
    names.retain(|name| {
        name.strip_prefix(&prefix).is_some_and(|time| time.chars().all(|c| c.is_ascii_digit()))
    });
    names.sort();
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

fn log_of(path: &Path) -> PathBuf {
    beside(path, "-wal")
}

/// Gives the write-ahead log its size before it is used: a commit then overwrites, and waits for the disk only, not for
/// the filesystem's journal. SQLite takes a log without a header of its own for an empty one (sqlite.org/walformat.html),
/// overwrites it from its beginning after each checkpoint, and removes it when it is closed in order.
///
/// Without room for it, or in a directory that cannot be written, there is none: what that means, the open finds out.
/// Says whether it was made.
fn make_room_for_log(path: &Path) -> bool {
    let log = log_of(path);
    let fill = || -> io::Result<()> {
        let mut file = fs::File::options().write(true).create_new(true).open(&log)?;
        file.write_all(&vec![0; LOG_BYTES])?;
        file.sync_all()
    };
    match fill() {
        Ok(()) => true,
        Err(error) => {
            if error.kind() != io::ErrorKind::AlreadyExists {
                // Half of it would take room from what has to be written.
                let _none = fs::remove_file(&log);
            }
            false
        }
    }
}

/// So many statements are kept prepared: more than a store has.
const STATEMENTS: usize = 64;
/// The log's size, and after how many pages it is moved into the file, so that it does not outgrow that.
const LOG_BYTES: usize = 1 << 20;
const LOG_PAGES: i64 = 240;

fn settings(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "wal_autocheckpoint", LOG_PAGES)?;
    connection.pragma_update(None, "busy_timeout", 5000)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FORMAT: Format = Format {
        noun: "herd book",
        application_id: 0x434f_5754,
        version: 1,
        tables: "CREATE TABLE cows (name TEXT) STRICT;",
        later_tables: "",
        changes: &[],
        advice: "it knows the cows: look for a backup",
    };

    #[test]
    fn a_log_without_its_file_is_damage_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (path, log) = (directory.path().join("herd.db"), directory.path().join("herd.db-wal"));
        fs::write(&log, b"frames").unwrap();
        let error = open(&path).err().unwrap().to_string();
        for part in ["write-ahead log is there", "herd.db-wal", "herd.db-shm", "look for a backup"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert_eq!(fs::read(&log).unwrap(), b"frames");
        assert!(!path.exists());

        // An empty one has nothing to replay.
        fs::write(&log, b"").unwrap();
        open(&path).unwrap();
    }

    #[test]
    fn with_the_traces_of_a_restore_a_missing_store_is_not_made_anew() {
        for trace in [RESTORING.to_owned(), format!("{BEFORE_RESTORE}1800000000")] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("herd.db");
            fs::write(beside(&path, &trace), b"cows").unwrap();
            let error = open(&path).err().unwrap().to_string();
            for part in [&trace, "restore was interrupted", "herd book restore BACKUP` again"] {
                assert!(error.contains(part), "{part}: {error}");
            }
            assert!(!path.exists());
            // Beside one that is there they are nothing but files.
            fs::rename(beside(&path, &trace), directory.path().join("away")).unwrap();
            open(&path).unwrap().close().unwrap();
            fs::rename(directory.path().join("away"), beside(&path, &trace)).unwrap();
            open(&path).unwrap();
        }
    }

    fn open(path: &Path) -> Result<Connection, OpenError> {
        Ok(FORMAT.open(path, |_| Ok(()))?.0)
    }

    #[test]
    fn what_is_refused_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let (path, log) = (directory.path().join("herd.db"), directory.path().join("herd.db-wal"));
        let contents = || (fs::read(&path).unwrap(), fs::read(&log).ok());
        let connection = open(&path).unwrap();
        connection.execute("INSERT INTO cows VALUES ('Bertha')", []).unwrap();
        // As a power cut leaves them.
        let left = contents();
        connection.close().unwrap();
        let closed = contents();
        assert_eq!(closed.1, None);
        let unloved = |_: &Connection| Err::<(), _>(FORMAT.damaged(&path, "no herd of mine"));

        let refused = FORMAT.open(&path, unloved).err().unwrap().to_string();
        assert!(refused.contains("no herd of mine"), "{refused}");
        assert!(contents() == closed, "a closed store was changed");

        let mut damaged = closed.0;
        damaged[4096..4096 + 16].fill(0xff);
        fs::write(&path, &damaged).unwrap();
        let refused = open(&path).err().unwrap();
        assert!(matches!(refused, OpenError::Damaged { .. }), "{refused}");
        assert!(contents() == (damaged, None), "a damaged store was changed");

        fs::write(&path, &left.0).unwrap();
        fs::write(&log, left.1.as_deref().unwrap()).unwrap();
        FORMAT.open(&path, unloved).err().unwrap();
        assert!(contents() == left, "a store that was not closed was changed");
        open(&path).unwrap();
    }

    #[test]
    fn a_store_of_an_earlier_version_gets_what_it_lacks_and_keeps_what_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("herd.db");
        let connection = open(&path).unwrap();
        connection.execute("INSERT INTO cows VALUES ('Bertha')", []).unwrap();
        connection.close().unwrap();
        let later_tables = "CREATE TABLE IF NOT EXISTS bulls (name TEXT) STRICT;";
        let changes = &[(2, "UPDATE cows SET name = 'Berta' WHERE name = 'Bertha';")];
        let later = Format { version: 2, later_tables, changes, ..FORMAT };
        for bulls in 0..2 {
            let connection = later.open(&path, |_| Ok(())).unwrap().0;
            let count = |table: &str| {
                let sql = format!("SELECT count(*) FROM {table}");
                connection.query_row(&sql, [], |row| row.get::<_, i64>(0)).unwrap()
            };
            assert_eq!((count("cows WHERE name = 'Berta'"), count("bulls")), (1, bulls));
            connection.execute("INSERT INTO bulls VALUES ('Hans')", []).unwrap();
            // What has changed once is not changed again.
            connection.execute("INSERT INTO cows VALUES ('Bertha')", []).unwrap();
        }
        let refused = open(&path).err().unwrap();
        assert!(matches!(refused, OpenError::Newer { found: 2, known: 1, .. }), "{refused}");
    }

    #[test]
    fn the_log_has_its_size_from_the_start_and_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let (path, log) = (directory.path().join("herd.db"), directory.path().join("herd.db-wal"));
        let connection = open(&path).unwrap();
        let size = || fs::metadata(&log).unwrap().len();
        assert_eq!(size(), LOG_BYTES as u64);
        // Bytes 18 and 19 of a file with a write-ahead log are 2 (sqlite.org/fileformat.html).
        assert_eq!(fs::read(&path).unwrap()[18..20], [2, 2]);
        for n in 0..2000 {
            connection.execute("INSERT INTO cows VALUES (?)", [format!("cow {n}")]).unwrap();
        }
        assert_eq!(size(), LOG_BYTES as u64);
        // As after a power cut: file and log as they are, read by another process.
        let copy = tempfile::tempdir().unwrap();
        for name in ["herd.db", "herd.db-wal"] {
            fs::copy(directory.path().join(name), copy.path().join(name)).unwrap();
        }
        let again = open(&copy.path().join("herd.db")).unwrap();
        let cows = again.query_row("SELECT count(*) FROM cows", [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(cows, 2000);
        connection.close().unwrap();
        assert!(!log.exists());
    }
}
