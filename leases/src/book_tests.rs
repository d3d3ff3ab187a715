#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    Acquisition, Ask, BookError, BootId, DeviceIdentity, DeviceNumber, Failure, Grace, Grant, Kind, Mode,
    Moment, Process, Release, Releasing, Scratch, ScratchGrant, Seen, Share, Spare, Spec, State, Suspicion,
    Tenant, Ttl, UnixMicros, Uptime,
};

const SECOND: u64 = 1_000_000;

pub(crate) fn vm(n: u8) -> VmId {
    if n == IMAGE { VmId::of_image("sha256:0").unwrap() } else { format!("vm{n}").parse().unwrap() }
}

/// 10 is image 0 shared, 11 is the same with a scratch disk.
pub(crate) fn spec(n: u8) -> Spec {
    let image = format!("registry.example/app:{}", if n >= SHARED { 0 } else { n });
    let mode = if n >= SHARED { Mode::SharedReadOnly } else { Mode::CopyOnWrite };
    let scratch = (n == SHARED + 1).then_some(Scratch { size_bytes: 1 << 20, raw: false });
    Spec { image, platform: "linux/amd64".into(), tenant: Tenant::default(), mode, scratch }
}

pub(crate) const SHARED: u8 = 10;
/// In whose name what is shared is held, among VMs.
pub(crate) const IMAGE: u8 = 200;
/// In whose name a spare is held, among VMs.
const SPARE: u8 = 201;

pub(crate) fn id(n: u64) -> LeaseId {
    LeaseId::from_random(u128::from(n))
}

pub(crate) fn at(boot: u8, up: u64) -> Moment {
    Moment { wall: UnixMicros(0), boot: BootId::from_bits(boot.into()), up: Uptime(up * SECOND) }
}

pub(crate) fn ttl(seconds: u64) -> Ttl {
    Ttl::from_seconds(seconds).unwrap()
}

pub(crate) fn grace() -> Grace {
    Grace { expired: ttl(10), boot: ttl(100) }
}

pub(crate) fn ask(n: u8, s: u8) -> Ask {
    Ask {
        vm: vm(n),
        spec: spec(s),
        ttl: None,
        fresh: false,
        expects: 0,
        request: None,
        share: None,
        spare: None,
    }
}

fn request(n: u8) -> RequestId {
    format!("request-{n}").parse().unwrap()
}

pub(crate) fn back(n: u8) -> Release {
    Release { vm: vm(n), lease: None, generation: None, request: None, abandon: false }
}

fn failure() -> Failure {
    Failure { reason: "POOL_FULL".into(), message: "the pool is full".into() }
}

pub(crate) fn grant(n: u32) -> Grant {
    let number = DeviceNumber { major: 253, minor: n };
    let device = DeviceIdentity {
        path: format!("/dev/mapper/snap-{n}"),
        number,
        dm_name: format!("snap-{n}"),
        dm_uuid: None,
        thin_id: n,
        pool: DeviceNumber { major: 253, minor: 0 },
        size_bytes: 1 << 30,
        read_only: false,
    };
    let (filesystem, image_digest) = ("ext4".into(), "sha256:0".into());
    Grant { device, filesystem, scratch: None, image_digest, process: Process::default(), at: UnixMicros(1) }
}

pub(crate) fn apply(book: &mut Book, changes: Vec<Change>) {
    for change in changes {
        book.apply(change);
    }
}

fn failed(book: &mut Book, id: &LeaseId, now: &Moment) {
    let changes = book.fail(id, failure(), now);
    apply(book, changes);
}

pub(crate) fn acquired(book: &mut Book, ask: &Ask, fresh: LeaseId, now: &Moment) -> Lease {
    match book.acquire(ask, fresh, now).unwrap() {
        Acquisition::New { lease, changes } => {
            apply(book, changes);
            *lease
        }
        Acquisition::Existing(lease) => {
            let (kept, changes) = book.keep(ask, &lease.id, None, now).unwrap();
            apply(book, changes);
            kept
        }
    }
}

/// A lease that is granted.
fn granted(book: &mut Book, ask: &Ask, n: u64, now: &Moment) -> Lease {
    let lease = acquired(book, ask, id(n), now);
    let (lease, changes) = book.grant(&lease.id, grant(n as u32), now).unwrap();
    apply(book, changes);
    lease
}

fn released(book: &mut Book, ask: &Release, now: &Moment) -> Releasing {
    let (outcome, changes) = book.release(ask, now).unwrap();
    apply(book, changes);
    outcome
}

fn removed(book: &mut Book, id: &LeaseId) {
    let changes = book.remove(id, &at(1, 0)).unwrap();
    apply(book, changes);
}

fn suspected(book: &mut Book, now: &Moment) {
    let changes = book.suspect(grace(), now);
    apply(book, changes);
}

#[test]
fn acquire_is_idempotent_by_vm_and_spec() {
    let mut book = Book::default();
    let first = granted(&mut book, &ask(1, 1), 1, &at(1, 0));
    let before = book.clone();
    assert_eq!(acquired(&mut book, &ask(1, 1), id(2), &at(1, 5)), first);
    assert_eq!(book, before, "nothing to write for that");
    assert_ne!(acquired(&mut book, &ask(2, 1), id(3), &at(1, 5)).id, first.id);
}

#[test]
fn another_spec_is_a_conflict_that_names_what_differs() {
    let mut book = Book::default();
    let held = acquired(&mut book, &ask(1, 1), id(1), &at(1, 0));
    let error = book.acquire(&ask(1, 2), id(2), &at(1, 0)).unwrap_err();
    let BookError::Conflict { lease, differences, .. } = error else { panic!("{error}") };
    assert_eq!(lease, held.id);
    assert_eq!(differences.len(), 1);
    assert_eq!((differences[0].field, differences[0].asked.as_str()), ("image", "registry.example/app:2"));
}

#[test]
fn a_released_vm_gets_a_new_generation_and_the_old_one_can_do_nothing_to_it() {
    let mut book = Book::default();
    let now = at(1, 0);
    let old = granted(&mut book, &ask(1, 1), 1, &now);
    assert!(matches!(released(&mut book, &back(1), &now), Releasing::Now(_)));
    assert!(
        matches!(released(&mut book, &back(1), &now), Releasing::Again(_)),
        "a second release changes nothing"
    );
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, old.id);

    let new = granted(&mut book, &ask(1, 2), 2, &now);
    assert!(new.generation > old.generation);
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, new.id);
    assert_eq!(book.get(&old.id).unwrap().grant(), Some(&grant(1)), "its device is still known");

    assert_eq!(book.renew(&old.id, None, None, &now), Err(BookError::Released(old.id.clone())));
    for stale in [
        Release { lease: Some(old.id.clone()), ..back(1) },
        Release { generation: Some(old.generation), ..back(1) },
        Release { lease: Some(new.id.clone()), ..back(2) },
    ] {
        released(&mut book, &stale, &now);
        assert!(book.get(&new.id).unwrap().is_held(), "{stale:?}");
    }
    removed(&mut book, &old.id);
    assert_eq!(book.renew(&old.id, None, None, &now), Err(BookError::Gone(old.id.clone())));
    assert_eq!(book.remove(&old.id, &now), Ok(Vec::new()));
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, new.id);
}

