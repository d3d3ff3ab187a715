//! Acquire, release and reclaim, stopped or made to fail at every effect.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{collections::BTreeMap, sync::atomic::Ordering};

use super::*;
use crate::fakes::{Fault, Process_, Sight, State_, World, start, wish, world};

#[tokio::test]
async fn equal_wishes_get_one_lease_and_different_vms_different_disks() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let calls = (0..40).map(|n| {
        let acquirer = process.acquirer.clone();
        tokio::spawn(
            async move { acquirer.acquire(wish(&format!("vm-{}", n % 10))).await.unwrap().lease.clone() },
        )
    });
    let mut leases = BTreeMap::new();
    for call in calls.collect::<Vec<_>>() {
        let lease = call.await.unwrap();
        assert_eq!(leases.entry(lease.vm.clone()).or_insert_with(|| lease.clone()).id, lease.id);
    }
    assert_eq!(leases.len(), 10);
    process.audit(&world, "after forty calls");
    let again = process.acquirer.acquire(wish("vm-3")).await.unwrap();
    assert!(again.existing);
    assert_eq!(again.lease, leases[&again.lease.vm]);
}

#[tokio::test]
async fn a_caller_that_goes_away_stops_nothing() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let call = process.acquirer.acquire(wish("vm-1"));
    // Polled once, then dropped.
    assert!(futures_util::FutureExt::now_or_never(call).is_none());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert_eq!(process.acquirer.ledger.read(|b| b.after(None).count()), 1);
    process.audit(&world, "after the caller went away");
    assert_eq!(lease.generation.0, 1);
}

#[tokio::test]
async fn an_image_that_vanished_meanwhile_is_pulled_again() {
    let (world, directory) = (Arc::new(World::default()), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let acquired = process.acquirer.acquire(wish("vm-1")).await.unwrap();
    assert!(acquired.stages.iter().any(|(stage, _)| stage == Stage::Pull));
    process.audit(&world, "after the second pull");
}

#[tokio::test]
async fn a_device_that_is_not_what_was_granted_is_not_handed_out_again() {
    type Harm = fn(&mut State_);
    let table: [(&str, Harm, Reason, &str); 5] = [
        ("not activated yet", |s| s.devices.clear(), Reason::NotReady, "try again"),
        ("no snapshot", |s| s.snapshots.clear(), Reason::DeviceMismatch, "its snapshot is gone"),
        (
            "another device",
            |s| {
                s.devices.insert("snap-9".into(), 0);
                s.snapshots.values_mut().for_each(|device| *device = "snap-9".into());
            },
            Reason::DeviceMismatch,
            "/dev/mapper/snap-9",
        ),
        ("no thin device", |s| s.sight = Sight::NotThin, Reason::DeviceMismatch, "linear"),
        ("no file handles", |s| s.sight = Sight::Blind, Reason::NotReady, "EMFILE"),
    ];
    for (name, harm, reason, says) in table {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
        harm(&mut world.state.lock().unwrap());
        let error = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{name}");
        let text = error.to_string();
        assert!(text.contains(lease.id.as_str()) && text.contains(says), "{name}: {text}");
        assert_eq!(text.contains("release it"), reason == Reason::DeviceMismatch, "{name}: {text}");
    }
}

/// Acquire fails at each of its effects; what follows leaves nothing, and the next acquire works.
#[tokio::test]
async fn a_refusal_at_any_effect_leaves_nothing_behind() {
    for fault in [Fault::Refused, Fault::AnswerLost] {
        for fail_at in 1..=2 {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let process = start(&world, directory.path());
            let what = format!("{fault:?} at effect {fail_at}");
            world.arm(fault, fail_at);
            let error = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
            assert_eq!(error.reason(), Reason::ContainerdUnavailable, "{what}");
            process.settle().await;
            assert!(world.is_empty(), "{what}");
            assert_eq!(process.acquirer.ledger.read(|b| b.after(None).count()), 0, "{what}");
            process.acquirer.acquire(wish("vm-1")).await.unwrap();
            process.audit(&world, &what);
        }
    }
}

/// The process dies at each effect of acquire, release and reclaim; the next one finds its way from what is on disk.
#[tokio::test]
async fn a_crash_at_any_effect_is_recovered_from() {
    let mut struck = 0;
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        for fail_at in 1.. {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let what = format!("{fault:?} at effect {fail_at}");
            let dead = start(&world, directory.path());
            let kept = dead.acquirer.acquire(wish("kept")).await.unwrap().lease.clone();
            world.arm(fault, fail_at);
            story(&dead, &world).await;
            if !world.has_struck() {
                break;
            }
            struck += 1;
            world.arm(fault, 0);
            let process = start(&world, directory.path());
            process.reclaimer.recover().await.unwrap();
            process.settle().await;
            process.audit(&world, &what);
            let again = process.acquirer.acquire(wish("kept")).await.unwrap();
            assert_eq!(again.lease, kept, "{what}: a granted lease survives");
            process.acquirer.acquire(wish("other")).await.unwrap();
            process.audit(&world, &what);
        }
    }
    // Two of the acquire and three of the reclaimer, each before and after.
    assert!(struck >= 10, "only {struck} crash points were reached");
}

