//! Spares made, handed out, dropped, lost, and stopped at every effect.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{collections::BTreeSet, path::Path};

use cowshed_leases::{Lease, State, Ttl};

use super::{
    refill::{Refiller, Round},
    *,
};
use crate::{
    fakes::{Fault, Process_, World, back, image, start, wish, world},
    metrics::Metrics,
};

/// A process and what fills its shelves.
struct Host {
    process: Process_,
    refiller: Arc<Refiller>,
    round: Round,
}

fn host(world: &Arc<World>, directory: &Path) -> Host {
    let process = start(world, directory);
    let (spares, acquirer) = (process.acquirer.spares.clone(), process.acquirer.clone());
    let refiller = Arc::new(Refiller { spares, acquirer, metrics: Metrics::new().unwrap() });
    Host { process, refiller, round: Round::default() }
}

fn settings() -> Settings {
    crate::config::Config::default().spares()
}

/// An image of this name, of its own.
fn other(name: &str) -> ResolvedImage {
    let name = ImageRef::parse(name).unwrap();
    ResolvedImage { manifest: Digest::of(name.to_string().as_bytes()), name, ..image() }
}

#[test]
fn what_a_pin_cannot_keep_is_told() {
    let limits = |image_max, total_max| Limits { image_max, total_max, ..settings().limits };
    // Whether there are any, of an image and of all at the most, asked for, kept, and what says so.
    let table = [
        (true, 8, 9, 8, 8, None),
        (true, 8, 9, 9, 8, Some("image_max")),
        (true, 8, 7, 8, 7, Some("total_max")),
        (false, 8, 9, 3, 0, Some("enabled")),
        (false, 8, 9, 0, 0, None),
    ];
    for (enabled, image_max, total_max, asked, kept, says) in table {
        let settings = Settings { enabled, limits: limits(image_max, total_max), ..settings() };
        let pins = Pins { here: vec![(image(), asked)], unknown: Vec::new() };
        let (there, why) = settings.pinned(&image().name, asked, &pins);
        assert_eq!((there, why.is_some()), (kept, says.is_some()), "{asked}: {why:?}");
        assert!(why.is_none_or(|why| why.contains(says.unwrap())), "{asked}");
    }
}

#[test]
fn a_pin_is_not_alone() {
    let settings = settings();
    assert_eq!((settings.limits.image_max, settings.limits.total_max), (128, 1024));
    let images: Vec<_> = (1..=9).map(|n| other(&format!("r.example/x:{n}"))).collect();
    let pinned = |count: usize, asked| {
        let here: Vec<_> = images.iter().take(count).map(|image| (image.clone(), asked)).collect();
        let told = here.iter().map(|(image, _)| {
            let pins = Pins { here: here.clone(), unknown: Vec::new() };
            settings.pinned(&image.name, asked, &pins)
        });
        told.collect::<Vec<_>>()
    };
    assert!(pinned(8, 128).iter().all(|told| *told == (128, None)));
    assert!(pinned(9, 113).iter().all(|(_, why)| why.is_none()), "1017 are no more than 1024");
    // Who gets none is told so, and who takes them from him as well; `allot` says who it is.
    let told = pinned(9, 128);
    assert_eq!(told.iter().map(|(kept, _)| kept).sum::<u32>(), 1024);
    for (kept, why) in told {
        let why = why.unwrap();
        assert!(why.contains("pins ask for 1152 together, and 1024"), "{why}");
        assert_eq!(why.contains("other images"), kept == 128, "{kept}: {why}");
    }
    // Two names of one image do not add up; one does not get what the other asks for.
    let second = ResolvedImage { name: ImageRef::parse("r.example/y:1").unwrap(), ..images[0].clone() };
    let pins = Pins { here: vec![(images[0].clone(), 128), (second.clone(), 3)], unknown: Vec::new() };
    let small = Settings { limits: Limits { total_max: 128, ..settings.limits }, ..settings };
    assert_eq!(small.pinned(&images[0].name, 128, &pins), (128, None));
    assert_eq!(small.pinned(&second.name, 3, &pins), (3, None));
    // Of what is not here, or cannot be asked about, none are made.
    let pins = Pins { here: vec![(images[0].clone(), 2)], unknown: vec![(images[1].name.clone(), 2)] };
    for image in &images[1..3] {
        let (kept, why) = settings.pinned(&image.name, 2, &pins);
        assert!(kept == 0 && why.unwrap().contains(&Platform::host().to_string()), "{}", image.name);
    }
}

