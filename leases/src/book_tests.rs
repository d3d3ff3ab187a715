#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;

use super::*;
use crate::{DeviceIdentity, DeviceNumber, Process};

fn vm(n: u8) -> VmId {
    format!("vm{n}").parse().unwrap()
}

fn spec(n: u8) -> Spec {
    Spec { image: format!("registry.example/app:{n}"), platform: "linux/amd64".into() }
}

fn id(n: u64) -> LeaseId {
    LeaseId::from_random(u128::from(n))
}

fn grant(n: u32) -> Grant {
    let number = DeviceNumber { major: 253, minor: n };
    let device = DeviceIdentity {
        path: format!("/dev/mapper/snap-{n}"),
        number,
        dm_name: format!("snap-{n}"),
        dm_uuid: None,
        thin_id: n,
        pool: DeviceNumber { major: 253, minor: 0 },
        size_bytes: 1 << 30,
    };
    let process = Process::default();
    Grant { device, filesystem: "ext4".into(), image_digest: "sha256:0".into(), process, at: UnixMicros(1) }
}

fn acquired(book: &mut Book, vm: &VmId, spec: &Spec, fresh: LeaseId) -> Lease {
    match book.acquire(vm, spec, fresh, UnixMicros(0)).unwrap() {
        Acquisition::New(lease) => {
            book.apply(Change::Put(lease.clone()));
            *lease
        }
        Acquisition::Existing(lease) => *lease,
    }
}

#[test]
fn acquire_is_idempotent_by_vm_and_spec() {
    let mut book = Book::default();
    let first = acquired(&mut book, &vm(1), &spec(1), id(1));
    assert_eq!(acquired(&mut book, &vm(1), &spec(1), id(2)), first);
    assert_ne!(acquired(&mut book, &vm(2), &spec(1), id(3)).id, first.id);
}

#[test]
fn another_spec_is_a_conflict_that_names_what_differs() {
    let mut book = Book::default();
    let held = acquired(&mut book, &vm(1), &spec(1), id(1));
    let error = book.acquire(&vm(1), &spec(2), id(2), UnixMicros(0)).unwrap_err();
    let BookError::Conflict { lease, differences, .. } = error else { panic!("{error}") };
    assert_eq!(lease, held.id);
    assert_eq!(differences.len(), 1);
    assert_eq!((differences[0].field, differences[0].asked.as_str()), ("image", "registry.example/app:2"));
}

#[test]
fn a_released_vm_gets_a_new_generation_while_the_old_disk_is_reclaimed() {
    let mut book = Book::default();
    let old = acquired(&mut book, &vm(1), &spec(1), id(1));
    book.apply(book.grant(&old.id, grant(1)).unwrap());
    book.apply(book.release(&old.id, UnixMicros(9)).unwrap());
    assert!(book.release(&old.id, UnixMicros(10)).is_none(), "a second release changes nothing");
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, old.id);

    let new = acquired(&mut book, &vm(1), &spec(2), id(2));
    assert!(new.generation > old.generation);
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, new.id);
    assert_eq!(book.get(&old.id).unwrap().grant(), Some(&grant(1)), "its device is still known");

    book.apply(book.remove(&old.id).unwrap().unwrap());
    assert_eq!(book.remove(&old.id).unwrap(), None);
    assert_eq!(book.of_vm(&vm(1)).unwrap().id, new.id);
}

#[test]
fn only_a_lease_in_preparation_is_granted_and_only_a_released_one_removed() {
    let mut book = Book::default();
    let lease = acquired(&mut book, &vm(1), &spec(1), id(1));
    assert_eq!(book.remove(&lease.id), Err(BookError::NotReleasing(lease.id.clone())));
    book.apply(book.release(&lease.id, UnixMicros(1)).unwrap());
    assert_eq!(book.grant(&lease.id, grant(1)), Err(BookError::NotPreparing(lease.id.clone())));
    assert_eq!(book.grant(&id(7), grant(1)), Err(BookError::NotPreparing(id(7))));
}

#[test]
fn a_device_is_granted_to_one_lease_until_that_is_gone() {
    let mut book = Book::default();
    let a = acquired(&mut book, &vm(1), &spec(1), id(1));
    let b = acquired(&mut book, &vm(2), &spec(1), id(2));
    book.apply(book.grant(&a.id, grant(1)).unwrap());
    let taken = BookError::DeviceTaken { device: "snap-1".into(), owner: a.id.clone(), asked: b.id.clone() };
    assert_eq!(book.grant(&b.id, grant(1)), Err(taken.clone()));
    book.apply(book.release(&a.id, UnixMicros(2)).unwrap());
    assert_eq!(book.grant(&b.id, grant(1)), Err(taken));
    book.apply(book.remove(&a.id).unwrap().unwrap());
    assert!(book.grant(&b.id, grant(1)).is_ok());
}

