//! The crash matrix: the snapshotter is stopped before and after every single effect, started again on the same pool and
//! store, and everything is compared.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::Duration,
};

use prometheus::Registry;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use crate::{
    error::{Code, Error, Result},
    fake::{FakePool, Fuse},
    metrics::Metrics,
    reclaim,
    size::Bytes,
    snapshotter::{Inner, Settings, Snapshotter},
    start::{Found, reconcile},
    store::{self, Store, again::IfMissing},
    tree::{Change, Kind, Snapshot, State, ThinId, UnixNanos},
};

const SIZE: &str = "containerd.io/snapshot/cowshed.size";
const LAYER: &str = "containerd.io/snapshot.ref";

/// Not started yet.
pub(crate) fn inner(directory: &Path, pool: &FakePool) -> Inner {
    let path = directory.join("snapshots.db");
    let (connection, tree, store_id) = store::open(&path, IfMissing::Make).unwrap();
    let settings = Settings {
        store: path.clone(),
        pool: String::new(),
        base_size: Bytes(1 << 30),
        allow_unzeroed: false,
        heirs: pool.heirs(),
        trim: None,
    };
    let store = Store::start(connection, tree, path).unwrap();
    let mut inner = Inner::new(settings, store_id, store, Metrics::register(&Registry::new()).unwrap());
    inner.filesystem = Arc::new(pool.clone());
    inner
}

pub(crate) async fn start(directory: &Path, pool: &FakePool) -> Snapshotter {
    start_inner(Arc::new(inner(directory, pool)), pool).await
}

