//! What VMs share, and their scratch disks, stopped or made to fail at every effect.

#![allow(clippy::unwrap_used, clippy::panic)]

use cowshed_leases::Mode;

use super::*;
use crate::fakes::{Fault, Process_, back, start, wish, world};

fn shared(vm: &str, scratch: Option<u64>) -> Wish {
    let scratch = scratch.map(|size_bytes| Scratch { size_bytes, raw: false });
    Wish { mode: Mode::SharedReadOnly, scratch, ..wish(vm) }
}

async fn acquire(process: &Process_, wish: Wish) -> Lease {
    process.acquirer.acquire(wish).await.unwrap().lease.clone()
}

async fn release(process: &Process_, vm: &str) {
    process.acquirer.release(back(vm)).await.unwrap();
}

fn device(lease: &Lease) -> &DeviceIdentity {
    &lease.grant().unwrap().device
}

fn leases(process: &Process_) -> usize {
    process.acquirer.ledger.read(|book| book.after(None).count())
}

#[tokio::test]
async fn all_vms_of_an_image_share_one_device_until_the_last_has_closed_it() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let calls = (0..20).map(|n| {
        let acquirer = process.acquirer.clone();
        let wish = shared(&format!("vm-{n}"), (n % 2 == 0).then_some(64 << 20));
        tokio::spawn(async move { acquirer.acquire(wish).await.unwrap().lease.clone() })
    });
    let mut granted = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        granted.push(call.await.unwrap());
    }
    assert_eq!(world.look(|s| (s.views, s.devices.len())), (1, 11), "one for all, and ten scratch disks");
    assert!(granted.iter().all(|lease| device(lease) == device(&granted[0]) && device(lease).read_only));
    let scratch = granted[0].grant().unwrap().scratch.clone().unwrap().device;
    assert_eq!((scratch.size_bytes, scratch.read_only), (64 << 20, false));
    process.audit(&world, "when all have it");
    assert!(process.reclaimer.audit(crate::audit::Repair::Nothing).await.unwrap().is_empty());
    let again = process.acquirer.acquire(shared("vm-1", None)).await.unwrap();
    assert!(again.existing && again.lease == granted[1]);

    let (root, name) = (device(&granted[0]).dm_name.clone(), scratch.dm_name);
    world.set_open(&root, 2);
    world.set_open(&name, 1);
    for n in 0..20 {
        release(&process, &format!("vm-{n}")).await;
    }
    process.settle().await;
    let devices = || world.look(|s| s.devices.keys().cloned().collect::<Vec<_>>());
    assert_eq!(devices(), [root.clone(), name.clone()]);
    assert_eq!(leases(&process), 2, "the VM whose scratch disk is open, and what it shares");
    world.set_open(&name, 0);
    process.settle().await;
    assert_eq!(devices(), vec![root.clone()]);
    // Who comes now gets a new one: the old one is on its way out.
    let next = acquire(&process, shared("next", None)).await;
    assert_ne!(device(&next).dm_name, root);
    world.set_open(&root, 0);
    process.settle().await;
    process.audit(&world, "when the old one is gone");
    release(&process, "next").await;
    process.settle().await;
    assert!(world.is_empty() && leases(&process) == 0);
}

#[tokio::test]
async fn what_the_kernel_lets_everybody_write_to_is_not_shared() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    world.state.lock().unwrap().all_writable = true;
    let error = process.acquirer.acquire(shared("vm-1", Some(16 << 20))).await.unwrap_err();
    assert!(is_unshareable(&error), "{error}");
    let text = error.to_string();
    assert!(text.contains("to be shared: this snapshotter's") && text.contains("COPY_ON_WRITE"), "{text}");
    assert!(!is_unshareable(&unfit("/dev/x", "it is none")), "of whatever mode");
    process.settle().await;
    assert!(world.is_empty() && leases(&process) == 0);
    acquire(&process, wish("vm-1")).await;
}

#[tokio::test]
async fn what_is_lost_is_replaced_for_those_who_come_and_kept_for_those_who_have_it() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let old = acquire(&process, shared("old", None)).await;
    let name = device(&old).dm_name.clone();
    world.set_open(&name, 1);
    // Somebody has made it writable.
    world.state.lock().unwrap().read_only.remove(&name);
    let error = process.acquirer.acquire(shared("new", None)).await.unwrap_err();
    assert_eq!(error.reason(), Reason::NotReady, "{error}");
    assert!(error.to_string().contains("acquire again"), "{error}");
    let new = acquire(&process, shared("new", None)).await;
    assert_ne!(device(&new).dm_name, name);
    process.settle().await;
    assert!(world.look(|s| s.devices.contains_key(&name)), "a VM has it");
    release(&process, "old").await;
    process.settle().await;
    assert!(world.look(|s| s.devices.contains_key(&name)), "it is open");
    world.set_open(&name, 0);
    process.settle().await;
    process.audit(&world, "when the old one is gone");
    assert!(!world.look(|s| s.devices.contains_key(&name)));
}

