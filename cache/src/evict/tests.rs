//! Runs against a containerd, a kernel and a ledger in memory.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU64,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::SystemTime,
};

use containerd_client::types::Descriptor;
use cowshed_gc::evict::{Action, Bytes, Growth, Kind, VolumeGroup};
use cowshed_leases::{Lease, LeaseId, Moment, UnixMicros};
use tonic_types::StatusExt as _;

use super::*;
use crate::{
    clock::Clock,
    config::Config,
    containerd::{Held, ImageRecord, SnapshotRecord},
    fakes::{self, Process_, World, book, start, wish, world},
    image::{Digest, ImageInfo, ImageRef, Platform},
    keeping::Catalogue,
    kernel::PoolMode,
    ledger::Ledger,
    rescue::Hindrances,
};

pub(crate) const GIB: u64 = 1 << 30;
/// The fake pool's data.
const TOTAL: u64 = 1024;
/// When the tests are, in seconds.
const NOW: i64 = 10_000_000;

fn name(short: &str) -> String {
    format!("r.example/{short}:1")
}

fn digest(of: &str) -> String {
    Digest::of(of.as_bytes()).to_string()
}

type Hook = Box<dyn FnOnce() + Send>;

/// containerd's images and layers. What a layer has goes from the pool with it.
pub(crate) struct Store {
    world: Arc<World>,
    records: Mutex<BTreeMap<String, ImageRecord>>,
    /// Name, parent, GiB.
    layers: Mutex<BTreeMap<String, (Option<String>, u64)>>,
    held: Mutex<Vec<Held>>,
    pulled: Mutex<BTreeSet<String>>,
    /// What happens when somebody looks whether it may remove an image.
    meanwhile: Mutex<Option<Hook>>,
    /// Removed layers stay in the pool.
    lazy: AtomicBool,
    looks: AtomicUsize,
}

impl Store {
    fn new(world: Arc<World>) -> Self {
        Self {
            world,
            records: Mutex::default(),
            layers: Mutex::default(),
            held: Mutex::default(),
            pulled: Mutex::default(),
            meanwhile: Mutex::default(),
            lazy: AtomicBool::new(false),
            looks: AtomicUsize::new(0),
        }
    }

    /// An image of one layer of so many GiB, not used for so many seconds. That of the fakes has an index.
    pub(crate) fn put(&self, short: &str, gib: u64, unused: u64) {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.unsigned_abs() - unused);
        let target = if short == "app" { digest("target") } else { digest(short) };
        let target = Descriptor { digest: target, ..Descriptor::default() };
        let record =
            ImageRecord { name: name(short), target, created_at: Some(at), ..ImageRecord::default() };
        self.records.lock().unwrap().insert(name(short), record);
        let top = if short == "app" { digest("chain") } else { format!("layer-{short}") };
        self.layers.lock().unwrap().insert(top, (None, gib));
    }

    fn mark(&self, short: &str, mark: impl FnOnce(&mut ImageRecord)) {
        mark(self.records.lock().unwrap().get_mut(&name(short)).unwrap());
    }

    fn names(&self) -> Vec<String> {
        let short = |name: &String| name.trim_start_matches("r.example/").trim_end_matches(":1").to_owned();
        self.records.lock().unwrap().keys().map(short).collect()
    }

    fn actives(&self) -> Vec<SnapshotRecord> {
        let active = |key: &String| SnapshotRecord {
            name: key.clone(),
            parent: Some(digest("chain")),
            ..SnapshotRecord::default()
        };
        self.world.look(|s| s.snapshots.keys().map(active).collect())
    }

    fn collect(&self) {
        let records = self.records.lock().unwrap();
        let tops = |record: &ImageRecord| {
            let short = record.name.trim_start_matches("r.example/").trim_end_matches(":1");
            if short == "app" { digest("chain") } else { format!("layer-{short}") }
        };
        let mut kept: BTreeSet<String> = records.values().map(tops).collect();
        kept.extend(self.actives().into_iter().filter_map(|active| active.parent));
        for held in &*self.held.lock().unwrap() {
            if let Held::Snapshot(name) = held {
                kept.insert(name.clone());
            }
        }
        let mut freed = 0;
        self.layers.lock().unwrap().retain(|layer, (_, gib)| {
            let stays = kept.contains(layer);
            freed += if stays { 0 } else { *gib };
            stays
        });
        if !self.lazy.load(Ordering::SeqCst) {
            self.world.state.lock().unwrap().data_used -= freed * GIB;
        }
    }
}

