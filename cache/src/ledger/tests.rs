#![allow(clippy::unwrap_used)]

use std::fs;

use cowshed_leases::{Spec, State, Uptime};

use super::{schema::RESERVE, *};
use crate::fakes::book::{ask, back, grant, id, now, spec};

fn vm(n: u32) -> VmId {
    ask(n).vm
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let writes = (0..200).map(|n| {
        let ledger = ledger.clone();
        tokio::spawn(
            async move { ledger.acquire(ask(n % 100), id(n), now(), GivenUp::default()).await.unwrap() },
        )
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap();
    }
    ledger.begin_pull("cowshed-pull-1".into(), "a".into()).await.unwrap();
    let some = ledger.read(|book| book.of_vm(&vm(7)).unwrap().clone());
    ledger.release(back(7), now()).await.unwrap();
    let before = ledger.read(Clone::clone);
    assert_eq!(before.after(None).count(), 100, "two acquires of one VM are one lease");
    drop(ledger);

    let ledger = Ledger::open(directory.path()).unwrap();
    let all = |book: &Book| book.after(None).cloned().collect::<Vec<_>>();
    assert_eq!(ledger.read(all), all(&before));
    assert!(ledger.read(Book::last_generation) >= before.last_generation());
    assert!(ledger.read(Book::last_revision) >= before.last_revision());
    assert_eq!(ledger.pulls().keys().collect::<Vec<_>>(), ["cowshed-pull-1"]);
    assert!(matches!(ledger.read(|b| b.get(&some.id).unwrap().state.clone()), State::Releasing { .. }));
    ledger.remove_all(vec![some.id.clone()], now()).await.unwrap();
    assert_eq!(ledger.pulls_of_no_job(), ["cowshed-pull-1"]);
    ledger.end_pull("cowshed-pull-1".into()).await.unwrap();
    drop(ledger);

    let ledger = Ledger::open(directory.path()).unwrap();
    assert_eq!(ledger.read(|b| b.after(None).count()), 99);
    assert!(ledger.pulls().is_empty());
    let again = ledger.acquire(ask(7), id(999), now(), GivenUp::default()).await.unwrap();
    let Acquisition::New { lease: again, .. } = again else { unreachable!("{again:?}") };
    assert!(again.generation > some.generation, "a generation is never given out twice");
}

#[tokio::test]
async fn what_is_given_out_was_reserved_and_is_never_given_out_again() {
    let directory = tempfile::tempdir().unwrap();
    let reserved = || {
        let connection = Connection::open(directory.path().join("ledger.db")).unwrap();
        let read = |name| {
            let sql = "SELECT value FROM counters WHERE name = ?";
            connection.query_row(sql, [name], |row| row.get::<_, i64>(0)).unwrap().unsigned_abs()
        };
        (read("last_generation"), read("last_revision"))
    };
    let mut greatest = (0, 0);
    for run in 0..3 {
        let ledger = Ledger::open(directory.path()).unwrap();
        for n in 0..u32::try_from(RESERVE).unwrap() + 1 {
            let n = 1000 * run + n;
            let Acquisition::New { lease, .. } =
                ledger.acquire(ask(n), id(n), now(), GivenUp::default()).await.unwrap()
            else {
                unreachable!("VM {n} has no lease")
            };
            let given = (lease.generation.0, lease.revision.0);
            assert!(given.0 > greatest.0 && given.1 > greatest.1, "{given:?} after {greatest:?}");
            let reserved = reserved();
            assert!(given.0 <= reserved.0 && given.1 <= reserved.1, "{given:?}, reserved {reserved:?}");
            greatest = given;
        }
        // Not closed in order; what is there was durable at each answer.
        std::mem::forget(ledger.clone());
        assert!(ledger.read(|book| book.last_generation()) <= reserved().0);
    }
}

#[tokio::test]
async fn leases_are_gathered_a_page_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    for count in [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE] {
        let there = ledger.read(|book| book.after(None).count());
        let more = (there..count).map(|n| {
            let ledger = ledger.clone();
            let n = u32::try_from(n).unwrap();
            tokio::spawn(
                async move { ledger.acquire(ask(n), id(n), now(), GivenUp::default()).await.unwrap() },
            )
        });
        for write in more.collect::<Vec<_>>() {
            write.await.unwrap();
        }
        let all: Vec<LeaseId> = ledger.read(|book| book.after(None).map(|lease| lease.id.clone()).collect());
        assert_eq!(all.len(), count);
        assert_eq!(ledger.gather(|lease| Some(lease.id.clone())), all);
        let some = ledger.gather(|lease| (lease.id == id(0)).then(|| lease.vm.clone()));
        assert_eq!(some.len(), count.min(1), "only what is picked");
    }
}

#[tokio::test]
async fn closing_leaves_one_file_with_all_that_was_queued() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let writes: Vec<_> = (0..50)
        .map(|n| {
            let ledger = ledger.clone();
            tokio::spawn(async move { ledger.acquire(ask(n), id(n), now(), GivenUp::default()).await })
        })
        .collect();
    for write in writes {
        write.await.unwrap().unwrap();
    }
    ledger.close().await;
    let left: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["ledger.db"]);
    let refused = ledger.acquire(ask(51), id(51), now(), GivenUp::default()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::Stopping);
    ledger.close().await;
    assert_eq!(Ledger::open(directory.path()).unwrap().read(|b| b.after(None).count()), 50);
}

