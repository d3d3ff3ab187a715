//! Acquire, release and reclaim, stopped or made to fail at every effect.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use cowshed_leases::{Revision, State, Suspicion};

use super::*;
use crate::fakes::{Fault, Process_, Sight, State_, World, back, start, wish, world};
use crate::{identity::CONTAINERD_WAIT, reclaim::ABREAST};

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

/// What was begun for who has left is whoever's comes next.
#[tokio::test]
async fn a_disk_that_nobody_waits_for_any_more_is_a_spare() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let preparing = world.prepares.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    let begun = intent(&process).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    drop(preparing);
    while process.acquirer.under_way() > 0 {
        tokio::task::yield_now().await;
    }
    let leases: Vec<Lease> = process.acquirer.ledger.read(|book| book.after(None).cloned().collect());
    let [spare] = &leases[..] else { panic!("not one: {leases:?}") };
    assert!(spare.vm.is_spare() && spare.id == begun.id, "{spare:?}");
    assert_eq!(process.acquirer.spares.count(&crate::fakes::image().manifest).ready, 1);
    process.audit(&world, "after its caller has left");
    let next = process.acquirer.acquire(wish("vm-2")).await.unwrap();
    assert!(next.spare && next.lease.id == begun.id);
}

#[tokio::test]
async fn who_leaves_gives_up_its_place_in_the_line() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut process = start(&world, directory.path());
    // One at a time, and one who waits.
    Arc::get_mut(&mut process.acquirer).unwrap().crowd = Crowd::new(1, 1);
    let ask = |vm: &str| {
        let (acquirer, wish) = (process.acquirer.clone(), wish(vm));
        tokio::spawn(async move { acquirer.acquire(wish).await })
    };
    let in_line = async || {
        while process.acquirer.crowd.waiting() == 0 {
            tokio::task::yield_now().await;
        }
    };
    let preparing = world.prepares.lock().await;
    let first = ask("vm-1");
    intent(&process).await;
    let leaves = ask("vm-2");
    in_line().await;
    let refused = ask("vm-3").await.unwrap().unwrap_err();
    assert_eq!(refused.reason(), Reason::Overloaded);
    leaves.abort();
    assert!(leaves.await.unwrap_err().is_cancelled());
    assert_eq!(process.acquirer.crowd.waiting(), 0);
    let mut comes = ask("vm-3");
    tokio::select! {
        () = in_line() => {}
        refused = &mut comes => panic!("{refused:?}"),
    }
    drop(preparing);
    first.await.unwrap().unwrap();
    comes.await.unwrap().unwrap();
    while process.acquirer.under_way() > 0 {
        tokio::task::yield_now().await;
    }
    let mut vms: Vec<String> =
        process.acquirer.ledger.read(|book| book.after(None).map(|l| l.vm.to_string()).collect());
    vms.sort();
    assert_eq!(vms, ["vm-1", "vm-3"], "nothing is made for who has left");
    process.audit(&world, "after one has left the line");
}

/// Who has a disk keeps it while containerd hangs, and hardly waits.
#[tokio::test(start_paused = true)]
async fn a_containerd_that_hangs_is_waited_for_a_few_seconds_and_then_not_at_all() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    world.hangs.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    assert_eq!(process.acquirer.renew(lease.id.clone(), None).await.unwrap().id, lease.id);
    let took = begun.elapsed();
    assert!((CONTAINERD_WAIT..CONTAINERD_WAIT * 2).contains(&took), "{took:?}");
    // The kernel alone does not do if it does not know the disk.
    world.state.lock().unwrap().sight = Sight::NotThin;
    let refused = process.acquirer.renew(lease.id.clone(), None).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ContainerdUnavailable);
    world.state.lock().unwrap().sight = Sight::Clear;
    // The monitor has noticed.
    let hindrances = process.acquirer.admission.hindrances.clone();
    hindrances.set_hung(Some(&Error::new(Reason::ContainerdTimeout, "it hangs")));
    let begun = Instant::now();
    process.acquirer.renew(lease.id, None).await.unwrap();
    assert!(process.acquirer.acquire(wish("vm-1")).await.unwrap().existing);
    let refused = process.acquirer.acquire(wish("vm-2")).await.unwrap_err();
    assert_eq!((refused.reason(), begun.elapsed()), (Reason::ContainerdUnavailable, Duration::ZERO));
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
        ("no snapshot", |s| s.snapshots.clear(), Reason::DeviceMismatch, "has lost its record"),
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
            dead.story(&world, wish("other")).await;
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

