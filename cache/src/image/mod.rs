//! Images: pulled once into containerd, unpacked into its snapshotter, ready to be snapshotted.

mod access;
mod brake;
mod catalogue;
#[cfg(test)]
mod containerd_fake;
mod digest;
mod documents;
mod facts;
mod flight;
mod gate;
mod glance;
mod known;
mod labels;
mod listing;
mod locks;
mod manifest;
mod memory;
mod on_disk;
pub(crate) mod pace;
mod platform;
mod progress;
mod pull;
mod reference;
mod revalidation;
mod signatures;
mod store;
mod tap;
mod unpack;
mod verdicts;
mod verify;
mod waits;
mod window;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Notify, Semaphore};

pub use access::{Access, PullPolicy};
pub use digest::Digest;
pub use flight::{Interest, Pull};
pub use gate::{Budget, Class, Terms};
pub use glance::Glance;
pub use manifest::ProcessConfig;
pub(crate) use manifest::{ACCEPTED, DOCUMENT_MAX_BYTES};
pub use on_disk::OnDisk;
pub use platform::Platform;
pub use progress::{LayerProgress, LayerStage, Progress, PullStage};
pub use reference::ImageRef;
pub use signatures::{Others, Signatures};
pub use verify::Verifiers;

use crate::{
    containerd::{Containerd, ImageRecord},
    error::{Error, Reason, Result},
    layer::Bounds,
    registry::Registries,
};
use facts::Facts;
use labels::Labels;
use locks::Locks;
use verify::Target;

/// An image that can be snapshotted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedImage {
    /// Its full reference.
    pub name: ImageRef,
    /// What containerd's record points to: an index or a manifest.
    pub target: Digest,
    /// The manifest for the platform.
    pub manifest: Digest,
    /// The platform.
    pub platform: Platform,
    /// The committed snapshot of all its layers.
    pub chain_id: Digest,
    /// How it wants its process started.
    pub process: ProcessConfig,
    /// Sum of its layers, compressed, in bytes.
    pub compressed_bytes: u64,
    /// How many layers it has.
    pub layers: u32,
    /// When containerd's record was made.
    pub created_at: Option<SystemTime>,
}

/// An image as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of the API's message Image")]
pub struct ImageInfo {
    pub name: String,
    pub target_digest: String,
    pub manifest_digest: Option<String>,
    pub platform: String,
    pub compressed_bytes: u64,
    pub layers: u32,
    pub unpacked: bool,
    pub created_at: Option<SystemTime>,
    /// Looked up on demand.
    pub on_disk: Option<OnDisk>,
}

impl From<ResolvedImage> for ImageInfo {
    fn from(image: ResolvedImage) -> Self {
        Self {
            name: image.name.to_string(),
            target_digest: image.target.to_string(),
            manifest_digest: Some(image.manifest.to_string()),
            platform: image.platform.to_string(),
            compressed_bytes: image.compressed_bytes,
            layers: image.layers,
            unpacked: true,
            created_at: image.created_at,
            on_disk: None,
        }
    }
}

/// Whether an image was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// All of it, unpacked.
    Hit,
    /// Something was fetched or unpacked.
    Miss,
}

impl Cache {
    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
        }
    }
}

/// Bounds of a pull.
#[derive(Clone, Copy, Debug)]
pub struct PullLimits {
    /// Layers of one image that are fetched at the same time.
    pub concurrent_downloads: usize,
    /// Deadline for unpacking one layer.
    pub unpack_timeout: Duration,
    /// How often a blob is tried.
    pub attempts: u32,
    /// Who unpacks.
    pub unpacker: Unpacker,
    /// How much a layer may be.
    pub layer: Bounds,
    /// How many bytes the layers of an image may have together, compressed.
    pub image_bytes: u64,
    /// Size of the disks that images are unpacked into, in bytes, if it is known.
    pub disk: Option<u64>,
    /// Whether compressed layers are kept when they are unpacked.
    pub keep_layers: bool,
    /// How long a registry's word counts that a tenant may have what another has pulled.
    pub access_check: Duration,
    /// How long it counts what a tag meant; zero: for ever.
    pub revalidate: Duration,
}

/// Who unpacks layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unpacker {
    /// Cowshed, while they arrive.
    Cowshed,
    /// containerd's differ, when they have arrived.
    Containerd,
}

