//! Which images stay: pins, what is in use, and the removal of what nobody needs.
//!
//! Pins and removals come one after the other, so that no image goes that was pinned while its removal was under way. An
//! Acquire does not wait for them: one that has resolved an image that goes at that moment pulls it again, and what was
//! made of it is held by its own lease.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use cowshed_leases::{Book, Lease, LeaseId, Moment, State, Ttl, UnixMicros};
use tokio::sync::{Mutex, oneshot};

use crate::{
    clock::Clock,
    containerd::ImageRecord,
    error::{Error, Reason, Result},
    evict::is_ours,
    image::{ImageInfo, ImageRef, Platform},
    ledger::{Ledger, Marks, Pin},
    making::Wishes,
    prefetch::job::Jobs,
    reclaim::Wake,
    rescue::Hindrances,
    spares::Spares,
    tasks::Tasks,
};

/// So long a removal waits for the image's spares.
const SPARES_GO: Duration = Duration::from_secs(10);
/// So many VMs of an image that is in use are named.
const NAMED: usize = 10;

/// The images that containerd has; the seam where tests put a fake.
#[async_trait::async_trait]
pub trait Catalogue: Send + Sync {
    /// The image of this name, as it is listed.
    async fn find(&self, image: &ImageRef, platform: &Platform) -> Result<Option<ImageInfo>>;
    /// All records.
    async fn records(&self) -> Result<Vec<ImageRecord>>;
    /// Digests of all manifests that `target` is or leads to, for whatever platform; of what is there, or was.
    async fn manifests(&self, target: &str) -> Result<BTreeSet<String>>;
    /// Whether it is being pulled.
    fn is_pulled(&self, image: &ImageRef) -> bool;
    /// Removes the record, if it is this one still, and says whether it was. With `collect`, waits until what it alone has
    /// held is collected.
    async fn remove(&self, record: &ImageRecord, collect: bool) -> Result<bool>;
}

/// What a removal has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// There was no such image.
    Nothing,
    /// The name has gone, the image has others.
    Name,
    /// The image has gone.
    Image,
}

/// An image that is to go, by all its names, to make room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Going {
    /// What its names lead to.
    pub target: String,
    /// All its names.
    pub names: BTreeSet<String>,
    /// The manifests that no other image leads to: spares of these are nobody's then.
    pub own: BTreeSet<String>,
    /// When a disk was last made of it, as far as was known when it was chosen.
    pub last_use: UnixMicros,
    /// So long what a prefetch job has fetched is kept.
    pub prefetched_for: Duration,
}

/// Pins and removes.
pub struct Keeper {
    /// The images.
    pub catalogue: Arc<dyn Catalogue>,
    /// Pins, and who holds what.
    pub ledger: Ledger,
    /// Whether anything can be removed.
    pub hindrances: Hindrances,
    /// What time it is.
    pub clock: Clock,
    /// Where removals run.
    pub tasks: Tasks,
    /// What is ready to be handed out.
    pub spares: Spares,
    /// Images that disks are asked of.
    pub wishes: Wishes,
    /// To be woken when there is something to clear away.
    pub wake: Wake,
    /// Whose turn it is.
    pub turn: Mutex<()>,
}

impl Keeper {
    /// Pins an image that is there; see `PinImage` in the API.
    pub async fn pin(
        &self,
        image: &ImageRef,
        platform: &Platform,
        hold_for: Option<Ttl>,
        spares: u32,
    ) -> Result<ImageInfo> {
        let _turn = self.turn.lock().await;
        let Some(found) = self.catalogue.find(image, platform).await? else {
            let message = format!("image {image} is not there: `cowshed pull {image}` first, then pin it");
            return Err(Error::new(Reason::ImageNotFound, message).with("image", image));
        };
        self.ledger.pin(image.to_string(), hold_for, spares, self.clock.now()).await?;
        tracing::info!(%image, "pinned");
        Ok(found)
    }

    /// Ends a pin; says whether there was one.
    pub async fn unpin(&self, image: &ImageRef) -> Result<bool> {
        let was_pinned = self.ledger.unpin(image.to_string(), self.clock.now()).await?;
        if was_pinned {
            tracing::info!(%image, "unpinned");
        }
        Ok(was_pinned)
    }