#[tokio::test]
async fn an_open_device_is_waited_for_and_says_so() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let device = lease.grant().unwrap().device.dm_name.clone();
    world.set_open(&device, 1);
    process.acquirer.release(back(lease.vm.as_str())).await.unwrap();
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
    assert_eq!(process.acquirer.release(back("vm-1")).await.unwrap(), Releasing::Nothing);
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
    let released = process.acquirer.release(back("vm-1")).await.unwrap();
    assert!(matches!(released, Releasing::Now(lease) if lease.id == first.id));
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
    let first = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let by_id = Release { lease: Some(first.id.clone()), ..back("vm-1") };
    assert!(matches!(process.acquirer.release(by_id.clone()).await.unwrap(), Releasing::Now(_)));
    let preparing = world.prepares.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    tokio::task::yield_now().await;
    let again = process.acquirer.release(by_id).await.unwrap();
    assert!(matches!(again, Releasing::Again(lease) if lease.id == first.id));
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
    // One more than are looked at at once.
    for vm in (0..=ABREAST).map(|n| format!("vm-{n}")) {
        leases.push(process.acquirer.acquire(wish(&vm)).await.unwrap().lease.clone());
        process.acquirer.release(back(&vm)).await.unwrap();
    }
    leases.sort_by(|a, b| a.id.cmp(&b.id));
    let last = leases.last().unwrap();
    let late = last.grant().unwrap().device.dm_name.clone();
    world.state.lock().unwrap().opened_by_removal = Some(late.clone());
    process.settle().await;
    process.audit(&world, "while it is open");
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&last.id], "the device is open");
    world.set_open(&late, 0);
    process.settle().await;
    assert!(world.is_empty());
}

/// Somebody has labelled or leased the snapshot of a VM's disk.
#[tokio::test]
async fn a_snapshot_that_something_else_holds_goes_all_the_same() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    world.state.lock().unwrap().held_elsewhere.insert(lease.id.snapshot_key());
    process.acquirer.release(back(lease.vm.as_str())).await.unwrap();
    process.reclaimer.pass_over_everything().await;
    assert!(world.is_empty());
}

#[tokio::test]
async fn a_device_that_goes_at_leisure_is_waited_for_without_another_collection() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    world.state.lock().unwrap().at_leisure = true;
    process.acquirer.release(back(lease.vm.as_str())).await.unwrap();
    tokio::time::pause();
    for _ in 0..2 {
        process.reclaimer.pass_over_everything().await;
        let why = process.reclaimer.waiting.read().unwrap()[&lease.id].clone();
        assert!(why.contains("is being removed"), "{why}");
        assert_eq!(world.look(|s| (s.snapshots.len(), s.devices.len(), s.collections)), (0, 1, 1));
    }
    tokio::time::resume();
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

fn request(name: &str) -> Option<RequestId> {
    Some(name.parse().unwrap())
}

fn state(process: &Process_, id: &LeaseId) -> Option<State> {
    process.acquirer.ledger.read(|book| book.get(id).map(|lease| lease.state.clone()))
}

#[tokio::test]
async fn a_failure_that_nobody_was_told_is_kept_with_its_reason() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let preparing = world.prepares.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(wish("vm-1")).await });
    let lease = intent(&process).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    world.state.lock().unwrap().parents.clear();
    world.pulls_fail.store(true, Ordering::SeqCst);
    drop(preparing);
    let failed = loop {
        match state(&process, &lease.id) {
            Some(State::Failed { failure, .. }) => break failure,
            _ => tokio::task::yield_now().await,
        }
    };
    assert_eq!(failed.reason, "REGISTRY_UNAVAILABLE");
    while !process.acquirer.making.now().is_empty() {
        tokio::task::yield_now().await;
    }
    process.settle().await;
    assert!(world.is_empty());
    assert!(matches!(state(&process, &lease.id), Some(State::Failed { cleared: true, .. })));
    // Who asks again hears how it ends this time, and leaves nothing behind.
    process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
    process.settle().await;
    assert_eq!(process.acquirer.ledger.read(|book| book.after(None).count()), 0);
}

