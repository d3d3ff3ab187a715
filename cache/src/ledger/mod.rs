//! The ledger: which VM holds which disk, on disk, as the book of leases decided it.
//!
//! One SQLite file, one writer thread (see `cowshed_pool::store`), in which the book decides each write in turn.

mod error;
mod schema;
pub mod tools;

use std::{collections::BTreeMap, path::Path};

use cowshed_leases::{Acquisition, Book, Grant, Lease, LeaseId, Spec, State, UnixMicros, VmId};
use cowshed_pool::store::{Batch, Store, file::OpenError};

pub use crate::flights::GivenUp;

use crate::error::{Error, Reason, Result};
use schema::{Change, FORMAT, Records};

/// What a release comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Release {
    /// There was nothing to release.
    Nothing,
    /// It had been released before.
    Again(Lease),
    /// It is released.
    Now(Lease),
}

/// A handle on the ledger; all handles share one writer.
#[derive(Clone)]
pub struct Ledger(Store<Records>);

impl Ledger {
    /// Opens `directory/ledger.db`, making it if there is none, and starts its writer.
    ///
    /// # Errors
    /// If the file is damaged, empty, newer than this program, not a ledger, or cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        let path = directory.join("ledger.db");
        let (connection, records) = FORMAT.open(&path, |connection| schema::load(connection, &path))?;
        let store = Store::start(connection, records, path.clone());
        store.map(Self).map_err(|source| FORMAT.io(&path, source))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Looks at what is durable.
    pub fn read<T>(&self, look: impl FnOnce(&Book) -> T) -> T {
        self.0.read(|records| look(&records.book))
    }

    /// The containerd leases of pulls that have begun and not ended, with their images.
    pub fn pulls(&self) -> BTreeMap<String, String> {
        self.0.read(|records| records.pulls.clone())
    }

    /// Writes the intent of a new lease, or finds the one that the VM holds. Refused if it was given up by then.
    pub async fn acquire(
        &self,
        vm: VmId,
        spec: Spec,
        fresh: LeaseId,
        now: UnixMicros,
        given_up: GivenUp,
    ) -> Result<Acquisition> {
        self.write(move |batch| {
            if given_up.is_set() {
                return Err(released(&vm));
            }
            let acquisition = book(batch).acquire(&vm, &spec, fresh, now).map_err(Error::from)?;
            if let Acquisition::New(lease) = &acquisition {
                batch.change(Change::Lease(cowshed_leases::Change::Put(lease.clone())));
            }
            Ok(acquisition)
        })
        .await
    }

    /// Confirms that the lease's device is there.
    pub async fn grant(&self, id: LeaseId, grant: Grant) -> Result<Lease> {
        self.write(move |batch| {
            let change = book(batch).grant(&id, grant).map_err(Error::from)?;
            batch.change(Change::Lease(change));
            lease_in(batch, &id)
        })
        .await
    }

    /// Marks the lease for reclaiming. `None` if it is gone; unchanged if it is marked.
    pub async fn release(&self, id: LeaseId, now: UnixMicros) -> Result<Option<Lease>> {
        self.write(move |batch| {
            if let Some(change) = book(batch).release(&id, now) {
                batch.change(Change::Lease(change));
            }
            Ok(book(batch).get(&id).cloned())
        })
        .await
    }

    /// Marks the lease that the VM has, or only this one of it, for reclaiming. The writer looks it up, in turn, so that
    /// it also finds one that was asked for just before.
    pub async fn release_of(&self, vm: VmId, only: Option<LeaseId>, now: UnixMicros) -> Result<Release> {
        self.write(move |batch| {
            let found = match &only {
                Some(id) => book(batch).get(id).filter(|lease| lease.vm == vm),
                None => book(batch).of_vm(&vm),
            };
            let Some(lease) = found.cloned() else { return Ok(Release::Nothing) };
            let Some(change) = book(batch).release(&lease.id, now) else { return Ok(Release::Again(lease)) };
            batch.change(Change::Lease(change));
            lease_in(batch, &lease.id).map(Release::Now)
        })
        .await
    }

    /// Marks those of `ids` that are still being prepared; says how many.
    pub async fn give_up_all(&self, ids: Vec<LeaseId>, now: UnixMicros) -> Result<usize> {
        self.write(move |batch| {
            let mut count = 0;
            for id in &ids {
                let preparing = book(batch).get(id).is_some_and(|lease| lease.state == State::Preparing);
                if let Some(change) = book(batch).release(id, now).filter(|_| preparing) {
                    batch.change(Change::Lease(change));
                    count += 1;
                }
            }
            Ok(count)
        })
        .await
    }

    /// Forgets leases whose disks are gone.
    pub async fn remove_all(&self, ids: Vec<LeaseId>) -> Result<()> {
        self.write(move |batch| {
            for id in &ids {
                if let Some(change) = book(batch).remove(id).map_err(Error::from)? {
                    batch.change(Change::Lease(change));
                }
            }
            Ok(())
        })
        .await
    }

    /// Writes down that a pull is about to take the containerd lease `lease`.
    pub async fn begin_pull(&self, lease: String, image: String) -> Result<()> {
        self.write(move |batch| {
            batch.change(Change::Pull(lease, Some(image)));
            Ok(())
        })
        .await
    }

    /// Writes down that the pull's containerd lease is gone.
    pub async fn end_pull(&self, lease: String) -> Result<()> {
        self.write(move |batch| {
            batch.change(Change::Pull(lease, None));
            Ok(())
        })
        .await
    }

    /// Finishes the writes that have begun and closes the file; later ones are refused. To be called once, at the end.
    pub async fn close(&self) {
        self.0.close().await;
    }

    async fn write<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Batch<'_, Records>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.0.write(decide).await
    }
}

/// The book with all that was decided before.
fn book<'a>(batch: &'a Batch<'_, Records>) -> &'a Book {
    &batch.state().book
}

/// A lease that is there.
fn lease_in(batch: &Batch<'_, Records>, id: &LeaseId) -> Result<Lease> {
    let missing = || Error::new(Reason::LedgerError, format!("lease {id} vanished from the book"));
    book(batch).get(id).cloned().ok_or_else(missing)
}

fn released(vm: &VmId) -> Error {
    let message = format!(
        "the disk of VM {vm} was released while it was being made; acquire again if it is wanted still"
    );
    Error::new(Reason::Released, message).with("vm_id", vm)
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