#[test]
fn only_a_lease_in_preparation_is_granted_and_only_a_released_one_removed() {
    let mut book = Book::default();
    let now = at(1, 0);
    let lease = acquired(&mut book, &ask(1, 1), id(1), &now);
    assert_eq!(book.renew(&lease.id, None, None, &now), Err(BookError::StillPreparing(lease.id.clone())));
    assert_eq!(book.remove(&lease.id, &now), Err(BookError::NotReleasing(lease.id.clone())));
    released(&mut book, &back(1), &now);
    assert_eq!(book.grant(&lease.id, grant(1), &now), Err(BookError::NotPreparing(lease.id.clone())));
    assert_eq!(book.grant(&id(7), grant(1), &now), Err(BookError::NotPreparing(id(7))));
    assert!(book.fail(&lease.id, failure(), &now).is_empty(), "what was released does not fail");
}

#[test]
fn a_device_is_granted_to_one_lease_until_that_is_gone() {
    let mut book = Book::default();
    let now = at(1, 0);
    let a = granted(&mut book, &ask(1, 1), 1, &now);
    let b = acquired(&mut book, &ask(2, 1), id(2), &now);
    let taken = BookError::DeviceTaken { device: "snap-1".into(), owner: a.id.clone(), asked: b.id.clone() };
    assert_eq!(book.grant(&b.id, grant(1), &now), Err(taken.clone()));
    released(&mut book, &back(1), &now);
    assert_eq!(book.grant(&b.id, grant(1), &now), Err(taken));
    removed(&mut book, &a.id);
    assert!(book.grant(&b.id, grant(1), &now).is_ok());
}

#[test]
fn a_lease_without_a_time_limit_never_expires_and_one_with_it_does_unless_renewed() {
    let mut book = Book::default();
    let endless = granted(&mut book, &ask(1, 1), 1, &at(1, 0));
    let limited = granted(&mut book, &Ask { ttl: Some(ttl(30)), ..ask(2, 1) }, 2, &at(1, 0));
    suspected(&mut book, &at(1, 29));
    assert!(book.after(None).all(|lease| matches!(lease.state, State::Granted(_))));
    let (renewed, changes) = book.renew(&limited.id, None, None, &at(1, 29)).unwrap();
    assert_eq!(renewed.term.until, Some(Uptime(59 * SECOND)));
    apply(&mut book, changes);
    suspected(&mut book, &at(1, 58));
    assert_eq!(book.get(&limited.id).unwrap().suspicion(&at(1, 58)), None);
    suspected(&mut book, &at(1, 1_000_000));
    assert!(matches!(book.get(&endless.id).unwrap().state, State::Granted(_)));
    let lease = book.get(&limited.id).unwrap();
    assert!(matches!(lease.state, State::Suspect { why: Suspicion::Expired, .. }));
    assert!(!lease.is_overdue(&at(1, 1_000_009)) && lease.is_overdue(&at(1, 1_000_010)));

    // A renewal just before the reclaimer decides wins.
    let (renewed, changes) = book.renew(&limited.id, Some(ttl(5)), None, &at(1, 1_000_011)).unwrap();
    apply(&mut book, changes);
    assert!(matches!(renewed.state, State::Granted(_)));
    assert!(book.give_up_on(&limited.id, &at(1, 1_000_012)).is_empty());
    assert_eq!(book.get(&limited.id).unwrap().grant(), Some(&grant(2)));
}

#[test]
fn an_earlier_boot_s_disk_is_got_back_or_replaced_by_a_fresh_one() {
    let mut book = Book::default();
    for n in 1..=3 {
        granted(&mut book, &ask(n, 1), n.into(), &at(1, 50));
    }
    // Also before anybody has looked.
    let Acquisition::New { lease, changes } =
        book.acquire(&Ask { fresh: true, ..ask(3, 2) }, id(30), &at(2, 0)).unwrap()
    else {
        panic!("the old one")
    };
    apply(&mut book, changes);
    assert_eq!(lease.spec, spec(2));
    assert!(matches!(book.get(&id(3)).unwrap().state, State::Releasing { .. }));

    suspected(&mut book, &at(2, 1));
    let moved = DeviceIdentity { number: DeviceNumber { major: 253, minor: 77 }, ..grant(1).device };
    for n in [1, 2] {
        let State::Suspect { why, until, .. } = book.get(&id(n)).unwrap().state else {
            panic!("not suspect")
        };
        assert_eq!((why, until), (Suspicion::EarlierBoot, Uptime(101 * SECOND)));
    }
    let before = book.clone();
    suspected(&mut book, &at(2, 2));
    assert_eq!(book, before, "nothing to do twice");
    let again = acquired(&mut book, &ask(1, 1), id(10), &at(2, 3));
    assert_eq!((again.id, again.term.boot), (id(1), at(2, 0).boot));
    assert_eq!(again.state, State::Granted(Box::new(grant(1))));
    let (again, changes) =
        book.renew(&id(1), None, Some(&Seen { root: moved.clone(), scratch: None }), &at(2, 3)).unwrap();
    apply(&mut book, changes);
    assert_eq!(again.grant().unwrap().device, moved, "its numbers are those of this boot");
    let again = acquired(&mut book, &Ask { fresh: true, ..ask(1, 1) }, id(11), &at(2, 4));
    assert_eq!(again.id, id(1), "what this boot has acquired is not replaced");

    // Another boot: the grace begins anew.
    assert!(book.get(&id(2)).unwrap().is_overdue(&at(2, 101)));
    assert!(!book.get(&id(2)).unwrap().is_overdue(&at(3, 5000)));
    suspected(&mut book, &at(3, 5000));
    assert!(!book.get(&id(2)).unwrap().is_overdue(&at(3, 5099)));
    let changes = book.give_up_on(&id(2), &at(3, 5100));
    apply(&mut book, changes);
    assert!(matches!(book.get(&id(2)).unwrap().state, State::Releasing { grant: Some(_), .. }));
}

#[test]
fn what_failed_stays_until_it_is_seen_and_does_not_hold_its_vm() {
    let mut book = Book::default();
    let now = at(1, 0);
    let tried = acquired(&mut book, &Ask { request: Some(request(1)), ..ask(1, 1) }, id(1), &now);
    let changes = book.fail(&tried.id, failure(), &now);
    apply(&mut book, changes);
    assert!(book.get(&tried.id).unwrap().is_to_be_reclaimed());
    removed(&mut book, &tried.id);
    let State::Failed { failure: why, cleared: true, .. } = &book.of_vm(&vm(1)).unwrap().state else {
        panic!()
    };
    assert_eq!(why, &failure());
    // The same request again is a new try.
    let again = acquired(&mut book, &Ask { request: Some(request(1)), ..ask(1, 1) }, id(2), &now);
    assert!(again.generation > tried.generation);
    assert!(book.get(&tried.id).is_none(), "who asks again has seen it");
    let changes = book.fail(&again.id, failure(), &now);
    apply(&mut book, changes);
    // Seen before it is cleared away.
    released(&mut book, &back(1), &now);
    assert!(matches!(book.get(&again.id).unwrap().state, State::Releasing { .. }));
    removed(&mut book, &again.id);
    assert_eq!(book.after(None).count(), 0);
}