impl Host {
    fn spares(&self) -> &Spares {
        &self.refiller.spares
    }

    fn count(&self) -> Count {
        self.spares().count(&image().manifest)
    }

    /// Until there are as many as there should be.
    async fn fill(&mut self) {
        loop {
            self.refiller.round(&mut self.round).await;
            let Count { ready, making, wanted } = self.count();
            if making == 0 && ready >= wanted {
                return;
            }
            self.spares().0.wake.notified().await;
        }
    }

    async fn pin(&mut self, count: u32) {
        let now = self.process.acquirer.clock.now();
        self.process.acquirer.ledger.pin(image().name.to_string(), None, count, now).await.unwrap();
        self.round = Round::default();
        self.fill().await;
    }

    fn spares_in_the_ledger(&self) -> Vec<Lease> {
        self.process
            .acquirer
            .ledger
            .read(|book| book.after(None).filter(|l| l.vm.is_spare()).cloned().collect())
    }
}

#[tokio::test]
async fn a_pin_of_what_is_not_here_promises_nothing() {
    use std::sync::atomic::Ordering::SeqCst;
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(2).await;
    let name = image().name;
    assert_eq!(host.process.acquirer.spares_pinned(&name, 2).await, (2, None));
    world.absent.store(true, SeqCst);
    let (kept, why) = host.process.acquirer.spares_pinned(&name, 2).await;
    assert!(kept == 0 && why.unwrap().contains("before it is here"));
}

#[tokio::test]
async fn a_hit_takes_one_write_and_nothing_of_containerd() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(3).await;
    assert_eq!(host.count(), Count { ready: 3, making: 0, wanted: 3 });
    host.process.audit(&world, "filled");
    // Whatever containerd is asked for fails from now on.
    world.arm(Fault::Refused, 1);
    let (mut devices, acquirer) = (BTreeSet::new(), &host.process.acquirer);
    for vm in ["a", "b", "c"] {
        let wish = crate::acquire::Wish { ttl: Ttl::from_seconds(60).ok(), ..wish(vm) };
        let got = acquirer.acquire(wish).await.unwrap();
        assert!(got.spare && !got.existing && got.lease.term.until.is_some());
        assert!(devices.insert(got.lease.grant().unwrap().device.dm_name.clone()), "twice");
    }
    assert!(acquirer.acquire(wish("d")).await.is_err(), "there is none left");
    assert!(acquirer.acquire(wish("a")).await.unwrap().existing);
    world.arm(Fault::Refused, 0);
    host.process.settle().await;
    host.process.audit(&world, "handed out");
    // Back on the shelf come new ones only.
    host.process.acquirer.release(back("a")).await.unwrap();
    host.fill().await;
    host.process.settle().await;
    assert_eq!(host.count().ready, 3, "as many as were given out at once");
    host.process.audit(&world, "filled again");
}

#[tokio::test]
async fn a_crowd_gets_different_spares_and_then_disks_of_their_own() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(20).await;
    let calls: Vec<_> = (0..50)
        .map(|n| {
            let acquirer = host.process.acquirer.clone();
            tokio::spawn(async move { acquirer.acquire(wish(&format!("vm-{n}"))).await.unwrap() })
        })
        .collect();
    let (mut hits, mut devices) = (0, BTreeSet::new());
    for call in calls {
        let got = call.await.unwrap();
        hits += u32::from(got.spare);
        assert!(devices.insert(got.lease.grant().unwrap().device.dm_name.clone()), "twice");
    }
    assert_eq!(hits, 20);
    host.process.audit(&world, "after the crowd");
    host.fill().await;
    assert_eq!(host.count().ready, 50, "another such crowd would find all");
}

#[tokio::test]
async fn what_is_not_what_it_was_is_given_up_and_nobody_notices() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(2).await;
    // One of the devices has become another: the kernel refuses writes to it.
    let [lost, _] = &host.spares_in_the_ledger()[..] else { panic!("not two") };
    let device = lost.grant().unwrap().device.dm_name.clone();
    world.state.lock().unwrap().read_only.insert(device.clone());
    let mut devices = BTreeSet::new();
    for vm in ["a", "b"] {
        let got = host.process.acquirer.acquire(wish(vm)).await.unwrap();
        devices.insert(got.lease.grant().unwrap().device.dm_name.clone());
    }
    assert!(devices.len() == 2 && !devices.contains(&device), "{devices:?}");
    assert!(!host.spares().known().contains(&lost.id));
    host.process.settle().await;
    host.process.audit(&world, "without it");
}

