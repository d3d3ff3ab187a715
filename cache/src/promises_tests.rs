//! Bursts, quotas and restarts, on a process in memory.

#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use cowshed_gc::reserve::{Quota, Quotas};
use cowshed_leases::State;

use super::*;
use crate::{
    acquire::Wish,
    evict::MakesRoom,
    fakes::{Process_, World, back, image, start_within, wish, world},
};

const GIB: u64 = 1 << 30;

/// Of the fake's pool so much is free beyond its head-room, in GiB.
fn leave(world: &World, gib: u64) {
    let total: u64 = 1 << 40;
    world.state.lock().unwrap().data_used = total - total * 5 / 100 - 1 - gib * GIB;
}

fn limits(quotas: Quotas) -> Policy {
    Policy { expected: Bytes(2 * GIB), learns: false, overcommit_percent: Some(100), quotas }
}

fn of(tenant: &str, vm: &str) -> Wish {
    let mut wish = wish(vm);
    wish.access.tenant = tenant.parse().unwrap();
    wish
}

fn red(leases: Option<u64>, bytes: Option<u64>) -> Quotas {
    let quota = Quota { leases, bytes: bytes.map(|gib| Bytes(gib * GIB)) };
    Quotas { own: [("red".parse().unwrap(), quota)].into(), any_other: None }
}

async fn burst(process: &Process_, tenant: &str, vms: impl Iterator<Item = u32>) -> Vec<Result<(), Error>> {
    let calls = vms.map(|n| {
        let (acquirer, wish) = (process.acquirer.clone(), of(tenant, &format!("{tenant}-{n}")));
        tokio::spawn(async move { acquirer.acquire(wish).await.map(drop) })
    });
    let mut outcomes = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        outcomes.push(call.await.unwrap());
    }
    outcomes
}

fn refusals(outcomes: &[Result<(), Error>]) -> Vec<Reason> {
    outcomes.iter().filter_map(|outcome| outcome.as_ref().err().map(Error::reason)).collect()
}

fn within(world: &Arc<World>, directory: &Path, quotas: Quotas) -> Process_ {
    start_within(world, directory, limits(quotas))
}

#[tokio::test]
async fn of_a_burst_as_many_as_fit_are_granted_and_the_rest_leaves_nothing() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    leave(&world, 41);
    let process = within(&world, directory.path(), Quotas::default());
    // No disk comes to be: who is refused does not wait for one.
    let hung = world.prepares.lock().await;
    let calls: Vec<_> = (0..50)
        .map(|n| {
            let acquirer = process.acquirer.clone();
            tokio::spawn(async move { acquirer.acquire(wish(&format!("vm-{n}"))).await.map(drop) })
        })
        .collect();
    while calls.iter().filter(|call| call.is_finished()).count() < 30 {
        tokio::task::yield_now().await;
    }
    assert_eq!(process.acquirer.ledger.promises().reserved(), Bytes(40 * GIB));
    drop(hung);
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap());
    }
    assert_eq!(refusals(&outcomes), [Reason::PoolFull; 30]);
    let said = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).unwrap().to_string();
    for word in ["overcommit_percent is 100", "40.00 GiB", "2.00 GiB", "42.00 GiB", "cowshed pool extend"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    process.settle().await;
    assert_eq!(process.acquirer.ledger.read(|book| book.after(None).count()), 20);
    process.audit(&world, "after the burst");
    // What has gone makes room for as many.
    let granted: Vec<String> = process
        .acquirer
        .ledger
        .read(|book| book.after(None).take(5).map(|lease| lease.vm.to_string()).collect());
    for vm in &granted {
        process.acquirer.release(back(vm)).await.unwrap();
    }
    process.settle().await;
    assert_eq!(refusals(&burst(&process, "next", 0..8).await), [Reason::PoolFull; 3]);
    // A restart forgets nothing.
    process.acquirer.ledger.close().await;
    let process = within(&world, directory.path(), Quotas::default());
    process.writes.look().await;
    assert_eq!(process.acquirer.ledger.promises().reserved(), Bytes(40 * GIB));
    assert_eq!(refusals(&burst(&process, "last", 0..3).await), [Reason::PoolFull; 3]);
}

#[tokio::test]
async fn who_writes_nothing_and_who_fails_takes_nothing() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    leave(&world, 3);
    let process = within(&world, directory.path(), Quotas::default());
    let promises = process.acquirer.ledger.promises().clone();
    for fail_at in 1..=2 {
        world.arm(crate::fakes::Fault::Refused, fail_at);
        process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
        assert_eq!(promises.reserved(), Bytes(0), "at effect {fail_at}");
        process.settle().await;
    }
    world.arm(crate::fakes::Fault::Refused, 0);
    process.acquirer.acquire(wish("vm-1")).await.unwrap();
    assert_eq!(process.acquirer.acquire(wish("vm-2")).await.unwrap_err().reason(), Reason::PoolFull);
    let shared = |vm: &str| Wish { mode: cowshed_leases::Mode::SharedReadOnly, ..wish(vm) };
    process.acquirer.acquire(shared("vm-3")).await.unwrap();
    assert_eq!(promises.reserved(), Bytes(2 * GIB));
}

