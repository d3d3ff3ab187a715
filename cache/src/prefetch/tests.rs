//! Jobs on a fake puller: what they come to, and what restarts, cancels and deadlines do to them.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use cowshed_leases::{Moment, Ttl, UnixMicros};

use super::{job::tests::plan, *};
use crate::fakes;

/// What is served: image → how often it fails first, and with what for ever after.
#[derive(Default)]
struct Registry {
    fails: Mutex<BTreeMap<String, (u32, Option<Reason>)>>,
    /// Pulls under way, and the most there were.
    under_way: AtomicUsize,
    most: AtomicUsize,
    /// All that was asked for, with whether there were credentials.
    asked: Mutex<Vec<(String, bool)>>,
    /// Pulls wait for this, but for those of `free`.
    gate: tokio::sync::RwLock<()>,
    free: Mutex<BTreeSet<String>>,
    /// Nothing may begin.
    closed: AtomicBool,
    /// What has begun is to be given up.
    drains: AtomicBool,
    drained: tokio::sync::Notify,
}

struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait::async_trait]
impl Puller for Registry {
    async fn pull(
        &self,
        (image, _): (&ImageRef, &Platform),
        access: &Access,
        _terms: &Terms,
        show: &(dyn Fn(Progress, bool) + Send + Sync),
    ) -> Result<(ResolvedImage, Cache)> {
        let name = image.to_string();
        self.asked.lock().unwrap().push((name.clone(), access.credential.is_some()));
        let now = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        let _under_way = UnderWay(&self.under_way);
        self.most.fetch_max(now, Ordering::SeqCst);
        show(Progress::default(), false);
        tokio::time::sleep(Duration::from_millis(100)).await;
        if !self.free.lock().unwrap().contains(&name) {
            let _open = self.gate.read().await;
        }
        let mut fails = self.fails.lock().unwrap();
        if let Some((left, then)) = fails.get_mut(&name) {
            if *left > 0 {
                *left -= 1;
                return Err(Error::new(Reason::RegistryUnavailable, "it is down"));
            }
            if let Some(reason) = then {
                return Err(Error::new(*reason, "no"));
            }
        }
        Ok((ResolvedImage { name: image.clone(), ..fakes::image() }, Cache::Miss))
    }
}

#[async_trait::async_trait]
impl Permit for Registry {
    async fn admit(&self) -> Result<()> {
        let is_closed = self.closed.load(Ordering::SeqCst);
        if is_closed { Err(Error::new(Reason::PoolFull, "it is full")) } else { Ok(()) }
    }

    async fn withdrawn(&self) {
        while !self.drains.load(Ordering::SeqCst) {
            self.drained.notified().await;
        }
    }
}

/// The wall clock follows tokio's, which tests let jump.
fn clock() -> Clock {
    let begun = tokio::time::Instant::now();
    Clock::of(move || {
        let wall = UnixMicros(i64::try_from(begun.elapsed().as_micros()).unwrap());
        Moment { wall, ..fakes::book::now() }
    })
}

fn start(directory: &Path, registry: &Arc<Registry>) -> (Prefetcher, Ledger) {
    let ledger = Ledger::open(directory).unwrap();
    let metrics = Metrics::new().unwrap();
    (
        Prefetcher::new(
            ledger.clone(),
            registry.clone(),
            registry.clone(),
            clock(),
            Tasks::default(),
            Wake::default(),
            metrics,
        ),
        ledger,
    )
}

fn id(text: &str) -> JobId {
    text.parse().unwrap()
}

/// Time that does not pass while the ledger writes: it is no part of the clock that jumps.
async fn ended(prefetcher: &Prefetcher, name: &str) -> Arc<Job> {
    let (id, mut changes) = (id(name), prefetcher.0.ledger.changes());
    loop {
        changes.borrow_and_update();
        let picture = prefetcher.get(&id).unwrap();
        if picture.job.ended.is_some() {
            return picture.job;
        }
        changes.changed().await.unwrap();
    }
}