pub(crate) async fn start_inner(inner: Arc<Inner>, pool: &FakePool) -> Snapshotter {
    let found = Found { new_uuid: None, thin_ids: Some(pool.thins().into_keys().collect()), creations: 0 };
    tokio::spawn(reclaim::run(inner.clone()));
    reconcile(&inner, Arc::new(pool.clone()), found).await.unwrap();
    Snapshotter(inner)
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub(crate) async fn make(
    s: &Snapshotter,
    key: &str,
    parent: &str,
    kind: Kind,
    pairs: &[(&str, &str)],
) -> Result<String> {
    s.make(key.to_owned(), parent.to_owned(), kind, labels(pairs)).await.map(|mount| mount.source)
}

/// What was answered with success so far, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Promised(Vec<&'static str>);

/// All kinds of operations, each once; tells what it was promised as it goes.
async fn scenario(s: &Snapshotter, pool: &FakePool, told: &UnboundedSender<&'static str>) -> Result<()> {
    let tell = |what| {
        let _deaf = told.send(what);
    };
    make(s, "a", "", Kind::Active, &[(LAYER, "x")]).await?;
    tell("a");
    s.commit("base".into(), "a".into(), BTreeMap::new()).await?;
    tell("base");
    // Somebody has the layer open still: it is suspended for a moment.
    let origin = s.0.store.read(|tree| tree.ready("base").map(|s| s.id))?;
    pool.open(s.0.name(origin).as_str(), 1);
    let made = make(s, "b", "base", Kind::Active, &[]).await;
    pool.close_all();
    made?;
    tell("b");
    make(s, "large", "base", Kind::Active, &[(SIZE, "2GiB")]).await?;
    tell("large");
    make(s, "v", "base", Kind::View, &[]).await?;
    tell("v");
    s.remove("v")?;
    tell("no v");
    s.remove("b")?;
    tell("no b");
    quiet(s).await;
    Ok(())
}

/// Waits until nothing is to be reclaimed or put to rest.
pub(crate) async fn quiet(s: &Snapshotter) {
    for _ in 0..2000 {
        let removing = s.0.store.read(|tree| tree.all().any(|s| s.state == State::Removing));
        if !removing && s.0.active_origins().is_empty() && s.0.heirs.are_quiet() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("it does not come to rest");
}

/// Store, pool and kernel say the same, and what was promised is there.
async fn audit(s: &Snapshotter, pool: &FakePool, promised: &Promised, what: &str) {
    // A crash may have kept a Remove from being written down; containerd, which knows of it, repeats it.
    for what in &promised.0 {
        if let Some(key) = what.strip_prefix("no ") {
            s.remove(key).unwrap();
        }
    }
    quiet(s).await;
    let (ours, to_be_active, keys) = s.0.store.read(|tree| {
        let ours: BTreeSet<ThinId> = tree.all().map(|s| s.thin).collect();
        let active = tree.listed().filter(|s| s.kind.is_active()).chain(tree.heirs());
        let active: BTreeSet<String> = active.map(|one| s.0.name(one.id).as_str().to_owned()).collect();
        let keys: BTreeSet<String> = tree.listed().map(|s| s.key.clone()).collect();
        (ours, active, keys)
    });
    let in_pool: BTreeSet<ThinId> = pool.thins().into_keys().collect();
    assert_eq!(in_pool, ours, "{what}: thin ids of pool and store");
    assert_eq!(pool.device_names(), to_be_active, "{what}: devices of kernel and store");
    assert!(!pool.any_suspended(), "{what}: a device is suspended");
    assert!(pool.all_whole(), "{what}: a device has no table or no link");
    let mut expected = BTreeSet::new();
    for promise in &promised.0 {
        match *promise {
            "base" => {
                expected.remove("a");
                expected.insert("base".to_owned());
            }
            "no v" => drop(expected.remove("v")),
            "no b" => drop(expected.remove("b")),
            key => drop(expected.insert(key.to_owned())),
        }
    }
    // What was asked last and not answered may be there or not.
    let unanswered: BTreeSet<&str> = match promised.0.last().copied() {
        None => ["a"].into(),
        Some("a") => ["a", "base"].into(),
        Some("base") => ["b"].into(),
        Some("b") => ["large"].into(),
        Some("large") => ["v"].into(),
        Some("v") => ["v"].into(),
        Some("no v") => ["b"].into(),
        _ => BTreeSet::new(),
    };
    let differ: BTreeSet<&str> = keys.symmetric_difference(&expected).map(String::as_str).collect();
    assert!(differ.is_subset(&unanswered), "{what}: there are {keys:?}, promised were {expected:?}");
    // And it works.
    let path = make(s, "after", "", Kind::Active, &[]).await.unwrap();
    assert!(pool.device_names().contains(path.strip_prefix("/dev/mapper/").unwrap()), "{what}");
    if keys.contains("base") {
        make(s, "after-base", "base", Kind::View, &[]).await.unwrap();
        make(s, "after-large", "base", Kind::Active, &[(SIZE, "2GiB")]).await.unwrap();
    }
    let contents = pool.thins();
    s.0.store.read(|tree| {
        for one in tree.all().filter(|s| s.kind == Kind::Grown || s.key.ends_with("large")) {
            assert_eq!(contents[&one.thin], "empty, grown", "{what}: {:?}", one.key);
        }
    });
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs the scenario until the fuse blows (or to its end); returns what was promised, and whether it crashed.
fn run_until_crash(directory: &Path, pool: &FakePool, fuse: Fuse) -> (Promised, bool) {
    let (told, mut heard) = unbounded_channel();
    let (directory, used) = (directory.to_owned(), pool.clone());
    let ended = until_crash(pool, async move {
        let s = start(&directory, &used).await;
        used.set_fuse(fuse);
        drop(scenario(&s, &used, &told).await);
    });
    let mut promised = Promised::default();
    while let Ok(what) = heard.try_recv() {
        promised.0.push(what);
    }
    (promised, !ended)
}

/// Runs it until its end or until the fuse blows; says whether it has ended. Whoever had devices open is gone then.
pub(crate) fn until_crash(pool: &FakePool, run: impl Future<Output = ()> + Send + 'static) -> bool {
    let runtime = runtime();
    let ended = runtime.block_on(async {
        let running = tokio::spawn(run);
        while !running.is_finished() {
            if matches!(pool.fuse(), Fuse::CrashBefore(0)) {
                // Whatever else is under way comes to the same end.
                tokio::time::sleep(Duration::from_millis(30)).await;
                return false;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        running.await.unwrap();
        true
    });
    runtime.shutdown_background();
    // The store's thread lets go of its file when the last handle is gone.
    #[allow(clippy::disallowed_methods, reason = "no runtime is left here to sleep in")]
    std::thread::sleep(Duration::from_millis(30));
    pool.close_all();
    ended
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Killed,
    PowerCut,
}

#[test]
fn stopped_at_every_effect_it_comes_back_whole() {
    for (cause, heirs) in
        [Cause::Killed, Cause::PowerCut].into_iter().flat_map(|cause| [(cause, 0), (cause, 4)])
    {
        let mut crashes = 0;
        for n in 0.. {
            let mut crashed = false;
            for fuse in [Fuse::CrashBefore(n), Fuse::CrashAfter(n + 1)] {
                let directory = tempfile::tempdir().unwrap();
                let pool = FakePool::with_heirs(heirs);
                let (promised, stopped) = run_until_crash(directory.path(), &pool, fuse);
                crashed |= stopped;
                pool.set_fuse(Fuse::Whole);
                if cause == Cause::PowerCut {
                    pool.cut_power();
                }
                let what = format!("{cause:?} {fuse:?}, {heirs} heirs, promised {:?}", promised.0);
                runtime().block_on(async {
                    let s = start(directory.path(), &pool).await;
                    audit(&s, &pool, &promised, &what).await;
                });
            }
            if !crashed {
                break;
            }
            crashes += 1;
        }
        assert!(crashes > 15, "only {crashes} effects were seen");
    }
}

/// The start after a crash is stopped too, at every effect that it has.
#[test]
fn stopped_again_while_it_comes_back() {
    let mut starts = 0;
    for n in (1..).step_by(3) {
        for m in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let pool = FakePool::with_heirs(m % 2);
            let (promised, stopped) = run_until_crash(directory.path(), &pool, Fuse::CrashAfter(n));
            if !stopped {
                assert!(starts > 15, "only {starts} starts were stopped");
                return;
            }
            pool.cut_power();
            pool.set_fuse(Fuse::CrashBefore(m));
            let (path, used) = (directory.path().to_owned(), pool.clone());
            let came_back = until_crash(&pool, async move { quiet(&start(&path, &used).await).await });
            pool.set_fuse(Fuse::Whole);
            let what = format!("stopped after {n} and then before {m}, promised {:?}", promised.0);
            runtime().block_on(async {
                let s = start(directory.path(), &pool).await;
                audit(&s, &pool, &promised, &what).await;
            });
            if came_back {
                break;
            }
            starts += 1;
        }
    }
}

#[test]
fn an_effect_that_fails_leaves_nothing_behind() {
    for (n, heirs) in (0..60).flat_map(|n| [(n, 4), (n, 0)]) {
        let directory = tempfile::tempdir().unwrap();
        let pool = FakePool::with_heirs(heirs);
        let (told, mut heard) = unbounded_channel();
        let whole = runtime().block_on(async {
            let s = start(directory.path(), &pool).await;
            pool.set_fuse(Fuse::FailAt(n));
            let outcome = scenario(&s, &pool, &told).await;
            let whole = pool.fuse() != Fuse::Whole;
            pool.set_fuse(Fuse::Whole);
            if let Err(error) = &outcome {
                assert!(error.to_string().contains("told to fail"), "{n}: {error}");
            }
            let mut promised = Promised::default();
            while let Ok(what) = heard.try_recv() {
                promised.0.push(what);
            }
            audit(&s, &pool, &promised, &format!("failed at {n}, promised {:?}", promised.0)).await;
            whole
        });
        if whole && heirs == 0 {
            assert!(n > 15, "only {n} effects were seen");
            return;
        }
    }
    panic!("the scenario has no end");
}

pub(crate) fn with_pool<T>(test: impl AsyncFnOnce(Snapshotter, FakePool) -> T) -> T {
    let directory = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let pool = FakePool::new();
        let s = start(directory.path(), &pool).await;
        test(s, pool).await
    })
}

#[test]
fn an_open_device_is_never_removed() {
    with_pool(async |s, pool| {
        let path = make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        let name = path.strip_prefix("/dev/mapper/").unwrap();
        pool.open(name, 1);
        s.remove("a").unwrap();
        assert_eq!(s.stat("a").unwrap_err().code, Code::NotFound);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(pool.device_names().contains(name), "it was removed while open");
        assert_eq!(pool.thins().len(), 2);
        pool.open(name, 0);
        quiet(&s).await;
        assert_eq!((pool.device_names().len(), pool.thins().len()), (0, 1));
    });
}

#[test]
fn a_committed_snapshot_that_is_open_is_suspended_for_its_children() {
    with_pool(async |s, pool| {
        let path = make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        let name = path.strip_prefix("/dev/mapper/").unwrap();
        pool.open(name, 1);
        s.commit("base".into(), "a".into(), BTreeMap::new()).await.unwrap();
        // The fake refuses a snapshot of what is active and not suspended.
        make(&s, "b", "base", Kind::Active, &[]).await.unwrap();
        assert!(!pool.any_suspended());
        assert!(pool.device_names().contains(name));
        pool.open(name, 0);
        quiet(&s).await;
        assert!(!pool.device_names().contains(name), "a closed committed snapshot stays active");
        assert_eq!(s.usage("b").await, Ok(0));
    });
}

#[test]
fn views_are_read_only_and_fifty_at_once_are_fifty() {
    with_pool(async |s, pool| {
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        s.commit("base".into(), "a".into(), BTreeMap::new()).await.unwrap();
        let all = (0..50).map(|n| {
            let s = s.clone();
            async move { make(&s, &format!("v{n}"), "base", Kind::View, &[]).await.unwrap() }
        });
        let paths: BTreeSet<String> = futures_util::future::join_all(all).await.into_iter().collect();
        assert_eq!(paths.len(), 50);
        for path in &paths {
            assert!(pool.is_read_only(path.strip_prefix("/dev/mapper/").unwrap()));
        }
        let same = make(&s, "v7", "base", Kind::View, &[]).await.unwrap_err();
        assert_eq!(same.code, Code::AlreadyExists);
    });
}

#[test]
fn one_blank_for_all_who_ask_at_once() {
    with_pool(async |s, pool| {
        let all = (0..20).map(|n| {
            let s = s.clone();
            async move { make(&s, &format!("a{n}"), "", Kind::Active, &[]).await.map(drop) }
        });
        let made: Result<Vec<()>, Error> = futures_util::future::join_all(all).await.into_iter().collect();
        made.unwrap();
        assert_eq!(pool.thins().len(), 21);
        assert!(pool.thins().values().all(|content| content == "empty"));
    });
}

#[test]
fn what_is_not_ours_is_left_alone() {
    with_pool(async |s, pool| {
        for id in [1, 2, 4] {
            pool.add_foreign(ThinId(id));
        }
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        s.remove("a").unwrap();
        quiet(&s).await;
        let foreign = pool.thins().into_iter().filter(|(_, content)| content == "foreign");
        assert_eq!(foreign.map(|(id, _)| id.0).collect::<Vec<_>>(), [1, 2, 4]);
    });
}

#[test]
fn a_pool_that_was_used_up_makes_no_more() {
    with_pool(async |s, pool| {
        pool.set_creations(0);
        s.0.creations.store((1 << 24) / 10 * 9, std::sync::atomic::Ordering::Relaxed);
        let refused = make(&s, "a", "", Kind::Active, &[]).await.unwrap_err();
        assert_eq!(refused.code, Code::ResourceExhausted);
        assert!(refused.to_string().contains("new pool"), "{refused}");
    });
}

/// Else the kernel could still be at a device that the reclaimer deletes.
#[test]
fn a_caller_of_mounts_that_has_gone_does_not_let_go_of_the_device() {
    with_pool(async |s, pool| {
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        let id = s.0.store.read(|tree| tree.ready("a").map(|s| s.id)).unwrap();
        pool.cut_power();
        let held = pool.hold();
        let asked = s.clone();
        let caller = tokio::spawn(async move { asked.mounts("a").await.map(drop) });
        while s.0.device_lock(id).try_lock().is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(
            s.0.device_lock(id).try_lock().is_err(),
            "the device's lock is free while the kernel is at it"
        );
        drop(held);
        drop(s.0.device_lock(id).lock().await);
        assert!(pool.device_names().contains(s.0.name(id).as_str()));
    });
}

/// Else its thin id could be another disk's before the next of a crowd makes a snapshot of it.
#[test]
fn a_lost_base_keeps_its_thin_id_while_somebody_wants_a_snapshot_of_it() {
    with_pool(async |s, pool| {
        make(&s, "warm", "", Kind::Active, &[]).await.unwrap();
        let blanks = || -> Vec<Snapshot> {
            s.0.store.read(|tree| tree.all().filter(|s| s.kind == Kind::Blank).cloned().collect())
        };
        let lost = blanks().remove(0);
        // A making holds its origin,
        let held = pool.hold();
        let asked = s.clone();
        let caller = tokio::spawn(async move { make(&asked, "a", "", Kind::Active, &[]).await });
        while !s.0.busy.counts().contains_key(&lost.id) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(held);
        caller.await.unwrap().unwrap();
        assert!(s.0.busy.counts().is_empty());
        // as this one does, which is slow.
        let slow = s.0.busy.hold([lost.id]);
        pool.lose(lost.thin);
        make(&s, "b", "", Kind::Active, &[]).await.unwrap();
        make(&s, "c", "", Kind::Active, &[]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(blanks().iter().any(|blank| blank.id == lost.id), "it was struck off while it was wanted");
        assert!(!pool.thins().contains_key(&lost.thin), "its thin id is somebody else's");
        drop(slow);
        s.0.wake.notify_one();
        quiet(&s).await;
        assert_eq!(blanks().len(), 1);
    });
}

#[test]
fn a_base_that_the_pool_has_lost_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let pool = FakePool::new();
    let blank = |pool: &FakePool| *pool.thins().first_key_value().unwrap().0;
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        pool.lose(blank(&pool));
        make(&s, "b", "", Kind::Active, &[]).await.unwrap();
        quiet(&s).await;
        assert_eq!(pool.thins().len(), 3);
        s.close().await;
    });
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        let base = s.0.store.read(|tree| tree.all().find(|s| s.kind == Kind::Blank).map(|s| s.thin)).unwrap();
        pool.lose(base);
        s.close().await;
        let s = start(directory.path(), &pool).await;
        assert!(
            s.0.store.read(|tree| tree.all().all(|s| s.kind != Kind::Blank)),
            "a lost base is still in the store"
        );
        make(&s, "c", "", Kind::Active, &[]).await.unwrap();
        assert!(pool.thins().values().all(|content| content == "empty"));
    });
}