/// Asks for image 0 shared.
fn ask_shared(n: u8, fresh: u64) -> Ask {
    Ask { share: Some(Share { image: vm(IMAGE), fresh: id(fresh) }), ..ask(n, SHARED) }
}

#[test]
fn what_is_shared_is_there_as_long_as_somebody_shares_it() {
    let (mut book, now) = (Book::default(), at(1, 0));
    let [a, b] =
        [1, 2].map(|n: u8| acquired(&mut book, &ask_shared(n, 100 + u64::from(n)), id(n.into()), &now));
    assert_eq!((&a.shares, &b.shares, book.sharers(&id(101))), (&Some(id(101)), &Some(id(101)), 2));
    let early = BookError::NotShared { device: "snap-7".into(), asked: a.id.clone() };
    assert_eq!(book.grant(&a.id, grant(7), &now), Err(early), "nobody has made it");
    let (shared, changes) = book.grant(&id(101), grant(7), &now).unwrap();
    apply(&mut book, changes);
    for lease in [&a, &b] {
        let (lease, changes) = book.grant(&lease.id, grant(7), &now).unwrap();
        apply(&mut book, changes);
        assert_eq!((lease.own_device(), lease.root()), (None, &shared.id));
    }
    assert_eq!(shared.own_device(), Some(&grant(7).device));
    let c = acquired(&mut book, &ask(3, 0), id(3), &now);
    assert!(matches!(book.grant(&c.id, grant(7), &now), Err(BookError::DeviceTaken { .. })));

    // It does not expire, nor does a boot make it doubtful.
    let later = at(2, 1000);
    suspected(&mut book, &later);
    assert!(matches!(book.get(&a.id).unwrap().state, State::Suspect { .. }));
    assert_eq!(book.get(&shared.id).unwrap(), &shared);
    for (user, is_last) in [(1, false), (2, true)] {
        released(&mut book, &back(user), &later);
        assert!(book.get(&shared.id).unwrap().is_held(), "its device may be in use");
        removed(&mut book, &id(user.into()));
        assert_eq!(book.get(&shared.id).unwrap().is_held(), !is_last);
    }
    removed(&mut book, &shared.id);
    assert_eq!(book.after(None).count(), 1);
}

#[test]
fn what_is_retired_is_kept_for_those_who_have_it_and_given_to_nobody_else() {
    let (mut book, now) = (Book::default(), at(1, 0));
    let a = acquired(&mut book, &ask_shared(1, 100), id(1), &now);
    assert!(book.retire(&id(100), &now).is_empty(), "it is not there yet");
    for (lease, device) in [(id(100), 7), (a.id.clone(), 7)] {
        let (_, changes) = book.grant(&lease, grant(device), &now).unwrap();
        apply(&mut book, changes);
    }
    let late = acquired(&mut book, &ask_shared(2, 101), id(2), &now);
    let changes = book.retire(&id(100), &now);
    apply(&mut book, changes);
    assert!(book.retire(&id(100), &now).is_empty() && book.retire(&a.id, &now).is_empty());
    assert!(matches!(book.grant(&late.id, grant(7), &now), Err(BookError::NotShared { .. })));
    let next = acquired(&mut book, &ask_shared(3, 102), id(3), &now);
    assert_eq!((next.shares, book.sharers(&id(100))), (Some(id(102)), 2));
    assert!(book.get(&a.id).unwrap().is_held() && Book::load(stored(&book)).is_ok());
    failed(&mut book, &late.id, &now);
    released(&mut book, &back(1), &now);
    removed(&mut book, &id(100));
    assert!(book.get(&id(100)).is_some(), "somebody has it");
    removed(&mut book, &a.id);
    removed(&mut book, &id(100));
    assert!(book.get(&id(100)).is_none());
}

#[test]
fn what_cannot_be_shared_is_released_when_nobody_names_it() {
    let (mut book, now) = (Book::default(), at(1, 0));
    for n in 1..=3 {
        acquired(&mut book, &ask_shared(n, 99 + u64::from(n)), id(n.into()), &now);
    }
    released(&mut book, &back(1), &now);
    failed(&mut book, &id(2), &now);
    assert_eq!((book.sharers(&id(100)), book.get(&id(2)).unwrap().shares.is_none()), (2, true));
    failed(&mut book, &id(100), &now);
    assert!(matches!(book.get(&id(100)).unwrap().state, State::Releasing { grant: None, .. }));
    // One more comes: it shares something new.
    assert_eq!(acquired(&mut book, &ask_shared(4, 101), id(4), &now).shares, Some(id(101)));
    assert_eq!(book.remove(&id(100), &now), Ok(Vec::new()), "others name it");
    assert!(Book::load(stored(&book)).is_ok());
    failed(&mut book, &id(3), &now);
    removed(&mut book, &id(1));
    removed(&mut book, &id(100));
    assert!(book.get(&id(100)).is_none());
    // Who fails last, and alone, lets go of it too.
    failed(&mut book, &id(4), &now);
    assert!(!book.get(&id(101)).unwrap().is_held());
    let mut lost = stored(&book);
    lost.leases.retain(|lease| lease.id == id(3));
    lost.leases[0].shares = Some(id(9));
    assert!(Book::load(lost).unwrap_err().contains("which is not there"));
}

#[test]
fn who_renews_what_an_operator_gave_up_is_told() {
    let (mut book, now) = (Book::default(), at(1, 0));
    let lease = granted(&mut book, &ask(1, 1), 1, &now);
    released(&mut book, &Release { abandon: true, ..back(1) }, &now);
    assert_eq!(book.renew(&lease.id, None, None, &now), Err(BookError::Abandoned(lease.id.clone())));
    released(&mut book, &back(1), &now);
    assert!(matches!(book.get(&lease.id).unwrap().state, State::Releasing { abandoned: true, .. }));
    // Also of what its launcher has given back before.
    let lease = granted(&mut book, &ask(2, 1), 2, &now);
    released(&mut book, &back(2), &now);
    released(&mut book, &Release { abandon: true, ..back(2) }, &now);
    assert!(matches!(book.get(&lease.id).unwrap().state, State::Releasing { abandoned: true, .. }));
}

#[test]
fn a_request_that_comes_late_changes_nothing() {
    let mut book = Book::default();
    let now = at(1, 0);
    let first = Ask { request: Some(request(1)), ..ask(1, 1) };
    let lease = acquired(&mut book, &first, id(1), &now);
    assert_eq!(acquired_id(&book, &first), Ok(lease.id.clone()));
    let give_back = Release { request: Some(request(2)), ..back(1) };
    assert!(matches!(released(&mut book, &give_back, &now), Releasing::Now(_)));
    // The acquire once more, late.
    let over = BookError::RequestOver { request: request(1), lease: lease.id.clone() };
    assert_eq!(acquired_id(&book, &first), Err(over.clone()));
    removed(&mut book, &lease.id);
    assert_eq!(acquired_id(&book, &first), Err(over));
    // The release once more, when the VM has a new disk.
    let next = acquired(&mut book, &Ask { request: Some(request(3)), ..ask(1, 1) }, id(2), &now);
    assert_eq!(released(&mut book, &give_back, &now), Releasing::Nothing);
    assert!(book.get(&next.id).unwrap().is_held());
    // One that found nothing finds nothing for ever.
    let nothing = Release { request: Some(request(4)), ..back(2) };
    assert_eq!(released(&mut book, &nothing, &now), Releasing::Nothing);
    acquired(&mut book, &ask(2, 1), id(3), &now);
    assert_eq!(released(&mut book, &nothing, &now), Releasing::Nothing);
    assert!(book.get(&id(3)).unwrap().is_held());

    let reused = |what| BookError::RequestReused { request: request(3), what };
    assert_eq!(acquired_id(&book, &Ask { request: Some(request(3)), ..ask(2, 1) }), Err(reused("VM")));
    assert_eq!(acquired_id(&book, &Ask { request: Some(request(3)), ..ask(1, 2) }), Err(reused("spec")));
    let other = Release { request: Some(request(3)), ..back(1) };
    assert_eq!(book.release(&other, &now), Err(reused("call")));
}

