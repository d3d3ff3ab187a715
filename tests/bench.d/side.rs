//! One snapshotter as a client of containerd sees it.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use containerd_client::{
    connect,
    services::v1::{
        CreateRequest, DeleteRequest,
        leases_client::LeasesClient,
        snapshots::{
            CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
            RemoveSnapshotRequest, snapshots_client::SnapshotsClient,
        },
        version_client::VersionClient,
    },
};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};

use crate::{
    Outcome,
    devices::{self, Pool},
};

/// Everything here happens in this namespace of containerd.
pub(crate) const NAMESPACE: &str = "bench";
const SOCKET: &str = "/run/containerd/containerd.sock";
/// What hangs fails the run.
const LIMIT: Duration = Duration::from_secs(300);

/// Who holds a snapshot against containerd's collection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Holder<'a> {
    /// It itself, by a label.
    Itself,
    /// A lease.
    Lease(&'a str),
}

/// A writable snapshot that was made.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) key: String,
    pub(crate) path: String,
    /// Its device-mapper name.
    pub(crate) device: String,
}

/// What a Prepare replied.
struct Prepared {
    key: String,
    path: String,
}

impl Prepared {
    /// Opens the device, as a launcher would.
    fn check(self) -> Outcome<Disk> {
        let device = devices::openable(&self.path)?;
        Ok(Disk { key: self.key, path: self.path, device })
    }
}

/// A snapshotter, its parent snapshot, and the disks that stay in it.
pub(crate) struct Side {
    pub(crate) snapshotter: String,
    /// Apart from the other side's even if both have the same snapshotter.
    tag: &'static str,
    channel: Channel,
    made: AtomicU64,
    parent: String,
    pool: Option<Pool>,
}

impl Side {
    /// Connects, makes the parent snapshot and `standing` disks of it that stay.
    pub(crate) async fn new(tag: &'static str, snapshotter: &str, standing: usize) -> Outcome<Self> {
        let mut side = Self::connected(tag, snapshotter).await?;
        let (first, _) = side.prepare().await?;
        side.pool = Some(devices::pool_of(&first.device)?);
        let parent = format!("bench-{tag}-parent");
        let commit = CommitSnapshotRequest {
            snapshotter: side.snapshotter.clone(),
            name: parent.clone(),
            key: first.key,
            labels: root_label(),
        };
        side.snapshots().commit(request(commit, Holder::Itself)?).await.map_err(told("Commit"))?;
        side.parent = parent;
        // at least one of them is no measurement: the first of a parent may do more
        for _ in 0..standing.max(1) {
            side.prepare().await?;
        }
        Ok(side)
    }

    async fn connected(tag: &'static str, snapshotter: &str) -> Outcome<Self> {
        Ok(Self {
            snapshotter: snapshotter.to_owned(),
            tag,
            channel: connect(SOCKET).await?,
            made: AtomicU64::new(0),
            parent: String::new(),
            pool: None,
        })
    }

    /// Connects; the parent is the image that was pulled into this snapshotter, the only one there.
    pub(crate) async fn of_images(tag: &'static str, snapshotter: &str) -> Outcome<Self> {
        let mut side = Self::connected(tag, snapshotter).await?;
        let all = side.list().await?;
        let tops = all.iter().filter(|one| all.iter().all(|other| other.parent != one.name));
        match tops.collect::<Vec<_>>().as_slice() {
            [top] if top.kind() == Kind::Committed => side.parent = top.name.clone(),
            tops => {
                return Err(format!("{} images are unpacked in {snapshotter}, not one", tops.len()).into());
            }
        }
        Ok(side)
    }

    pub(crate) fn set_pool(&mut self, pool: Pool) {
        self.pool = Some(pool);
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    pub(crate) async fn version(&self) -> Outcome<String> {
        Ok(VersionClient::new(self.channel.clone()).version(Request::new(())).await?.into_inner().version)
    }

    /// Name of the thin pool, and what of it is in use.
    pub(crate) fn pool(&self) -> Outcome<&Pool> {
        self.pool.as_ref().ok_or_else(|| "the pool is not known yet".into())
    }

    /// Makes a disk of the parent, and says how long the call took. The device has to be there to be opened.
    pub(crate) async fn prepare(&self) -> Outcome<(Disk, Duration)> {
        self.prepare_held(Holder::Itself).await
    }

    pub(crate) async fn prepare_held(&self, holder: Holder<'_>) -> Outcome<(Disk, Duration)> {
        let (prepared, took) = self.call_prepare(holder).await?;
        Ok((prepared.check()?, took))
    }

    /// The call alone.
    async fn call_prepare(&self, holder: Holder<'_>) -> Outcome<(Prepared, Duration)> {
        let key = format!("bench-{}-{}", self.tag, self.made.fetch_add(1, Ordering::Relaxed));
        let labels = if matches!(holder, Holder::Itself) { root_label() } else { HashMap::new() };
        let (path, took) = self.call_prepare_of(&key, holder, labels).await?;
        Ok((Prepared { key, path }, took))
    }

    /// The call alone, the key and the labels being the caller's: the device's path.
    pub(crate) async fn prepare_labelled(
        &self,
        key: &str,
        holder: Holder<'_>,
        labels: &[(&str, &str)],
    ) -> Outcome<String> {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Ok(self.call_prepare_of(key, holder, labels).await?.0)
    }

    async fn call_prepare_of(
        &self,
        key: &str,
        holder: Holder<'_>,
        labels: HashMap<String, String>,
    ) -> Outcome<(String, Duration)> {
        let message = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: self.parent.clone(),
            labels,
        };
        let request = request(message, holder)?;
        let mut client = self.snapshots();
        let begun = Instant::now();
        let reply = client.prepare(request).await;
        let took = begun.elapsed();
        let mounts = reply.map_err(told("Prepare"))?.into_inner().mounts;
        Ok((mounts.into_iter().next().ok_or("Prepare returned no mount")?.source, took))
    }