#[test]
fn a_caller_that_has_gone_leaves_nothing() {
    with_pool(async |s, pool| {
        make(&s, "warm", "", Kind::Active, &[]).await.unwrap();
        let held = pool.hold();
        let asked = s.clone();
        let caller = tokio::spawn(async move { make(&asked, "a", "", Kind::Active, &[]).await });
        while s.0.busy.counts().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        drop(held);
        while !s.0.busy.counts().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        quiet(&s).await;
        assert_eq!(s.stat("a").unwrap_err().code, Code::NotFound);
        assert_eq!((pool.thins().len(), pool.device_names().len()), (2, 1));
        // And its name is free.
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
    });
}

#[test]
fn only_a_layer_on_what_is_clean_does_without_its_journal() {
    with_pool(async |s, pool| {
        let options = async |key: &str, parent: &str, kind, pairs: &[(&str, &str)]| {
            s.make(key.into(), parent.into(), kind, labels(pairs)).await.unwrap().options.join(",")
        };
        assert_eq!(options("layer", "", Kind::Active, &[(LAYER, "x")]).await, "rw,noload,nobarrier");
        assert_eq!(options("disk", "", Kind::Active, &[]).await, "rw");
        s.commit("base".into(), "layer".into(), BTreeMap::new()).await.unwrap();
        assert_eq!(options("view", "base", Kind::View, &[]).await, "ro");
        quiet(&s).await;
        pool.soil();
        // The kernel refuses to write without the journal that has to be replayed.
        assert_eq!(options("next", "base", Kind::Active, &[(LAYER, "y")]).await, "rw");
        assert_eq!(options("look", "base", Kind::View, &[]).await, "ro,noload");
        assert_eq!(s.mounts("disk").await.unwrap().options, ["rw"]);
    });
}