#[async_trait::async_trait]
impl Survey for Store {
    fn snapshotter(&self) -> &str {
        "cowshed"
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.looks.fetch_add(1, Ordering::SeqCst);
        let layer = |(name, (parent, _)): (&String, &(Option<String>, u64))| SnapshotRecord {
            name: name.clone(),
            parent: parent.clone(),
            committed: true,
            ..SnapshotRecord::default()
        };
        let mut all: Vec<_> = self.layers.lock().unwrap().iter().map(layer).collect();
        all.extend(self.actives());
        Ok(all)
    }

    async fn blobs(&self) -> Result<HashMap<String, HashMap<String, String>>> {
        let content = |digest: String| HashMap::from([("containerd.io/gc.ref.content.0".to_owned(), digest)]);
        let snapshot = |top| HashMap::from([("containerd.io/gc.ref.snapshot.cowshed".to_owned(), top)]);
        let mut blobs = HashMap::new();
        for record in self.records.lock().unwrap().values() {
            let short = record.name.trim_start_matches("r.example/").trim_end_matches(":1");
            let target = record.target.digest.clone();
            if short == "app" {
                blobs.insert(target, content(digest("manifest")));
                blobs.insert(digest("manifest"), content(digest("config")));
                blobs.insert(digest("config"), snapshot(digest("chain")));
            } else {
                blobs.insert(target, content(format!("config-{short}")));
                blobs.insert(format!("config-{short}"), snapshot(format!("layer-{short}")));
            }
        }
        Ok(blobs)
    }

    async fn held(&self, _but: &BTreeSet<String>) -> Result<Vec<Held>> {
        Ok(self.held.lock().unwrap().clone())
    }

    async fn usage(&self, snapshot: &str) -> Result<Option<u64>> {
        let layers = self.layers.lock().unwrap();
        Ok(Some(layers.get(snapshot).map_or(GIB, |(_, gib)| gib * GIB)))
    }
}

#[async_trait::async_trait]
impl Catalogue for Store {
    async fn find(&self, _image: &ImageRef, _platform: &Platform) -> Result<Option<ImageInfo>> {
        Ok(Some(fakes::image().into()))
    }

    async fn records(&self) -> Result<Vec<ImageRecord>> {
        Ok(self.records.lock().unwrap().values().cloned().collect())
    }

    async fn manifests(&self, target: &str) -> Result<BTreeSet<String>> {
        let hook = self.meanwhile.lock().unwrap().take();
        hook.into_iter().for_each(|hook| hook());
        let is_app = target == digest("target");
        Ok(is_app.then(|| digest("manifest")).into_iter().collect())
    }

    fn is_pulled(&self, image: &ImageRef) -> bool {
        self.pulled.lock().unwrap().contains(&image.to_string())
    }

    async fn remove(&self, record: &ImageRecord, collect: bool) -> Result<bool> {
        let was_there = self.records.lock().unwrap().remove(&record.name).is_some();
        if collect {
            self.collect();
        }
        Ok(was_there)
    }
}

/// A volume group of so many GiB, which gives them or does not.
struct Group {
    gib: Mutex<u64>,
    gives: bool,
}

#[async_trait::async_trait]
impl Grower for Group {
    fn growth(&self, kind: Kind) -> Growth {
        match kind {
            Kind::Data => Growth::UpTo { step: Bytes(GIB), ceiling: Bytes(1 << 50) },
            Kind::Metadata => Growth::Never,
        }
    }

    async fn group(&self) -> Result<VolumeGroup> {
        let free = Bytes(*self.gib.lock().unwrap() * GIB);
        Ok(VolumeGroup { free, extent: NonZeroU64::new(4 << 20).unwrap() })
    }

    fn group_lately(&self) -> Option<VolumeGroup> {
        None
    }

    async fn extend(&self, _kind: Kind, _to: Bytes, _hurry: Hurry<'_>) -> Result<()> {
        if !self.gives {
            return Err(Error::new(Reason::NotReady, "the volume group is locked"));
        }
        // The fake pool stays as it is; that is enough for one run.
        *self.gib.lock().unwrap() = 0;
        Ok(())
    }
}

pub(crate) struct Host {
    pub(crate) world: Arc<World>,
    pub(crate) process: Process_,
    pub(crate) store: Arc<Store>,
    pub(crate) evictor: Arc<Evictor>,
    _directory: tempfile::TempDir,
}

pub(crate) fn host() -> Host {
    host_with(Arc::new(NoGrower))
}

fn host_with(grower: Arc<dyn Grower>) -> Host {
    host_of(grower, &Config::default())
}