/// A spare of image 1 that is ready.
fn spare(book: &mut Book, n: u64, now: &Moment) -> Lease {
    let (lease, changes) = book.intend_spare(id(n), spec(1), now).unwrap();
    apply(book, changes);
    let (lease, changes) = book.grant(&lease.id, grant(n as u32), now).unwrap();
    apply(book, changes);
    lease
}

/// Wants this one.
fn ask_for(n: u8, spare: &Lease) -> Ask {
    let seen = Seen { root: spare.grant().unwrap().device.clone(), scratch: None };
    let spare = Spare { lease: spare.id.clone(), image_digest: "sha256:0".into(), seen };
    Ask { spare: Some(spare), ..ask(n, 1) }
}

#[test]
fn a_spare_is_handed_out_once_and_is_then_a_lease_like_any_other() {
    let mut book = Book::default();
    let now = at(1, 5);
    let made = spare(&mut book, 1, &at(1, 0));
    assert!(made.is_ready_spare(&now) && !made.vm.is_vm());
    let mut wish = ask_for(1, &made);
    wish.ttl = Some(ttl(60));
    wish.request = Some(request(1));
    let lease = acquired(&mut book, &wish, id(9), &now);
    assert_eq!((&lease.id, &lease.vm, lease.term.until), (&made.id, &vm(1), Some(at(1, 65).up)));
    assert!(lease.generation > made.generation && lease.is_held() && lease.grant().is_some());
    assert_eq!(book.held_by(&vm(1)).map(|l| &l.id), Some(&made.id));
    assert_eq!(book.held_by(&made.vm), None);
    assert_eq!(book.get(&id(9)), None, "no other lease is made");
    // Not to another, and not taken back as a spare.
    let twice = book.acquire(&ask_for(2, &made), id(8), &now);
    assert_eq!(twice, Err(BookError::NoSpare(made.id.clone())));
    assert_eq!(book.drop_spare(&made.id, &now), Vec::new());
    let adopted = book.adopt_spare(&made.id, &seen(1, 1), &at(1, 6));
    assert_eq!(adopted, Err(BookError::NoSpare(made.id.clone())), "only its VM renews it");
    // The request again, the wish again: the same lease.
    assert_eq!(acquired(&mut book, &wish, id(7), &now).id, made.id);
    assert_eq!(acquired(&mut book, &ask(1, 1), id(7), &now).id, made.id);
    assert!(matches!(released(&mut book, &back(1), &now), Releasing::Now(_)));
    removed(&mut book, &made.id);
    assert_eq!(Book::load(stored(&book)), Ok(book));
}

#[test]
fn only_what_is_ready_and_right_is_handed_out() {
    let mut book = Book::default();
    let now = at(1, 5);
    let (preparing, changes) = book.intend_spare(id(1), spec(1), &now).unwrap();
    apply(&mut book, changes);
    let ready = spare(&mut book, 2, &now);
    let refused = |ask: &Ask, now: &Moment| match book.acquire(ask, id(9), now) {
        Err(BookError::NoSpare(id)) => id,
        other => panic!("{other:?}"),
    };
    let of = |id: &LeaseId| Spare { lease: id.clone(), ..ask_for(1, &ready).spare.unwrap() };
    assert_eq!(refused(&Ask { spare: Some(of(&preparing.id)), ..ask(1, 1) }, &now), preparing.id);
    assert_eq!(refused(&Ask { spare: Some(of(&id(77))), ..ask(1, 1) }, &now), id(77));
    let another = Spare { image_digest: "sha256:1".into(), ..of(&ready.id) };
    assert_eq!(refused(&Ask { spare: Some(another), ..ask(1, 1) }, &now), ready.id);
    let mut device = of(&ready.id);
    device.seen.root.dm_name = "snap-9".into();
    assert_eq!(refused(&Ask { spare: Some(device), ..ask(1, 1) }, &now), ready.id);
    assert_eq!(refused(&Ask { spec: spec(SHARED), ..ask_for(1, &ready) }, &now), ready.id);
    assert_eq!(refused(&ask_for(1, &ready), &at(2, 0)), ready.id, "its device may be gone since the boot");
    // Another VM's lease, whoever names it.
    let mut book = book.clone();
    let theirs = granted(&mut book, &ask(3, 1), 3, &now);
    let stolen = ask_for(1, &theirs);
    assert_eq!(book.acquire(&stolen, id(9), &now), Err(BookError::NoSpare(theirs.id)));
}

#[test]
fn a_spare_outlives_boots_and_goes_when_it_is_dropped_or_cannot_be_made() {
    let mut book = Book::default();
    let ready = spare(&mut book, 1, &at(1, 0));
    suspected(&mut book, &at(2, 1_000));
    assert_eq!(book.get(&ready.id), Some(&ready), "nobody has to ask after it");
    let (unseen, changes) = book.renew(&ready.id, None, None, &at(2, 0)).unwrap();
    assert!(!unseen.is_ready_spare(&at(2, 0)) && changes.is_empty(), "nobody has looked at it");
    let (again, changes) = book.adopt_spare(&ready.id, &seen(1, 77), &at(2, 0)).unwrap();
    apply(&mut book, changes);
    assert!(again.is_ready_spare(&at(2, 9)) && again.term.ttl.is_none());
    assert_eq!(again.grant().unwrap().device, seen(1, 77).root);
    let (renewed, _) = book.renew(&ready.id, Some(ttl(5)), Some(&seen(1, 77)), &at(2, 0)).unwrap();
    assert_eq!(renewed, again, "whoever asks, it does not expire");
    let (half, changes) = book.intend_spare(id(2), spec(1), &at(2, 0)).unwrap();
    apply(&mut book, changes);
    assert_eq!(book.drop_spare(&half.id, &at(2, 0)), Vec::new(), "it has a maker");
    let early = book.adopt_spare(&half.id, &seen(2, 2), &at(2, 0));
    assert_eq!(early, Err(BookError::NoSpare(half.id.clone())));
    failed(&mut book, &half.id, &at(2, 0));
    let changes = book.drop_spare(&ready.id, &at(2, 0));
    apply(&mut book, changes);
    for id in [&half.id, &ready.id] {
        assert!(matches!(book.get(id).unwrap().state, State::Releasing { .. }));
        removed(&mut book, id);
    }
    assert_eq!(book.after(None).count(), 0);
}

