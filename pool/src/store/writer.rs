//! The writer thread: batches what has queued up into one commit.

use std::{
    io,
    path::{Path, PathBuf},
    process,
    sync::{Arc, PoisonError, RwLock},
    thread,
};

use rusqlite::{Connection, ErrorCode};
use tokio::sync::{mpsc, oneshot};

use super::{Stored, WriteError};

/// Decides one write; gives back what to call when it is durable, or was not made so.
pub(super) type Job<S> = Box<dyn FnOnce(&mut Batch<'_, S>) -> Finish + Send>;
type Finish = Box<dyn FnOnce(Result<(), WriteError>) + Send>;

/// At most so many writes share a commit: bounds how long the first waits for the last.
const BATCH: usize = 512;
/// The process's exit status when the disk of a store has failed.
pub const DISK_FAILED: u8 = 25;

/// Writes that will be made durable together.
pub struct Batch<'a, S: Stored> {
    state: &'a mut S,
    changes: Vec<S::Change>,
    undo: Vec<S::Change>,
}

impl<S: Stored> Batch<'_, S> {
    /// The state with all that was decided before in this batch.
    pub fn state(&self) -> &S {
        self.state
    }

    pub(super) fn state_mut(&mut self) -> &mut S {
        self.state
    }

    /// Makes a change.
    pub fn change(&mut self, change: S::Change) {
        self.undo.push(self.state.apply(change.clone()));
        self.changes.push(change);
    }
}

/// What the thread is told.
pub(super) enum Order<S: Stored> {
    Write(Job<S>),
    /// Finish what is queued, close the file, answer.
    Close(oneshot::Sender<()>),
}

/// Starts the thread. It ends when it is told to, or when all senders are gone.
pub(super) fn start<S: Stored>(
    connection: Connection,
    state: S,
    published: Arc<RwLock<S>>,
    path: PathBuf,
    queue: usize,
) -> io::Result<mpsc::Sender<Order<S>>> {
    let (sender, receiver) = mpsc::channel(queue);
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let writer = Writer { connection, state, published, path };
    thread::Builder::new().name(name).spawn(move || writer.run(receiver))?;
    Ok(sender)
}

struct Writer<S: Stored> {
    connection: Connection,
    state: S,
    published: Arc<RwLock<S>>,
    path: PathBuf,
}

impl<S: Stored> Writer<S> {
    fn run(mut self, mut orders: mpsc::Receiver<Order<S>>) {
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
            let path = self.path.display();
            tracing::warn!(%path, %error, "not closed; its write-ahead log is read at the next start");
        }
    }

    fn commit_together(&mut self, jobs: Vec<Job<S>>) {
        let mut batch = Batch { state: &mut self.state, changes: Vec::new(), undo: Vec::new() };
        let finishes: Vec<Finish> = jobs.into_iter().map(|job| job(&mut batch)).collect();
        let Batch { changes, undo, .. } = batch;
        let committed = if changes.is_empty() { Ok(()) } else { commit::<S>(&mut self.connection, &changes) };
        let outcome = match committed {
            Ok(()) => {
                let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
                for change in changes {
                    published.apply(change);
                }
                Ok(())
            }
            Err(error) => {
                for change in undo.into_iter().rev() {
                    self.state.apply(change);
                }
                Err(self.explain(&error))
            }
        };
        for finish in finishes {
            finish(outcome.clone());
        }
    }

    /// What a commit's failure means. Does not return if it is not known what the disk holds.
    fn explain(&self, error: &rusqlite::Error) -> WriteError {
        let path = self.path.display().to_string();
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => WriteError::Full(path),
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                WriteError::NotWritten {
                    path,
                    what: format!("{error}; make its directory writable, then repeat"),
                }
            }
            Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                fatal(&self.path, error)
            }
            _ => WriteError::NotWritten { path, what: error.to_string() },
        }
    }
}

fn commit<S: Stored>(connection: &mut Connection, changes: &[S::Change]) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for change in changes {
        S::write(&transaction, change)?;
    }
    transaction.commit()
}

/// After a failed fsync or write nobody knows what the disk holds, and trying again would hide it: the next start
/// reads what is there.
fn fatal(path: &Path, error: &rusqlite::Error) -> ! {
    tracing::error!(path = %path.display(), %error, "the state's disk failed; stopping, so that no reply is a lie");
    process::exit(i32::from(DISK_FAILED));
}