/// As if the process ended here.
async fn kill(prefetcher: &Prefetcher) {
    let tasks: Vec<_> = prefetcher.live().values().cloned().collect();
    tasks.iter().for_each(|live| live.task.lock().unwrap().take().unwrap().abort());
    prefetcher.0.ledger.close().await;
}

/// Its end comes after what is told by the ledger.
async fn idle(prefetcher: &Prefetcher) {
    while !prefetcher.live().is_empty() {
        tokio::task::yield_now().await;
    }
}

fn how(job: &Job) -> Option<End> {
    job.ended.map(|(how, _)| how)
}

#[tokio::test(start_paused = true)]
async fn what_may_pass_is_tried_again_and_what_may_not_is_told() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, ledger) = start(directory.path(), &registry);
    registry.fails.lock().unwrap().extend([
        ("r.example/a:1".to_owned(), (3, None)),
        ("r.example/b:1".to_owned(), (1, Some(Reason::ImageNotFound))),
    ]);
    let pin_for = Ttl::from_seconds(60).ok();
    let wanted = Plan { pin_for, ..plan(&["r.example/a:1", "r.example/b:1", "r.example/c:1"]) };
    prefetcher.create(id("j"), wanted, None).await.unwrap();
    let job = ended(&prefetcher, "j").await;
    assert_eq!(how(&job), Some(End::Incomplete));
    assert!(matches!(&job.stages[0], Stage::Here { was_there: false, .. }));
    assert!(matches!(&job.stages[1], Stage::Failed { reason, .. } if reason == "IMAGE_NOT_FOUND"));
    assert!(matches!(&job.stages[2], Stage::Here { .. }));
    assert_eq!(registry.asked.lock().unwrap().len(), 4 + 2 + 1);
    assert_eq!(registry.most.load(Ordering::SeqCst), 1, "one at a time");
    let now = clock().now();
    let pinned = |image: &str| ledger.read_all(|_, marks| marks.pin(image, &now).is_some());
    assert!(pinned("r.example/a:1") && !pinned("r.example/b:1") && pinned("r.example/c:1"));
    idle(&prefetcher).await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_goes_on_where_it_was() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let images: Vec<String> = (0..6).map(|n| format!("r.example/a:{n}")).collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let concurrency = NonZeroU32::new(2).unwrap();
    registry.free.lock().unwrap().extend(images[..2].iter().map(|name| (*name).to_owned()));
    let shut = registry.gate.write().await;
    {
        let (prefetcher, _ledger) = start(directory.path(), &registry);
        prefetcher.create(id("j"), Plan { concurrency, ..plan(&images) }, None).await.unwrap();
        let mut changes = prefetcher.0.ledger.changes();
        while prefetcher.get(&id("j")).unwrap().job.waiting().count() > 4 {
            changes.changed().await.unwrap();
        }
        kill(&prefetcher).await;
    }
    drop(shut);
    let before = registry.asked.lock().unwrap().len();
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    assert_eq!(prefetcher.list(None, 10)[0].job.ended, None);
    prefetcher.resume();
    prefetcher.resume();
    assert_eq!(how(&*ended(&prefetcher, "j").await), Some(End::Done));
    assert_eq!(registry.asked.lock().unwrap().len() - before, 4, "only what was missing");
    assert_eq!(registry.most.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn cancelled_or_late_it_pulls_no_more() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    let shut = registry.gate.write().await;
    prefetcher.create(id("cancelled"), plan(&["r.example/a:1"]), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 1);
    assert!(prefetcher.get(&id("cancelled")).unwrap().seen[0].progress.is_some());
    let cancelled = prefetcher.cancel(&id("cancelled")).await.unwrap();
    assert_eq!(how(&cancelled.job), Some(End::Cancelled));
    idle(&prefetcher).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 0);
    let deadline = Ttl::from_seconds(100).ok();
    prefetcher.create(id("late"), Plan { deadline, ..plan(&["r.example/b:1"]) }, None).await.unwrap();
    let late = ended(&prefetcher, "late").await;
    let (how_, at) = late.ended.unwrap();
    assert_eq!((how_, (at.0 - late.created_at.0) / 1_000_000), (End::Late, 100));
    idle(&prefetcher).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 0);
    drop(shut);
    assert_eq!(how(&prefetcher.cancel(&id("late")).await.unwrap().job), Some(End::Late), "it stays so");
    assert_eq!(prefetcher.cancel(&id("none")).await.unwrap_err().reason(), Reason::PrefetchNotFound);
    idle(&prefetcher).await;
}