fn host_of(grower: Arc<dyn Grower>, config: &Config) -> Host {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let store = Arc::new(Store::new(world.clone()));
    let clock = Clock::of(|| Moment { wall: UnixMicros(NOW * 1_000_000), ..book::now() });
    let keeper = Keeper {
        catalogue: store.clone(),
        ledger: process.acquirer.ledger.clone(),
        hindrances: Hindrances::default(),
        clock,
        tasks: Tasks::default(),
        spares: process.acquirer.spares.clone(),
        wishes: process.acquirer.wishes.clone(),
        wake: process.acquirer.wake.clone(),
        turn: tokio::sync::Mutex::default(),
    };
    let evictor = Evictor::new(Parts {
        policy: config.gc_policy(),
        settings: config.gc_settings(),
        keeper: Arc::new(keeper),
        survey: store.clone(),
        kernel: process.acquirer.kernel.clone(),
        admission: process.acquirer.admission.clone(),
        grower,
        metrics: Metrics::new().unwrap(),
        tasks: Tasks::default(),
    });
    Host { world, process, store, evictor: Arc::new(evictor), _directory: directory }
}

impl Host {
    /// So many GiB of the pool are in use.
    fn fill(&self, gib: u64) {
        self.world.state.lock().unwrap().data_used = gib * GIB;
    }

    fn used(&self) -> u64 {
        self.world.look(|s| s.data_used) / GIB
    }

    fn ledger(&self) -> &Ledger {
        &self.evictor.keeper.ledger
    }

    async fn run(&self) -> Report {
        self.evictor.run(Trigger::Pressure).await.unwrap()
    }

    async fn make(&self) -> Result<()> {
        let full = self.process.acquirer.admission.admit(&self.process.acquirer.kernel).await.unwrap_err();
        self.evictor.make(full, Bytes(0), None).await
    }

    /// A spare of the fakes' image, made.
    pub(crate) async fn spare(&self, n: u32) -> LeaseId {
        let (id, ledger) = (book::id(n), self.ledger());
        ledger.intend_spare(id.clone(), book::spec(), book::now()).await.unwrap();
        let grant = cowshed_leases::Grant { image_digest: digest("manifest"), ..book::grant(n) };
        let device = grant.device.dm_name.clone();
        ledger.grant(id.clone(), grant, book::now()).await.unwrap();
        let mut state = self.world.state.lock().unwrap();
        state.leases.insert(id.snapshot_key());
        state.snapshots.insert(id.snapshot_key(), device.clone());
        state.devices.insert(device, 0);
        id
    }
}

fn fates(report: &Report) -> Vec<(String, &'static str)> {
    let what = |step: &cowshed_gc::evict::Step| match &step.action {
        Action::Extend { kind, .. } => format!("extend {kind}"),
        Action::DropSpare { .. } => "spare".to_owned(),
        Action::RemoveImage { names, .. } => {
            names[0].0.trim_start_matches("r.example/").trim_end_matches(":1").to_owned()
        }
    };
    report.steps.iter().map(|(step, fate)| (what(step), fate.code())).collect()
}

fn fate(what: &str, code: &'static str) -> (String, &'static str) {
    (what.to_owned(), code)
}

const DAY: u64 = 86_400;

#[tokio::test]
async fn cold_images_go_from_the_high_mark_to_the_low_one() {
    let host = host();
    host.store.put("app", 10, 9 * DAY);
    host.store.put("old", 100, 8 * DAY);
    host.store.put("older", 50, 9 * DAY);
    host.store.put("recent", 100, DAY);
    host.process.acquirer.acquire(wish("vm-1")).await.unwrap();
    host.fill(TOTAL * 84 / 100);
    assert!(host.run().await.steps.is_empty(), "it is not above the mark");
    host.fill(TOTAL * 88 / 100);
    let plan = host.evictor.plan(Trigger::Pressure).await.unwrap();
    assert_eq!(host.store.names(), ["app", "old", "older", "recent"], "a plan has changed something");
    let report = host.run().await;
    assert_eq!(report.steps.iter().map(|(step, _)| step.clone()).collect::<Vec<_>>(), plan.steps);
    assert_eq!(report.outcome, Outcome::Met, "{report:?}");
    assert_eq!(fates(&report), [fate("old", "DONE"), fate("older", "DONE")]);
    assert_eq!(host.store.names(), ["app", "recent"]);
    assert!(host.used() <= TOTAL * 75 / 100, "{} GiB are in use", host.used());
    assert!(host.run().await.steps.is_empty(), "running it twice is running it once");
}