/// Acquire, release, reclaim, as far as it gets.
async fn story(process: &Process_, world: &World) {
    let struck = async {
        while !world.has_struck() {
            tokio::task::yield_now().await;
        }
    };
    let all = async {
        let acquired = process.acquirer.acquire(wish("other")).await.unwrap();
        process.acquirer.release(&acquired.lease.vm, None).await.unwrap();
        process.settle().await;
    };
    tokio::select! {
        () = all => {}
        () = struck => {}
    }
}

#[tokio::test]
async fn an_open_device_is_waited_for_and_says_so() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let device = lease.grant().unwrap().device.dm_name.clone();
    world.set_open(&device, 1);
    process.acquirer.release(&lease.vm, None).await.unwrap();
    process.settle().await;
    process.audit(&world, "while it is open");
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&lease.id], "the device is open");
    // The VM gets a new disk meanwhile.
    let second = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert!(second.generation > lease.generation);
    assert_ne!(second.grant().unwrap().device.dm_name, device);

    world.set_open(&device, 0);
    process.settle().await;
    process.audit(&world, "after it was closed");
    assert!(process.acquirer.ledger.read(|b| b.get(&lease.id).is_none()));
    assert!(process.reclaimer.waiting.read().unwrap().is_empty());
}

/// Lets the others run until there is a lease.
async fn intent(process: &Process_) -> Lease {
    loop {
        if let Some(lease) = process.acquirer.ledger.read(|book| book.after(None).next().cloned()) {
            return lease;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_release_during_the_pull_is_heeded() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    world.absent.store(true, Ordering::SeqCst);
    let pulling = world.pulls.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    tokio::task::yield_now().await;
    assert_eq!(process.acquirer.release(&"vm-1".parse().unwrap(), None).await.unwrap(), None);
    // Who asks after the release gets a disk, and does not join the one that was given up.
    let acquirer = process.acquirer.clone();
    let later = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    tokio::task::yield_now().await;
    drop(pulling);
    assert_eq!(call.await.unwrap().unwrap_err().reason(), Reason::Released);
    let lease = later.await.unwrap().unwrap().lease.clone();
    assert_eq!(process.acquirer.ledger.read(|b| b.after(None).cloned().collect::<Vec<_>>()), [lease]);
    process.audit(&world, "after the pull");
}

#[tokio::test]
async fn a_release_while_the_snapshot_is_made_is_heeded() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let preparing = world.prepares.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    let first = intent(&process).await;
    let released = process.acquirer.release(&first.vm, None).await.unwrap().unwrap();
    assert_eq!(released.id, first.id);
    let acquirer = process.acquirer.clone();
    let later = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    tokio::task::yield_now().await;
    // Its snapshot can appear yet, so its record stays.
    process.settle().await;
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&first.id], "the disk is still being made");
    drop(preparing);
    assert_eq!(call.await.unwrap().unwrap_err().reason(), Reason::Released);
    let second = later.await.unwrap().unwrap().lease.clone();
    assert_ne!(second.id, first.id);
    process.settle().await;
    process.audit(&world, "after both");
}