#[test]
fn removals_that_cannot_be_written_are_repeated_in_order() {
    with_pool(async |s, pool| {
        let mut parent = String::new();
        for name in ["1", "2", "3"] {
            make(&s, "work", &parent, Kind::Active, &[(LAYER, name)]).await.unwrap();
            s.commit(name.into(), "work".into(), BTreeMap::new()).await.unwrap();
            parent = name.into();
        }
        // Somebody else writes the store's file; the writer gives up after a while.
        let other = rusqlite::Connection::open(&s.0.settings.store).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        for name in ["3", "2", "1"] {
            s.remove(name).unwrap();
            assert_eq!(s.stat(name).unwrap_err().code, Code::NotFound);
        }
        while s.0.abandoned().is_empty() {
            assert_eq!(pool.thins().len(), 4, "one was deleted before its mark was written");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(s.stat("1").is_ok(), "what is not written is not so");
        other.execute_batch("ROLLBACK").unwrap();
        quiet(&s).await;
        assert_eq!(pool.thins().len(), 1, "not all that was removed is gone");
        assert_eq!(s.0.store.read(|tree| tree.listed().count()), 0);
    });
}

#[test]
fn a_layer_is_on_the_disk_when_its_commit_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let pool = FakePool::new();
    let layer = |s: &Snapshotter| s.0.store.read(|tree| tree.ready("base").map(|s| s.thin)).unwrap();
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        let path = make(&s, "layer", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        pool.write(path.strip_prefix("/dev/mapper/").unwrap(), ", unpacked");
        s.commit("base".into(), "layer".into(), BTreeMap::new()).await.unwrap();
        s.close().await;
        pool.cut_power();
        assert_eq!(pool.thins()[&layer(&s)], "empty, unpacked");
    });
}