impl Default for PullLimits {
    fn default() -> Self {
        Self {
            concurrent_downloads: 3,
            unpack_timeout: Duration::from_secs(1800),
            attempts: 4,
            unpacker: Unpacker::Cowshed,
            layer: Bounds { bytes: 64 << 30, members: 4_000_000, memory: 96 << 20 },
            image_bytes: 64 << 30,
            disk: None,
            keep_layers: true,
            access_check: Duration::from_secs(300),
            revalidate: Duration::ZERO,
        }
    }
}

/// The durable record of pulls under way, so that a crashed one's containerd lease is found again.
#[async_trait::async_trait]
pub trait PullJournal: Send + Sync {
    /// Before the containerd lease is made.
    async fn begin(&self, lease: &str, image: &str) -> Result<()>;
    /// After it is gone.
    async fn end(&self, lease: &str) -> Result<()>;
}

/// Counts what pulls do.
pub trait PullObserver: Send + Sync {
    /// A pull has begun.
    fn started(&self);
    /// Bytes have arrived from a registry.
    fn fetched(&self, bytes: u64);
    /// A layer was unpacked in this time, without what it was in line for memory.
    fn layer_unpacked(&self, took: Duration);
    /// A pull is over, however it ended.
    fn ended(&self);
    /// A pull has come to this.
    fn finished(&self, outcome: &Result<Cache>, took: Duration);
}

