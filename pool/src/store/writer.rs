//! Makes what has queued up durable with one commit: a thread does, or a caller that finds it idle and may wait for the disk.

use std::{
    io,
    path::{Path, PathBuf},
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
    thread,
    time::{Duration, Instant},
};

use prometheus::Histogram;
use rusqlite::{Connection, ErrorCode};
use tokio::sync::{oneshot, watch};

use super::{QUEUE, Stored, WriteError};

/// What to call when a write is durable, or was taken back.
type Finish = Box<dyn FnOnce(Result<(), WriteError>) + Send>;

/// At most so many writes share a commit: bounds how long the first waits for the last.
const BATCH: usize = 512;
/// What nobody waits for is written at most so late: such writes come in crowds, and share a commit then.
const BEHIND: Duration = Duration::from_millis(50);
/// The process's exit status when the disk of a store has failed.
pub const DISK_FAILED: u8 = 25;

/// What one write decides on, and what it changes.
pub struct Batch<'a, S: Stored> {
    state: &'a mut S,
    changes: Vec<S::Change>,
    undo: Vec<S::Change>,
}

impl<S: Stored> Batch<'_, S> {
    /// The state with all that was decided before.
    pub fn state(&self) -> &S {
        self.state
    }

    /// Makes a change.
    pub fn change(&mut self, change: S::Change) {
        self.undo.push(self.state.apply(change.clone()));
        self.changes.push(change);
    }
}

/// From when on others see what a write changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shows {
    WhenDurable,
    AtOnce,
}

/// Who makes a write durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// The thread.
    Thread,
    /// The caller, unless somebody is at it already: it may wait for the disk, and two turns of the processor are saved.
    Caller,
}

/// A write that was decided, and is not durable.
struct Decided<S: Stored> {
    changes: Vec<S::Change>,
    undo: Vec<S::Change>,
    shows: Shows,
    finish: Finish,
}

/// What is decided.
struct Book<S: Stored> {
    /// With all that was decided.
    state: S,
    /// In this order.
    queued: Vec<Decided<S>>,
    /// No more is taken, and these are told when the file is closed.
    closing: Option<Vec<oneshot::Sender<()>>>,
    closed: bool,
}

/// What all handles and the thread share. Whoever locks several locks the desk first, then the book.
pub(super) struct Shared<S: Stored> {
    /// Held from before writes are taken off the queue until they are durable, so that they are in their order.
    desk: Mutex<Desk>,
    book: Mutex<Book<S>>,
    /// What is durable, and what shows at once.
    pub(super) published: RwLock<S>,
    /// That has changed.
    pub(super) shown: watch::Sender<()>,
    /// Something is queued, or no more will be.
    news: Condvar,
    /// Where transactions are counted, in seconds.
    pub(super) seconds: OnceLock<Histogram>,
}

/// The last one to go ends the thread.
pub(super) struct Handle<S: Stored>(pub(super) Arc<Shared<S>>);

impl<S: Stored> Drop for Handle<S> {
    fn drop(&mut self) {
        if let Ok(mut book) = self.0.book() {
            book.closing.get_or_insert_default();
        }
        self.0.news.notify_one();
    }
}