#[test]
fn a_layer_that_the_end_of_the_host_has_interrupted_is_never_committed() {
    let directory = tempfile::tempdir().unwrap();
    let pool = FakePool::new();
    let commit = async |s: &Snapshotter, name: &str, key: &str| {
        s.commit(name.to_owned(), key.to_owned(), BTreeMap::new()).await
    };
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        for key in ["one", "two"] {
            make(&s, key, "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        }
        make(&s, "disk", "", Kind::Active, &[]).await.unwrap();
        s.close().await;
        // Only the service has started anew: what is being unpacked goes on.
        let s = start(directory.path(), &pool).await;
        commit(&s, "layer-one", "one").await.unwrap();
        s.close().await;
        pool.cut_power();
        for _ in 0..2 {
            let s = start(directory.path(), &pool).await;
            let refused = commit(&s, "layer-two", "two").await.unwrap_err();
            assert_eq!(refused.code, Code::DataLoss, "{refused}");
            s.close().await;
        }
        let s = start(directory.path(), &pool).await;
        commit(&s, "saved", "disk").await.unwrap();
        s.remove("two").unwrap();
        make(&s, "two", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        commit(&s, "layer-two", "two").await.unwrap();
    });
}

#[test]
fn what_could_not_be_flushed_stays_refused_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let pool = FakePool::new();
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        pool.set_fuse(Fuse::FailAt(0));
        let failed = s.commit("saved".into(), "a".into(), BTreeMap::new()).await.unwrap_err();
        assert_ne!(failed.code, Code::DataLoss, "the kernel's own words: {failed}");
        s.close().await;
        let s = start(directory.path(), &pool).await;
        let refused = s.commit("saved".into(), "a".into(), BTreeMap::new()).await.unwrap_err();
        assert_eq!(refused.code, Code::DataLoss, "{refused}");
    });
}