#[tokio::test]
async fn a_release_by_lease_id_leaves_every_other_one_alone() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let vm: VmId = "vm-1".parse().unwrap();
    let first = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert!(process.acquirer.release(&vm, Some(first.id.clone())).await.unwrap().is_some());
    let preparing = world.prepares.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    tokio::task::yield_now().await;
    assert_eq!(process.acquirer.release(&vm, Some(first.id.clone())).await.unwrap().unwrap().id, first.id);
    drop(preparing);
    assert_ne!(call.await.unwrap().unwrap().lease.id, first.id);
}

#[tokio::test]
async fn what_a_crashed_task_has_left_half_made_is_cleared_away() {
    for fail_at in 1..=2 {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = start(&world, directory.path());
        world.arm(Fault::Panics, fail_at);
        process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
        let busy = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
        assert_eq!(busy.reason(), Reason::NotReady);
        process.settle().await;
        assert!(world.is_empty(), "effect {fail_at}");
        process.acquirer.acquire(wish("vm-1")).await.unwrap();
        process.audit(&world, "after the crash");
    }
}

#[tokio::test]
async fn everything_is_looked_at_although_releases_keep_coming() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let wake = process.reclaimer.wake.clone();
    let releases = async {
        while world.looks.load(Ordering::SeqCst) < 3 {
            wake.now();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = process.reclaimer.run(stopped) => {}
        () = releases => {}
    }
}

/// A launcher opens what it has released, after the reclaimer has planned to remove it.
#[tokio::test]
async fn a_device_that_is_opened_while_others_are_removed_is_left_alone() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let mut leases = Vec::new();
    for vm in ["vm-1", "vm-2"] {
        leases.push(process.acquirer.acquire(wish(vm)).await.unwrap().lease.clone());
        process.acquirer.release(&vm.parse().unwrap(), None).await.unwrap();
    }
    leases.sort_by(|a, b| a.id.cmp(&b.id));
    let late = leases[1].grant().unwrap().device.dm_name.clone();
    world.state.lock().unwrap().opened_by_removal = Some(late.clone());
    process.settle().await;
    process.audit(&world, "while it is open");
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&leases[1].id], "the device is open");
    world.set_open(&late, 0);
    process.settle().await;
    assert!(world.is_empty());
}

#[tokio::test]
async fn a_device_that_goes_at_leisure_is_waited_for_without_another_collection() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    world.state.lock().unwrap().at_leisure = true;
    process.acquirer.release(&lease.vm, None).await.unwrap();
    for _ in 0..2 {
        process.reclaimer.pass_over_everything().await;
        let why = process.reclaimer.waiting.read().unwrap()[&lease.id].clone();
        assert!(why.contains("is being removed"), "{why}");
        assert_eq!(world.look(|s| (s.snapshots.len(), s.devices.len(), s.collections)), (0, 1, 1));
    }
    assert!(process.acquirer.ledger.read(|b| b.get(&lease.id).is_some()), "forgotten with its device there");
    // It goes while a pass waits for it.
    let goes = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        world.state.lock().unwrap().devices.clear();
    };
    tokio::join!(process.reclaimer.pass_over_everything(), goes);
    assert!(process.acquirer.ledger.read(|b| b.get(&lease.id).is_none()));
    assert_eq!(world.look(|s| s.collections), 1);
}