    /// Removes an image that nobody needs; see `RemoveImage` in the API. In a task of its own: what is removed is removed to
    /// its end, also if the caller goes away.
    pub async fn remove(self: &Arc<Self>, image: ImageRef) -> Result<Removed> {
        let (done, outcome) = oneshot::channel();
        let this = self.clone();
        self.tasks.spawn(async move {
            let removed = this.remove_in_turn(&image).await;
            match &removed {
                Ok(removed) => tracing::info!(%image, ?removed, "removed"),
                Err(error) => tracing::info!(%image, %error, "not removed"),
            }
            // The caller may have gone.
            let _gone = done.send(removed);
        });
        let stopping = || Error::new(Reason::Stopping, "the service is stopping; call again when it is up");
        outcome.await.unwrap_or_else(|_| Err(stopping()))
    }

    async fn remove_in_turn(&self, image: &ImageRef) -> Result<Removed> {
        let name = image.to_string();
        // Its layers could not go.
        self.hindrances.admit()?;
        let leads = self.leads_of_others(&name).await;
        let _turn = self.turn.lock().await;
        self.hindrances.admit()?;
        // What has come after that is not seen to be there.
        let since = self.clock.now().wall;
        let records = self.catalogue.records().await?;
        let Some(record) = records.iter().find(|record| record.name == name) else {
            // A crash may have come between its removal and this.
            self.forget([name].into(), BTreeSet::new(), since).await;
            return Ok(Removed::Nothing);
        };
        let mut manifests = self.catalogue.manifests(&record.target.digest).await?;
        manifests.insert(record.target.digest.clone());
        let named = Named { record, among: &records, manifests: &manifests };
        let judged = || {
            if self.catalogue.is_pulled(image) {
                let message = format!("image {image} is being pulled: remove it when that has ended");
                return Err(Error::new(Reason::ImageInUse, message).with("image", image));
            }
            let now = self.clock.now();
            self.ledger.read_all(|book, marks| judge(&named, book, marks, &now))
        };
        let removed = judged()?;
        if removed == Removed::Image && self.drop_spares(&manifests).await? {
            // Somebody may have come meanwhile.
            judged()?;
        }
        let own = match removed {
            Removed::Image => self.own_uses(record, &records, &manifests, &leads).await,
            Removed::Nothing | Removed::Name => BTreeSet::new(),
        };
        match self.take_off(&[record], removed == Removed::Image, own).await? {
            None => Ok(removed),
            Some(_) => {
                let message =
                    format!("image {image} was changed while it was being removed: remove it again");
                Err(Error::new(Reason::NotReady, message).with("image", image))
            }
        }
    }
}

impl Keeper {
    /// Spares of what goes are nobody's: they go first, for layers under them cannot. Waits until they are gone, or it is clear
    /// that it takes longer; says whether there were any, so that it has taken its time.
    async fn drop_spares(&self, manifests: &BTreeSet<String>) -> Result<bool> {
        drop(self.spares.clear(manifests.iter().filter_map(|digest| digest.parse().ok())));
        let made_of_it = |lease: &&Lease| {
            lease.vm.is_spare() && lease.grant().is_some_and(|grant| manifests.contains(&grant.image_digest))
        };
        let all =
            || self.ledger.read(|book| book.after(None).filter(made_of_it).map(|l| l.id.clone()).collect());
        let there: Vec<LeaseId> = all();
        if there.is_empty() {
            return Ok(false);
        }
        self.ledger.drop_spares(there.clone(), self.clock.now()).await?;
        self.wake.now();
        // The image goes all the same, and its layers after the spares.
        self.wait_until_gone(&there, SPARES_GO).await;
        Ok(true)
    }

    /// Waits until nothing is left of these leases, for `limit` at the most.
    pub(crate) async fn wait_until_gone(&self, leases: &[LeaseId], limit: Duration) {
        let is_there = || self.ledger.read(|book| leases.iter().any(|id| book.get(id).is_some()));
        let mut changes = self.ledger.changes();
        // Not wait_for: its look would hold up the writer that it waits for.
        let gone = async {
            while is_there() && changes.changed().await.is_ok() {
                changes.borrow_and_update();
            }
        };
        let _in_time = tokio::time::timeout(limit, gone).await;
    }
}

