//! What is durable: one SQLite file, and one at a time who writes it.
//!
//! Every write decides at once on the state as the ones before have left it, durable or not, and queues up. A thread, or a
//! caller that may wait for the disk, makes all that has queued up durable with one commit, and only then answers and
//! publishes. A commit that fails takes everything back that was decided and is not durable, and every caller of that is
//! told; a failed fsync ends the process, for what is on the disk is then unknown.
//!
//! A write that nobody has to wait for ([`Store::write_behind`]) is answered and published before it is durable.

pub mod again;
pub mod file;
mod snapshots;
mod writer;

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};

use rusqlite::Connection;
use thiserror::Error as ThisError;
use tokio::sync::{oneshot, watch};

pub(crate) use snapshots::{open, open_for_reading};
pub use writer::{Batch, DISK_FAILED};
use writer::{By, Handle, Shows};

/// How many writes may queue up before a caller is told to come back.
const QUEUE: usize = 4096;

/// A state that is kept in a SQLite file.
pub trait Stored: Clone + Send + Sync + 'static {
    /// A change of it: what it says of one record from then on, so that making it once more changes nothing.
    type Change: Clone + Send + 'static;

    /// Makes the change in memory; gives back the one that takes it back.
    fn apply(&mut self, change: Self::Change) -> Self::Change;

    /// Makes the change in the file, within a transaction.
    ///
    /// # Errors
    /// As SQLite says.
    fn write(connection: &Connection, change: &Self::Change) -> rusqlite::Result<()>;
}

/// Why a write was not made durable.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum WriteError {
    /// The disk is full.
    #[error("the state directory is full: {0} cannot be written; free space there, then repeat")]
    Full(String),
    /// The file cannot be written.
    #[error("{path} was not written: {what}")]
    NotWritten {
        /// The file.
        path: String,
        /// SQLite's words.
        what: String,
    },
    /// Too many writes wait.
    #[error("{QUEUE} writes are waiting for the disk; try again in a second")]
    Busy,
    /// The service stops.
    #[error("the service is stopping; repeat the request when it is up again")]
    Stopping,
}

/// A handle on the state; all handles share one writer, which ends with the last of them.
pub struct Store<S: Stored> {
    handle: Arc<Handle<S>>,
    path: PathBuf,
}

impl<S: Stored> Clone for Store<S> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone(), path: self.path.clone() }
    }
}

impl<S: Stored> Store<S> {
    /// Starts the writer of `connection`, whose file is `path` and says `stored`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(connection: Connection, stored: S, path: PathBuf) -> std::io::Result<Self> {
        let handle = Arc::new(writer::start(connection, stored, path.clone())?);
        Ok(Self { handle, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has its transactions counted there from now on, in seconds; the first to say so counts.
    pub fn count_transactions(&self, seconds: prometheus::Histogram) {
        let _counted_already = self.handle.0.seconds.set(seconds);
    }

    /// Looks at what is durable, and at what was written behind.
    pub fn read<T>(&self, look: impl FnOnce(&S) -> T) -> T {
        look(&self.handle.0.published.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Told each time that what [`Self::read`] sees has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.handle.0.shown.subscribe()
    }

    /// Changes what is no part of the file, such as things learnt of the world.
    pub(crate) fn note(&self, change: impl Fn(&mut S)) -> Result<(), WriteError> {
        self.handle.0.note(change)
    }

    /// Finishes the writes that have begun and closes the file; later ones are refused. To be called once, at the end.
    pub async fn close(&self) {
        // An error means that the writer is gone, and the file is closed with it.
        let _closed = self.handle.0.close().await;
    }

    /// Lets `decide` decide on the state and change it; returns when that is durable.
    ///
    /// # Errors
    /// What `decide` refuses, and what keeps it from being durable.
    pub async fn write<T, E>(&self, decide: impl FnOnce(&mut Batch<'_, S>) -> Result<T, E>) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<WriteError> + Send + 'static,
    {
        let answer = self.enter(By::Thread, decide)?;
        answer.await.map_err(|_| E::from(WriteError::Stopping))?
    }

    /// The same for a caller that may wait for the disk: it is the one that writes, unless somebody is at it. What the future
    /// comes to is mostly there when this returns; whoever waits for the future waits for no disk.
    ///
    /// # Errors
    /// As there.
    pub fn write_here<T, E, F>(
        &self,
        decide: F,
    ) -> impl Future<Output = Result<T, E>> + Send + use<S, T, E, F>
    where
        T: Send + 'static,
        E: From<WriteError> + Send + 'static,
        F: FnOnce(&mut Batch<'_, S>) -> Result<T, E>,
    {
        let answer = self.enter(By::Caller, decide);
        async move { answer?.await.map_err(|_| E::from(WriteError::Stopping))? }
    }

    fn enter<T, E>(
        &self,
        by: By,
        decide: impl FnOnce(&mut Batch<'_, S>) -> Result<T, E>,
    ) -> Result<oneshot::Receiver<Result<T, E>>, E>
    where
        T: Send + 'static,
        E: From<WriteError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        self.handle.0.enter(Shows::WhenDurable, by, |batch| {
            let decided = decide(batch);
            Box::new(move |committed| {
                // The caller may have gone; what it asked for is durable all the same.
                let _gone = reply.send(committed.map_err(E::from).and(decided));
            })
        })?;
        Ok(answer)
    }

    /// Lets `decide` decide on the state and change it. What it changes is seen at once, and a crash may still undo it;
    /// `written` is called with its answer when it is durable, or is taken back.
    ///
    /// # Errors
    /// What `decide` refuses.
    pub(crate) fn write_behind<T, E>(
        &self,
        decide: impl FnOnce(&mut Batch<'_, S>) -> Result<T, E>,
        written: impl FnOnce(T, Result<(), WriteError>) + Send + 'static,
    ) -> Result<(), E>
    where
        T: Send + 'static,
        E: From<WriteError>,
    {
        let mut refused = Ok(());
        self.handle.0.enter(Shows::AtOnce, By::Thread, |batch| match decide(batch) {
            Ok(decided) => Box::new(move |committed| written(decided, committed)),
            Err(error) => {
                refused = Err(error);
                Box::new(|_| {})
            }
        })?;
        refused
    }
}

#[cfg(test)]
mod tests;