impl<S: Stored> Shared<S> {
    /// A decision that has panicked has left the state half changed: nothing is written any more.
    fn book(&self) -> Result<MutexGuard<'_, Book<S>>, WriteError> {
        self.book.lock().map_err(|_| WriteError::Stopping)
    }

    /// Takes a write.
    pub(super) fn enter(
        &self,
        shows: Shows,
        by: By,
        decide: impl FnOnce(&mut Batch<'_, S>) -> Finish,
    ) -> Result<(), WriteError> {
        let mut book = self.book()?;
        if book.closing.is_some() {
            return Err(WriteError::Stopping);
        }
        // What nobody waits for has nobody who could try again.
        if shows == Shows::WhenDurable && book.queued.len() >= QUEUE {
            return Err(WriteError::Busy);
        }
        let mut batch = Batch { state: &mut book.state, changes: Vec::new(), undo: Vec::new() };
        let finish = decide(&mut batch);
        let Batch { changes, undo, .. } = batch;
        if shows == Shows::AtOnce && changes.is_empty() {
            drop(book);
            finish(Ok(()));
            return Ok(());
        }
        let decided = Decided { changes, undo, shows, finish };
        if shows == Shows::AtOnce {
            show(&mut *self.published.write().unwrap_or_else(PoisonError::into_inner), &decided);
            self.shown.send_replace(());
        }
        book.queued.push(decided);
        drop(book);
        if by == By::Thread || !self.write_here() {
            self.news.notify_one();
        }
        Ok(())
    }

    /// Makes what has queued up durable, if nobody is at it; says whether that was all.
    fn write_here(&self) -> bool {
        let Ok(mut desk) = self.desk.try_lock() else { return false };
        self.write_some(&mut desk);
        self.book().is_ok_and(|book| book.queued.is_empty())
    }

    fn write_some(&self, desk: &mut Desk) {
        let batch = match self.book() {
            Ok(mut book) => {
                let count = book.queued.len().min(BATCH);
                book.queued.drain(..count).collect::<Vec<_>>()
            }
            Err(_) => return,
        };
        if batch.is_empty() {
            return;
        }
        let (done, outcome) = match desk.commit(&batch, self.seconds.get()) {
            Ok(()) => {
                self.publish(&batch);
                (batch, Ok(()))
            }
            Err(error) => {
                let why = desk.explain(&error);
                (self.take_back(batch), Err(why))
            }
        };
        for decided in done {
            (decided.finish)(outcome.clone());
        }
    }

    /// Changes what is no part of the file.
    pub(super) fn note(&self, change: impl Fn(&mut S)) -> Result<(), WriteError> {
        let mut book = self.book()?;
        change(&mut book.state);
        change(&mut *self.published.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Takes no more; the answer, or its end, comes when the file is closed.
    pub(super) fn close(&self) -> oneshot::Receiver<()> {
        let (closed, answer) = oneshot::channel();
        if let Ok(mut book) = self.book()
            && !book.closed
        {
            book.closing.get_or_insert_default().push(closed);
        }
        self.news.notify_one();
        answer
    }

    /// Waits until there is something to write; `false` when there will be no more.
    fn is_to_write(&self) -> bool {
        let Ok(book) = self.book() else { return false };
        let nothing = |book: &mut Book<S>| book.queued.is_empty() && book.closing.is_none();
        let Ok(book) = self.news.wait_while(book, nothing) else { return false };
        if book.queued.is_empty() {
            return false;
        }
        let nobody_waits = |book: &mut Book<S>| {
            let behind = |decided: &Decided<S>| decided.shows == Shows::AtOnce;
            book.queued.len() < BATCH && book.closing.is_none() && book.queued.iter().all(behind)
        };
        self.news.wait_timeout_while(book, BEHIND, nobody_waits).is_ok()
    }

    /// Lets everybody see what is durable now, below what shows already.
    fn publish(&self, durable: &[Decided<S>]) {
        let Ok(book) = self.book() else { return };
        let mut published = self.published.write().unwrap_or_else(PoisonError::into_inner);
        let above = book.queued.iter().filter(|decided| decided.shows == Shows::AtOnce);
        durable.iter().chain(above).for_each(|decided| show(&mut *published, decided));
        // Whoever is told may look at once.
        drop(published);
        drop(book);
        self.shown.send_replace(());
    }

    /// Takes back `failed` and all that was decided after it; returns that in order.
    fn take_back(&self, mut failed: Vec<Decided<S>>) -> Vec<Decided<S>> {
        let Ok(mut book) = self.book() else { return failed };
        failed.append(&mut book.queued);
        for decided in failed.iter_mut().rev() {
            for undo in decided.undo.drain(..).rev() {
                book.state.apply(undo);
            }
        }
        *self.published.write().unwrap_or_else(PoisonError::into_inner) = book.state.clone();
        drop(book);
        self.shown.send_replace(());
        failed
    }
}

fn show<S: Stored>(published: &mut S, decided: &Decided<S>) {
    for change in &decided.changes {
        published.apply(change.clone());
    }
}

/// Starts the thread.
pub(super) fn start<S: Stored>(connection: Connection, state: S, path: PathBuf) -> io::Result<Handle<S>> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let published = RwLock::new(state.clone());
    let book = Mutex::new(Book { state, queued: Vec::new(), closing: None, closed: false });
    let shown = watch::Sender::new(());
    let seconds = OnceLock::new();
    let desk = Mutex::new(Desk { connection: Some(connection), path });
    let shared = Arc::new(Shared { desk, book, published, shown, news: Condvar::new(), seconds });
    let writing = shared.clone();
    thread::Builder::new().name(name).spawn(move || run(&writing))?;
    Ok(Handle(shared))
}

fn run<S: Stored>(shared: &Arc<Shared<S>>) {
    let _end = End(shared.clone());
    while shared.is_to_write() {
        // Whoever has panicked at it has left a transaction that nobody knows the end of.
        let Ok(mut desk) = shared.desk.lock() else { return };
        shared.write_some(&mut desk);
    }
    if let Ok(mut desk) = shared.desk.lock() {
        desk.close();
    }
}

/// The thread's end, in order or by a panic: nobody must wait for it any more.
struct End<S: Stored>(Arc<Shared<S>>);

impl<S: Stored> Drop for End<S> {
    fn drop(&mut self) {
        let mut book = self.0.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.closed = true;
        // Whoever waits for one of these hears that there is nobody to answer.
        let unwritten = std::mem::take(&mut book.queued);
        let closing = book.closing.replace(Vec::new());
        drop(book);
        drop((unwritten, closing));
    }
}

/// The file. Whoever has it writes.
struct Desk {
    /// `None` when it is closed.
    connection: Option<Connection>,
    path: PathBuf,
}

/// Taken back unless it is committed. Its statements are kept prepared, which rusqlite's own are not.
struct Transaction<'a>(&'a Connection);