#[test]
fn what_nobody_waits_for_any_more_becomes_a_spare() {
    let mut book = Book::default();
    let now = at(1, 0);
    let wish = Ask { ttl: Some(ttl(9)), request: Some(request(1)), ..ask(1, 1) };
    let lease = acquired(&mut book, &wish, id(1), &now);
    let (spare, changes) = book.shelve(&lease.id, grant(1), &now).unwrap();
    apply(&mut book, changes);
    assert!(spare.is_ready_spare(&at(1, 99)) && book.held_by(&vm(1)).is_none());
    let gone: Vec<_> = book.gone_after(Revision::default()).map(|gone| (&gone.id, &gone.vm)).collect();
    assert_eq!(gone, [(&lease.id, &vm(1))], "who has followed it is told");
    assert_eq!(book.request(&request(1)), None, "it may come again");
    assert_eq!(book.drop_spare(&id(7), &now), Vec::new());
    // The VM that comes back gets it, as anybody would.
    let back = acquired(&mut book, &Ask { request: Some(request(1)), ..ask_for(1, &spare) }, id(2), &now);
    assert_eq!(back.id, lease.id);
    assert_eq!(book.shelve(&back.id, grant(1), &now), Err(BookError::NotPreparing(back.id)));
    let shared = acquired(&mut book, &ask(2, SHARED), id(3), &now);
    assert_eq!(book.shelve(&shared.id, grant(3), &now), Err(BookError::NoSpare(shared.id)));
    assert_eq!(Book::load(stored(&book)), Ok(book));
}

fn acquired_id(book: &Book, ask: &Ask) -> Result<LeaseId, BookError> {
    Ok(match book.acquire(ask, id(99), &at(1, 0))? {
        Acquisition::New { lease, .. } | Acquisition::Existing(lease) => lease.id,
    })
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let mut book = Book::default();
    let a = acquired(&mut book, &ask(1, 1), id(1), &at(1, 0));
    let stored = stored(&book);
    assert_eq!(Book::load(stored.clone()), Ok(book.clone()));
    let with = |lease: Lease| Stored {
        leases: vec![a.clone(), lease],
        last_generation: 2,
        last_revision: Revision(9),
        ..stored.clone()
    };
    let b = Lease { id: id(2), generation: Generation(2), revision: Revision(2), ..a.clone() };
    let error = |stored| Book::load(stored).unwrap_err();
    assert!(error(with(b.clone())).contains("held by both"));
    let c = Lease { vm: vm(2), ..b };
    assert!(
        error(with(Lease { generation: Generation(3), ..c.clone() })).contains("generation that was never")
    );
    assert!(error(with(Lease { revision: Revision(10), ..c.clone() })).contains("revision that was never"));
    assert!(error(with(Lease { revision: a.revision, ..c.clone() })).contains("the same revision"));
    assert!(Book::load(with(c)).is_ok());
}

/// What would be written down of the book.
pub(crate) fn stored(book: &Book) -> Stored {
    Stored {
        leases: book.after(None).cloned().collect(),
        gone: book.gone.values().cloned().collect(),
        requests: book.requests.iter().map(|(id, request)| (id.clone(), request.clone())).collect(),
        horizon: book.horizon,
        last_generation: book.last_generation,
        last_revision: book.last_revision,
    }
}

/// Where a lease stands, as the oracle has it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stand {
    Preparing,
    Granted { boot: u8, until: Option<u64> },
    Suspect { expired: bool, boot: u8, until: u64 },
    Releasing,
    Failed { cleared: bool },
}

impl Stand {
    fn holds(&self) -> bool {
        matches!(self, Self::Preparing | Self::Granted { .. } | Self::Suspect { .. })
    }
}

#[derive(Clone, Debug)]
struct Entry {
    lease: u64,
    vm: u8,
    spec: u8,
    ttl: Option<u64>,
    shares: Option<u64>,
    /// The number of a spare's device, when it was looked at last.
    number: Option<u32>,
    stand: Stand,
}

/// What is shared has lease ids from here on.
const BASES: u64 = 1000;

/// The naive oracle: a list, searched from end to end, with the rules written down once more.
#[derive(Clone, Debug, Default)]
struct Oracle {
    entries: Vec<Entry>,
    /// Request, whether it acquired, VM, lease.
    requests: Vec<(u8, bool, u8, Option<u64>)>,
    boot: u8,
    up: u64,
    wall: i64,
}

/// A spare that somebody has chosen, rightly or not.
#[derive(Clone, Copy, Debug)]
struct Chosen {
    lease: u64,
    /// Whose device was looked at.
    seen: u64,
    /// The number of that device now.
    number: u32,
    /// Of which image it has to be; spares are of 0.
    image: u8,
}

impl Chosen {
    fn spare(self) -> Spare {
        let (lease, image_digest) = (id(self.lease), format!("sha256:{}", self.image));
        Spare { lease, image_digest, seen: seen(self.seen, self.number) }
    }
}

/// The device of this lease, which has this number now.
fn seen(lease: u64, number: u32) -> Seen {
    let number = DeviceNumber { major: 253, minor: number };
    Seen { root: DeviceIdentity { number, ..grant(lease as u32).device }, scratch: None }
}

#[derive(Clone, Debug)]
enum Command {
    Acquire {
        vm: u8,
        spec: u8,
        ttl: Option<u64>,
        fresh: bool,
        request: Option<u8>,
        spare: Option<Chosen>,
    },
    IntendSpare(u8),
    /// With its device, which has this number now.
    AdoptSpare(u64, u32),
    DropSpare(u64),
    Grant(u64),
    Fail(u64),
    See(u64),
    Release {
        vm: u8,
        lease: Option<u64>,
        generation: Option<u64>,
        request: Option<u8>,
    },
    Renew(u64, Option<u64>),
    Suspect,
    GiveUpOn(u64),
    Remove(u64),
    /// The host's clock goes on; the wall's jumps.
    Pass(u64, i64),
    Reboot,
    /// What was written down is loaded.
    Restart,
}

fn command() -> impl Strategy<Value = Command> {
    let n = || prop_oneof![3 => 0..24u64, 1 => BASES..BASES + 24];
    let spec = || prop_oneof![3 => 0..2u8, 2 => SHARED..SHARED + 2];
    let request = || prop::option::weighted(0.3, 0..6u8);
    let time = || prop::option::of(1..40u64);
    let number = || 100..104u32;
    // Mostly the right device and image.
    let chosen = (0..24u64, prop::option::weighted(0.1, 0..24u64), number(), prop::bool::weighted(0.1))
        .prop_map(|(lease, other, number, wrong)| Chosen {
            lease,
            seen: other.unwrap_or(lease),
            number,
            image: u8::from(wrong),
        });
    prop_oneof![
        6 => (0..3u8, spec(), time(), any::<bool>(), request(), prop::option::weighted(0.4, chosen))
            .prop_map(|(vm, spec, ttl, fresh, request, spare)| {
                Command::Acquire { vm, spec, ttl, fresh, request, spare }
            }),
        3 => (0..2u8).prop_map(Command::IntendSpare),
        2 => (n(), number()).prop_map(|(lease, number)| Command::AdoptSpare(lease, number)),
        1 => n().prop_map(Command::DropSpare),
        5 => n().prop_map(Command::Grant),
        1 => n().prop_map(Command::Fail),
        1 => n().prop_map(Command::See),
        4 => (0..3u8, prop::option::weighted(0.3, n()), prop::option::weighted(0.2, 1..24u64), request())
            .prop_map(|(vm, lease, generation, request)| Command::Release { vm, lease, generation, request }),
        2 => (n(), time()).prop_map(|(lease, ttl)| Command::Renew(lease, ttl)),
        2 => Just(Command::Suspect),
        2 => n().prop_map(Command::GiveUpOn),
        3 => n().prop_map(Command::Remove),
        2 => (0..30u64, -1_000_000_000_000..1_000_000_000_000i64).prop_map(|(up, wall)| Command::Pass(up, wall)),
        1 => Just(Command::Reboot),
        1 => Just(Command::Restart),
    ]
}

