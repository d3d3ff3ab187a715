//! The ledger: which VM holds which disk, on disk, as the book of leases decided it.
//!
//! One SQLite file, one writer thread. The writer takes what has queued up, lets the book decide each in turn, makes
//! the lot durable with one commit, and only then answers and publishes. A commit that fails is taken back in memory
//! and every caller of it is told; a failed fsync ends the process, for what is on the disk is then unknown.

mod error;
mod schema;
mod writer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use cowshed_leases::{Acquisition, Book, Grant, Lease, LeaseId, Spec, UnixMicros, VmId};
use tokio::sync::{mpsc, oneshot};

pub use error::OpenError;
use writer::{Batch, Job, Order};

use crate::error::{Error, Reason, Result};

/// How many writes may queue up before a caller is told to come back.
const QUEUE: usize = 4096;

/// A handle on the ledger; all handles share one writer.
#[derive(Clone)]
pub struct Ledger {
    orders: mpsc::Sender<Order>,
    published: Arc<RwLock<Published>>,
    path: PathBuf,
}

/// What is durable, for readers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published {
    pub(crate) book: Book,
    /// Pulls under way: containerd lease → image.
    pub(crate) pulls: BTreeMap<String, String>,
}

impl Ledger {
    /// Opens `directory/ledger.db`, making it if there is none, and starts its writer.
    ///
    /// # Errors
    /// If the file is damaged, empty, newer than this program, not a ledger, or cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        let path = directory.join("ledger.db");
        let connection = schema::open(&path)?;
        let stored = schema::load(&connection, &path)?;
        let published = Arc::new(RwLock::new(stored.clone()));
        let orders = writer::start(connection, stored, published.clone(), path.clone(), QUEUE)
            .map_err(|source| OpenError::io(&path, source))?;
        Ok(Self { orders, published, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at what is durable.
    pub fn read<T>(&self, look: impl FnOnce(&Book) -> T) -> T {
        look(&self.published.read().unwrap_or_else(PoisonError::into_inner).book)
    }

    /// The containerd leases of pulls that have begun and not ended, with their images.
    pub fn pulls(&self) -> BTreeMap<String, String> {
        self.published.read().unwrap_or_else(PoisonError::into_inner).pulls.clone()
    }

    /// Writes the intent of a new lease, or finds the one that the VM holds.
    pub async fn acquire(
        &self,
        vm: VmId,
        spec: Spec,
        fresh: LeaseId,
        now: UnixMicros,
    ) -> Result<Acquisition> {
        self.write(move |batch| {
            let acquisition = batch.book().acquire(&vm, &spec, fresh, now).map_err(Error::from)?;
            if let Acquisition::New(lease) = &acquisition {
                batch.change(cowshed_leases::Change::Put(lease.clone()));
            }
            Ok(acquisition)
        })
        .await
    }

    /// Confirms that the lease's device is there.
    pub async fn grant(&self, id: LeaseId, grant: Grant) -> Result<Lease> {
        self.write(move |batch| {
            let change = batch.book().grant(&id, grant).map_err(Error::from)?;
            batch.change(change);
            batch.lease(&id)
        })
        .await
    }

    /// Marks the lease for reclaiming. `None` if it is gone; unchanged if it is marked.
    pub async fn release(&self, id: LeaseId, now: UnixMicros) -> Result<Option<Lease>> {
        self.write(move |batch| {
            if let Some(change) = batch.book().release(&id, now) {
                batch.change(change);
            }
            Ok(batch.book().get(&id).cloned())
        })
        .await
    }

    /// Marks all `ids` at once.
    pub async fn release_all(&self, ids: Vec<LeaseId>, now: UnixMicros) -> Result<()> {
        self.write(move |batch| {
            for id in &ids {
                if let Some(change) = batch.book().release(id, now) {
                    batch.change(change);
                }
            }
            Ok(())
        })
        .await
    }

    /// Forgets leases whose disks are gone.
    pub async fn remove_all(&self, ids: Vec<LeaseId>) -> Result<()> {
        self.write(move |batch| {
            for id in &ids {
                if let Some(change) = batch.book().remove(id).map_err(Error::from)? {
                    batch.change(change);
                }
            }
            Ok(())
        })
        .await
    }

    /// Writes down that a pull is about to take the containerd lease `lease`.
    pub async fn begin_pull(&self, lease: String, image: String) -> Result<()> {
        self.write(move |batch| {
            batch.begin_pull(lease, image);
            Ok(())
        })
        .await
    }

    /// Writes down that the pull's containerd lease is gone.
    pub async fn end_pull(&self, lease: String) -> Result<()> {
        self.write(move |batch| {
            batch.end_pull(lease);
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

    async fn write<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Batch<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |batch| {
            let decided = decide(batch);
            Box::new(move |committed| {
                // The caller may have gone; what it asked for is durable all the same.
                let _gone = reply.send(committed.and(decided));
            })
        });
        self.orders.try_send(Order::Write(job)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::new(
                Reason::NotReady,
                format!("{QUEUE} ledger writes are waiting; try again in a second"),
            ),
            mpsc::error::TrySendError::Closed(_) => stopped(),
        })?;
        answer.await.map_err(|_| stopped())?
    }
}

fn stopped() -> Error {
    Error::new(Reason::Stopping, "the service is stopping; repeat the request when it is up again")
}

#[async_trait::async_trait]
impl crate::image::PullJournal for Ledger {
    async fn begin(&self, lease: &str, image: &str) -> Result<()> {
        self.begin_pull(lease.to_owned(), image.to_owned()).await
    }

    async fn end(&self, lease: &str) -> Result<()> {
        self.end_pull(lease.to_owned()).await
    }
}

#[cfg(test)]
mod tests;