#[tokio::test]
async fn after_a_reboot_a_vm_gets_its_old_disk_or_a_fresh_one() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let before = start(&world, directory.path());
    let mut old = BTreeMap::new();
    for vm in ["keeps", "replaces", "forgets"] {
        old.insert(vm, before.acquirer.acquire(wish(vm)).await.unwrap().lease.clone());
    }
    before.acquirer.ledger.close().await;
    *world.time.lock().unwrap() = (1, 5);
    let process = start(&world, directory.path());
    process.reclaimer.recover().await.unwrap();
    for lease in old.values() {
        let Some(State::Suspect { why, .. }) = state(&process, &lease.id) else { panic!("{lease:?}") };
        assert_eq!(why, Suspicion::EarlierBoot);
    }
    let kept = process.acquirer.acquire(wish("keeps")).await.unwrap();
    assert!(kept.existing);
    assert_eq!(kept.lease.grant(), old["keeps"].grant());
    let fresh = process.acquirer.acquire(Wish { fresh: true, ..wish("replaces") }).await.unwrap();
    assert!(!fresh.existing);
    assert_ne!(fresh.lease.id, old["replaces"].id);
    // The grace is over, and somebody has the third one's device open.
    *world.time.lock().unwrap() = (1, 106);
    let device = old["forgets"].grant().unwrap().device.dm_name.clone();
    world.set_open(&device, 1);
    process.settle().await;
    assert!(matches!(state(&process, &old["forgets"].id), Some(State::Suspect { .. })));
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&old["forgets"].id], "the device is open");
    world.set_open(&device, 0);
    process.settle().await;
    // It may have become active only now: whoever wants it gets some time.
    assert!(matches!(state(&process, &old["forgets"].id), Some(State::Suspect { .. })));
    *world.time.lock().unwrap() = (1, 117);
    process.settle().await;
    process.settle().await;
    assert_eq!(state(&process, &old["forgets"].id), None);
    assert_eq!(process.acquirer.ledger.read(|book| book.after(None).count()), 2);
    process.audit(&world, "after the grace");
}

#[tokio::test]
async fn an_expired_lease_is_renewed_only_if_its_device_is_what_it_was() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let limited = Wish { ttl: Some(Ttl::from_seconds(30).unwrap()), ..wish("vm-1") };
    let lease = process.acquirer.acquire(limited).await.unwrap().lease.clone();
    *world.time.lock().unwrap() = (0, 31);
    process.settle().await;
    assert!(matches!(state(&process, &lease.id), Some(State::Suspect { why: Suspicion::Expired, .. })));
    world.state.lock().unwrap().sight = Sight::NotThin;
    let refused = process.acquirer.renew(lease.id.clone(), None).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::DeviceMismatch);
    world.state.lock().unwrap().sight = Sight::Clear;
    let renewed = process.acquirer.renew(lease.id.clone(), None).await.unwrap();
    assert_eq!(renewed.term.until.map(|until| until.0), Some(61_000_000));
    *world.time.lock().unwrap() = (0, 60);
    process.settle().await;
    process.audit(&world, "while it holds");
    *world.time.lock().unwrap() = (0, 61);
    process.settle().await;
    *world.time.lock().unwrap() = (0, 71);
    process.settle().await;
    assert!(world.is_empty(), "expired, its grace over, and closed");
    let gone = process.acquirer.renew(lease.id.clone(), None).await.unwrap_err();
    assert_eq!(gone.reason(), Reason::LeaseNotFound);
}