#[tokio::test]
async fn what_somebody_needs_stays_and_is_named() {
    type Guard = fn(&Host);
    let table: [(&str, Guard, &str); 6] = [
        ("pulled", |host| host.store.pulled.lock().unwrap().extend([name("some")]), "being pulled"),
        (
            "another client's",
            |host| {
                host.store.mark("some", |r| {
                    r.labels.insert("io.cri-containerd.image".into(), "managed".into());
                });
            },
            "",
        ),
        (
            "under a lease of another client",
            |host| host.store.held.lock().unwrap().push(Held::Snapshot("layer-some".into())),
            "",
        ),
        (
            "under another client's lease on its manifest",
            |host| host.store.held.lock().unwrap().push(Held::Blob(digest("some"))),
            "",
        ),
        ("young", |host| host.store.put("some", 100, 599), "short time ago"),
        (
            "written anew a moment ago",
            |host| {
                host.store.mark("some", |r| {
                    r.updated_at = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.unsigned_abs()));
                });
            },
            "short time ago",
        ),
    ];
    for (what, guard, says) in table {
        let host = host();
        host.store.put("some", 100, 9 * DAY);
        guard(&host);
        host.fill(TOTAL * 90 / 100);
        let report = host.run().await;
        assert!(report.steps.is_empty(), "{what}: {report:?}");
        let Outcome::Short { helps, .. } = &report.outcome else { unreachable!("{what}: {report:?}") };
        let helps: Vec<String> = helps.iter().map(ToString::to_string).collect();
        assert!(helps.join("; ").contains(says), "{what}: {helps:?}");
        assert!(helps.join("; ").contains("`cowshed pool extend --"), "{what}: {helps:?}");
    }
    let host = host();
    host.store.put("some", 100, 9 * DAY);
    host.ledger().pin(name("some"), None, 0, book::now()).await.unwrap();
    host.fill(TOTAL * 90 / 100);
    let report = host.run().await;
    assert!(report.steps.is_empty(), "{report:?}");
}

#[tokio::test]
async fn what_somebody_has_come_for_meanwhile_stays_and_another_goes() {
    let host = host();
    host.store.put("old", 150, 9 * DAY);
    host.store.put("other", 150, DAY);
    host.fill(TOTAL * 88 / 100);
    let store = host.store.clone();
    *host.store.meanwhile.lock().unwrap() = Some(Box::new(move || {
        store.pulled.lock().unwrap().extend([name("old")]);
    }));
    let report = host.run().await;
    assert_eq!(fates(&report), [fate("old", "SKIPPED"), fate("other", "DONE")]);
    assert_eq!(report.outcome, Outcome::Met);
    assert_eq!(host.store.names(), ["old"]);

    // It has got another name.
    let store = host.store.clone();
    host.store.pulled.lock().unwrap().clear();
    // That room has come back is seen.
    host.evictor.pool().await.unwrap();
    host.fill(TOTAL * 88 / 100);
    let plan = host.evictor.plan(Trigger::Pressure).await.unwrap();
    assert_eq!(plan.steps.len(), 1);
    let tag = ImageRecord { name: name("tag"), ..store.records.lock().unwrap()[&name("old")].clone() };
    let going = crate::keeping::Going {
        target: digest("old"),
        names: [name("old")].into(),
        own: BTreeSet::new(),
        last_use: UnixMicros(0),
        prefetched_for: Duration::from_secs(1),
    };
    store.records.lock().unwrap().insert(name("tag"), tag);
    let refused = host.evictor.keeper.evict(&going).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ImageInUse);
    assert!(refused.to_string().contains(&name("tag")), "{refused}");
}

#[tokio::test]
async fn no_room_is_made_of_what_a_disk_is_asked_of() {
    let host = host();
    host.store.put("old", 150, 9 * DAY);
    host.store.put("other", 150, DAY);
    host.fill(TOTAL * 96 / 100);
    let wished = host.process.acquirer.wishes.begin(name("old"));
    let plan = host.evictor.plan(Trigger::Pressure).await.unwrap();
    let going = crate::keeping::Going {
        target: digest("old"),
        names: [name("old")].into(),
        own: BTreeSet::new(),
        last_use: UnixMicros(i64::MAX),
        prefetched_for: Duration::from_secs(1),
    };
    let refused = host.evictor.keeper.evict(&going).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ImageInUse, "{refused}");
    host.make().await.unwrap();
    assert_eq!((plan.steps.len(), host.store.names()), (1, vec!["old".to_owned()]));
    drop(wished);
    host.fill(TOTAL * 96 / 100);
    host.make().await.unwrap();
    assert!(host.store.names().is_empty());
}