#[tokio::test]
async fn a_scratch_disk_that_no_pool_could_hold_is_refused() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let error = process.acquirer.acquire(shared("vm-1", Some(2 << 40))).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ScratchInvalid, "{error}");
    process.settle().await;
    assert!(world.is_empty() && leases(&process) == 0);
}

#[tokio::test]
async fn a_stop_lets_what_has_begun_be_shared() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    world.absent.store(true, std::sync::atomic::Ordering::SeqCst);
    let pull = world.pulls.lock().await;
    let acquirer = process.acquirer.clone();
    let call = tokio::spawn(async move { acquirer.acquire(shared("vm-1", None)).await.map(drop) });
    while process.acquirer.under_way() == 0 {
        tokio::task::yield_now().await;
    }
    let tasks = process.acquirer.tasks.clone();
    let stop = tokio::spawn(async move { tasks.close(Duration::from_secs(60)).await });
    tokio::task::yield_now().await;
    drop(pull);
    assert_eq!(stop.await.unwrap(), 0);
    call.await.unwrap().unwrap();
    process.audit(&world, "after the stop");
}

#[tokio::test]
async fn a_boot_and_another_spec_are_treated_as_with_any_disk() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let before = start(&world, directory.path());
    let lease = acquire(&before, shared("vm-1", Some(16 << 20))).await;
    before.acquirer.ledger.close().await;
    *world.time.lock().unwrap() = (1, 5);
    let process = start(&world, directory.path());
    process.settle().await;
    for other in [wish("vm-1"), shared("vm-1", None), shared("vm-1", Some(17 << 20))] {
        let error = process.acquirer.acquire(other).await.unwrap_err();
        assert_eq!(error.reason(), Reason::SpecConflict);
    }
    assert_eq!(acquire(&process, shared("vm-1", Some(16 << 20))).await.grant(), lease.grant());
    // Its grace is over, and nobody comes: what it shared goes with it.
    *world.time.lock().unwrap() = (2, 0);
    process.settle().await;
    for later in [101, 202] {
        *world.time.lock().unwrap() = (2, later);
        process.settle().await;
    }
    assert!(world.is_empty() && leases(&process) == 0);
}

#[tokio::test]
async fn a_refusal_at_any_effect_leaves_nothing_behind() {
    let mut struck = 0;
    for fault in [Fault::Refused, Fault::AnswerLost, Fault::Panics] {
        for fail_at in 1.. {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let process = start(&world, directory.path());
            let what = format!("{fault:?} at effect {fail_at}");
            world.arm(fault, fail_at);
            let outcome = process.acquirer.acquire(shared("vm-1", Some(16 << 20))).await;
            if !world.has_struck() {
                break;
            }
            struck += 1;
            assert!(outcome.is_err(), "{what}");
            process.settle().await;
            assert!(world.is_empty(), "{what}");
            let unseen = |lease: &Lease| !matches!(lease.state, State::Failed { cleared: true, .. });
            let left = process.acquirer.ledger.read(|book| book.after(None).filter(|l| unseen(l)).count());
            assert_eq!(left, 0, "{what}");
            acquire(&process, shared("vm-1", Some(16 << 20))).await;
            process.audit(&world, &what);
        }
    }
    // containerd's lease and the snapshot, of what is shared and of the scratch disk.
    assert_eq!(struck, 12);
}

/// The process dies at each effect; the next one finds its way from what is on disk.
#[tokio::test]
async fn a_crash_at_any_effect_is_recovered_from() {
    let mut struck = 0;
    let both = |fault| [(fault, false), (fault, true)];
    for (fault, with_another) in [Fault::CrashBefore, Fault::CrashAfter].into_iter().flat_map(both) {
        for fail_at in 1.. {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let what = format!("{fault:?} at effect {fail_at}, with another: {with_another}");
            let dead = start(&world, directory.path());
            let kept = if with_another { Some(acquire(&dead, shared("kept", None)).await) } else { None };
            world.arm(fault, fail_at);
            dead.story(&world, shared("other", Some(16 << 20))).await;
            if !world.has_struck() {
                break;
            }
            struck += 1;
            world.arm(fault, 0);
            let process = start(&world, directory.path());
            process.reclaimer.recover().await.unwrap();
            process.settle().await;
            process.audit(&world, &what);
            if let Some(kept) = kept {
                assert_eq!(acquire(&process, shared("kept", None)).await, kept, "{what}");
            }
            acquire(&process, shared("other", Some(16 << 20))).await;
            process.audit(&world, &what);
            assert_eq!(world.look(|s| s.read_only.iter().filter(|d| s.devices.contains_key(*d)).count()), 1);
        }
    }
    assert!(struck >= 30, "only {struck} crash points were reached");
}