/// One at a time, and the first of them not to be had for a long time.
#[tokio::test(start_paused = true)]
async fn one_that_is_tried_again_does_not_keep_the_others_waiting() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    registry.fails.lock().unwrap().extend([
        ("r.example/a:1".to_owned(), (u32::MAX, None)),
        ("r.example/b:1".to_owned(), (0, Some(Reason::ContainerdError))),
    ]);
    let wanted = plan(&["r.example/a:1", "r.example/b:1", "r.example/c:1"]);
    prefetcher.create(id("j"), wanted, None).await.unwrap();
    let mut changes = prefetcher.0.ledger.changes();
    while prefetcher.get(&id("j")).unwrap().job.waiting().count() > 1 {
        changes.changed().await.unwrap();
    }
    let job = prefetcher.get(&id("j")).unwrap().job;
    assert!(matches!(&job.stages[..], [Stage::Waiting, Stage::Failed { .. }, Stage::Here { .. }]), "{job:?}");
    let asked = |name: &str| registry.asked.lock().unwrap().iter().filter(|(asked, _)| asked == name).count();
    assert_eq!(asked("r.example/b:1"), usize::try_from(TRIES_MAX).unwrap());
    assert_eq!(registry.most.load(Ordering::SeqCst), 1);
    // Between two tries it is known when the next is.
    let seen = loop {
        let seen = prefetcher.get(&id("j")).unwrap().seen[0].clone();
        if seen.next_try.is_some() {
            break seen;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(seen.tries > 3 && seen.error.is_some(), "{seen:?}");
    // Why it was not had is known when the job is not at work any more.
    let cancelled = prefetcher.cancel(&id("j")).await.unwrap().job;
    assert_eq!(cancelled.causes.keys().collect::<Vec<_>>(), [&0]);
    assert_eq!(cancelled.causes[&0].message, "it is down");
    idle(&prefetcher).await;
    let late = Plan { deadline: Ttl::from_seconds(100).ok(), ..plan(&["r.example/a:1"]) };
    prefetcher.create(id("late"), late, None).await.unwrap();
    assert_eq!(ended(&prefetcher, "late").await.causes[&0].reason, "REGISTRY_UNAVAILABLE");
    idle(&prefetcher).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_drained_or_stopped_pulls_no_more_and_goes_on_later() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    let shut = registry.gate.write().await;
    prefetcher.create(id("j"), plan(&["r.example/a:1"]), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 1);
    registry.closed.store(true, Ordering::SeqCst);
    registry.drains.store(true, Ordering::SeqCst);
    registry.drained.notify_one();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 0);
    registry.drains.store(false, Ordering::SeqCst);
    registry.closed.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 1);
    // Nothing new is begun any more; what is under way is cut off by the end of the process.
    prefetcher.0.tasks.close(Duration::ZERO).await;
    prefetcher.create(id("k"), plan(&["r.example/b:1"]), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(registry.under_way.load(Ordering::SeqCst), 1);
    assert!(registry.asked.lock().unwrap().iter().all(|(name, _)| name == "r.example/a:1"));
    assert_eq!(prefetcher.get(&id("j")).unwrap().job.ended, None, "a stop is not its end");
    drop(shut);
}