impl<'a> Transaction<'a> {
    fn begin(connection: &'a Connection) -> rusqlite::Result<Self> {
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        Ok(Self(connection))
    }

    fn commit(self) -> rusqlite::Result<()> {
        self.0.prepare_cached("COMMIT")?.execute([]).map(drop)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // A commit that fails may have taken it back already.
        if !self.0.is_autocommit() {
            let _taken_back_when_closed = self.0.execute_batch("ROLLBACK");
        }
    }
}

impl Desk {
    /// Moves the write-ahead log into the file, so that what lies there between two runs is one file.
    fn close(&mut self) {
        if let Some(Err((_, error))) = self.connection.take().map(Connection::close) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "not closed; its write-ahead log is read at the next start");
        }
    }

    fn commit<S: Stored>(
        &mut self,
        batch: &[Decided<S>],
        seconds: Option<&Histogram>,
    ) -> rusqlite::Result<()> {
        let mut changes = batch.iter().flat_map(|decided| &decided.changes).peekable();
        if changes.peek().is_none() {
            return Ok(());
        }
        // Nothing is queued any more then.
        let closed = || {
            let misuse = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_MISUSE);
            rusqlite::Error::SqliteFailure(misuse, Some("the file is closed".to_owned()))
        };
        let connection = self.connection.as_ref().ok_or_else(closed)?;
        let begun = Instant::now();
        let transaction = Transaction::begin(connection)?;
        for change in changes {
            S::write(transaction.0, change)?;
        }
        transaction.commit()?;
        if let Some(seconds) = seconds {
            seconds.observe(begun.elapsed().as_secs_f64());
        }
        Ok(())
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

/// After a failed fsync or write nobody knows what the disk holds, and trying again would hide it: the next start
/// reads what is there.
fn fatal(path: &Path, error: &rusqlite::Error) -> ! {
    tracing::error!(path = %path.display(), %error, "the state's disk failed; stopping, so that no reply is a lie");
    process::exit(i32::from(DISK_FAILED));
}
