//! Cowshed as a launcher has it: disks by gRPC, from the shelf of spares or made when they are asked for.

use std::{
    cell::Cell,
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cowshed_proto::v1::{
    AcquireRequest, AcquireResponse, CacheResult, DiskSpec, GetStatusRequest, GetStatusResponse, Image,
    ListImagesRequest, OfferRequest, OfferResponse, PinImageRequest, PullImageRequest, ReleaseRequest,
    cowshed_client::CowshedClient,
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tonic::transport::Channel;

use crate::{
    Outcome,
    acquire::disks::{Disk, Launcher, checked, opened, run, settle},
    cowshed,
    devices::{self, Pool},
    samples::Samples,
    side,
};

const CONFIGURATION: &str = "/etc/cowshed/cowshed.toml";
const PATIENCE: Duration = Duration::from_secs(600);
/// The most spares that anything here asks for.
pub(crate) const SHELF: u32 = 100;

/// Whether Cowshed keeps spares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spares {
    Kept,
    Off,
}

/// A disk that Acquire has given.
pub(crate) struct Acquired {
    pub(crate) disk: Disk,
    /// Of the call, as its caller sees it.
    pub(crate) took: Duration,
    /// Of the look at the device after it.
    pub(crate) check: Duration,
    pub(crate) reply: AcquireResponse,
}

pub(crate) struct Service {
    channel: Channel,
    image: String,
    made: AtomicU64,
    bytes: u64,
    pool: Pool,
    /// The configuration without its section on spares.
    configuration: String,
    /// What that section has now: how many spares of an image at the most, if any.
    kept: Cell<Option<Option<u32>>>,
}

impl Service {
    /// Pulls the image; also a device that has its contents, for others.
    pub(crate) async fn new(image: &str) -> Outcome<(Self, String)> {
        let channel = cowshed::channel(Path::new(cowshed::SOCKET)).await?;
        let mut service = Self {
            channel,
            image: image.to_owned(),
            made: AtomicU64::new(0),
            bytes: 0,
            pool: Pool { name: String::new() },
            configuration: without_spares(&fs::read_to_string(CONFIGURATION)?),
            kept: Cell::new(None),
        };
        let pull = PullImageRequest { image: image.to_owned(), ..PullImageRequest::default() };
        let mut pictures = service.client().pull_image(pull).await?.into_inner();
        while pictures.message().await?.is_some() {}
        let request = AcquireRequest { vm_id: "source".to_owned(), ..service.request() };
        let reply = service.client().acquire(request).await?.into_inner();
        let device = device_of(&reply)?;
        service.bytes = opened(&device.path)?.1;
        service.pool = devices::pool_of(&device.dm_name)?;
        Ok((service, device.path))
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn client(&self) -> CowshedClient<Channel> {
        CowshedClient::new(self.channel.clone())
    }

    fn spec(&self) -> DiskSpec {
        DiskSpec { image: self.image.clone(), ..DiskSpec::default() }
    }

    fn request(&self) -> AcquireRequest {
        let vm_id = format!("vm-{}", self.made.fetch_add(1, Ordering::Relaxed));
        AcquireRequest { vm_id, spec: Some(self.spec()), ..AcquireRequest::default() }
    }

    /// A disk for a VM that has none. After the call the device is looked at; it has to be what the reply says.
    pub(crate) async fn acquire(&self) -> Outcome<Acquired> {
        let request = self.request();
        let mut client = self.client();
        let begun = Instant::now();
        let reply = client.acquire(request).await;
        let took = begun.elapsed();
        let reply = reply.map_err(|status| format!("Acquire: {:?}: {}", status.code(), status.message()))?;
        let reply = reply.into_inner();
        if reply.existing || reply.cache() != CacheResult::Hit {
            return Err(format!("a disk that was there, or an image that was not: {reply:?}").into());
        }
        let device = device_of(&reply)?;
        let begun = Instant::now();
        let number = checked(&device.path, self.bytes)?;
        let check = begun.elapsed();
        if number != rustix::fs::makedev(device.major, device.minor) {
            return Err(format!("{} is not {}:{}", device.path, device.major, device.minor).into());
        }
        let key = reply.lease.as_ref().map(|lease| lease.vm_id.clone()).unwrap_or_default();
        Ok(Acquired { disk: Disk { key, device: device.dm_name, number }, took, check, reply })
    }

    /// A disk from the shelf: anything else is a failure.
    pub(crate) async fn hit(&self) -> Outcome<Acquired> {
        let acquired = self.acquire().await?;
        if acquired.reply.spare { Ok(acquired) } else { Err("the disk was no spare".into()) }
    }

    /// A disk that was made when it was asked for: anything else is a failure.
    pub(crate) async fn miss(&self) -> Outcome<Acquired> {
        let acquired = self.acquire().await?;
        if acquired.reply.spare { Err("the disk was a spare".into()) } else { Ok(acquired) }
    }

    pub(crate) async fn release(&self, disk: &Disk) -> Outcome {
        let request = ReleaseRequest { vm_id: disk.key.clone(), ..ReleaseRequest::default() };
        let released = self.client().release(request).await?.into_inner();
        match released.lease {
            Some(_) => Ok(()),
            None => Err(format!("{} had no disk to release", disk.key).into()),
        }
    }

    pub(crate) async fn release_all(&self, disks: &[Disk]) -> Outcome {
        let released = stream::iter(disks.iter().map(|disk| self.release(disk))).buffer_unordered(16);
        released.try_collect::<Vec<()>>().await.map(drop)
    }

    /// Releases disks, and waits until their devices are gone and the pool is at rest.
    pub(crate) async fn clear(&self, disks: &[Disk]) -> Outcome {
        self.release_all(disks).await?;
        self.gone(disks).await?;
        self.pool.wait_at_rest().await?;
        settle().await
    }

    pub(crate) async fn gone(&self, disks: &[Disk]) -> Outcome {
        let of_side =
            |disk: &Disk| side::Disk { key: String::new(), path: String::new(), device: disk.device.clone() };
        devices::wait_gone(&disks.iter().map(of_side).collect::<Vec<_>>()).await
    }

    pub(crate) async fn offer(&self) -> Outcome<OfferResponse> {
        let request = OfferRequest { spec: Some(self.spec()), ..OfferRequest::default() };
        Ok(self.client().offer(request).await?.into_inner())
    }

    pub(crate) async fn status(&self) -> Outcome<GetStatusResponse> {
        Ok(self.client().get_status(GetStatusRequest {}).await?.into_inner())
    }

    async fn image(&self) -> Outcome<Image> {
        let images = self.client().list_images(ListImagesRequest::default()).await?.into_inner().images;
        let image = images.into_iter().find(|image| image.name == self.image);
        image.ok_or_else(|| format!("{} is not there", self.image).into())
    }

    /// From now on so many spares are kept, whatever the demand. Waits until they are there.
    pub(crate) async fn keep(&self, count: u32) -> Outcome {
        if self.configure(Some(count)).await? {
            let image = self.image.clone();
            let pin = PinImageRequest { image, spares: Some(count), ..PinImageRequest::default() };
            self.client().pin_image(pin).await?;
        }
        self.full(count).await.map(drop)
    }

    /// From now on there are none. Waits until those that there were are gone.
    pub(crate) async fn keep_none(&self) -> Outcome {
        self.configure(None).await?;
        let none = async || Ok(self.image().await?.spares == 0 && self.status().await?.spares == 0);
        self.wait_for("the spares do not go", none).await?;
        self.pool.wait_at_rest().await
    }

    /// The service has that in its configuration: so many spares of an image at the most, if any. It is started anew if that
    /// was otherwise; whether it was.
    async fn configure(&self, most: Option<u32>) -> Outcome<bool> {
        if self.kept.get() == Some(most) {
            return Ok(false);
        }
        let section = match most {
            Some(most) => format!("[spares]\nenabled = true\nimage_max = {most}\n"),
            None => "[spares]\nenabled = false\n".to_owned(),
        };
        fs::write(CONFIGURATION, format!("{}\n{section}", self.configuration))?;
        run("cowshed-host", &["restart", "cowshed"]).await?;
        self.kept.set(Some(most));
        let serves = async || {
            Ok(self.status().await.is_ok_and(|status| status.serving && status.containerd.is_some()))
        };
        self.wait_for("the service does not serve", serves).await?;
        Ok(true)
    }

    /// Waits until so many spares are ready; for how long.
    pub(crate) async fn ready(&self, count: u32) -> Outcome<Duration> {
        let begun = Instant::now();
        while self.offer().await?.spares < count {
            if begun.elapsed() > PATIENCE {
                return Err(format!("{count} spares are not there after {PATIENCE:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(begun.elapsed())
    }

    /// Waits until so many spares are ready, none is in the making, the pool is at rest and udev, too; how long it took
    /// until they were ready.
    pub(crate) async fn full(&self, count: u32) -> Outcome<Duration> {
        let took = self.ready(count).await?;
        let all_made = async || {
            let image = self.image().await?;
            Ok(image.spares >= count.max(image.spares_wanted)
                && self.status().await?.spares_in_the_making == 0)
        };
        self.wait_for("the shelf is not full", all_made).await?;
        self.pool.wait_at_rest().await?;
        settle().await?;
        Ok(took)
    }

    async fn wait_for(&self, what: &str, is_so: impl AsyncFn() -> Outcome<bool>) -> Outcome {
        let begun = Instant::now();
        while !is_so().await? {
            if begun.elapsed() > PATIENCE {
                let image = self.image().await;
                return Err(format!("{what} in {PATIENCE:?}: {image:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }
}

/// A configuration without its section on spares.
fn without_spares(text: &str) -> String {
    let mut is_on_spares = false;
    let kept = text.lines().filter(|line| {
        if line.starts_with('[') {
            is_on_spares = *line == "[spares]";
        }
        !is_on_spares
    });
    kept.collect::<Vec<_>>().join("\n")
}

fn device_of(reply: &AcquireResponse) -> Outcome<cowshed_proto::v1::Device> {
    let device = reply.lease.as_ref().and_then(|lease| lease.device.clone());
    device.ok_or_else(|| "Acquire has returned no device".into())
}

/// The service as a maker of one kind of disk.
pub(crate) struct Ours<'a> {
    pub(crate) service: &'a Service,
    /// Whether they come from the shelf, all of them, or none.
    pub(crate) spares: Spares,
    checks: Mutex<Samples>,
}

impl<'a> Ours<'a> {
    pub(crate) fn new(service: &'a Service, spares: Spares) -> Self {
        Self { service, spares, checks: Mutex::default() }
    }

    /// How long the looks at the devices took, after the calls.
    pub(crate) fn checks(&self) -> Samples {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) async fn acquire(&self) -> Outcome<Acquired> {
        let acquired = match self.spares {
            Spares::Kept => self.service.hit().await?,
            Spares::Off => self.service.miss().await?,
        };
        self.checks.lock().unwrap_or_else(PoisonError::into_inner).add_time(acquired.check);
        Ok(acquired)
    }
}

impl Launcher for Ours<'_> {
    fn name(&self) -> &'static str {
        match self.spares {
            Spares::Kept => "Acquire, a spare",
            Spares::Off => "Acquire, no spare",
        }
    }

    /// What is told is the time of the call: that the device is what it says it is was Cowshed's to check.
    async fn launch(&self) -> Outcome<(Disk, Duration)> {
        let acquired = self.acquire().await?;
        Ok((acquired.disk, acquired.took))
    }

    async fn clear(&self, disks: &[Disk]) -> Outcome {
        self.service.clear(disks).await
    }
}
