//! The pool that a start finds: not yet good, not ours, or good and with a device that does not come up at once.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{path::Path, sync::Arc, time::Duration};

use crate::{
    crash_tests::{inner, make, quiet, runtime, start},
    device::PoolMode,
    error::Code,
    fake::FakePool,
    reclaim,
    snapshotter::{Health, Snapshotter},
    start::bring_up,
    tree::Kind,
};

/// Started as the service starts it, which looks at the pool first.
fn start_looking(directory: &Path, pool: &FakePool) -> Snapshotter {
    let inner = Arc::new(inner(directory, pool));
    let found = pool.clone();
    tokio::spawn(bring_up(inner.clone(), move |_| Ok(found.clone())));
    tokio::spawn(reclaim::run(inner.clone()));
    Snapshotter(inner)
}

async fn until(mut condition: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("waited in vain");
}

/// What it says when it has looked.
async fn first_word(s: &Snapshotter) -> Health {
    until(|| s.health() != Health::Waiting("it is starting".to_owned())).await;
    s.health()
}

#[test]
fn a_pool_that_is_read_only_at_first_is_served_when_it_writes_again() {
    let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
    runtime().block_on(async {
        pool.set_mode(PoolMode::ReadOnly);
        let s = start_looking(directory.path(), &pool);
        let Health::Waiting(why) = first_word(&s).await else { panic!("{:?}", s.health()) };
        assert!(why.contains("mode ro") && why.contains("lvextend --poolmetadatasize"), "{why}");
        let refused = make(&s, "a", "", Kind::Active, &[]).await.unwrap_err();
        assert_eq!((refused.code, refused.to_string().contains("mode ro")), (Code::Unavailable, true));
        assert!(pool.thins().is_empty(), "it was written to");
        pool.set_mode(PoolMode::ReadWrite);
        until(|| s.health() == Health::Serving).await;
        make(&s, "a", "", Kind::Active, &[]).await.unwrap();
    });
}

#[test]
fn a_pool_that_has_to_be_repaired_is_refused_until_it_was() {
    for mode in [PoolMode::NeedsCheck, PoolMode::Failed] {
        let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
        runtime().block_on(async {
            pool.set_mode(mode);
            let s = start_looking(directory.path(), &pool);
            let Health::Refusing(why) = first_word(&s).await else { panic!("{:?}", s.health()) };
            assert!(why.contains(&format!("mode {mode}")) && why.contains("lvconvert --repair"), "{why}");
            let refused = make(&s, "a", "", Kind::Active, &[]).await.unwrap_err();
            assert_eq!(refused.code, Code::FailedPrecondition);
            assert!(pool.thins().is_empty(), "it was written to");
            pool.set_mode(PoolMode::ReadWrite);
            until(|| s.health() == Health::Serving).await;
            make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        });
    }
}

#[test]
fn what_has_the_name_of_the_pool_and_another_uuid_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, other) = (FakePool::new(), FakePool::new());
    other.set_uuid("LVM-other");
    runtime().block_on(async {
        let s = start_looking(directory.path(), &ours);
        assert_eq!(first_word(&s).await, Health::Serving);
        let path = make(&s, "a", "", Kind::Active, &[]).await.unwrap();
        ours.open(path.strip_prefix("/dev/mapper/").unwrap(), 1);
        s.remove("a").unwrap();
        s.close().await;
    });
    ours.close_all();
    runtime().block_on(async {
        let s = start_looking(directory.path(), &other);
        let Health::Refusing(why) = first_word(&s).await else { panic!("{:?}", s.health()) };
        assert!(why.contains("LVM-fake") && why.contains("LVM-other"), "both uuids are not named: {why}");
        assert_eq!(make(&s, "b", "", Kind::Active, &[]).await.unwrap_err().code, Code::FailedPrecondition);
        assert!(other.thins().is_empty() && other.reclaimed().is_empty(), "the other pool was changed");
        s.close().await;
    });
    runtime().block_on(async {
        let s = start_looking(directory.path(), &ours);
        assert_eq!(first_word(&s).await, Health::Serving);
        quiet(&s).await;
        make(&s, "b", "", Kind::Active, &[]).await.unwrap();
        assert_eq!(ours.thins().len(), 2, "blank and disk");
    });
}

#[test]
fn a_pool_without_a_uuid_is_refused() {
    let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
    runtime().block_on(async {
        pool.set_uuid("");
        let s = start_looking(directory.path(), &pool);
        let Health::Refusing(why) = first_word(&s).await else { panic!("{:?}", s.health()) };
        assert!(why.contains("--setuuid"), "{why}");
    });
}

/// Its VM may look for it and never ask for it.
#[test]
fn a_device_that_does_not_come_up_at_the_start_comes_up_later() {
    let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        for key in ["removed", "a"] {
            make(&s, key, "", Kind::Active, &[]).await.unwrap();
        }
        let path = s.mounts("a").await.unwrap().source;
        s.close().await;
        pool.cut_power();
        pool.refuse_activations(true);
        let s = start(directory.path(), &pool).await;
        assert_eq!(s.health(), Health::Serving, "two devices keep all others waiting");
        assert!(pool.device_names().is_empty());
        // Nobody needs the device of what is gone by then.
        s.remove("removed").unwrap();
        let refused = pool.activations_refused();
        until(|| pool.activations_refused() > refused).await;
        pool.refuse_activations(false);
        let name = path.strip_prefix("/dev/mapper/").unwrap();
        until(|| pool.device_names().contains(name)).await;
        quiet(&s).await;
        assert!(pool.all_whole());
        assert_eq!((pool.device_names().len(), pool.thins().len()), (1, 2));
    });
}