#[test]
fn a_book_in_which_two_leases_hold_one_vm_is_refused() {
    let mut book = Book::default();
    let a = acquired(&mut book, &vm(1), &spec(1), id(1));
    let b = Lease { id: id(2), generation: Generation(2), ..a.clone() };
    assert!(Book::load([a.clone(), b], 2).unwrap_err().contains("held by both"));
    assert!(Book::load([a], 0).unwrap_err().contains("never given out"));
}

/// The naive oracle: a list of (lease, vm, spec, state), searched from end to end.
#[derive(Default)]
struct Oracle(Vec<(LeaseId, VmId, Spec, &'static str)>);

#[derive(Clone, Debug)]
enum Command {
    Acquire(u8, u8),
    Grant(u64),
    Release(u64),
    Remove(u64),
    /// Apply, then take back.
    Undo(u64),
    /// Write down and load again.
    Restart,
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        4 => (0..3u8, 0..2u8).prop_map(|(v, s)| Command::Acquire(v, s)),
        3 => (0..24u64).prop_map(Command::Grant),
        3 => (0..24u64).prop_map(Command::Release),
        2 => (0..24u64).prop_map(Command::Remove),
        1 => (0..24u64).prop_map(Command::Undo),
        1 => Just(Command::Restart),
    ]
}

fn state_of(lease: &Lease) -> &'static str {
    match lease.state {
        State::Preparing => "preparing",
        State::Granted(_) => "granted",
        State::Releasing { .. } => "releasing",
    }
}

fn step(book: &mut Book, oracle: &mut Oracle, fresh: u64, command: Command) {
    match command {
        Command::Acquire(v, s) => {
            let held = oracle.0.iter().find(|(_, owner, _, state)| *owner == vm(v) && *state != "releasing");
            match (held, book.acquire(&vm(v), &spec(s), id(fresh), UnixMicros(0))) {
                (None, Ok(Acquisition::New(lease))) => {
                    assert!(book.after(None).all(|other| other.generation < lease.generation));
                    book.apply(Change::Put(lease));
                    oracle.0.push((id(fresh), vm(v), spec(s), "preparing"));
                }
                (Some(held), Ok(Acquisition::Existing(lease))) => {
                    assert_eq!((&held.0, &held.2), (&lease.id, &spec(s)));
                }
                (Some(held), Err(BookError::Conflict { lease, .. })) => {
                    assert_eq!(held.0, lease);
                    assert_ne!(held.2, spec(s));
                }
                (held, got) => panic!("{held:?} {got:?}"),
            }
        }
        Command::Grant(n) => {
            let entry = oracle.0.iter_mut().find(|entry| entry.0 == id(n) && entry.3 == "preparing");
            let change = book.grant(&id(n), grant(n as u32));
            assert_eq!(entry.is_some(), change.is_ok());
            if let (Some(entry), Ok(change)) = (entry, change) {
                entry.3 = "granted";
                book.apply(change);
            }
        }
        Command::Release(n) => {
            let entry = oracle.0.iter_mut().find(|entry| entry.0 == id(n) && entry.3 != "releasing");
            let change = book.release(&id(n), UnixMicros(2));
            assert_eq!(entry.is_some(), change.is_some());
            if let (Some(entry), Some(change)) = (entry, change) {
                entry.3 = "releasing";
                book.apply(change);
            }
        }
        Command::Remove(n) => {
            let at = oracle.0.iter().position(|entry| entry.0 == id(n));
            match (at, book.remove(&id(n))) {
                (None, Ok(None)) => {}
                (Some(at), Ok(Some(change))) if oracle.0[at].3 == "releasing" => {
                    oracle.0.remove(at);
                    book.apply(change);
                }
                (Some(at), Err(BookError::NotReleasing(_))) => assert_ne!(oracle.0[at].3, "releasing"),
                (at, got) => panic!("{at:?} {got:?}"),
            }
        }
        Command::Undo(n) => {
            let before = book.clone();
            if let Some(change) = book.release(&id(n), UnixMicros(3)) {
                let undo = book.apply(change);
                book.apply(undo);
            }
            assert_eq!(*book, before);
        }
        Command::Restart => {
            let stored: Vec<Lease> = book.after(None).cloned().collect();
            assert_eq!(Book::load(stored, book.last_generation()).as_ref(), Ok(&*book));
        }
    }
    let mut expected: Vec<_> = oracle.0.iter().map(|(id, _, _, state)| (id.clone(), *state)).collect();
    expected.sort();
    let found: Vec<_> = book.after(None).map(|lease| (lease.id.clone(), state_of(lease))).collect();
    assert_eq!(found, expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_oracle(commands in prop::collection::vec(command(), 1..40)) {
        let mut book = Book::default();
        let mut oracle = Oracle::default();
        for (fresh, command) in commands.into_iter().enumerate() {
            step(&mut book, &mut oracle, fresh as u64, command);
        }
    }
}