impl Keeper {
    /// What has gone is a stranger when it comes back: the ledger forgets when it was used, and that it was fetched for later.
    /// Only after it has gone: what is known of an image that stays decides whether it does. What a crash in between leaves is
    /// told and kept as if it had never gone, and nothing else comes of it.
    async fn forget(&self, names: BTreeSet<String>, manifests: BTreeSet<String>, since: UnixMicros) {
        if let Err(error) = self.ledger.forget_images(names, manifests, since).await {
            tracing::warn!(%error, "what was known of an image that is gone is not forgotten");
        }
    }

    /// Removes records of one image, the last of them with what they have held if that is to be collected, and forgets what has
    /// gone: what is known of the image goes with the last. Gives back the one that somebody has changed, which stays, as do
    /// those after it.
    async fn take_off<'a>(
        &self,
        records: &[&'a ImageRecord],
        collect: bool,
        own: BTreeSet<String>,
    ) -> Result<Option<&'a ImageRecord>> {
        let since = self.clock.now().wall;
        let mut gone = BTreeSet::new();
        let mut ended = Ok(None);
        for (at, record) in records.iter().enumerate() {
            match self.catalogue.remove(record, collect && at + 1 == records.len()).await {
                Ok(true) => {
                    gone.insert(record.name.clone());
                    continue;
                }
                Ok(false) => ended = Ok(Some(*record)),
                Err(error) => ended = Err(error),
            }
            // It may have gone all the same, and only what it has held not yet; or by another's hand.
            if self.is_gone(&record.name).await {
                gone.insert(record.name.clone());
            }
            break;
        }
        let own = if gone.len() == records.len() { own } else { BTreeSet::new() };
        if !gone.is_empty() {
            self.forget(gone, own, since).await;
        }
        ended
    }

    /// Whether there is no such record, as far as that can be learnt.
    async fn is_gone(&self, name: &str) -> bool {
        self.catalogue.records().await.is_ok_and(|records| records.iter().all(|record| record.name != name))
    }

    /// What the other images lead to, if the removal of this one may have to know: read before its turn, for which pins and
    /// evictions wait. What is missing is read then.
    async fn leads_of_others(&self, name: &str) -> Leads {
        let mut leads = Leads::new();
        let Ok(records) = self.catalogue.records().await else { return leads };
        let Some(record) = records.iter().find(|record| record.name == name) else { return leads };
        let target = &record.target.digest;
        if records.iter().any(|other| other.name != name && other.target.digest == *target) {
            return leads;
        }
        let Ok(mut manifests) = self.catalogue.manifests(target).await else { return leads };
        manifests.insert(target.clone());
        if self.used(&manifests).is_empty() {
            return leads;
        }
        for other in others(record, &records) {
            let Ok(theirs) = self.catalogue.manifests(other).await else { break };
            leads.insert(other.to_owned(), theirs);
        }
        leads
    }

    /// The manifests of an image of which disks were made, but for those to which one of the others leads.
    async fn own_uses(
        &self,
        record: &ImageRecord,
        among: &[ImageRecord],
        manifests: &BTreeSet<String>,
        leads: &Leads,
    ) -> BTreeSet<String> {
        let mut used = self.used(manifests);
        for other in others(record, among) {
            if used.is_empty() {
                break;
            }
            if let Some(theirs) = leads.get(other) {
                used.retain(|manifest| !theirs.contains(manifest));
                continue;
            }
            match self.catalogue.manifests(other).await {
                Ok(theirs) => used.retain(|manifest| !theirs.contains(manifest)),
                // It may be everything.
                Err(_) => used.clear(),
            }
        }
        used
    }

    /// Those of the manifests of which disks were made.
    fn used(&self, manifests: &BTreeSet<String>) -> BTreeSet<String> {
        let is_used = |marks: &Marks, manifest: &&String| marks.last_use(manifest).is_some();
        self.ledger.read_all(|_, marks| {
            manifests.iter().filter(|manifest| is_used(marks, manifest)).cloned().collect()
        })
    }

    /// Removes an image to make room, if nobody has come for it since it was chosen; says whether it was there. Its caller sees
    /// to it that this is done to its end.
    pub(crate) async fn evict(&self, going: &Going) -> Result<bool> {
        let _turn = self.turn.lock().await;
        self.hindrances.admit()?;
        let records = self.catalogue.records().await?;
        let of_it: Vec<&ImageRecord> =
            records.iter().filter(|record| record.target.digest == going.target).collect();
        if of_it.is_empty() {
            return Ok(false);
        }
        if let Some(other) =
            of_it.iter().find(|record| !going.names.contains(&record.name) || !is_ours(record))
        {
            let message = format!("it has the name {} by now, or another client has marked it", other.name);
            return Err(Error::new(Reason::ImageInUse, message).with("image", &other.name));
        }
        let mut manifests = self.catalogue.manifests(&going.target).await?;
        manifests.insert(going.target.clone());
        self.admit_going(going, &of_it, &manifests)?;
        if self.drop_spares(&going.own).await? {
            // Somebody may have come meanwhile.
            self.admit_going(going, &of_it, &manifests)?;
        }
        let Some(changed) = self.take_off(&of_it, true, going.own.clone()).await? else { return Ok(true) };
        let message = format!("image {} was changed while it was being removed", changed.name);
        Err(Error::new(Reason::NotReady, message).with("image", &changed.name))
    }

    /// Refuses if somebody is at it, or needs it.
    fn admit_going(
        &self,
        going: &Going,
        records: &[&ImageRecord],
        manifests: &BTreeSet<String>,
    ) -> Result<()> {
        let now = self.clock.now();
        let awaited =
            |name: &str| self.ledger.read_jobs(|jobs| is_awaited(jobs, name, going, manifests, &now));
        for record in records {
            let is_pulled = ImageRef::parse(&record.name).is_ok_and(|image| self.catalogue.is_pulled(&image));
            if is_pulled || awaited(&record.name) || self.wishes.contains(&record.name) {
                let message = format!(
                    "image {} is being pulled, a prefetch job is about it, or a VM is to have a disk of it",
                    record.name
                );
                return Err(Error::new(Reason::ImageInUse, message).with("image", &record.name));
            }
        }
        self.ledger.read_all(|book, marks| judge_unneeded(going, records, manifests, book, marks, &now))
    }
}