#[tokio::test]
async fn a_disk_that_is_made_meanwhile_keeps_its_image() {
    let host = host();
    host.store.put("app", 200, 9 * DAY);
    host.fill(TOTAL * 88 / 100);
    let plan = host.evictor.plan(Trigger::Pressure).await.unwrap();
    assert_eq!(plan.steps.len(), 1, "{plan}");
    let going = crate::keeping::Going {
        target: digest("target"),
        names: [name("app")].into(),
        own: [digest("manifest")].into(),
        last_use: UnixMicros(i64::MIN),
        prefetched_for: Duration::from_secs(1),
    };
    host.process.acquirer.acquire(wish("vm-1")).await.unwrap();
    let refused = host.evictor.keeper.evict(&going).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ImageInUse, "{refused}");
    host.process.acquirer.release(fakes::back("vm-1")).await.unwrap();
    host.process.settle().await;
    // It was used since.
    let refused = host.evictor.keeper.evict(&going).await.unwrap_err();
    assert!(refused.to_string().contains("meanwhile"), "{refused}");
    let now_known = crate::keeping::Going { last_use: UnixMicros(i64::MAX), ..going };
    assert!(host.evictor.keeper.evict(&now_known).await.unwrap());
    assert!(!host.evictor.keeper.evict(&now_known).await.unwrap(), "there is nothing any more");
}

#[tokio::test]
async fn what_is_on_its_way_back_is_not_asked_for_twice() {
    let host = host();
    host.store.put("old", 150, 9 * DAY);
    host.store.put("other", 150, DAY);
    host.store.lazy.store(true, Ordering::SeqCst);
    host.fill(TOTAL * 88 / 100);
    assert_eq!(fates(&host.run().await), [fate("old", "DONE")]);
    assert!(host.run().await.steps.is_empty());
    let plan = host.evictor.plan(Trigger::Pressure).await.unwrap();
    assert_eq!(plan.pool.returning.data, Bytes(150 * GIB));
    // It has come, and somebody writes.
    host.fill(TOTAL * 88 / 100 - 150);
    assert!(host.run().await.steps.is_empty());
    host.fill(TOTAL * 88 / 100);
    assert_eq!(fates(&host.run().await), [fate("other", "DONE")]);
}

#[tokio::test(start_paused = true)]
async fn in_an_emergency_what_does_not_come_back_is_not_waited_for() {
    for (percent, mode) in [(96, PoolMode::ReadWrite), (90, PoolMode::OutOfDataSpace)] {
        let host = host();
        host.store.put("old", 250, 9 * DAY);
        host.store.put("other", 250, DAY);
        // It does come, and somebody writes as much.
        host.store.lazy.store(true, Ordering::SeqCst);
        host.fill(TOTAL * percent / 100);
        host.world.state.lock().unwrap().pool_mode = mode;
        assert_eq!(fates(&host.run().await), [fate("old", "DONE")], "{mode}");
        assert!(host.run().await.steps.is_empty(), "{mode}");
        tokio::time::advance(Duration::from_secs(6)).await;
        assert_eq!(fates(&host.run().await), [fate("other", "DONE")], "{mode}");
    }
}

#[tokio::test]
async fn spares_go_first_and_those_that_somebody_has_open_stay() {
    let host = host();
    host.store.put("app", 100, 9 * DAY);
    host.store.put("other", 100, DAY);
    let (closed, open) = (host.spare(1).await, host.spare(2).await);
    host.world.set_open("snap-2", 1);
    host.fill(TOTAL * 88 / 100);
    let settling = async {
        // As the service's own reclaimer does.
        while host.ledger().read(|book| book.get(&closed).is_some()) {
            host.process.settle().await;
            tokio::task::yield_now().await;
        }
    };
    let (report, ()) = tokio::join!(host.run(), settling);
    assert_eq!(fates(&report), [fate("spare", "DONE"), fate("other", "DONE")], "{report:?}");
    assert!(host.ledger().read(|book| book.get(&open).is_some_and(Lease::is_spare)));
    assert_eq!(host.store.names(), ["app"]);
}