    /// Where a snapshot's device is.
    pub(crate) async fn mounts(&self, key: &str) -> Outcome<String> {
        let message = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let reply =
            self.snapshots().mounts(request(message, Holder::Itself)?).await.map_err(told("Mounts"))?;
        Ok(reply.into_inner().mounts.into_iter().next().ok_or("Mounts returned no mount")?.source)
    }

    /// Makes disks all at once, and says how long it took until the last reply. Their devices are opened after that.
    pub(crate) async fn prepare_at_once(&self, count: usize) -> Outcome<(Vec<Disk>, Duration)> {
        let begun = Instant::now();
        let replies = try_join_all((0..count).map(|_| self.call_prepare(Holder::Itself))).await?;
        let took = begun.elapsed();
        let disks: Outcome<Vec<Disk>> = replies.into_iter().map(|(prepared, _)| prepared.check()).collect();
        Ok((disks?, took))
    }

    /// One call of Remove. Its device goes at a later collection.
    pub(crate) async fn remove(&self, disk: &Disk) -> Outcome {
        self.remove_key(&disk.key).await
    }

    pub(crate) async fn remove_key(&self, key: &str) -> Outcome {
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        self.snapshots().remove(request(message, Holder::Itself)?).await.map_err(told("Remove"))?;
        Ok(())
    }

    /// Makes a lease without end.
    pub(crate) async fn make_lease(&self, id: &str) -> Outcome {
        let message = CreateRequest { id: id.to_owned(), labels: HashMap::new() };
        match self.leases().create(request(message, Holder::Itself)?).await {
            Err(status) if status.code() != Code::AlreadyExists => Err(told("Leases.Create")(status).into()),
            _ => Ok(()),
        }
    }

    /// Deletes a lease, and waits for the collection of all that only it held.
    pub(crate) async fn end_lease(&self, id: &str) -> Outcome {
        self.delete_lease(id, true).await
    }

    /// Deletes a lease. What only it held is collected when containerd gets to it.
    pub(crate) async fn drop_lease(&self, id: &str) -> Outcome {
        self.delete_lease(id, false).await
    }

    async fn delete_lease(&self, id: &str, sync: bool) -> Outcome {
        let message = DeleteRequest { id: id.to_owned(), sync };
        self.leases().delete(request(message, Holder::Itself)?).await.map_err(told("Leases.Delete"))?;
        Ok(())
    }

    /// Has containerd collect what nothing holds.
    pub(crate) async fn collect(&self) -> Outcome {
        let id = format!("bench-{}-nudge", self.tag);
        self.make_lease(&id).await?;
        self.end_lease(&id).await
    }

    /// Removes disks, and waits until their devices are gone.
    pub(crate) async fn remove_fully(&self, disks: &[Disk]) -> Outcome {
        stream::iter(disks.iter().map(|disk| self.remove(disk)))
            .buffer_unordered(8)
            .try_collect::<Vec<()>>()
            .await?;
        self.collect().await?;
        devices::wait_gone(disks).await
    }

    /// The same, and waits until the pool is at rest, so that the next measurement does not pay for this one.
    pub(crate) async fn clear(&self, disks: &[Disk]) -> Outcome {
        self.remove_fully(disks).await?;
        self.rest().await
    }

    /// Waits until the pool frees nothing any more.
    pub(crate) async fn rest(&self) -> Outcome {
        self.pool()?.wait_at_rest().await
    }

    /// How many snapshots this snapshotter has in our namespace.
    pub(crate) async fn count(&self) -> Outcome<usize> {
        Ok(self.list().await?.len())
    }

    async fn list(&self) -> Outcome<Vec<Info>> {
        let message = ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), filters: Vec::new() };
        let listed = self.snapshots().list(request(message, Holder::Itself)?).await.map_err(told("List"))?;
        let mut listed = listed.into_inner();
        let mut all = Vec::new();
        while let Some(page) = listed.message().await.map_err(told("List"))? {
            all.extend(page.info);
        }
        Ok(all)
    }
}

fn root_label() -> HashMap<String, String> {
    HashMap::from([("containerd.io/gc.root".to_owned(), "2024-01-01T00:00:00Z".to_owned())])
}

fn request<T>(message: T, holder: Holder<'_>) -> Outcome<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    if let Holder::Lease(id) = holder {
        request.metadata_mut().insert("containerd-lease", MetadataValue::try_from(id)?);
    }
    request.set_timeout(LIMIT);
    Ok(request)
}

fn told(call: &'static str) -> impl Fn(tonic::Status) -> String {
    move |status| format!("containerd, {call}: {:?}: {}", status.code(), status.message())
}
