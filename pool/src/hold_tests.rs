//! Whoever works on the pool itself has it alone: others wait, and go on.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use crate::{
    crash_tests::{make, runtime, start},
    fake::FakePool,
    tree::Kind,
};

const SHORT: Duration = Duration::from_millis(100);

#[test]
fn activations_wait_while_the_pool_is_held_and_none_is_lost() {
    let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        make(&s, "before", "", Kind::Active, &[]).await.unwrap();
        let devices = pool.device_names();
        let held = s.hold(SHORT).await.unwrap();
        assert!(s.hold(SHORT).await.is_none(), "two have it alone");
        let making = {
            let s = s.clone();
            tokio::spawn(async move { make(&s, "meanwhile", "", Kind::Active, &[]).await })
        };
        tokio::time::sleep(SHORT).await;
        assert!(!making.is_finished() && pool.device_names() == devices, "it did not wait");
        // What is only read is told.
        s.stat("before").unwrap();
        drop(held);
        making.await.unwrap().unwrap();
        assert_eq!(pool.device_names().len(), devices.len() + 1);
    });
}

#[test]
fn what_hangs_in_the_kernel_is_not_waited_for() {
    let (directory, pool) = (tempfile::tempdir().unwrap(), FakePool::new());
    runtime().block_on(async {
        let s = start(directory.path(), &pool).await;
        let kernel = pool.hold();
        let making = {
            let s = s.clone();
            tokio::spawn(async move { make(&s, "slow", "", Kind::Active, &[]).await })
        };
        tokio::time::sleep(SHORT).await;
        assert!(s.hold(SHORT).await.is_none());
        drop(kernel);
        making.await.unwrap().unwrap();
        assert!(s.hold(SHORT).await.is_some());
    });
}