/// Over a restart, and over a boot, after which a spare's device has to be seen before it can be handed out.
#[tokio::test]
async fn spares_are_found_again_by_the_next_process() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut first = host(&world, directory.path());
    first.pin(3).await;
    let made: BTreeSet<LeaseId> = first.spares_in_the_ledger().into_iter().map(|lease| lease.id).collect();
    first.process.acquirer.ledger.close().await;
    for boot in [1, 2] {
        *world.time.lock().unwrap() = (boot, 10);
        let mut next = host(&world, directory.path());
        next.process.reclaimer.recover().await.unwrap();
        next.process.settle().await;
        // Nothing is handed out before it was looked at.
        assert_eq!(next.count().ready, 0);
        next.fill().await;
        assert_eq!(next.count(), Count { ready: 3, making: 0, wanted: 3 }, "boot {boot}");
        let found: BTreeSet<LeaseId> =
            next.spares_in_the_ledger().into_iter().map(|lease| lease.id).collect();
        assert_eq!(found, made, "boot {boot}");
        next.process.audit(&world, "found again");
        if boot == 2 {
            assert!(next.process.acquirer.acquire(wish("a")).await.unwrap().spare);
        }
        next.process.acquirer.ledger.close().await;
    }
}

/// Without any pin they are wanted as if they had been asked for.
#[tokio::test]
async fn a_restart_gives_up_no_spare_that_was_there_by_demand() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut first = host(&world, directory.path());
    (0..4).for_each(|_| first.spares().asked(&image()));
    first.fill().await;
    assert_eq!(first.count().ready, 4);
    first.process.acquirer.ledger.close().await;
    let mut next = host(&world, directory.path());
    next.fill().await;
    assert_eq!(next.count(), Count { ready: 4, making: 0, wanted: 4 });
    next.process.audit(&world, "found again");
    next.process.acquirer.ledger.close().await;
    // One that a VM has open, whatever the ledger says, is nobody's to hand out.
    let device = next.spares_in_the_ledger()[0].grant().unwrap().device.dm_name.clone();
    world.set_open(&device, 1);
    let mut last = host(&world, directory.path());
    last.fill().await;
    let still_there =
        |last: &Host| last.spares_in_the_ledger().iter().any(|l| l.grant().unwrap().device.dm_name == device);
    assert!(still_there(&last), "nor to give up: it would go when it is closed");
    for vm in ["a", "b", "c"] {
        let got = last.process.acquirer.acquire(wish(vm)).await.unwrap();
        assert_ne!(got.lease.grant().unwrap().device.dm_name, device);
    }
}

#[tokio::test]
async fn a_device_that_is_not_there_yet_is_looked_at_again() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(1).await;
    let device = host.spares_in_the_ledger()[0].grant().unwrap().device.dm_name.clone();
    world.state.lock().unwrap().devices.remove(&device);
    assert!(!host.process.acquirer.acquire(wish("a")).await.unwrap().spare, "it gets one of its own");
    world.set_open(&device, 0);
    host.spares().look_again();
    host.fill().await;
    let mut got = Vec::new();
    while host.count().ready > 0 {
        let vm = format!("vm-{}", got.len());
        got.push(
            host.process
                .acquirer
                .acquire(wish(&vm))
                .await
                .unwrap()
                .lease
                .grant()
                .unwrap()
                .device
                .dm_name
                .clone(),
        );
    }
    assert!(got.contains(&device), "{got:?}");
}

#[tokio::test]
async fn a_moved_tag_makes_the_old_ones_unwanted() {
    let spares = Spares::new(crate::config::Config::default().spares());
    let (old, new) = (image(), ResolvedImage { manifest: Digest::of(b"another"), ..image() });
    (0..3).for_each(|_| spares.asked(&old));
    spares.plan(Room::Tight, 0);
    assert_eq!(spares.count(&old.manifest).wanted, 3);
    spares.asked(&new);
    spares.plan(Room::Tight, 0);
    assert_eq!((spares.count(&old.manifest).wanted, spares.count(&new.manifest).wanted), (0, 1));
}