#[tokio::test]
async fn what_disks_write_is_seen_and_learnt() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let learning = Policy { learns: true, ..limits(Quotas::default()) };
    let process = start_within(&world, directory.path(), learning.clone());
    let promises = process.acquirer.ledger.promises().clone();
    let write = |lease: &Lease, bytes: u64| {
        let device = lease.grant().unwrap().device.dm_name.clone();
        world.state.lock().unwrap().written.insert(device, bytes);
    };
    let first = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    process.writes.look().await;
    assert_eq!(promises.reserved(), Bytes(2 * GIB));
    write(&first, GIB);
    process.writes.look().await;
    assert_eq!(promises.reserved(), Bytes(GIB));
    write(&first, 5 * GIB);
    process.writes.look().await;
    let used = promises.used_by(&Tenant::default());
    assert_eq!((promises.reserved(), used), (Bytes(0), Use { leases: 1, bytes: Bytes(5 * GIB) }));
    process.acquirer.release(back("vm-1")).await.unwrap();
    assert_eq!(promises.used_by(&Tenant::default()), Use::default());
    process.settle().await;
    // The next is expected to write as much.
    let name = image().name.to_string();
    assert_eq!(promises.expects(&learning, &Tenant::default(), &name), Bytes(5 * GIB));
    assert_eq!(promises.expects(&learning, &"blue".parse().unwrap(), &name), Bytes(2 * GIB), "another's");
    let next = process.acquirer.acquire(wish("vm-2")).await.unwrap().lease.clone();
    assert_eq!((next.expects, promises.reserved()), (5 * GIB, Bytes(5 * GIB)));
    assert_eq!(promises.expects(&limits(Quotas::default()), &Tenant::default(), &name), Bytes(2 * GIB));
}

#[tokio::test]
async fn a_quota_holds_under_a_burst_and_over_a_restart() {
    for quotas in [red(Some(3), None), red(None, Some(7))] {
        let (world, directory) = (world(), tempfile::tempdir().unwrap());
        let process = within(&world, directory.path(), quotas.clone());
        let outcomes = burst(&process, "red", 0..10).await;
        assert_eq!(refusals(&outcomes), [Reason::QuotaExceeded; 7], "{quotas:?}");
        let said = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).unwrap().to_string();
        assert!(said.contains("tenant red") && said.contains("[[quota]]"), "{said}");
        assert_eq!(refusals(&burst(&process, "blue", 0..10).await), [], "others are not concerned");
        process.settle().await;
        process.audit(&world, "after the burst");
        let granted: Vec<String> = process.acquirer.ledger.read(|book| {
            let red = book.after(None).filter(|lease| lease.spec.tenant.as_str() == "red");
            red.filter(|lease| matches!(lease.state, State::Granted(_))).map(|l| l.vm.to_string()).collect()
        });
        assert_eq!(granted.len(), 3);
        let refused = process.acquirer.acquire(of("red", "red-x")).await.unwrap_err().to_string();
        assert!(granted.iter().any(|vm| refused.contains(&format!("VM {vm},"))), "{refused}");
        // The same again is not counted anew.
        assert!(process.acquirer.acquire(of("red", &granted[0])).await.unwrap().existing);
        process.acquirer.ledger.close().await;
        let process = within(&world, directory.path(), quotas);
        process.writes.look().await;
        assert_eq!(refusals(&burst(&process, "red", 20..22).await), [Reason::QuotaExceeded; 2]);
        process.acquirer.release(back(&granted[0])).await.unwrap();
        process.settle().await;
        assert_eq!(refusals(&burst(&process, "red", 30..32).await), [Reason::QuotaExceeded; 1]);
    }
}

/// Room is made by nobody here, and it is told how often somebody wanted it.
#[derive(Default)]
struct Wanted(AtomicUsize);

#[async_trait::async_trait]
impl MakesRoom for Wanted {
    async fn make(&self, refused: Error, _needed: Bytes, _until: Option<Instant>) -> Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Err(refused)
    }
}