impl Oracle {
    fn now(&self) -> Moment {
        Moment { wall: UnixMicros(self.wall), ..at(self.boot, self.up) }
    }

    fn entry(&mut self, lease: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.lease == lease)
    }

    fn holder(&self, vm: u8) -> Option<usize> {
        self.entries.iter().position(|entry| entry.vm == vm && entry.stand.holds())
    }

    /// Releases what only this lease shares, which is about not to share it any more.
    fn unshare(&mut self, lease: u64) {
        let Some(base) = self.entry(lease).and_then(|entry| entry.shares) else { return };
        if self.entries.iter().any(|entry| entry.shares == Some(base) && entry.lease != lease) {
            return;
        }
        if let Some(base) = self.entry(base).filter(|base| base.stand.holds()) {
            base.stand = Stand::Releasing;
        }
    }

    /// The lease that is to be shared, which is made if there is none.
    fn share(&mut self, fresh_id: u64) -> u64 {
        if let Some(base) = self.holder(IMAGE) {
            return self.entries[base].lease;
        }
        let (lease, vm, spec) = (BASES + fresh_id, IMAGE, SHARED);
        self.intend(lease, vm, spec, (None, None));
        lease
    }

    fn intend(&mut self, lease: u64, vm: u8, spec: u8, (ttl, shares): (Option<u64>, Option<u64>)) {
        self.entries.push(Entry { lease, vm, spec, ttl, shares, number: None, stand: Stand::Preparing });
    }

    fn spare(&mut self, lease: u64) -> Option<&mut Entry> {
        let is_spare = |e: &&mut Entry| e.vm == SPARE && matches!(e.stand, Stand::Granted { .. });
        self.entry(lease).filter(is_spare)
    }

    /// Whether this spare can be handed out for that.
    fn can_hand_out(&mut self, chosen: Chosen, spec: u8) -> bool {
        let this_boot = self.boot;
        let is_seen = |e: &mut Entry| matches!(e.stand, Stand::Granted { boot, .. } if boot == this_boot);
        let is_right = chosen.seen == chosen.lease && chosen.image == 0 && spec < SHARED;
        is_right && self.spare(chosen.lease).is_some_and(is_seen)
    }

    fn see(&mut self, lease: u64) {
        match self.entry(lease).map(|entry| &mut entry.stand) {
            Some(Stand::Failed { cleared: true }) => self.entries.retain(|entry| entry.lease != lease),
            Some(stand @ Stand::Failed { .. }) => *stand = Stand::Releasing,
            _ => {}
        }
    }

    fn is_doubtful(&self, stand: &Stand) -> bool {
        match stand {
            Stand::Suspect { .. } => true,
            Stand::Granted { boot, until } => {
                *boot != self.boot || until.is_some_and(|until| until <= self.up)
            }
            _ => false,
        }
    }

    /// Whether the lease is the VM's then; `None`: refused.
    fn acquire(&mut self, command: &Command, fresh_id: u64) -> Option<u64> {
        let Command::Acquire { vm, spec, ttl, fresh, request, spare } = *command else { panic!() };
        if let Some((_, acquired, of, lease)) =
            request.and_then(|r| self.requests.iter().find(|k| k.0 == r)).copied()
        {
            let holds = self.entries.iter().find(|entry| Some(entry.lease) == lease && entry.stand.holds());
            if !acquired || of != vm || holds.is_none_or(|entry| entry.spec != spec) {
                return None;
            }
        }
        if let Some(holder) = self.holder(vm) {
            let entry = self.entries[holder].clone();
            let known = request.is_some_and(|r| self.requests.iter().any(|known| known.0 == r));
            if fresh && !known && self.is_doubtful(&entry.stand) {
                if spare.is_some_and(|chosen| !self.can_hand_out(chosen, spec)) {
                    return None;
                }
                self.entries[holder].stand = Stand::Releasing;
            } else if entry.spec != spec || entry.stand == Stand::Preparing {
                // One that is being made is found, and not kept yet.
                return (entry.spec == spec).then_some(entry.lease);
            } else {
                self.renew(entry.lease, ttl);
                self.note(request, true, vm, Some(entry.lease));
                return Some(entry.lease);
            }
        }
        if spare.is_some_and(|chosen| !self.can_hand_out(chosen, spec)) {
            return None;
        }
        let failed: Vec<u64> = self
            .entries
            .iter()
            .filter(|e| e.vm == vm && matches!(e.stand, Stand::Failed { .. }))
            .map(|e| e.lease)
            .collect();
        failed.into_iter().for_each(|lease| self.see(lease));
        let lease = spare.map_or(fresh_id, |chosen| chosen.lease);
        if let Some(chosen) = spare {
            let stand = Stand::Granted { boot: self.boot, until: ttl.map(|ttl| self.up + ttl) };
            let number = Some(chosen.number);
            *self.entry(lease).unwrap() = Entry { lease, vm, spec, ttl, shares: None, number, stand };
        } else {
            let shares = (spec >= SHARED).then(|| self.share(fresh_id));
            self.intend(lease, vm, spec, (ttl, shares));
        }
        self.note(request, true, vm, Some(lease));
        Some(lease)
    }

    fn note(&mut self, request: Option<u8>, acquired: bool, vm: u8, lease: Option<u64>) {
        if let Some(request) = request
            && !self.requests.iter().any(|known| known.0 == request)
        {
            self.requests.push((request, acquired, vm, lease));
        }
    }

    fn renew(&mut self, lease: u64, ttl: Option<u64>) -> bool {
        let (boot, up) = (self.boot, self.up);
        let Some(entry) = self.entry(lease) else { return false };
        if !matches!(entry.stand, Stand::Granted { .. } | Stand::Suspect { .. }) {
            return false;
        }
        if entry.vm == SPARE {
            return true;
        }
        entry.ttl = ttl.or(entry.ttl).filter(|_| entry.vm < IMAGE);
        entry.stand = Stand::Granted { boot, until: entry.ttl.map(|ttl| up + ttl) };
        true
    }

    /// What the lease is to be granted, and whether what it shares is there.
    fn grant_for(&mut self, lease: u64) -> (Grant, bool) {
        let Some(entry) = self.entry(lease).map(|entry| entry.clone()) else {
            return (grant(lease as u32), true);
        };
        let own = ScratchGrant { device: grant(lease as u32).device, filesystem: "ext4".into() };
        let root = grant(entry.shares.unwrap_or(lease) as u32);
        let base = entry.shares.and_then(|base| self.entry(base));
        let is_there =
            entry.shares.is_none() || base.is_some_and(|b| matches!(b.stand, Stand::Granted { .. }));
        (Grant { scratch: (entry.spec == SHARED + 1).then_some(own), ..root }, is_there)
    }

    fn fail(&mut self, lease: u64) {
        if self.entry(lease).is_none_or(|entry| entry.stand != Stand::Preparing) {
            return;
        }
        self.unshare(lease);
        self.requests.retain(|known| known.3 != Some(lease));
        let entry = self.entry(lease).unwrap();
        entry.shares = None;
        entry.stand = if entry.vm >= IMAGE { Stand::Releasing } else { Stand::Failed { cleared: false } };
    }

    fn suspect(&mut self) {
        let (boot, up) = (self.boot, self.up);
        let doubtful: Vec<bool> =
            self.entries.iter().map(|e| e.vm < IMAGE && self.is_doubtful(&e.stand)).collect();
        for (entry, doubtful) in self.entries.iter_mut().zip(doubtful) {
            match entry.stand {
                Stand::Granted { boot: of, .. } if doubtful && of == boot => {
                    entry.stand = Stand::Suspect { expired: true, boot, until: up + 10 };
                }
                Stand::Granted { .. } if doubtful => {
                    entry.stand = Stand::Suspect { expired: false, boot, until: up + 100 };
                }
                Stand::Suspect { boot: of, .. } if of != boot => {
                    entry.stand = Stand::Suspect { expired: false, boot, until: up + 100 };
                }
                _ => {}
            }
        }
    }
}