/// Else its thin id could be another's disk before the base is made of it.
#[test]
fn what_a_base_is_grown_from_is_held_while_it_is_made() {
    with_pool(async |s, pool| {
        make(&s, "a", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        s.commit("layer".into(), "a".into(), BTreeMap::new()).await.unwrap();
        let layer = s.0.store.read(|tree| tree.ready("layer").unwrap().id);
        let held = pool.hold();
        let asked = s.clone();
        let caller =
            tokio::spawn(
                async move { make(&asked, "large", "layer", Kind::Active, &[(SIZE, "2GiB")]).await },
            );
        while s.0.store.read(|tree| tree.all().all(|s| s.kind != Kind::Grown)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(s.0.busy.counts().contains_key(&layer), "the reclaimer could delete it");
        drop(held);
        caller.await.unwrap().unwrap();
        assert!(s.0.busy.counts().is_empty());
    });
}

/// containerd has taken its own part of the commit back, and knows the disk by its old name only.
#[test]
fn a_commit_whose_caller_has_gone_changes_nothing() {
    with_pool(async |s, pool| {
        make(&s, "disk", "", Kind::Active, &[]).await.unwrap();
        let held = pool.hold();
        let asked = s.clone();
        let caller =
            tokio::spawn(async move { asked.commit("saved".into(), "disk".into(), BTreeMap::new()).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        drop(held);
        // The next one waits for the one before it: the store decides in order.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(s.stat("saved").unwrap_err().code, Code::NotFound);
        assert_eq!(s.stat("disk").unwrap().0.kind, Kind::Active);
        s.commit("saved".into(), "disk".into(), BTreeMap::new()).await.unwrap();
        assert_eq!(s.stat("saved").unwrap().0.kind, Kind::Committed);
    });
}

/// What was written to a file while the pool was full is lost, and no flush tells so.
#[test]
fn a_layer_that_was_unpacked_while_the_pool_had_no_room_is_torn() {
    let commit = async |s: &Snapshotter, key: &str| {
        s.commit(format!("{key}-c"), key.to_owned(), BTreeMap::new()).await
    };
    with_pool(async |s, pool| {
        make(&s, "layer", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        make(&s, "disk", "", Kind::Active, &[]).await.unwrap();
        make(&s, "other", "", Kind::Active, &[(LAYER, "y")]).await.unwrap();
        // Low space.
        pool.tell_event();
        commit(&s, "other").await.unwrap();
        // Full, or stopped, and back again.
        pool.tell_event();
        let refused = commit(&s, "layer").await.unwrap_err();
        assert!(refused.to_string().contains("may have been full"), "{refused}");
        assert_eq!(commit(&s, "layer").await.unwrap_err().code, Code::DataLoss);
        // A disk's writer was told.
        commit(&s, "disk").await.unwrap();
        // A new one begins with what was told by then; its name is that of containerd 1.7's own unpacker.
        let key = "default/9/extract-1-a sha256:b";
        make(&s, key, "", Kind::Active, &[]).await.unwrap();
        commit(&s, key).await.unwrap();
        assert!(s.0.unpacking().keys().count() == 0);
    });
}

#[test]
fn a_layer_that_is_mounted_still_is_frozen_before_it_is_flushed() {
    with_pool(async |s, pool| {
        let path = make(&s, "layer", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        let name = path.strip_prefix("/dev/mapper/").unwrap();
        pool.open(name, 1);
        s.commit("base".into(), "layer".into(), BTreeMap::new()).await.unwrap();
        assert_eq!(pool.times_suspended(), 1);
        assert!(!pool.any_suspended());
        pool.open(name, 0);
    });
}

#[test]
fn what_was_made_ahead_is_handed_out_without_a_word_to_the_pool() {
    let directory = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let pool = FakePool::with_heirs(4);
        let s = start(directory.path(), &pool).await;
        make(&s, "a", "", Kind::Active, &[(LAYER, "x")]).await.unwrap();
        s.commit("base".into(), "a".into(), BTreeMap::new()).await.unwrap();
        let heirs = || s.0.store.read(|tree| tree.heirs().map(|heir| heir.id).collect::<Vec<_>>());
        let settled = async |count: usize| {
            for _ in 0..1000 {
                if s.0.heirs.are_quiet() && heirs().len() == count {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            panic!("there are {:?}", heirs());
        };
        // A layer's, at once; a disk's, from the second on.
        for (n, left) in [("1", 0), ("2", 1), ("3", 1)] {
            if n != "2" {
                settled(1).await;
            }
            let (heir, thins) = (heirs().first().copied(), pool.thins().len());
            let device = make(&s, n, "base", Kind::Active, &[]).await.unwrap();
            if let Some(heir) = heir {
                assert_eq!(device, s.0.name(heir).path(), "{n}");
                assert!(n == "3" || pool.thins().len() == thins, "{n}: something was made");
            }
            settled(left).await;
        }
        // One that nobody has come for goes.
        let old = heirs()[0];
        let aged = s.0.write(move |tree| {
            let heir = Snapshot { created: UnixNanos(1), ..tree.get(old).unwrap().clone() };
            Ok((vec![Change::Put(Box::new(heir))], ()))
        });
        aged.await.unwrap();
        s.0.wake.notify_one();
        settled(0).await;
        make(&s, "5", "base", Kind::Active, &[]).await.unwrap();
        settled(1).await;
        // One whose device has gone wrong is not handed out.
        let heir = heirs()[0];
        pool.cut_power();
        pool.lose(s.0.store.read(|tree| tree.get(heir).unwrap().thin));
        let device = make(&s, "4", "base", Kind::Active, &[]).await.unwrap();
        assert_ne!(device, s.0.name(heir).path());
        assert!(pool.device_names().contains(device.strip_prefix("/dev/mapper/").unwrap()));
    });
}
