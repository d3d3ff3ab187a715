//! The ledger's writer thread: batches what has queued up into one commit.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    thread,
};

use cowshed_leases::{Book, Change, Lease, LeaseId};
use rusqlite::{Connection, ErrorCode, params};
use tokio::sync::{mpsc, oneshot};

use super::{Published, schema::state_name};
use crate::error::{Error, Reason, Result};

/// Decides one write; gives back what to call when it is durable, or was not made so.
pub(super) type Job = Box<dyn FnOnce(&mut Batch<'_>) -> Finish + Send>;
type Finish = Box<dyn FnOnce(Result<()>) + Send>;

/// At most so many writes share a commit: bounds how long the first waits for the last.
const BATCH: usize = 512;

/// Writes that will be made durable together.
pub(super) struct Batch<'a> {
    state: &'a mut Published,
    writes: Vec<Write>,
    undo: Vec<Undo>,
}

#[derive(Clone, Debug)]
enum Write {
    Lease(Change),
    BeginPull(String, String),
    EndPull(String),
}

enum Undo {
    Lease(Change),
    Pull(String, Option<String>),
}

impl Batch<'_> {
    /// The book with all that was decided before in this batch.
    pub(super) fn book(&self) -> &Book {
        &self.state.book
    }

    /// A lease that is there.
    pub(super) fn lease(&self, id: &LeaseId) -> Result<Lease> {
        let missing = || Error::new(Reason::LedgerError, format!("lease {id} vanished from the book"));
        self.state.book.get(id).cloned().ok_or_else(missing)
    }

    pub(super) fn change(&mut self, change: Change) {
        self.undo.extend(self.state.book.apply(change.clone()).map(Undo::Lease));
        self.writes.push(Write::Lease(change));
    }

    pub(super) fn begin_pull(&mut self, lease: String, image: String) {
        let before = self.state.pulls.insert(lease.clone(), image.clone());
        self.undo.push(Undo::Pull(lease.clone(), before));
        self.writes.push(Write::BeginPull(lease, image));
    }

    pub(super) fn end_pull(&mut self, lease: String) {
        let before = self.state.pulls.remove(&lease);
        self.undo.push(Undo::Pull(lease.clone(), before));
        self.writes.push(Write::EndPull(lease));
    }
}

/// What the thread is told.
pub(super) enum Order {
    Write(Job),
    /// Finish what is queued, close the file, answer.
    Close(oneshot::Sender<()>),
}

/// Starts the thread. It ends when it is told to, or when all senders are gone.
pub(super) fn start(
    connection: Connection,
    stored: Published,
    published: Arc<RwLock<Published>>,
    path: PathBuf,
    queue: usize,
) -> io::Result<mpsc::Sender<Order>> {
    let (sender, receiver) = mpsc::channel(queue);
    let writer = Writer { connection, state: stored, published, path };
    thread::Builder::new().name("ledger".to_owned()).spawn(move || writer.run(receiver))?;
    Ok(sender)
}

struct Writer {
    connection: Connection,
    state: Published,
    published: Arc<RwLock<Published>>,
    path: PathBuf,
}

impl Writer {
    fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let mut queued = Vec::new();
        let mut closing = Vec::new();
        while orders.blocking_recv_many(&mut queued, BATCH) > 0 {
            let mut jobs = Vec::new();
            for order in queued.drain(..) {
                match order {
                    Order::Write(job) => jobs.push(job),
                    Order::Close(closed) => closing.push(closed),
                }
            }
            if !closing.is_empty() {
                // What is queued already is still taken; nothing more is.
                orders.close();
            }
            self.commit_together(jobs);
        }
        self.close();
        for closed in closing {
            let _gone = closed.send(());
        }
    }

    /// Moves the write-ahead log into the file, so that what lies there between two runs is one file.
    fn close(self) {
        if let Err((_, error)) = self.connection.close() {
            tracing::warn!(ledger = %self.path.display(), %error, "the ledger was not closed; its write-ahead log is read at the next start");
        }
    }

    fn commit_together(&mut self, jobs: Vec<Job>) {
        let mut batch = Batch { state: &mut self.state, writes: Vec::new(), undo: Vec::new() };
        let finishes: Vec<Finish> = jobs.into_iter().map(|job| job(&mut batch)).collect();
        let Batch { writes, undo, .. } = batch;
        let committed = if writes.is_empty() { Ok(()) } else { commit(&mut self.connection, &writes) };
        let outcome = match committed {
            Ok(()) => {
                publish(&self.published, writes);
                Ok(())
            }
            Err(error) => {
                take_back(&mut self.state, undo);
                Err(self.explain(&error))
            }
        };
        for finish in finishes {
            finish(outcome.clone());
        }
    }

    /// What a commit's failure means. Does not return if it is not known what the disk holds.
    fn explain(&self, error: &rusqlite::Error) -> Error {
        let path = self.path.display();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Error::new(
                Reason::StateDirectoryFull,
                format!(
                    "the state directory is full: {path} cannot be written; free space there, then repeat"
                ),
            ),
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => Error::new(
                Reason::LedgerError,
                format!(
                    "the ledger {path} cannot be written ({error}); make its directory writable, then repeat"
                ),
            ),
            Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                fatal(&self.path, error)
            }
            _ => Error::new(Reason::LedgerError, format!("the ledger {path} was not written: {error}")),
        }
        .with("path", path)
    }
}

fn commit(connection: &mut Connection, writes: &[Write]) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for write in writes {
        match write {
            Write::Lease(Change::Put(lease)) => put(&transaction, lease)?,
            Write::Lease(Change::Delete(id)) => {
                transaction.prepare_cached("DELETE FROM leases WHERE id = ?")?.execute([id.as_str()])?;
            }
            Write::BeginPull(lease, image) => {
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO pulls VALUES (?, ?)")?
                    .execute([lease, image])?;
            }
            Write::EndPull(lease) => {
                transaction.prepare_cached("DELETE FROM pulls WHERE lease = ?")?.execute([lease])?;
            }
        }
    }
    transaction.commit()
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

fn publish(published: &RwLock<Published>, writes: Vec<Write>) {
    let mut published = published.write().unwrap_or_else(PoisonError::into_inner);
    for write in writes {
        match write {
            Write::Lease(change) => {
                published.book.apply(change);
            }
            Write::BeginPull(lease, image) => {
                published.pulls.insert(lease, image);
            }
            Write::EndPull(lease) => {
                published.pulls.remove(&lease);
            }
        }
    }
}

fn take_back(state: &mut Published, undo: Vec<Undo>) {
    for step in undo.into_iter().rev() {
        match step {
            Undo::Lease(change) => {
                state.book.apply(change);
            }
            Undo::Pull(lease, Some(image)) => {
                state.pulls.insert(lease, image);
            }
            Undo::Pull(lease, None) => {
                state.pulls.remove(&lease);
            }
        }
    }
}

/// After a failed fsync or write nobody knows what the disk holds, and trying again would hide it: the next start
/// reads what is there.
fn fatal(path: &Path, error: &rusqlite::Error) -> ! {
    tracing::error!(ledger = %path.display(), %error, "the ledger's disk failed; stopping, so that no reply is a lie");
    std::process::exit(i32::from(crate::exit::LEDGER_FAILED));
}