fn seconds(uptime: Uptime) -> u64 {
    uptime.0 / SECOND
}

fn boot_of(boot: BootId) -> u8 {
    (0..=255).find(|n| BootId::from_bits((*n).into()) == boot).unwrap()
}

fn stand(lease: &Lease) -> Stand {
    match &lease.state {
        State::Preparing => Stand::Preparing,
        State::Granted(_) => {
            Stand::Granted { boot: boot_of(lease.term.boot), until: lease.term.until.map(seconds) }
        }
        State::Suspect { why, boot, until, .. } => Stand::Suspect {
            expired: *why == Suspicion::Expired,
            boot: boot_of(*boot),
            until: seconds(*until),
        },
        State::Releasing { .. } => Stand::Releasing,
        State::Failed { cleared, .. } => Stand::Failed { cleared: *cleared },
    }
}

/// A book, and what would take the last step back.
#[derive(Default)]
struct Desk {
    book: Book,
    undo: Vec<Change>,
}

impl Desk {
    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            let undo = self.book.apply(change.clone());
            let once = self.book.clone();
            self.book.apply(change);
            assert_eq!(self.book, once, "made twice it is not as if made once");
            self.undo.push(undo);
        }
    }

    /// Takes the last step back, as a failed commit does.
    fn take_back(&self, before: &Book) {
        let mut book = self.book.clone();
        for undo in self.undo.iter().rev() {
            book.apply(undo.clone());
        }
        // These are never used again.
        (book.last_revision, book.last_generation) = (before.last_revision, before.last_generation);
        assert_eq!(&book, before, "a step that is taken back leaves a trace");
    }
}

/// Both do it, and come to the same.
fn step(desk: &mut Desk, oracle: &mut Oracle, fresh: u64, command: &Command) {
    let now = oracle.now();
    match command {
        Command::Acquire { vm: v, spec: s, ttl: time, fresh: anew, request: name, spare } => {
            let ask = Ask {
                spare: spare.map(Chosen::spare),
                vm: vm(*v),
                spec: spec(*s),
                ttl: time.map(ttl),
                fresh: *anew,
                expects: 0,
                request: name.map(request),
                share: (*s >= SHARED).then(|| Share { image: vm(IMAGE), fresh: id(BASES + fresh) }),
            };
            let expected = oracle.acquire(command, fresh);
            match (expected, desk.book.acquire(&ask, id(fresh), &now)) {
                (Some(n), Ok(Acquisition::New { lease, changes })) => {
                    assert_eq!((&lease.id, n), (&id(n), spare.map_or(fresh, |chosen| chosen.lease)));
                    assert!(desk.book.after(None).all(|other| other.generation < lease.generation));
                    desk.apply(changes);
                }
                (Some(n), Ok(Acquisition::Existing(lease))) => {
                    assert_eq!((&lease.id, &lease.spec), (&id(n), &spec(*s)));
                    match desk.book.keep(&ask, &lease.id, None, &now) {
                        Ok((_, changes)) => desk.apply(changes),
                        Err(error) => assert_eq!(error, BookError::StillPreparing(lease.id)),
                    }
                }
                (None, Err(_)) => {}
                (expected, got) => panic!("{expected:?} {got:?}"),
            }
        }
        Command::IntendSpare(s) => {
            let (lease, changes) = desk.book.intend_spare(id(fresh), spec(*s), &now).unwrap();
            assert!(desk.book.after(None).all(|other| other.generation < lease.generation));
            oracle.intend(fresh, SPARE, *s, (None, None));
            desk.apply(changes);
        }
        Command::AdoptSpare(n, number) => {
            let boot = oracle.boot;
            match (oracle.spare(*n), desk.book.adopt_spare(&id(*n), &seen(*n, *number), &now)) {
                (Some(entry), Ok((_, changes))) => {
                    entry.stand = Stand::Granted { boot, until: None };
                    entry.number = Some(*number);
                    desk.apply(changes);
                }
                (None, Err(error)) => assert_eq!(error, BookError::NoSpare(id(*n))),
                (entry, got) => panic!("{entry:?} {got:?}"),
            }
        }
        Command::DropSpare(n) => {
            oracle.spare(*n).into_iter().for_each(|entry| entry.stand = Stand::Releasing);
            let changes = desk.book.drop_spare(&id(*n), &now);
            desk.apply(changes);
        }
        Command::Grant(n) => {
            let (boot, up) = (oracle.boot, oracle.up);
            let (granted, is_there) = oracle.grant_for(*n);
            let entry = oracle.entry(*n).filter(|entry| entry.stand == Stand::Preparing);
            match (entry, desk.book.grant(&id(*n), granted, &now)) {
                (Some(_), Err(BookError::NotShared { .. })) if !is_there => {}
                (Some(entry), Ok((_, changes))) if is_there => {
                    entry.stand = Stand::Granted { boot, until: entry.ttl.map(|ttl| up + ttl) };
                    desk.apply(changes);
                }
                (None, Err(BookError::NotPreparing(_))) => {}
                (entry, got) => panic!("{entry:?} {got:?}"),
            }
        }
        Command::Fail(n) => {
            oracle.fail(*n);
            let changes = desk.book.fail(&id(*n), failure(), &now);
            desk.apply(changes);
        }
        Command::See(n) => {
            oracle.see(*n);
            let changes = desk.book.see(&id(*n), &now);
            desk.apply(changes);
        }
        Command::Release { vm: v, lease, generation, request: name } => {
            release(desk, oracle, (*v, *lease, *generation, *name), &now);
        }
        Command::Renew(n, time) => {
            let renewed = oracle.renew(*n, *time);
            let outcome = desk.book.renew(&id(*n), time.map(ttl), None, &now);
            assert_eq!(outcome.is_ok(), renewed, "{outcome:?}");
            if let Ok((_, changes)) = outcome {
                desk.apply(changes);
            }
        }
        Command::Suspect => {
            oracle.suspect();
            let changes = desk.book.suspect(grace(), &now);
            desk.apply(changes);
        }
        Command::GiveUpOn(n) => {
            let (boot, up) = (oracle.boot, oracle.up);
            if let Some(entry) = oracle.entry(*n)
                && matches!(entry.stand, Stand::Suspect { boot: of, until, .. } if of == boot && until <= up)
            {
                entry.stand = Stand::Releasing;
            }
            let changes = desk.book.give_up_on(&id(*n), &now);
            desk.apply(changes);
        }
        Command::Remove(n) => {
            let shared = oracle.entries.iter().any(|entry| entry.shares == Some(*n));
            match (oracle.entry(*n).map(|entry| &mut entry.stand), desk.book.remove(&id(*n), &now)) {
                (Some(Stand::Releasing), Ok(changes)) if shared => assert!(changes.is_empty()),
                (Some(Stand::Releasing), Ok(changes)) => {
                    oracle.unshare(*n);
                    oracle.entries.retain(|entry| entry.lease != *n);
                    desk.apply(changes);
                }
                (Some(stand @ Stand::Failed { .. }), Ok(changes)) => {
                    *stand = Stand::Failed { cleared: true };
                    desk.apply(changes);
                }
                (None, Ok(changes)) => assert!(changes.is_empty()),
                (Some(stand), Err(BookError::NotReleasing(_))) => assert!(stand.holds()),
                (stand, got) => panic!("{stand:?} {got:?}"),
            }
        }
        Command::Pass(up, wall) => {
            oracle.up += up;
            oracle.wall = *wall;
        }
        Command::Reboot => {
            oracle.boot = oracle.boot.wrapping_add(1);
            oracle.up = 0;
        }
        Command::Restart => {
            let stored = stored(&desk.book);
            assert_eq!(Book::load(stored).as_ref(), Ok(&desk.book));
        }
    }
}