/// The images that Acquire needs; the seam where tests put a fake.
#[async_trait::async_trait]
pub trait ImageCache: Send + Sync {
    /// The image, if it is there and unpacked, may be had, and need not be asked for at its registry.
    async fn resolve(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Result<Option<ResolvedImage>>;
    /// The image, if it is there and unpacked, whoever may have it: for what is made ahead of need, and given to nobody before
    /// he was looked at.
    async fn local(&self, image: &ImageRef, platform: &Platform) -> Result<Option<ResolvedImage>>;
    /// The image, pulled and unpacked if need be; whether it was there.
    async fn ensure(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Result<(ResolvedImage, Cache)>;
}

/// Which pulls are alive.
pub trait RunningPulls: Send + Sync {
    /// Their containerd leases.
    fn running(&self) -> BTreeSet<String>;
}

/// Layers that are inflated ahead of their turn, of all pulls. Each has some memory of its own.
const SPARE_THREADS: usize = 8;

/// Bytes that wait in the taps of all pulls, and of those that may have to wait for others.
const ROOM: u64 = 24 << 20;
const SIDE_ROOM: u64 = 12 << 20;

/// How often it is seen to it that what is known of images is not too old.
const BETWEEN_LOOK_UPS: Duration = Duration::from_secs(5);

/// Who has to agree before an image is used.
#[derive(Debug, Default)]
pub struct Checks {
    /// Those who sign.
    pub signatures: Option<Signatures>,
    /// An operator's programs, asked about what is signed.
    pub verifiers: Option<Verifiers>,
}

/// The images of one containerd. Clones share everything.
#[derive(Clone)]
pub struct Images(Arc<Shared>);

struct Shared {
    containerd: Arc<Containerd>,
    registries: Registries,
    journal: Arc<dyn PullJournal>,
    observer: Arc<dyn PullObserver>,
    limits: PullLimits,
    checks: Checks,
    /// What names meant a moment ago; not used before somebody tells of changes.
    known: known::Known,
    follows: AtomicBool,
    /// What was there at the last look.
    standing: glance::Standing,
    /// What manifests say, by target digest and platform: immutable, so never stale.
    facts: Mutex<HashMap<(Digest, Platform), Arc<Facts>>>,
    /// What blobs say, whatever they are.
    documents: documents::Documents,
    /// containerd leases of pulls that are alive.
    running: Mutex<BTreeSet<String>>,
    flights: flight::Flights,
    /// How many are under way, by how urgent they are.
    traffic: gate::Traffic,
    /// How much room layers take, by chain id.
    sizes: on_disk::Sizes,
    /// Whose is what, and what registries said of who may have it.
    owners: access::Owners,
    answers: access::Answers,
    /// What registries were asked lately about what tags mean.
    questions: revalidation::Questions,
    /// One at a time for each blob that is fetched and each layer that is unpacked, across all pulls.
    locks: Locks,
    /// For bytes that are fetched and not unpacked yet; and for those of pulls that may have to wait.
    room: Arc<tap::Room>,
    side_room: Arc<tap::Room>,
    /// For layers that are inflated ahead of their turn; and what all that are inflated take.
    spare_threads: Arc<Semaphore>,
    memory: Arc<memory::Memory>,
}

impl Images {
    /// Of this containerd, from these registries; used if the checks do not object.
    pub fn new(
        containerd: Arc<Containerd>,
        registries: Registries,
        journal: Arc<dyn PullJournal>,
        observer: Arc<dyn PullObserver>,
        limits: PullLimits,
        checks: Checks,
    ) -> Self {
        Self(Arc::new(Shared {
            containerd,
            registries,
            journal,
            observer,
            limits,
            checks,
            known: known::Known::default(),
            follows: AtomicBool::new(false),
            standing: glance::Standing::default(),
            facts: Mutex::default(),
            documents: documents::Documents::default(),
            running: Mutex::default(),
            flights: flight::Flights::default(),
            traffic: gate::Traffic::default(),
            sizes: on_disk::Sizes::default(),
            owners: access::Owners::default(),
            answers: access::Answers::default(),
            questions: revalidation::Questions::default(),
            locks: Locks::default(),
            room: Arc::new(tap::Room::of(ROOM)),
            side_room: Arc::new(tap::Room::of(SIDE_ROOM)),
            spare_threads: Arc::new(Semaphore::new(SPARE_THREADS)),
            memory: Arc::default(),
        }))
    }

    /// Joins the pull of this image, or begins it, for somebody who waits for it.
    pub fn pull(&self, image: &ImageRef, platform: &Platform, access: &Access) -> Pull {
        // Its interest stays.
        flight::join(&self.0, image, platform, access, &Terms::LAUNCHER).0
    }

    /// The same ahead of need: it gives way to those of higher classes, and ends if all who are interested in it go.
    pub fn prefetch(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
        terms: &Terms,
    ) -> (Pull, Interest) {
        let terms = Terms { stays: false, ..terms.clone() };
        flight::join(&self.0, image, platform, access, &terms)
    }

    /// Listens to containerd for what happens to images, for ever; until it is called, nothing is remembered of them.
    pub async fn follow_changes(self) {
        let shared = self.0.clone();
        let containerd = Containerd::clone(&shared.containerd);
        shared.follows.store(true, Ordering::SeqCst);
        let changed = Arc::new(Notify::new());
        let news = changed.clone();
        let following = containerd.follow_images(move |name| {
            shared.known.forget(name);
            news.notify_one();
        });
        tokio::join!(following, self.keep_looking(changed), self.keep_known());
    }

    /// Looks up again in time what is asked for, for ever: no Acquire waits for it.
    async fn keep_known(&self) {
        let shared = &self.0;
        loop {
            tokio::time::sleep(BETWEEN_LOOK_UPS).await;
            for (image, platform, owner) in shared.known.due(Instant::now()) {
                if shared.asks_registry(&image) {
                    continue;
                }
                let tenant = owner.unwrap_or_default();
                let access = Access { tenant, credential: None, policy: PullPolicy::IfNotPresent };
                // Whoever asks next looks for himself, and is told.
                if !matches!(self.look_up(&image, &platform, &access).await, Ok(Some(_))) {
                    shared.known.drop_of(&image, &platform, &access.tenant);
                }
            }
        }
    }

    /// How many pulls are under way.
    pub fn pulls_in_flight(&self) -> usize {
        self.0.flights.count()
    }
}

impl Shared {
    /// Whether what a name means may be its registry's to say.
    fn asks_registry(&self, image: &ImageRef) -> bool {
        !self.limits.revalidate.is_zero() && image.digest().is_none()
    }

    /// The image's record, what it points to, and what that says, if it is there.
    async fn recorded(
        &self,
        image: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<(ImageRecord, Digest, Arc<Facts>)>> {
        let Some(record) = self.record(image).await? else { return Ok(None) };
        let Ok(target) = record.target.digest.parse::<Digest>() else { return Ok(None) };
        let facts = self.facts(&target, platform).await?;
        Ok(facts.map(|facts| (record, target, facts)))
    }

    /// containerd's record of the image, if there is one.
    async fn record(&self, image: &ImageRef) -> Result<Option<ImageRecord>> {
        self.containerd.image(&image.to_string()).await.map_err(|e| self.containerd.explain(e))
    }

    /// Whether the registry says, if it is time to ask it again, that the tag means something else by now. One that does not
    /// answer changes nothing.
    async fn means_another(&self, image: &ImageRef, target: &Digest, access: &Access) -> bool {
        if !self.asks_registry(image) {
            return false;
        }
        let asking = revalidation::meaning(self.registries.clone(), image.clone(), access.credential.clone());
        self.questions.has_moved((image, access), target, self.limits.revalidate, asking).await
    }

    async fn has_snapshot(&self, chain_id: &Digest) -> Result<bool> {
        Ok(self.snapshot_labels(chain_id).await?.is_some())
    }

    /// The labels of a snapshot, if there is one.
    async fn snapshot_labels(&self, chain_id: &Digest) -> Result<Option<Labels>> {
        self.containerd.snapshot_labels(chain_id.as_str()).await.map_err(|e| self.containerd.explain(e))
    }
}

#[async_trait::async_trait]
impl ImageCache for Images {
    async fn resolve(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Result<Option<ResolvedImage>> {
        if access.policy == PullPolicy::Always && image.digest().is_none() {
            return Ok(None);
        }
        let shared = &self.0;
        if shared.asks_registry(image) {
            return self.look_up(image, platform, access).await;
        }
        match shared.known.get(image, platform, &access.tenant) {
            Some(known) => Ok(Some(ResolvedImage::clone(&known))),
            None => self.look_up(image, platform, access).await,
        }
    }

    async fn local(&self, image: &ImageRef, platform: &Platform) -> Result<Option<ResolvedImage>> {
        let shared = &self.0;
        let Some((record, target, facts)) = shared.recorded(image, platform).await? else { return Ok(None) };
        if !shared.has_snapshot(&facts.chain_id).await? {
            return Ok(None);
        }
        Ok(Some(facts.resolved(image.clone(), target, record.created_at)))
    }

    async fn ensure(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Result<(ResolvedImage, Cache)> {
        if access.policy == PullPolicy::Never {
            let message = format!(
                "image {image} is not there for {platform}, and is not to be pulled: `cowshed pull {image}`, or acquire it \
                 with another pull policy"
            );
            return Err(Error::new(Reason::ImageNotPresent, message).with("image", image));
        }
        self.pull(image, platform, access).outcome().await
    }
}

impl Images {
    /// What containerd says the name means now, if that is there and unpacked, and may be had.
    async fn look_up(
        &self,
        image: &ImageRef,
        platform: &Platform,
        access: &Access,
    ) -> Result<Option<ResolvedImage>> {
        let shared = &self.0;
        let begun = shared.known.begin();
        let Some((record, target, facts)) = shared.recorded(image, platform).await? else { return Ok(None) };
        let Some(top) = shared.snapshot_labels(&facts.chain_id).await? else { return Ok(None) };
        if !shared.permits_image(image, &target, (&facts, &top), access).await? {
            return Ok(None);
        }
        if access.policy == PullPolicy::IfNotPresent && shared.means_another(image, &target, access).await {
            return Ok(None);
        }
        // Whoever has pulled it.
        let size = record.target.size.try_into().unwrap_or_default();
        let media_type = &record.target.media_type;
        let found = Target { digest: &target, media_type, size, is_here: true };
        shared.expect_signed(image, found, Some(&facts.manifest), access).await?;
        shared.verify(image, found).await?;
        let resolved = facts.resolved(image.clone(), target, record.created_at);
        if shared.follows.load(Ordering::SeqCst) {
            let owner = shared.plain_owner(&resolved.target, (&facts, &top), access).await?;
            if let Some(owner) = owner {
                shared.known.note(platform, owner, &resolved, begun);
            }
        }
        Ok(Some(resolved))
    }
}

impl RunningPulls for Images {
    fn running(&self) -> BTreeSet<String> {
        self.0.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Says which image an error is about.
fn about(image: &ImageRef, error: Error) -> Error {
    let name = image.to_string();
    if error.to_string().contains(&name) { error } else { error.context(format!("image {name}")) }
        .with("image", name)
}