/// Of a process that starts anew nobody knows at first what disks have written: all of it would be reserved beside what is in use.
#[tokio::test]
async fn nothing_is_promised_before_it_is_known_what_disks_have_written() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    leave(&world, 5);
    let process = within(&world, directory.path(), Quotas::default());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let device = lease.own_device().unwrap().dm_name.clone();
    world.state.lock().unwrap().written.insert(device, 2 * GIB);
    leave(&world, 3);
    process.acquirer.ledger.close().await;
    let mut process = within(&world, directory.path(), Quotas::default());
    let wanted = Arc::new(Wanted::default());
    Arc::get_mut(&mut process.acquirer).unwrap().room = wanted.clone();
    let soon = || Wish { until: Some(Instant::now() + Duration::from_millis(50)), ..wish("vm-2") };
    for containerd_answers in [true, false] {
        if !containerd_answers {
            world.state.lock().unwrap().usage_fails = true;
            process.writes.look().await;
        }
        let refused = process.acquirer.acquire(soon()).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::NotReady, "{refused}");
        let said = refused.to_string();
        assert!(said.contains("overcommit_percent is 100") && said.contains("try again"), "{said}");
    }
    world.state.lock().unwrap().usage_fails = false;
    let (acquired, ()) = tokio::join!(process.acquirer.acquire(wish("vm-2")), process.writes.look());
    acquired.unwrap();
    assert_eq!(process.acquirer.ledger.promises().reserved(), Bytes(2 * GIB));
    assert_eq!(wanted.0.load(Ordering::SeqCst), 0);
    assert_eq!(process.acquirer.acquire(wish("vm-3")).await.unwrap_err().reason(), Reason::PoolFull);
    assert_eq!(wanted.0.load(Ordering::SeqCst), 1);
}

/// A VM whose disk is suspect gets a new one in its place.
#[tokio::test]
async fn a_fresh_disk_takes_the_place_of_the_one_before() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = within(&world, directory.path(), red(Some(1), None));
    process.acquirer.acquire(of("red", "red-1")).await.unwrap();
    world.time.lock().unwrap().0 += 1;
    let fresh = Wish { fresh: true, ..of("red", "red-1") };
    assert!(!process.acquirer.acquire(fresh).await.unwrap().existing);
    let used = process.acquirer.ledger.promises().used_by(&"red".parse().unwrap());
    assert_eq!(used.leases, 1);
    assert_eq!(
        process.acquirer.acquire(of("red", "red-2")).await.unwrap_err().reason(),
        Reason::QuotaExceeded
    );
}

/// What is decided and not written counts no more than what was never asked for.
#[tokio::test]
async fn sums_follow_what_is_taken_back() {
    use crate::fakes::book::{ask, id, now};
    let directory = tempfile::tempdir().unwrap();
    let ledger = crate::ledger::Ledger::open(directory.path()).unwrap();
    let take = |n: u32| {
        let ask = cowshed_leases::Ask { expects: 10, ..ask(n) };
        ledger.acquire(ask, id(n), now(), crate::flights::GivenUp::default())
    };
    take(1).await.unwrap();
    let connection = rusqlite::Connection::open(ledger.path()).unwrap();
    connection
        .execute_batch("CREATE TRIGGER no BEFORE INSERT ON leases BEGIN SELECT RAISE(FAIL, 'no'); END")
        .unwrap();
    take(2).await.unwrap_err();
    assert_eq!(ledger.promises().reserved(), Bytes(10));
    connection.execute_batch("DROP TRIGGER no").unwrap();
    take(3).await.unwrap();
    let used = ledger.promises().used_by(&Tenant::default());
    assert_eq!(used, Use { leases: 2, bytes: Bytes(20) });
}

/// Nothing is promised by who does not know what is free.
#[tokio::test]
async fn a_pool_that_does_not_answer_when_it_counts_is_no_room() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    leave(&world, 3);
    let process = start_within(&world, directory.path(), limits(Quotas::default()));
    process.acquirer.acquire(wish("vm-1")).await.unwrap();
    // It answers the first look; the one that is to say whether room has come is not answered.
    world.state.lock().unwrap().pool_answers = Some(1);
    let refused = process.acquirer.acquire(wish("vm-2")).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::NotReady, "{refused}");
    assert_eq!(process.acquirer.ledger.promises().reserved(), Bytes(2 * GIB));
}

/// What is learnt of a disk that goes takes its time, and somebody may open it meanwhile.
#[tokio::test]
async fn a_disk_that_is_opened_while_it_is_looked_at_stays_and_is_learnt_of_once() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let learning = Policy { learns: true, ..limits(Quotas::default()) };
    let process = start_within(&world, directory.path(), learning.clone());
    let promises = process.acquirer.ledger.promises().clone();
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let device = lease.grant().unwrap().device.dm_name.clone();
    process.acquirer.release(back("vm-1")).await.unwrap();
    world.state.lock().unwrap().opened_by_look = Some(device.clone());
    for _ in 0..3 {
        process.settle().await;
    }
    assert!(world.look(|s| s.devices.contains_key(&device)), "it is gone while it is open");
    let expects = || promises.expects(&learning, &Tenant::default(), &image().name.to_string());
    assert_eq!(expects(), Bytes(2 * GIB), "it is learnt of before it has gone");
    world.set_open(&device, 0);
    process.settle().await;
    assert!(!world.look(|s| s.devices.contains_key(&device)));
    // It had written nothing: a sixteenth less, once.
    assert_eq!(expects(), Bytes(2 * GIB - 2 * GIB / 16));
}