#[tokio::test]
async fn a_damaged_ledger_is_reported_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger.db");
    let ledger = Ledger::open(directory.path()).unwrap();
    ledger.acquire(ask(1), id(1), now(), GivenUp::default()).await.unwrap();
    drop(ledger);
    wait_for_close(&path);
    let good = fs::read(&path).unwrap();

    let mut flipped = good.clone();
    for byte in &mut flipped[4096..] {
        *byte ^= 0x5a;
    }
    let mut newer = good.clone();
    newer[60..64].copy_from_slice(&7u32.to_be_bytes());
    let mut foreign = good.clone();
    foreign[68..72].copy_from_slice(&0u32.to_be_bytes());
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("empty", Vec::new(), "it is empty"),
        ("truncated", good[..good.len() / 2].to_vec(), "damaged"),
        ("flipped bytes", flipped, "damaged"),
        ("other file", b"not a database, surely, as anyone can see".to_vec(), "damaged"),
        ("newer", newer, "has format 7"),
        ("foreign database", foreign, "not a ledger"),
    ];
    for (name, bytes, expected) in cases {
        fs::write(&path, &bytes).unwrap();
        let error = Ledger::open(directory.path()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected) && error.contains("ledger.db"), "{name}: {error:?}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{name}: touched");
    }
    fs::remove_file(&path).unwrap();
    fs::write(path.with_extension("db-wal"), b"frames").unwrap();
    let error = Ledger::open(directory.path()).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("write-ahead log is there") && error.contains("ledger.db-shm"), "{error:?}");
    fs::remove_file(path.with_extension("db-wal")).unwrap();

    fs::write(&path, &good).unwrap();
    assert_eq!(Ledger::open(directory.path()).unwrap().read(|b| b.after(None).count()), 1);
}

/// The writer's thread closes the file, and folds the log into it, when the last handle is gone.
fn wait_for_close(path: &Path) {
    while path.with_extension("db-wal").exists() {
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_half_made_ledger_is_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("ledger.db.new"), b"torn").unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    assert_eq!(ledger.read(|b| b.after(None).count()), 0);
}

#[tokio::test]
async fn conflicts_name_what_differs() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    ledger.acquire(ask(1), id(1), now(), GivenUp::default()).await.unwrap();
    let other = Spec { image: "registry.example/other:2".into(), ..spec() };
    let error =
        ledger.acquire(Ask { spec: other, ..ask(1) }, id(2), now(), GivenUp::default()).await.unwrap_err();
    assert_eq!(error.reason(), Reason::SpecConflict);
    for part in ["vm-1", id(1).as_str(), "image", "registry.example/app:1", "registry.example/other:2"] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[tokio::test]
async fn a_release_finds_what_was_asked_for_just_before_and_what_was_given_up_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let given_up = GivenUp::default();
    // Both queue up before either is published.
    let (asked, released) =
        tokio::join!(ledger.acquire(ask(1), id(1), now(), given_up.clone()), ledger.release(back(1), now()),);
    assert!(matches!(asked.unwrap(), Acquisition::New { .. }));
    let Releasing::Now(lease) = released.unwrap() else { unreachable!("not found") };
    assert!(matches!(lease.state, State::Releasing { .. }));
    let again = ledger.release(Release { lease: Some(id(1)), ..back(1) }, now()).await.unwrap();
    assert_eq!(again, Releasing::Again(lease));
    let other = Release { lease: Some(id(1)), ..back(2) };
    assert_eq!(ledger.release(other, now()).await.unwrap(), Releasing::Nothing);

    given_up.set();
    let refused = ledger.acquire(ask(1), id(2), now(), given_up).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::Released);
    assert!(ledger.read(|book| book.get(&id(2)).is_none()));
}

#[tokio::test]
async fn what_has_become_doubtful_is_not_renewed_unseen_with_others() {
    let directory = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    let later = Moment { up: Uptime(60_000_000), ..now() };
    for n in [1, 2] {
        let ttl = Ttl::from_seconds(if n == 1 { 30 } else { 3000 }).ok();
        ledger.acquire(Ask { ttl, ..ask(n) }, id(n), now(), GivenUp::default()).await.unwrap();
        ledger.grant(id(n), grant(n), now()).await.unwrap();
    }
    let both = || [1, 2].map(|n| (id(n), None, None)).to_vec();
    let renewed = ledger.renew_all(both(), later).await.unwrap();
    assert_eq!(renewed[0], Err(BookError::Doubtful(id(1))));
    assert_eq!(renewed[1].as_ref().unwrap().term.until, Some(Uptime(3_060_000_000)));
    let seen =
        ledger.renew(id(1), None, Some(Seen { root: grant(1).device, scratch: None }), later).await.unwrap();
    assert_eq!(seen.term.until, Some(Uptime(90_000_000)));
}