#[tokio::test]
async fn who_would_be_refused_gets_room_if_there_is_any() {
    let host = host();
    host.store.put("old", 30, 9 * DAY);
    host.store.put("recent", 100, DAY);
    host.fill(TOTAL * 96 / 100);
    host.make().await.unwrap();
    assert_eq!(host.store.names(), ["recent"], "only what was lacking");
    host.fill(TOTAL * 99 / 100);
    let (one, other) = tokio::join!(host.make(), host.make());
    one.and(other).unwrap();
    assert!(host.store.names().is_empty());

    host.store.put("app", 10, 9 * DAY);
    host.fill(TOTAL * 90 / 100);
    host.process.acquirer.acquire(wish("vm-1")).await.unwrap();
    host.fill(TOTAL * 99 / 100);
    let refused = host.make().await.unwrap_err();
    assert_eq!(refused.reason(), Reason::PoolFull);
    let text = refused.to_string();
    for words in
        ["data_headroom_percent", "lacking: ", "release VM vm-1", "`cowshed pool extend --data +SIZE`"]
    {
        assert!(text.contains(words), "{words:?}: {text}");
    }
    let looks = host.store.looks.load(Ordering::SeqCst);
    assert_eq!(host.make().await.unwrap_err().to_string(), text, "the same a moment later");
    assert_eq!(host.store.looks.load(Ordering::SeqCst), looks, "and nothing is looked at for it");
}

#[tokio::test]
async fn a_promise_gets_room_if_it_comes_to_enough_and_removes_nothing_otherwise() {
    let host = host();
    host.store.put("old", 30, 9 * DAY);
    host.store.put("recent", 100, DAY);
    // 51 are kept free, and 52 are free beside them.
    host.fill(TOTAL * 90 / 100);
    let refused = Error::new(Reason::PoolFull, "promised");
    let make = |gib: u64| host.evictor.make(refused.clone(), Bytes(gib * GIB), None);
    let short = make(200).await.unwrap_err();
    assert_eq!(short.reason(), Reason::PoolFull);
    assert!(short.to_string().contains("lacking: "), "{short}");
    assert_eq!(host.store.names(), ["old", "recent"]);
    make(60).await.unwrap();
    assert_eq!(host.store.names(), ["recent"], "only what was lacking");
    let looks = host.store.looks.load(Ordering::SeqCst);
    assert_eq!(make(300).await.unwrap_err().reason(), Reason::PoolFull);
    assert!(host.store.looks.load(Ordering::SeqCst) > looks, "since then room was made");
}

#[tokio::test(start_paused = true)]
async fn who_comes_after_one_in_vain_is_told_at_once_and_it_is_looked_at_anew_behind_that() {
    let host = host();
    host.fill(TOTAL * 99 / 100);
    let text = host.make().await.unwrap_err().to_string();
    host.store.put("old", 100, 9 * DAY);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(host.make().await.unwrap_err().to_string(), text, "it was waited for");
    while !host.store.names().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    host.process.acquirer.admission.admit(&host.process.acquirer.kernel).await.unwrap();
    // Since there was something to be had, it is waited for again.
    host.store.put("other", 100, 9 * DAY);
    host.fill(TOTAL * 99 / 100);
    host.make().await.unwrap();
    // What was so a while ago does not count.
    host.fill(TOTAL * 99 / 100);
    host.make().await.unwrap_err();
    host.store.put("last", 100, 9 * DAY);
    tokio::time::advance(Duration::from_secs(46)).await;
    host.make().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_emergency_is_not_waited_out_after_runs_in_vain() {
    let host = host();
    host.store.put("young", 100, 60);
    let (_running, stopped) = tokio::sync::watch::channel(false);
    let watching = tokio::spawn(host.evictor.clone().watch(crate::kernel::Events::listen(), stopped));
    // Above the high mark for so long that it rests for a while.
    for gib in TOTAL * 86 / 100..TOTAL * 95 / 100 {
        host.fill(gib);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(host.store.names(), ["young"], "at {gib} GiB");
    }
    let begun = Instant::now();
    host.fill(TOTAL * 96 / 100);
    while !host.store.names().is_empty() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(begun.elapsed() < Duration::from_secs(2), "it is not acted on");
    }
    watching.abort();
}

