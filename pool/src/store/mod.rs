//! What is durable: one SQLite file and one thread that writes it.
//!
//! The thread takes what has queued up, lets each write decide on the state as the ones before have left it, makes the
//! lot durable with one commit, and only then answers and publishes. A commit that fails is taken back in memory and
//! every caller of it is told; a failed fsync ends the process, for what is on the disk is then unknown.

pub mod file;
mod snapshots;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use rusqlite::Connection;
use thiserror::Error as ThisError;
use tokio::sync::{mpsc, oneshot};

pub(crate) use snapshots::{open, open_for_reading};
pub use writer::{Batch, DISK_FAILED};
use writer::{Job, Order};

/// How many writes may queue up before a caller is told to come back.
const QUEUE: usize = 4096;

/// A state that is kept in a SQLite file.
pub trait Stored: Clone + Send + Sync + 'static {
    /// A change of it.
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

/// A handle on the state; all handles share one writer.
pub struct Store<S: Stored> {
    orders: mpsc::Sender<Order<S>>,
    published: Arc<RwLock<S>>,
    path: PathBuf,
}

impl<S: Stored> Clone for Store<S> {
    fn clone(&self) -> Self {
        Self { orders: self.orders.clone(), published: self.published.clone(), path: self.path.clone() }
    }
}

impl<S: Stored> Store<S> {
    /// Starts the writer of `connection`, whose file is `path` and says `stored`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(connection: Connection, stored: S, path: PathBuf) -> std::io::Result<Self> {
        let published = Arc::new(RwLock::new(stored.clone()));
        let orders = writer::start(connection, stored, published.clone(), path.clone(), QUEUE)?;
        Ok(Self { orders, published, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at what is durable.
    pub fn read<T>(&self, look: impl FnOnce(&S) -> T) -> T {
        look(&self.published.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes what is no part of the file, such as things learnt of the world.
    pub(crate) async fn note(&self, change: impl Fn(&mut S) + Send + 'static) -> Result<(), WriteError> {
        let published = self.published.clone();
        self.write::<(), WriteError>(move |batch| {
            change(batch.state_mut());
            change(&mut published.write().unwrap_or_else(PoisonError::into_inner));
            Ok(())
        })
        .await
    }

    /// Finishes the writes that have begun and closes the file; later ones are refused. To be called once, at the end.
    pub async fn close(&self) {
        let (closed, answer) = oneshot::channel();
        if self.orders.send(Order::Close(closed)).await.is_ok() {
            // An error means that the writer is gone, and the file is closed with it.
            let _closed = answer.await;
        }
    }

    /// Lets `decide` decide on the state and change it; returns when that is durable.
    ///
    /// # Errors
    /// What `decide` refuses, and what keeps it from being durable.
    pub async fn write<T, E>(
        &self,
        decide: impl FnOnce(&mut Batch<'_, S>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<WriteError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job<S> = Box::new(move |batch| {
            let decided = decide(batch);
            Box::new(move |committed: Result<(), WriteError>| {
                // The caller may have gone; what it asked for is durable all the same.
                let _gone = reply.send(committed.map_err(E::from).and(decided));
            })
        });
        self.orders.try_send(Order::Write(job)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => WriteError::Busy,
            mpsc::error::TrySendError::Closed(_) => WriteError::Stopping,
        })?;
        answer.await.map_err(|_| E::from(WriteError::Stopping))?
    }
}
