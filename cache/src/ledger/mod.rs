//! The ledger: which VM holds which disk, on disk, as the book of leases decided it.
//!
//! One SQLite file, and one at a time who writes it (see `cowshed_pool::store`); the book decides each write in turn.

mod error;
mod marks;
mod schema;
mod slot;
pub mod tools;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use cowshed_leases::{
    Acquisition, Ask, Book, BookError, Failure, Grace, Grant, Lease, LeaseId, Moment, Release, Releasing,
    Seen, Spec, Ttl, UnixMicros, VmId,
};
use cowshed_pool::store::{Batch, Store, again::IfMissing, file::OpenError};
use rusqlite::Connection;
use tokio::sync::watch;

pub use crate::flights::GivenUp;
pub use marks::{Marks, Pin};
pub(crate) use schema::state_name;
pub use slot::LedgerSlot;

use crate::{
    error::{Error, Reason, Result},
    prefetch::job::{Causes, End, Job, JobId, Jobs, Plan, Stage},
    promises::{Leads, Promises},
};
use marks::Mark;
use schema::{Change, FORMAT, Records};

/// So many leases are looked at in one go where all are: writes wait for that.
const PAGE: usize = 256;

/// A handle on the ledger; all handles share one writer.
#[derive(Clone)]
pub struct Ledger {
    store: Store<Records>,
    promises: Promises,
}