#[tokio::test]
async fn a_request_is_known_after_a_restart() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let named = Wish { request: request("a"), ..wish("vm-1") };
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(named.clone()).await.unwrap().lease.clone();
    let give_back = Release { request: request("b"), ..back("vm-1") };
    process.acquirer.release(give_back.clone()).await.unwrap();
    process.settle().await;
    let revision = process.acquirer.ledger.read(|book| book.last_revision());
    process.acquirer.ledger.close().await;

    let process = start(&world, directory.path());
    assert!(process.acquirer.ledger.read(|book| book.last_revision()) >= revision);
    assert_eq!(
        process.acquirer.ledger.read(|book| book.gone_after(Revision(0)).next().unwrap().id.clone()),
        lease.id
    );
    let late = process.acquirer.acquire(named).await.unwrap_err();
    assert_eq!(late.reason(), Reason::RequestOver);
    let next = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert_eq!(process.acquirer.release(give_back).await.unwrap(), Releasing::Nothing);
    assert!(matches!(state(&process, &next.id), Some(State::Granted(_))));
    let reused = process.acquirer.acquire(Wish { request: request("b"), ..wish("vm-1") }).await.unwrap_err();
    assert_eq!(reused.reason(), Reason::RequestIdReused);
}

#[tokio::test]
async fn who_joins_another_s_acquire_gets_what_it_asks_for_besides() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let preparing = world.prepares.lock().await;
    let first = process.acquirer.acquire(Wish { request: request("a"), ..wish("vm-1") });
    let ttl = Some(Ttl::from_seconds(30).unwrap());
    let second = process.acquirer.acquire(Wish { request: request("b"), ttl, ..wish("vm-1") });
    let (first, second, ()) = tokio::join!(first, second, async {
        intent(&process).await;
        drop(preparing);
    });
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first.lease.id, second.lease.id);
    assert_eq!((first.lease.term.ttl, second.lease.term.ttl), (None, ttl));
    process.acquirer.release(back("vm-1")).await.unwrap();
    for name in ["a", "b"] {
        let late =
            process.acquirer.acquire(Wish { request: request(name), ..wish("vm-1") }).await.unwrap_err();
        assert_eq!(late.reason(), Reason::RequestOver, "{name}");
    }
}

/// containerd's store was replaced: it knows no snapshot, and cleans up the snapshotter only if it is made to.
#[tokio::test]
async fn a_released_disk_that_containerd_has_forgotten_is_swept_up() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    {
        let mut state = world.state.lock().unwrap();
        state.snapshots.clear();
        state.at_leisure = true;
    }
    let kept = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
    assert!(kept.to_string().contains("the device is there"), "{kept}");
    process.acquirer.release(back("vm-1")).await.unwrap();
    tokio::time::pause();
    while state(&process, &lease.id).is_some() {
        process.reclaimer.pass_over_everything().await;
        tokio::time::advance(Duration::from_secs(4)).await;
    }
    assert!(world.look(|s| s.sweeps) > 0);
}

/// The pool is down for longer than the grace: nobody could have come back for a disk, and its device is not there.
#[tokio::test]
async fn a_disk_is_not_given_up_because_its_pool_was_down() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let before = start(&world, directory.path());
    let lease = before.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    before.acquirer.ledger.close().await;
    let device = lease.grant().unwrap().device.dm_name.clone();
    world.state.lock().unwrap().devices.clear();
    *world.time.lock().unwrap() = (1, 0);
    let process = start(&world, directory.path());
    process.settle().await;
    *world.time.lock().unwrap() = (1, 200);
    process.settle().await;
    assert!(matches!(state(&process, &lease.id), Some(State::Suspect { .. })), "given up unseen");
    assert!(process.reclaimer.waiting.read().unwrap()[&lease.id].contains("not active"));
    // The pool is back: there is time to come back for the disk.
    world.set_open(&device, 0);
    process.settle().await;
    assert!(matches!(state(&process, &lease.id), Some(State::Suspect { .. })), "given up at once");
    assert!(process.reclaimer.waiting.read().unwrap()[&lease.id].contains("came up a moment ago"));
    let back = process.acquirer.acquire(wish("vm-1")).await.unwrap();
    assert_eq!(back.lease.grant(), lease.grant());
    process.audit(&world, "after it was acquired again");
}