/// The watch has found out before them.
#[tokio::test(start_paused = true)]
async fn who_comes_when_nothing_can_be_removed_in_an_emergency_is_told_at_once() {
    let host = host();
    host.fill(TOTAL * 99 / 100);
    host.evictor.remember(&host.run().await);
    let looks = host.store.looks.load(Ordering::SeqCst);
    let refused = host.make().await.unwrap_err().to_string();
    assert!(refused.contains("lacking: "), "{refused}");
    assert_eq!(host.store.looks.load(Ordering::SeqCst), looks, "it was looked at again first");
    // A run that has made some room says nothing of who comes then.
    host.store.put("old", 10, 9 * DAY);
    host.evictor.remember(&host.run().await);
    host.store.put("recent", 100, 8 * DAY);
    host.make().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_the_watch_has_found_out_counts_until_it_looks_again() {
    let host = host();
    host.fill(TOTAL * 99 / 100);
    host.evictor.remember(&host.run().await);
    host.store.put("late", 100, 9 * DAY);
    tokio::time::advance(pace::LONGEST).await;
    let refused = host.make().await.unwrap_err();
    assert!(refused.to_string().contains("lacking: "), "it was waited for: {refused}");
    // It is looked at behind the answer.
    while !host.store.names().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Those who wait for the same, and those who come after one in vain.
#[tokio::test]
async fn each_is_refused_by_words_of_his_own() {
    let host = host();
    host.fill(TOTAL * 90 / 100);
    let make = async |tenant: &str, gib: u64| {
        let refused = Error::new(Reason::PoolFull, format!("{tenant} wants {gib}")).with("needed_bytes", gib);
        host.evictor.make(refused, Bytes(gib * GIB), None).await.unwrap_err()
    };
    let (red, blue) = tokio::join!(make("red", 200), make("blue", 200));
    let green = make("green", 300).await;
    for (error, words) in [(red, "red wants 200"), (blue, "blue wants 200"), (green, "green wants 300")] {
        let text = error.to_string();
        assert!(text.starts_with(words) && text.contains("lacking: "), "{text}");
        assert_eq!(text.matches(" wants ").count(), 1, "{text}");
        let details = error.to_status().get_error_details();
        let needed = &details.error_info().unwrap().metadata["needed_bytes"];
        assert!(words.ends_with(needed), "{text}: {needed}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_wait_so_long_is_told_in_time() {
    let host = host();
    host.store.put("old", 30, 9 * DAY);
    host.store.lazy.store(true, Ordering::SeqCst);
    host.fill(TOTAL * 96 / 100);
    let full = host.process.acquirer.admission.admit(&host.process.acquirer.kernel).await.unwrap_err();
    let begun = Instant::now();
    let until = deadline(Duration::from_secs(2));
    let refused = host.evictor.make(full, Bytes(0), Some(until)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::PoolFull);
    assert!(refused.to_string().contains("room is being made"), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    // Those who wait get it when it has come.
    let (waiting, ()) = tokio::join!(host.make(), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        host.fill(TOTAL * 93 / 100);
    });
    waiting.unwrap();
}

#[tokio::test]
async fn the_pool_grows_before_anything_goes_and_what_does_not_grow_is_told() {
    for gives in [true, false] {
        let host = host_with(Arc::new(Group { gib: Mutex::new(1000), gives }));
        host.store.put("old", 150, 9 * DAY);
        host.fill(TOTAL * 88 / 100);
        let report = host.run().await;
        if gives {
            assert_eq!(fates(&report), [fate("extend data", "DONE")]);
            assert_eq!(host.store.names(), ["old"]);
        } else {
            assert_eq!(fates(&report), [fate("extend data", "FAILED"), fate("old", "DONE")]);
            assert_eq!(report.steps[0].1.why(), Some("the volume group is locked"));
        }
        assert_eq!(report.outcome, Outcome::Met, "{report:?}");
    }
}

/// Whose pool grows by an LVM2 that can be made to hang.
fn host_by_lvm() -> (Host, Arc<grow::tests::Fake>) {
    let lvm = grow::tests::Fake::new(1000 * GIB, true);
    let data = Growth::UpTo { step: Bytes(GIB), ceiling: Bytes(1 << 50) };
    (host_with(Arc::new(ByLvm::new(lvm.clone(), Steps { data, metadata: Growth::Never }))), lvm)
}

#[tokio::test(start_paused = true)]
async fn an_lvm2_that_does_not_answer_keeps_nothing_from_going() {
    let (host, lvm) = host_by_lvm();
    host.store.put("old", 150, 9 * DAY);
    host.store.put("other", 150, 8 * DAY);
    host.fill(TOTAL * 88 / 100);
    let hung = lvm.answers.lock().await;
    let begun = Instant::now();
    assert_eq!(fates(&host.run().await), [fate("old", "DONE")]);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // It is not waited for again.
    host.fill(TOTAL * 88 / 100);
    let begun = Instant::now();
    assert_eq!(fates(&host.run().await), [fate("other", "DONE")]);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    drop(hung);
    while host.evictor.grower.group_lately().is_none() {
        tokio::task::yield_now().await;
    }
    host.store.put("old", 150, 9 * DAY);
    host.fill(TOTAL * 88 / 100);
    assert_eq!(fates(&host.run().await), [fate("extend data", "DONE")], "it counts when it answers");
}

#[tokio::test(start_paused = true)]
async fn an_extension_that_hangs_keeps_nothing_from_going() {
    let (host, lvm) = host_by_lvm();
    host.store.put("old", 150, 9 * DAY);
    host.store.put("other", 150, 8 * DAY);
    host.fill(TOTAL * 88 / 100);
    let _hung = lvm.extends.lock().await;
    let begun = Instant::now();
    let report = host.run().await;
    assert_eq!(fates(&report), [fate("extend data", "FAILED"), fate("old", "DONE")]);
    assert!(report.steps[0].1.why().unwrap().contains("LVM2 has not extended"), "{report:?}");
    assert!(begun.elapsed() < Duration::from_secs(125), "{:?}", begun.elapsed());
    host.fill(TOTAL * 88 / 100);
    let begun = Instant::now();
    assert_eq!(fates(&host.run().await), [fate("other", "DONE")]);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_extension_that_hangs_is_not_waited_for_by_who_is_in_need() {
    type Comes = fn(&Host);
    let need: [(&str, Comes); 2] = [
        ("an emergency", |host| host.fill(TOTAL * 96 / 100)),
        ("somebody waits for room", |host| {
            let (evictor, full) = (host.evictor.clone(), Error::new(Reason::PoolFull, "full"));
            tokio::spawn(async move { evictor.make(full, Bytes(0), None).await });
        }),
    ];
    for (what, comes) in need {
        let (host, lvm) = host_by_lvm();
        host.store.put("old", 250, 9 * DAY);
        host.fill(TOTAL * 88 / 100);
        let _hung = lvm.extends.lock().await;
        let evictor = host.evictor.clone();
        let running = tokio::spawn(async move { evictor.run(Trigger::Pressure).await });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(host.store.names(), ["old"], "{what}: there is time");
        comes(&host);
        let begun = Instant::now();
        assert_eq!(
            fates(&running.await.unwrap().unwrap()),
            [fate("extend data", "FAILED"), fate("old", "DONE")]
        );
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_pool_that_does_not_write_is_nothing_to_plan_for() {
    let host = host();
    host.store.put("old", 150, 9 * DAY);
    host.fill(TOTAL * 88 / 100);
    for mode in [PoolMode::ReadOnly, PoolMode::NeedsCheck, PoolMode::Failed] {
        host.world.state.lock().unwrap().pool_mode = mode;
        let refused = host.evictor.run(Trigger::Pressure).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::PoolUnusable, "{mode}");
    }
    host.world.state.lock().unwrap().pool_mode = PoolMode::OutOfDataSpace;
    assert_eq!(fates(&host.run().await), [fate("old", "DONE")], "what is out of space still deletes");
}

#[tokio::test]
async fn what_was_not_used_for_too_long_goes_without_need() {
    let host = host();
    host.store.put("old", 1, 9 * DAY);
    host.store.put("recent", 1, DAY);
    host.fill(100);
    let policy = Policy { retention: Some(Duration::from_secs(2 * DAY)), ..host.evictor.policy.clone() };
    let occupied = host.evictor.take_stock(Growing::IfItCan).await.unwrap();
    let all = occupancy::occupancy(&occupied.0, &occupied.1);
    let plan = plan(&all, &policy, Trigger::Schedule, UnixMicros(NOW * 1_000_000));
    let fates = host.evictor.carry_out(&plan, &all, Trigger::Schedule).await;
    assert_eq!(fates, [Fate::Done]);
    assert_eq!(host.store.names(), ["recent"]);
    assert_eq!(host.evictor.returning().outstanding().data, Bytes(GIB));
}

#[tokio::test(start_paused = true)]
async fn what_was_not_used_for_too_long_is_looked_for_on_schedule() {
    let mut config = Config::default();
    (config.gc.retention_seconds, config.gc.interval_seconds) = (2 * DAY, 7200);
    let host = host_of(Arc::new(NoGrower), &config);
    host.store.put("old", 1, 9 * DAY);
    host.store.put("recent", 1, DAY);
    host.fill(100);
    let (_running, stopped) = tokio::sync::watch::channel(false);
    let watching = tokio::spawn(host.evictor.clone().watch(crate::kernel::Events::listen(), stopped));
    tokio::time::sleep(Duration::from_secs(7190)).await;
    assert_eq!(host.store.names(), ["old", "recent"], "before its time");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(host.store.names(), ["recent"]);
    watching.abort();
}