impl Ledger {
    /// Opens `directory/ledger.db`, making it if there is none, and starts its writer.
    ///
    /// # Errors
    /// If the file is damaged, empty, newer than this program, not a ledger, or cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        Self::open_or(directory, IfMissing::Make)
    }

    /// The same; what is done if there is none is said.
    ///
    /// # Errors
    /// As there, and if there is none and none is to be made.
    pub fn open_or(directory: &Path, if_missing: IfMissing) -> Result<Self, OpenError> {
        let path = directory.join("ledger.db");
        let load = |connection: &Connection| schema::load(connection, &path);
        let (connection, records) = match if_missing {
            IfMissing::Make => FORMAT.open(&path, load)?,
            IfMissing::Refuse => FORMAT.open_there(&path, load)?,
        };
        let promises = Promises::of(&records.book);
        let records = Records { leads: Leads::these(&promises), ..records };
        let store = Store::start(connection, records, path.clone());
        store.map(|store| Self { store, promises }).map_err(|source| FORMAT.io(&path, source))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// Has its transactions counted there from now on, in seconds.
    pub fn count_transactions(&self, seconds: prometheus::Histogram) {
        self.store.count_transactions(seconds);
    }

    /// Looks at what is durable.
    pub fn read<T>(&self, look: impl FnOnce(&Book) -> T) -> T {
        self.store.read(|records| look(&records.book))
    }

    /// What `pick` takes of each lease, some leases at a time, so that no write waits for long. What changes meanwhile may be in it
    /// or not.
    pub fn gather<T>(&self, mut pick: impl FnMut(&Lease) -> Option<T>) -> Vec<T> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let last = self.read(|book| {
                let page: Vec<&Lease> = book.after(after.as_ref()).take(PAGE).collect();
                all.extend(page.iter().filter_map(|lease| pick(lease)));
                page.last().filter(|_| page.len() == PAGE).map(|lease| lease.id.clone())
            });
            match last {
                Some(last) => after = Some(last),
                None => return all,
            }
        }
    }

    /// The same, and at what is kept of images.
    pub fn read_all<T>(&self, look: impl FnOnce(&Book, &Marks) -> T) -> T {
        self.store.read(|records| look(&records.book, &records.marks))
    }

    /// What the pool has promised to the leases of this ledger, and is about to.
    pub fn promises(&self) -> &Promises {
        &self.promises
    }

    /// The containerd leases of pulls that have begun and not ended, with their images.
    pub fn pulls(&self) -> BTreeMap<String, String> {
        self.store.read(|records| records.pulls.clone())
    }

    /// Those of them that nobody needs if they are not alive any more: a prefetch job that still waits for the image goes on
    /// with what a pull of it has left, which its containerd lease holds.
    pub fn pulls_of_no_job(&self) -> Vec<String> {
        self.store.read(|records| {
            let awaited = records.jobs.awaited();
            let is_left = |(_, image): &(&String, &String)| !awaited.contains(image.as_str());
            records.pulls.iter().filter(is_left).map(|(lease, _)| lease.clone()).collect()
        })
    }

    /// Told each time that what [`Self::read`] sees has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.store.changes()
    }

    /// Writes the intent of a new lease, or finds the one that the VM holds. Refused if it was given up by then.
    pub async fn acquire(
        &self,
        ask: Ask,
        fresh: LeaseId,
        now: Moment,
        given_up: GivenUp,
    ) -> Result<Acquisition> {
        self.write(move |batch| {
            if given_up.is_set() {
                return Err(released(&ask.vm));
            }
            let acquisition = book(batch).acquire(&ask, fresh, &now).map_err(Error::from)?;
            if let Acquisition::New { changes, .. } = &acquisition {
                apply(batch, changes.clone());
            }
            Ok(acquisition)
        })
        .await
    }

    /// Makes the spare that `ask` names the VM's. That its image was used is in the same write. Refused if it was given up by
    /// then. The caller may wait for the disk: see [`Store::write_here`].
    pub fn hand_out_here(
        &self,
        ask: Ask,
        now: Moment,
        given_up: GivenUp,
    ) -> impl Future<Output = Result<HandedOut>> + Send + use<> {
        self.store.write_here(move |batch: &mut Batch<'_, Records>| {
            if given_up.is_set() {
                return Err(released(&ask.vm));
            }
            // No lease is made, so no id is used.
            match book(batch).acquire(&ask, LeaseId::from_random(0), &now) {
                Ok(Acquisition::New { lease, changes }) => {
                    apply(batch, changes);
                    let used =
                        lease.grant().map(|grant| batch.state().marks.used(&grant.image_digest, grant.at));
                    mark(batch, used.unwrap_or_default());
                    Ok(HandedOut::Lease(lease))
                }
                Ok(Acquisition::Existing(_)) => Ok(HandedOut::Held),
                Err(BookError::NoSpare(_)) => Ok(HandedOut::NoSpare),
                Err(error) => Err(error.into()),
            }
        })
    }

    /// Writes the intent of a spare; see [`Book::intend_spare`].
    pub async fn intend_spare(&self, id: LeaseId, spec: Spec, now: Moment) -> Result<Lease> {
        self.write(move |batch| {
            let (lease, changes) = book(batch).intend_spare(id, spec, &now).map_err(Error::from)?;
            apply(batch, changes);
            Ok(lease)
        })
        .await
    }

    /// Notes that these spares, with their devices as they are now, can be handed out; returns those that are spares still.
    pub async fn confirm_spares(&self, seen: Vec<(LeaseId, Seen)>, now: Moment) -> Result<Vec<LeaseId>> {
        self.write(move |batch| {
            let mut confirmed = Vec::with_capacity(seen.len());
            for (id, seen) in &seen {
                // One that was handed out or dropped is no spare any more.
                let Ok((_, changes)) = book(batch).adopt_spare(id, seen, &now) else { continue };
                apply(batch, changes);
                confirmed.push(id.clone());
            }
            Ok(confirmed)
        })
        .await
    }

    /// Marks those of `ids` for reclaiming that are spares still; says how many.
    pub async fn drop_spares(&self, ids: Vec<LeaseId>, now: Moment) -> Result<usize> {
        self.change_each(ids, move |book, id| Ok(book.drop_spare(id, &now))).await
    }

    /// Confirms that the VM has the lease that it was found to hold; see [`Book::keep`].
    pub async fn keep(&self, ask: Ask, id: LeaseId, seen: Seen, now: Moment) -> Result<Lease> {
        let decide = move |book: &Book| {
            book.keep(&ask, &id, Some(&seen), &now).map_err(|error| match error {
                // It was found to be held a moment ago.
                BookError::Gone(_) | BookError::Released(_) | BookError::Abandoned(_) => released(&ask.vm),
                error => Error::from(error),
            })
        };
        let (lease, changes) = self.read(&decide)?;
        if changes.is_empty() {
            return Ok(lease);
        }
        self.write(move |batch| {
            let (lease, changes) = decide(book(batch))?;
            apply(batch, changes);
            Ok(lease)
        })
        .await
    }

    /// Lets a lease hold for its time from now on; see [`Book::renew`].
    pub async fn renew(
        &self,
        id: LeaseId,
        ttl: Option<Ttl>,
        seen: Option<Seen>,
        now: Moment,
    ) -> Result<Lease> {
        let mut renewed = self.renew_all(vec![(id.clone(), ttl, seen)], now).await?;
        renewed.pop().unwrap_or(Err(BookError::Gone(id))).map_err(Error::from)
    }

    /// The same for many, with one write.
    pub async fn renew_all(
        &self,
        leases: Vec<(LeaseId, Option<Ttl>, Option<Seen>)>,
        now: Moment,
    ) -> Result<Vec<Result<Lease, BookError>>> {
        self.write(move |batch| {
            let mut renew = |(id, ttl, seen): &(LeaseId, Option<Ttl>, Option<Seen>)| {
                let doubtful = |lease: &Lease| lease.suspicion(&now).is_some();
                if seen.is_none() && book(batch).get(id).is_some_and(doubtful) {
                    return Err(BookError::Doubtful(id.clone()));
                }
                let (lease, changes) = book(batch).renew(id, *ttl, seen.as_ref(), &now)?;
                apply(batch, changes);
                Ok(lease)
            };
            Ok(leases.iter().map(&mut renew).collect())
        })
        .await
    }

    /// Confirms that the lease's device is there. That its image was used is in the same write.
    pub async fn grant(&self, id: LeaseId, grant: Grant, now: Moment) -> Result<Lease> {
        self.write(move |batch| {
            let (manifest, at) = (grant.image_digest.clone(), grant.at);
            let (lease, changes) = book(batch).grant(&id, grant, &now).map_err(Error::from)?;
            apply(batch, changes);
            let used = batch.state().marks.used(&manifest, at);
            mark(batch, used);
            Ok(lease)
        })
        .await
    }

    /// Confirms that the lease's device is there, for whoever comes next: see [`Book::shelve`].
    pub async fn shelve(&self, id: LeaseId, grant: Grant, now: Moment) -> Result<Lease> {
        self.write(move |batch| {
            let (lease, changes) = book(batch).shelve(&id, grant, &now).map_err(Error::from)?;
            apply(batch, changes);
            Ok(lease)
        })
        .await
    }

    /// Writes down why the lease could not be made. Nothing if it was released meanwhile.
    pub async fn fail(&self, id: LeaseId, failure: Failure, now: Moment) -> Result<()> {
        self.fail_all(vec![id], failure, now).await.map(drop)
    }

    /// The same of those of `ids` that are still being prepared; says how many.
    pub async fn fail_all(&self, ids: Vec<LeaseId>, failure: Failure, now: Moment) -> Result<usize> {
        self.change_each(ids, move |book, id| Ok(book.fail(id, failure.clone(), &now))).await
    }

    /// Lets nobody more share what this lease has; see [`Book::retire`].
    pub async fn retire(&self, id: LeaseId, now: Moment) -> Result<()> {
        self.change_each(vec![id], move |book, id| Ok(book.retire(id, &now))).await.map(drop)
    }

    /// Forgets why the lease has failed: its caller was told.
    pub async fn see(&self, id: LeaseId, now: Moment) -> Result<()> {
        self.change_each(vec![id], move |book, id| Ok(book.see(id, &now))).await.map(drop)
    }

    /// Marks what is given back for reclaiming. The writer looks it up, in turn, so that it also finds one that was asked
    /// for just before.
    pub async fn release(&self, ask: Release, now: Moment) -> Result<Releasing> {
        self.write(move |batch| {
            let (outcome, changes) = book(batch).release(&ask, &now).map_err(Error::from)?;
            apply(batch, changes);
            Ok(outcome)
        })
        .await
    }

    /// Marks leases whose time is over, or that an earlier boot has left; says how many.
    pub async fn suspect(&self, grace: Grace, now: Moment) -> Result<usize> {
        if self.read(|book| book.suspect(grace, &now).is_empty()) {
            return Ok(0);
        }
        self.write(move |batch| {
            let changes = book(batch).suspect(grace, &now);
            let count = changes.len();
            apply(batch, changes);
            Ok(count)
        })
        .await
    }

    /// Marks those of `ids` for reclaiming whose grace is over, and that nobody has renewed; says how many.
    pub async fn give_up_on(&self, ids: Vec<LeaseId>, now: Moment) -> Result<usize> {
        self.change_each(ids, move |book, id| Ok(book.give_up_on(id, &now))).await
    }

    /// Forgets leases whose disks are gone; of failed ones, that there is something to clear away.
    pub async fn remove_all(&self, ids: Vec<LeaseId>, now: Moment) -> Result<()> {
        self.change_each(ids, move |book, id| book.remove(id, &now).map_err(Error::from)).await.map(drop)
    }

    /// One write with a decision about each; says how many came to something.
    async fn change_each(
        &self,
        ids: Vec<LeaseId>,
        decide: impl Fn(&Book, &LeaseId) -> Result<Vec<cowshed_leases::Change>> + Send + 'static,
    ) -> Result<usize> {
        self.write(move |batch| {
            let mut count = 0;
            for id in &ids {
                let changes = decide(book(batch), id)?;
                count += usize::from(!changes.is_empty());
                apply(batch, changes);
            }
            Ok(count)
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

    /// Pins the image of this name, until it is unpinned or for so long from `now` on, with so many spares. An earlier pin is
    /// replaced.
    pub async fn pin(&self, image: String, hold_for: Option<Ttl>, spares: u32, now: Moment) -> Result<Pin> {
        let until = hold_for.map(|ttl| end_of(ttl, &now));
        let pin = Pin { until, spares };
        self.set_pin(image, Some(pin), now).await?;
        Ok(pin)
    }

    /// Ends the pin; says whether there was one.
    pub async fn unpin(&self, image: String, now: Moment) -> Result<bool> {
        self.set_pin(image, None, now).await.map(|before| before.is_some())
    }

    /// Gives back the pin that held before.
    async fn set_pin(&self, image: String, pin: Option<Pin>, now: Moment) -> Result<Option<Pin>> {
        self.write(move |batch| {
            let before = batch.state().marks.pin(&image, &now);
            let marks = batch.state().marks.set_pin(&image, pin, &now);
            mark(batch, marks);
            Ok(before)
        })
        .await
    }

    /// Looks at the prefetch jobs.
    pub fn read_jobs<T>(&self, look: impl FnOnce(&Jobs) -> T) -> T {
        self.store.read(|records| look(&records.jobs))
    }

    /// Writes a new prefetch job, or finds the one of this name; see [`Jobs::create`].
    pub async fn create_job(&self, id: JobId, plan: Plan, now: UnixMicros) -> Result<Arc<Job>> {
        self.write(move |batch| {
            let (job, changes) = batch.state().jobs.create(id, plan, now)?;
            changes.into_iter().for_each(|change| batch.change(Change::Job(change)));
            Ok(job)
        })
        .await
    }

    /// Writes what has become of one of a prefetch job's images, and pins it if the job says so. `None`: the job has ended.
    pub async fn settle_job(
        &self,
        id: JobId,
        at: usize,
        stage: Stage,
        now: Moment,
    ) -> Result<Option<Arc<Job>>> {
        self.write(move |batch| {
            let is_here = matches!(stage, Stage::Here { .. });
            let Some(job) = batch.state().jobs.settle(&id, at, stage, now.wall) else { return Ok(None) };
            if let Some(pin_for) = job.plan.pin_for.filter(|_| is_here) {
                let pin = Pin { until: Some(end_of(pin_for, &now)), spares: job.plan.spares };
                let marks = batch.state().marks.prolong_pin(&job.plan.images[at].image, pin, &now);
                mark(batch, marks);
            }
            batch.change(Change::Job((id, Some(job.clone()))));
            Ok(Some(job))
        })
        .await
    }

    /// Forgets what was so of images that are gone since: that jobs have fetched these names for later, and when disks were made
    /// of these manifests. What has happened after that stays.
    pub async fn forget_images(
        &self,
        names: BTreeSet<String>,
        manifests: BTreeSet<String>,
        since: UnixMicros,
    ) -> Result<()> {
        let is_known = self.store.read(|records| {
            !records.jobs.forget(&names, since).is_empty()
                || !records.marks.forget(&manifests, since).is_empty()
        });
        if !is_known {
            return Ok(());
        }
        self.write(move |batch| {
            let (jobs, marks) =
                (batch.state().jobs.forget(&names, since), batch.state().marks.forget(&manifests, since));
            jobs.into_iter().for_each(|change| batch.change(Change::Job(change)));
            mark(batch, marks);
            Ok(())
        })
        .await
    }

    /// Ends a prefetch job. `None`: there is none that runs.
    pub async fn end_job(
        &self,
        id: JobId,
        how: End,
        causes: Causes,
        now: UnixMicros,
    ) -> Result<Option<Arc<Job>>> {
        self.write(move |batch| {
            let ended = batch.state().jobs.end(&id, how, causes, now);
            if ended.is_some() {
                batch.change(Change::Job((id, ended.clone())));
            }
            Ok(ended)
        })
        .await
    }

    /// Finishes the writes that have begun and closes the file; later ones are refused. To be called once, at the end.
    pub async fn close(&self) {
        self.store.close().await;
    }

    async fn write<T: Send + 'static>(
        &self,
        decide: impl FnOnce(&mut Batch<'_, Records>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.store.write(decide).await
    }
}

/// What handing out a spare has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandedOut {
    /// The VM has it.
    Lease(Box<Lease>),
    /// It is no spare any more.
    NoSpare,
    /// The VM has a lease, and needs none.
    Held,
}

/// The book with all that was decided before.
fn book<'a>(batch: &'a Batch<'_, Records>) -> &'a Book {
    &batch.state().book
}

fn apply(batch: &mut Batch<'_, Records>, changes: Vec<cowshed_leases::Change>) {
    changes.into_iter().for_each(|change| batch.change(Change::Lease(change)));
    if let Some(reserved) = batch.state().to_reserve() {
        batch.change(Change::Reserved(reserved));
    }
}

/// When it is over if it begins now, by the wall clock.
fn end_of(ttl: Ttl, now: &Moment) -> UnixMicros {
    let micros = i64::try_from(ttl.micros()).unwrap_or(i64::MAX);
    UnixMicros(now.wall.0.saturating_add(micros))
}

fn mark(batch: &mut Batch<'_, Records>, marks: Vec<Mark>) {
    marks.into_iter().for_each(|mark| batch.change(Change::Image(mark)));
}

/// The answer to an acquire that a release has overtaken.
pub(crate) fn released(vm: &VmId) -> Error {
    let message = format!(
        "the disk of VM {vm} was released while it was being acquired; acquire again if it is wanted still"
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