/// What a pull has left is kept for the job that waits for its image, and no longer.
#[tokio::test(start_paused = true)]
async fn what_was_fetched_before_a_crash_is_kept_as_long_as_a_job_waits_for_it() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, ledger) = start(directory.path(), &registry);
    let shut = registry.gate.write().await;
    prefetcher.create(id("j"), plan(&["r.example/a:1"]), None).await.unwrap();
    for (lease, image) in [("mine", "r.example/a:1"), ("others", "r.example/b:1")] {
        ledger.begin_pull(lease.to_owned(), image.to_owned()).await.unwrap();
    }
    assert_eq!(ledger.pulls_of_no_job(), ["others"]);
    drop(shut);
    ended(&prefetcher, "j").await;
    assert_eq!(ledger.pulls_of_no_job(), ["mine", "others"]);
}

/// Polled once, then dropped.
#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_leaves_no_job_behind_that_nobody_runs() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    let mut changes = prefetcher.0.ledger.changes();
    assert!(prefetcher.create(id("j"), plan(&["r.example/a:1"]), None).now_or_never().is_none());
    changes.changed().await.unwrap();
    assert_eq!(how(&*ended(&prefetcher, "j").await), Some(End::Done));
}

#[tokio::test(start_paused = true)]
async fn credentials_are_waited_for_after_a_restart_and_written_nowhere() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let secret = Credential::Identity("geheim".to_owned());
    let wanted = Plan { has_credentials: true, ..plan(&["r.example/a:1"]) };
    {
        let (prefetcher, _ledger) = start(directory.path(), &registry);
        registry.closed.store(true, Ordering::SeqCst);
        prefetcher.create(id("j"), wanted.clone(), Some(secret.clone())).await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let picture = prefetcher.get(&id("j")).unwrap();
        assert!(!picture.wants_credentials && picture.seen[0].error.is_some(), "{picture:?}");
        kill(&prefetcher).await;
    }
    for file in std::fs::read_dir(directory.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        assert!(!bytes.windows(6).any(|window| window == b"geheim"));
    }
    registry.closed.store(false, Ordering::SeqCst);
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    prefetcher.resume();
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(prefetcher.get(&id("j")).unwrap().wants_credentials);
    assert!(registry.asked.lock().unwrap().is_empty(), "asked without credentials");
    let other = Plan { has_credentials: false, ..wanted.clone() };
    assert_eq!(prefetcher.create(id("j"), other, None).await.unwrap_err().reason(), Reason::SpecConflict);
    prefetcher.create(id("j"), wanted, Some(secret)).await.unwrap();
    assert_eq!(how(&*ended(&prefetcher, "j").await), Some(End::Done));
    assert_eq!(*registry.asked.lock().unwrap(), [("r.example/a:1".to_owned(), true)]);
}

#[tokio::test(start_paused = true)]
async fn the_jobs_follow_a_directory() {
    let (directory, registry) = (tempfile::tempdir().unwrap(), Arc::new(Registry::default()));
    let (prefetcher, _ledger) = start(directory.path(), &registry);
    let warm = tempfile::tempdir().unwrap();
    let path = warm.path().join("apps.toml");
    let mut expected = Vec::new();
    for (text, pulled) in [
        ("images = ['r.example/a:1']", Some("r.example/a:1")),
        // Half written.
        ("images = ['r.example/a:1'", None),
        ("images = ['r.example/b:1']", Some("r.example/b:1")),
        // Not due yet.
        ("images = ['r.example/b:1']", None),
    ] {
        std::fs::write(&path, text).unwrap();
        prefetcher.reconcile(&warm::read(warm.path()).unwrap()).await;
        for job in prefetcher.list(None, 10) {
            ended(&prefetcher, &job.job.id.to_string()).await;
        }
        expected.extend(pulled.map(|name| (name.to_owned(), false)));
        assert_eq!(*registry.asked.lock().unwrap(), expected, "{text}");
        // Names of jobs have the second.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}