#[tokio::test]
async fn what_nobody_wants_goes() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(5).await;
    let now = host.process.acquirer.clock.now();
    host.process.acquirer.ledger.unpin(image().name.to_string(), now).await.unwrap();
    host.round = Round::default();
    host.fill().await;
    assert_eq!(host.count(), Count::default());
    host.process.settle().await;
    assert!(world.is_empty() && host.spares_in_the_ledger().is_empty());
}

/// The making of a spare is refused at each effect: nothing is left, and it is tried again later.
#[tokio::test(start_paused = true)]
async fn a_spare_that_cannot_be_made_leaves_nothing() {
    for fault in [Fault::Refused, Fault::AnswerLost, Fault::Panics] {
        for fail_at in 1..=2 {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let mut host = host(&world, directory.path());
            let what = format!("{fault:?} at effect {fail_at}");
            host.spares().asked(&image());
            world.arm(fault, fail_at);
            let begun = tokio::time::Instant::now();
            host.refiller.round(&mut host.round).await;
            host.spares().0.wake.notified().await;
            while host.count().making > 0 {
                host.spares().0.wake.notified().await;
            }
            assert!(world.has_struck(), "{what}");
            assert_eq!(host.count().ready, 0, "{what}");
            host.process.reclaimer.recover().await.unwrap();
            host.process.settle().await;
            assert!(world.is_empty() && host.spares_in_the_ledger().is_empty(), "{what}");
            world.arm(fault, 0);
            // Not at once: the pause is of the host's clock, which does not stand still for tests.
            assert!(host.spares().state().shelves[&image().manifest].pause.is_some(), "{what}");
            host.spares().state().shelves.values_mut().for_each(|shelf| shelf.pause = None);
            host.fill().await;
            assert_eq!(host.count().ready, 1, "{what}, {:?}", begun.elapsed());
            host.process.audit(&world, &what);
        }
    }
}

/// The process dies at each effect of making a spare, and of what comes after its handing out.
#[tokio::test]
async fn a_crash_at_any_effect_loses_no_spare_and_hands_none_out_twice() {
    let mut struck = 0;
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        for fail_at in 1.. {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let what = format!("{fault:?} at effect {fail_at}");
            let mut dead = host(&world, directory.path());
            dead.pin(1).await;
            let kept = dead.process.acquirer.acquire(wish("kept")).await.unwrap();
            assert!(kept.spare);
            world.arm(fault, fail_at);
            let story = async {
                dead.fill().await;
                let got = dead.process.acquirer.acquire(wish("other")).await.unwrap();
                assert!(got.spare);
                dead.process.acquirer.release(back("other")).await.unwrap();
                dead.process.settle().await;
            };
            let dies = async {
                while !world.has_struck() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                () = story => {}
                () = dies => {}
            }
            if !world.has_struck() {
                break;
            }
            struck += 1;
            world.arm(fault, 0);
            let mut next = host(&world, directory.path());
            next.process.reclaimer.recover().await.unwrap();
            next.process.settle().await;
            next.process.audit(&world, &what);
            let again = next.process.acquirer.acquire(wish("kept")).await.unwrap();
            assert_eq!(again.lease.id, kept.lease.id, "{what}");
            next.fill().await;
            next.process.audit(&world, &what);
            let device = |vm: &str| {
                next.process.acquirer.ledger.read(|book| {
                    let lease = book.held_by(&vm.parse().unwrap()).cloned().unwrap();
                    lease.grant().unwrap().device.dm_name.clone()
                })
            };
            let other = next.process.acquirer.acquire(wish("other-one")).await.unwrap();
            assert!(other.spare, "{what}");
            assert_ne!(device("other-one"), device("kept"), "{what}");
            let half_made = |lease: &Lease| lease.vm.is_spare() && lease.state == State::Preparing;
            let left =
                next.process.acquirer.ledger.read(|book| book.after(None).filter(|l| half_made(l)).count());
            assert_eq!(left, 0, "{what}");
        }
    }
    // Two of the making and three of the reclaimer, each before and after.
    assert!(struck >= 10, "only {struck} crash points were reached");
}

#[tokio::test]
async fn one_that_is_taken_and_not_handed_out_is_put_back() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let mut host = host(&world, directory.path());
    host.pin(1).await;
    let taken = host.spares().take(&image().manifest).unwrap();
    assert!(host.spares().take(&image().manifest).is_none() && host.spares().known().contains(taken.lease()));
    let lease = taken.lease().clone();
    drop(taken);
    assert_eq!(host.spares().take(&image().manifest).unwrap().lease(), &lease);
}