/// Whether a prefetch job waits for the name, or has fetched for later what it leads to.
fn is_awaited(jobs: &Jobs, name: &str, going: &Going, manifests: &BTreeSet<String>, now: &Moment) -> bool {
    let mut fetched = jobs.fetched(going.prefetched_for);
    jobs.awaited().contains(name)
        || fetched.any(|(of, manifest, until)| of == name && until > now.wall && manifests.contains(manifest))
}

/// Refuses if it is pinned, disks are made of it, or one was since it was chosen.
fn judge_unneeded(
    going: &Going,
    records: &[&ImageRecord],
    manifests: &BTreeSet<String>,
    book: &Book,
    marks: &Marks,
    now: &Moment,
) -> Result<()> {
    for record in records {
        // Alone among records: that of its other names goes as well.
        let among = [ImageRecord::clone(record)];
        judge(&Named { record, among: &among, manifests }, book, marks, now)?;
    }
    let used = manifests.iter().filter_map(|manifest| marks.last_use(manifest)).max();
    if used.is_some_and(|used| used > going.last_use) {
        let message = "a disk was made of it meanwhile".to_owned();
        return Err(Error::new(Reason::ImageInUse, message).with("target", &going.target));
    }
    Ok(())
}

/// What images lead to, by their targets.
type Leads = HashMap<String, BTreeSet<String>>;

/// The targets of all other images.
fn others<'a>(record: &ImageRecord, among: &'a [ImageRecord]) -> BTreeSet<&'a str> {
    let targets = among.iter().map(|other| other.target.digest.as_str());
    targets.filter(|target| *target != record.target.digest).collect()
}