fn release(
    desk: &mut Desk,
    oracle: &mut Oracle,
    (v, lease, generation, name): (u8, Option<u64>, Option<u64>, Option<u8>),
    now: &Moment,
) {
    let generation = generation.map(Generation);
    let ask =
        Release { vm: vm(v), lease: lease.map(id), generation, request: name.map(request), abandon: false };
    let outcome = desk.book.release(&ask, now);
    if let Some(known) = name.and_then(|name| oracle.requests.iter().find(|known| known.0 == name)).copied() {
        let fits = !known.1 && known.2 == v;
        assert_eq!(outcome.is_ok(), fits, "{outcome:?}");
        assert!(outcome.is_err() || outcome.is_ok_and(|(_, changes)| changes.is_empty()));
        return;
    }
    let generations: BTreeMap<u64, Generation> = desk
        .book
        .after(None)
        .map(|l| (oracle.entries.iter().find(|e| id(e.lease) == l.id).unwrap().lease, l.generation))
        .collect();
    let of_vm = |entries: &[Entry]| {
        let rank = |entry: &Entry| match &entry.stand {
            stand if stand.holds() => 2,
            Stand::Failed { .. } => 1,
            _ => 0,
        };
        entries.iter().filter(|e| e.vm == v).max_by_key(|e| (rank(e), generations[&e.lease])).map(|e| e.lease)
    };
    let found = match lease {
        Some(lease) => oracle.entries.iter().find(|e| e.lease == lease && e.vm == v).map(|e| e.lease),
        None => of_vm(&oracle.entries),
    };
    let found = found.filter(|lease| generation.is_none_or(|g| generations[lease] == g));
    let (outcome, changes) = outcome.unwrap();
    desk.apply(changes);
    oracle.note(name, false, v, found);
    let Some(lease) = found else { return assert_eq!(outcome, Releasing::Nothing) };
    let entry = oracle.entry(lease).unwrap();
    if entry.stand.holds() {
        entry.stand = Stand::Releasing;
        assert!(matches!(outcome, Releasing::Now(l) if l.id == id(lease)));
    } else {
        oracle.see(lease);
        assert!(matches!(outcome, Releasing::Again(l) if l.id == id(lease)));
    }
}

fn compare(book: &Book, oracle: &Oracle) {
    let owner = |e: &Entry| if e.vm == SPARE { VmId::of_spare(&id(e.lease)) } else { vm(e.vm) };
    let number = |e: &Entry| e.number.map(|minor| DeviceNumber { major: 253, minor });
    let entry = |e: &Entry| (id(e.lease), owner(e), spec(e.spec), e.shares.map(id), e.stand.clone());
    let mut expected: Vec<_> = oracle.entries.iter().map(entry).collect();
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    let lease = |l: &Lease| (l.id.clone(), l.vm.clone(), l.spec.clone(), l.shares.clone(), stand(l));
    let found: Vec<_> = book.after(None).map(lease).collect();
    assert_eq!(found, expected);
    for (e, number) in oracle.entries.iter().filter_map(|e| Some((e, number(e)?))) {
        let grant = book.get(&id(e.lease)).and_then(Lease::grant);
        assert_eq!(grant.map(|grant| grant.device.number), Some(number), "lease {}", e.lease);
    }
    let mut requests: Vec<_> =
        oracle.requests.iter().map(|(r, a, v, l)| (request(*r), *a, vm(*v), l.map(id))).collect();
    requests.sort();
    let known: Vec<_> = book
        .requests
        .iter()
        .map(|(r, known)| (r.clone(), known.kind == Kind::Acquire, known.vm.clone(), known.lease.clone()))
        .collect();
    assert_eq!(known, requests);
}

/// A watcher that is told what has changed since the revision that it knows.
#[derive(Default)]
struct Mirror {
    revision: Revision,
    leases: BTreeMap<LeaseId, Lease>,
}

impl Mirror {
    fn catch_up(&mut self, book: &Book) {
        assert!(book.remembers(self.revision));
        for lease in book.changed_after(self.revision) {
            self.leases.insert(lease.id.clone(), lease.clone());
        }
        for gone in book.gone_after(self.revision) {
            self.leases.remove(&gone.id);
        }
        self.revision = book.last_revision();
        assert!(self.leases.values().eq(book.after(None)), "the mirror is not what the book is");
    }
}

/// How many sequences of commands are tried; COWSHED_SEQUENCES says it otherwise.
fn sequences() -> u32 {
    std::env::var("COWSHED_SEQUENCES").map_or(100_000, |text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: sequences(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_oracle(commands in prop::collection::vec(command(), 1..40)) {
        let mut desk = Desk::default();
        let mut oracle = Oracle::default();
        let mut mirror = Mirror::default();
        for (fresh, command) in commands.iter().enumerate() {
            let before = desk.book.clone();
            desk.undo.clear();
            step(&mut desk, &mut oracle, fresh as u64, command);
            compare(&desk.book, &oracle);
            desk.take_back(&before);
            if fresh % 3 == 0 {
                mirror.catch_up(&desk.book);
            }
        }
        mirror.catch_up(&desk.book);
    }
}