/// An image's name, among all that there are.
struct Named<'a> {
    record: &'a ImageRecord,
    among: &'a [ImageRecord],
    /// What it leads to.
    manifests: &'a BTreeSet<String>,
}

/// What its removal would come to, if it may be removed.
fn judge(named: &Named<'_>, book: &Book, marks: &Marks, now: &Moment) -> Result<Removed> {
    let Named { record, among, manifests } = named;
    let name = &record.name;
    if let Some(pin) = marks.pin(name, now) {
        let until = pin.until.map(|until| format!(" until {}", crate::clock::timestamp(until)));
        let message = format!(
            "image {name} is pinned{}: `cowshed unpin {name}` first",
            until.as_deref().unwrap_or_default()
        );
        return Err(Error::new(Reason::ImagePinned, message).with("image", name));
    }
    let is_other = |other: &&ImageRecord| other.name != *name && other.target.digest == record.target.digest;
    if among.iter().any(|other| is_other(&other)) {
        return Ok(Removed::Name);
    }
    let is_user = |lease: &&Lease| !lease.vm.is_spare() && is_made_of(lease, name, manifests);
    let (shared, of_vms): (Vec<&Lease>, Vec<&Lease>) =
        book.after(None).filter(is_user).partition(|l| l.vm.is_image());
    // What nobody shares any more is there until its device is closed.
    let users = if of_vms.is_empty() { shared } else { of_vms };
    if users.is_empty() {
        return Ok(Removed::Image);
    }
    let count = users.len();
    let mut vms: Vec<String> = users.iter().map(|lease| lease.vm.to_string()).collect();
    vms.sort();
    vms.dedup();
    vms.truncate(NAMED);
    let vms = vms.join(", ");
    let more = if count > NAMED { ", …" } else { "" };
    let message = format!(
        "image {name} is in use: leases of disks made of it: {count} (VMs {vms}{more}): release them, and remove it when \
         the disks are gone"
    );
    Err(Error::new(Reason::ImageInUse, message).with("image", name).with("vm_ids", vms))
}

/// Whether there is, or may be, a disk of the lease, and it was made of one of the manifests. Before it is known of which, by
/// the name that was asked for.
fn is_made_of(lease: &Lease, name: &str, manifests: &BTreeSet<String>) -> bool {
    match (lease.grant(), &lease.state) {
        (_, State::Failed { .. }) => false,
        (Some(grant), _) => manifests.contains(&grant.image_digest),
        (None, _) => lease.spec.image == name,
    }
}

/// What the ledger knows of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// When a disk was last made of its manifest.
    pub last_use: Option<UnixMicros>,
    /// The pin of its name.
    pub pin: Option<Pin>,
    /// How many VMs hold disks made of its manifest.
    pub leases: u32,
}

/// What the ledger knows of each of these images, now.
pub fn kept(ledger: &Ledger, images: Vec<ImageInfo>, now: &Moment) -> Vec<(ImageInfo, Kept)> {
    ledger.read_all(|book, marks| {
        // Leases that VMs hold, and the last of their grants, by manifest.
        let mut held: HashMap<&str, (u32, UnixMicros)> = HashMap::new();
        for lease in book.after(None).filter(|lease| lease.is_held() && lease.vm.is_vm()) {
            let Some(grant) = lease.grant() else { continue };
            let (count, last) = held.entry(&grant.image_digest).or_insert((0, grant.at));
            *count += 1;
            *last = grant.at.max(*last);
        }
        let of = |image: &ImageInfo| {
            let manifest = image.manifest_digest.as_deref();
            let held = manifest.and_then(|manifest| held.get(manifest));
            let used = manifest.and_then(|manifest| marks.last_use(manifest));
            Kept {
                // Of what was used before uses were written down, the leases tell.
                last_use: used.max(held.map(|(_, at)| *at)),
                pin: marks.pin(&image.name, now),
                leases: held.map_or(0, |(count, _)| *count),
            }
        };
        let with = |image: ImageInfo| {
            let kept = of(&image);
            (image, kept)
        };
        images.into_iter().map(with).collect()
    })
}

#[cfg(test)]
#[path = "keeping_tests.rs"]
mod tests;
