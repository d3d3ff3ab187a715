#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use cowshed_leases::{Lease, LeaseId, Release, Ttl, UnixMicros};
use cowshed_pool::store::file::{BEFORE_RESTORE, OpenError, RESTORING, beside};
use rusqlite::Connection;
use tempfile::TempDir;

use super::super::schema::RESERVE;
use super::{
    copy::PrivateCopy,
    restore::{carry_out, prepare},
    *,
};
use crate::{
    exit,
    fakes::book::{acquire, now},
    ledger::Ledger,
    serve::lock,
};

const NOW: i64 = 1_800_000_000;

/// All files of a directory, but the lock, with their contents.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let files = entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()));
    files.filter(|(name, _)| name != "lock").collect()
}

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let ledger = directory.path().join("ledger.db");
    (directory, ledger)
}

async fn release(ledger: &Ledger, lease: &Lease) {
    let ask = Release {
        vm: lease.vm.clone(),
        lease: Some(lease.id.clone()),
        generation: None,
        request: None,
        abandon: false,
    };
    ledger.release(ask, now()).await.unwrap();
}

/// Makes, or goes on with, a ledger in which these VMs have leases.
async fn ledger_with(directory: &Path, vms: std::ops::Range<u32>) {
    let ledger = Ledger::open(directory).unwrap();
    for n in vms {
        acquire(&ledger, n).await;
    }
    ledger.close().await;
}

async fn vms(directory: &Path) -> Vec<String> {
    let ledger = Ledger::open(directory).unwrap();
    let mut vms: Vec<String> = ledger.read(|book| book.after(None).map(|l| l.vm.to_string()).collect());
    ledger.close().await;
    vms.sort();
    vms
}

/// Brings a ledger into `directory` as a power cut leaves one: the last leases are in its log only.
async fn killed_with(directory: &Path, vms: std::ops::Range<u32>) {
    let (alive, _) = place();
    ledger_with(alive.path(), vms.start..vms.start + 1).await;
    let ledger = Ledger::open(alive.path()).unwrap();
    for n in vms.start + 1..vms.end {
        acquire(&ledger, n).await;
    }
    for name in files(alive.path()).keys() {
        fs::copy(alive.path().join(name), directory.join(name)).unwrap();
    }
    assert!(directory.join("ledger.db-shm").exists());
    ledger.close().await;
}

fn change(ledger: &Path, sql: &str) {
    Connection::open(ledger).unwrap().execute_batch(sql).unwrap();
}

#[tokio::test]
async fn a_ledger_is_checked_while_it_is_in_use_and_after_and_not_a_byte_is_changed() {
    let (directory, path) = place();
    let ledger = Ledger::open(directory.path()).unwrap();
    acquire(&ledger, 1).await;
    let lease = acquire(&ledger, 2).await;
    release(&ledger, &lease).await;
    ledger.pin("r.example/app:1".to_owned(), None, 0, now()).await.unwrap();
    let leases = [("preparing".to_owned(), 1), ("releasing".to_owned(), 1)].into();
    let format = format_of(&path);
    let expected = Findings { format, leases, pins: 1, last_generation: 1 + RESERVE, problems: Vec::new() };
    let check_unseen = |when: &str| {
        let before = files(directory.path());
        assert_eq!(check(&path).unwrap(), expected, "{when}");
        assert!(files(directory.path()) == before, "{when}: something was changed or made");
    };
    check_unseen("in use");
    ledger.close().await;
    check_unseen("closed");
    killed_with(directory.path(), 3..9).await;
    let before = files(directory.path());
    assert_eq!(check(&path).unwrap().leases.values().sum::<u64>(), 6, "what is in the log only");
    assert!(files(directory.path()) == before, "a ledger that was not closed was changed");
}

fn format_of(path: &Path) -> i64 {
    let header = fs::read(path).unwrap();
    u32::from_be_bytes(header[60..64].try_into().unwrap()).into()
}

type Mangle = fn(&Path);

/// What can be wrong with a ledger that has the VMs 1 to 3, and what is said of it.
const DAMAGES: [(&str, Mangle, &str); 10] = [
    ("empty", |path| fs::write(path, b"").unwrap(), "it is empty"),
    ("truncated", |path| rewrite(path, |bytes| bytes.truncate(bytes.len() / 2)), "malformed"),
    ("a page of noise", |path| rewrite(path, |bytes| bytes[4096..8192].fill(0x5a)), "page 2"),
    ("one flipped bit", |path| rewrite(path, |bytes| bytes[4096] ^= 0x04), "page 2"),
    ("another file", |path| fs::write(path, b"not a database, as anyone can see").unwrap(), "not a database"),
    ("another program's", |path| change(path, "PRAGMA application_id = 7"), "not a ledger"),
    (
        "a lease that cannot be read",
        |path| change(path, "UPDATE leases SET body = '{}' WHERE vm = 'vm-2'"),
        "00000002: missing field",
    ),
    (
        "a VM with two leases",
        |path| change(path, r#"UPDATE leases SET body = replace(body, '"vm-2"', '"vm-1"')"#),
        "VM vm-1 is held by both",
    ),
    (
        "a generation from nowhere",
        |path| change(path, "UPDATE counters SET value = 1 WHERE name = 'last_generation'"),
        "never given out",
    ),
    ("a pin of nothing", |path| change(path, "INSERT INTO pins VALUES ('a b', NULL)"), "a pin: image"),
];

fn rewrite(path: &Path, mangle: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    mangle(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn damage_is_told_with_its_way_out_and_never_copied_nor_restored_nor_touched() {
    for (name, mangle, expected) in DAMAGES {
        let (directory, path) = place();
        ledger_with(directory.path(), 1..4).await;
        mangle(&path);
        let (elsewhere, backup_of_it) = place();
        let before = files(directory.path());

        let findings = check(&path).unwrap();
        let told = |p: &Problem| p.what.contains(expected) && p.way_out.contains("cowshed ledger restore");
        assert!(findings.problems.iter().any(told), "{name}: {findings:?}");

        let refused = backup(&path, &backup_of_it, IfThere::Replace).unwrap_err();
        assert_eq!(refused.exit_status(), exit::LEDGER_DAMAGED, "{name}: {refused}");
        assert!(refused.to_string().contains("No backup was made"), "{name}: {refused}");
        assert!(files(elsewhere.path()).is_empty(), "{name}: something was left of the backup");

        ledger_with(elsewhere.path(), 7..9).await;
        let present = files(elsewhere.path());
        let refused = restore(elsewhere.path(), &path, NOW).unwrap_err();
        assert_eq!(refused.exit_status(), exit::LEDGER_DAMAGED, "{name}: {refused}");
        assert!(refused.to_string().contains("look for another backup"), "{name}: {refused}");
        assert!(files(elsewhere.path()) == present, "{name}: the present ledger was touched");
        assert!(!elsewhere.path().join("lock").exists(), "{name}");

        assert!(files(directory.path()) == before, "{name}: the damaged ledger was touched");
    }
}

#[tokio::test]
async fn what_sqlite_says_before_it_cannot_go_on_is_told_first() {
    let (directory, path) = place();
    ledger_with(directory.path(), 1..4).await;
    rewrite(&path, |bytes| bytes[8192..8704].fill(0x5a));
    let problems = check(&path).unwrap().problems;
    assert!(problems[0].what.contains("page 3"), "{problems:?}");
    for problem in &problems {
        assert!(problem.way_out.contains("dmesg"), "{problem:?}");
    }
}

#[tokio::test]
async fn every_lease_that_cannot_be_read_is_named() {
    let (directory, path) = place();
    ledger_with(directory.path(), 1..5).await;
    change(&path, "UPDATE leases SET body = 'x' WHERE vm IN ('vm-2', 'vm-4')");
    let problems: Vec<String> = check(&path).unwrap().problems.into_iter().map(|p| p.what).collect();
    assert_eq!(problems.len(), 2, "{problems:?}");
    for (problem, n) in problems.iter().zip([2, 4]) {
        assert!(problem.contains(LeaseId::from_random(n).as_str()), "{problem}");
    }
}

#[tokio::test]
async fn what_cannot_be_checked_says_what_to_do() {
    let (directory, path) = place();
    let refused = check(&path).unwrap_err();
    assert!(matches!(refused, ToolError::Missing { .. }), "{refused}");
    assert_eq!(refused.exit_status(), exit::STATE_UNUSABLE);
    let nowhere = check(Path::new("/nowhere/at/all/ledger.db")).unwrap_err();
    assert!(matches!(nowhere, ToolError::Missing { .. }), "{nowhere}");

    let unreadable = check(directory.path()).unwrap_err();
    assert_eq!(unreadable.exit_status(), exit::STATE_UNUSABLE);
    assert!(unreadable.to_string().contains("cannot be read"), "{unreadable}");

    ledger_with(directory.path(), 1..2).await;
    rewrite(&path, |bytes| bytes[60..64].copy_from_slice(&1000u32.to_be_bytes()));
    let before = files(directory.path());
    let newer = check(&path).unwrap_err();
    assert_eq!(newer.exit_status(), exit::LEDGER_DAMAGED);
    assert!(newer.to_string().contains("install the version that wrote it"), "{newer}");
    let (elsewhere, copy) = place();
    assert!(backup(&path, &copy, IfThere::Keep).unwrap_err().to_string().contains("install the version"));
    assert!(restore(elsewhere.path(), &path, NOW).unwrap_err().to_string().contains("format 1000"));
    assert!(files(directory.path()) == before);
    assert!(files(elsewhere.path()).is_empty());
}

/// Commits fill and restart the log over and over while it is copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_of_a_ledger_that_is_being_written_are_of_one_moment() {
    let (directory, path) = place();
    let ledger = Ledger::open(directory.path()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (ledger, stop) = (ledger.clone(), stop.clone());
        async move {
            for n in 1.. {
                let lease = acquire(&ledger, n).await;
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                release(&ledger, &lease).await;
                ledger.remove_all(vec![lease.id], now()).await.unwrap();
            }
        }
    });
    let (elsewhere, copy) = place();
    for _ in 0..10 {
        let before = ledger.read(cowshed_leases::Book::last_generation);
        let path = path.clone();
        let to = copy.clone();
        let made = tokio::task::spawn_blocking(move || backup(&path, &to, IfThere::Replace));
        let findings = made.await.unwrap().unwrap();
        assert!(findings.last_generation >= before, "{findings:?}, not {before}");
        // One at a time is made and removed.
        assert!(findings.leases.values().sum::<u64>() <= 1, "{findings:?}");
        assert_eq!(files(elsewhere.path()).into_keys().collect::<Vec<_>>(), ["ledger.db"]);
        assert_eq!(check(&copy).unwrap(), findings);
    }
    assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o7777, 0o600);
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    // What is copied if the files never hold still.
    let copied = PrivateCopy::while_written(&path).unwrap();
    let (findings, _) = check::examine(&copied, &path).unwrap();
    assert!(findings.last_generation >= ledger.read(cowshed_leases::Book::last_generation));
    ledger.close().await;
}

#[tokio::test]
async fn a_backup_replaces_nothing_unless_it_is_told_to_and_never_the_ledger() {
    let (directory, path) = place();
    ledger_with(directory.path(), 1..3).await;
    let (elsewhere, copy) = place();
    let refused = |destination: &Path, if_there, part: &str| {
        let before = (files(directory.path()), files(elsewhere.path()));
        let refused = backup(&path, destination, if_there).unwrap_err();
        assert_eq!(refused.exit_status(), exit::FAILURE);
        assert!(refused.to_string().contains(part), "{refused}");
        assert!((files(directory.path()), files(elsewhere.path())) == before, "{part}");
    };
    fs::write(&copy, b"precious").unwrap();
    refused(&copy, IfThere::Keep, "--force");
    refused(&path, IfThere::Replace, "is the ledger itself");
    refused(elsewhere.path(), IfThere::Replace, "is not a file");
    refused(Path::new("/nowhere/at/all/copy.db"), IfThere::Keep, "directory that is there");
    fs::write(beside(&copy, "-wal"), b"frames").unwrap();
    refused(&copy, IfThere::Replace, "part of a database that was there");
    fs::remove_file(beside(&copy, "-wal")).unwrap();
    backup(&path, &copy, IfThere::Replace).unwrap();
    assert_eq!(check(&copy).unwrap(), check(&path).unwrap());
}

fn counter(path: &Path, name: &str) -> i64 {
    let connection = Connection::open(path).unwrap();
    connection.query_row("SELECT value FROM counters WHERE name = ?", [name], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_restored_ledger_gives_out_nothing_that_was_given_out_before() {
    let (directory, path) = place();
    let (_elsewhere, copy) = place();
    ledger_with(directory.path(), 1..3).await;
    change(&path, "INSERT INTO counters VALUES ('of_a_later_version', 5)");
    backup(&path, &copy, IfThere::Keep).unwrap();
    ledger_with(directory.path(), 3..8).await;
    let before = fs::read(&path).unwrap();

    let restored = restore(directory.path(), &copy, NOW).unwrap();
    let aside = beside(&path, &format!("{BEFORE_RESTORE}{NOW}"));
    assert_eq!(restored.moved, [Moved { from: path.clone(), to: aside.clone() }]);
    assert!(fs::read(&aside).unwrap() == before);
    assert!(restored.unread.is_empty());
    assert_eq!(restored.findings, check(&path).unwrap());
    // Each of the two that wrote it has reserved some.
    let reserved = 2 * (1 + i64::try_from(RESERVE).unwrap());
    assert_eq!(counter(&path, "last_generation"), reserved + MARGIN);
    assert_eq!(counter(&path, "of_a_later_version"), 5 + MARGIN);
    let (horizon, last) = (counter(&path, "horizon"), counter(&path, "last_revision"));
    assert!(horizon == last && last > 1 << 40, "a watcher of before would not be told to begin anew");
    assert_eq!(counter(&path, RESTORED_AT), NOW);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(vms(directory.path()).await, ["vm-1", "vm-2"]);

    // Once more in the same second, and back to what was there at first.
    restore(directory.path(), &copy, NOW).unwrap();
    assert_eq!(counter(&path, "last_generation"), reserved + 2 * MARGIN);
    restore(directory.path(), &aside, NOW).unwrap();
    assert_eq!(vms(directory.path()).await.len(), 7);
    assert_eq!(counter(&path, "last_generation"), reserved + 3 * MARGIN);
    assert_eq!(counter(&path, RESTORED_AT), NOW + 2);
    assert!(fs::read(&aside).unwrap() == before, "what is kept was changed");
}

#[tokio::test]
async fn pins_and_uses_are_in_a_backup_and_in_what_is_restored_of_it() {
    let (directory, path) = place();
    let (_elsewhere, copy) = place();
    let image = "r.example/app:1".to_owned();
    let ledger = Ledger::open(directory.path()).unwrap();
    let pin = ledger.pin(image.clone(), Ttl::from_seconds(60).ok(), 3, now()).await.unwrap();
    ledger.close().await;
    change(&path, "INSERT INTO uses VALUES ('sha256:a', 7)");
    assert_eq!(backup(&path, &copy, IfThere::Keep).unwrap().pins, 1);
    let ledger = Ledger::open(directory.path()).unwrap();
    assert!(ledger.unpin(image.clone(), now()).await.unwrap());
    ledger.close().await;
    assert_eq!(restore(directory.path(), &copy, NOW).unwrap().findings.pins, 1);
    let ledger = Ledger::open(directory.path()).unwrap();
    let marks = ledger.read_all(|_, marks| marks.clone());
    assert_eq!(marks.pin(&image, &now()), Some(pin));
    assert_eq!(marks.last_use("sha256:a"), Some(UnixMicros(7)));
    ledger.close().await;
}

#[tokio::test]
async fn a_ledger_of_the_version_before_is_checked_as_it_is_and_gets_what_it_lacks_when_it_is_used() {
    let (directory, path) = place();
    let (_elsewhere, copy) = place();
    ledger_with(directory.path(), 1..3).await;
    change(
        &path,
        "DROP TABLE pins; DROP TABLE uses; DROP TABLE jobs; DROP TABLE pinned_spares; PRAGMA user_version = 2;
         CREATE TABLE before_6 (
             id TEXT PRIMARY KEY, vm TEXT NOT NULL, generation INTEGER NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL
         ) STRICT, WITHOUT ROWID;
         INSERT INTO before_6 SELECT * FROM leases; DROP TABLE leases; ALTER TABLE before_6 RENAME TO leases",
    );
    let before = files(directory.path());
    assert_eq!(check(&path).unwrap().format, 2);
    backup(&path, &copy, IfThere::Keep).unwrap();
    assert!(files(directory.path()) == before, "it was changed");
    assert_eq!(check(&copy).unwrap().format, 2);
    restore(directory.path(), &copy, NOW).unwrap();
    assert_eq!(check(&path).unwrap().format, 6, "what is restored is as this version writes it");

    fs::copy(&copy, &path).unwrap();
    let ledger = Ledger::open(directory.path()).unwrap();
    ledger.pin("r.example/app:1".to_owned(), None, 0, now()).await.unwrap();
    ledger.close().await;
    let findings = check(&path).unwrap();
    assert_eq!((findings.format, findings.pins, findings.leases.values().sum::<u64>()), (6, 1, 2));
    assert_eq!(vms(directory.path()).await, ["vm-1", "vm-2"]);
}

#[tokio::test]
async fn a_damaged_ledger_is_kept_as_it_is_when_a_backup_takes_its_place() {
    for (name, mangle, _) in DAMAGES {
        let (directory, path) = place();
        let (_elsewhere, copy) = place();
        ledger_with(directory.path(), 1..4).await;
        backup(&path, &copy, IfThere::Keep).unwrap();
        mangle(&path);
        // As after a power cut.
        fs::write(beside(&path, "-wal"), b"what is left of a log").unwrap();
        let before = files(directory.path());

        restore(directory.path(), &copy, NOW).unwrap();
        let aside = format!("ledger.db{BEFORE_RESTORE}{NOW}");
        let after = files(directory.path());
        assert!(after[&aside] == before["ledger.db"], "{name}");
        assert!(after[&format!("{aside}-wal")] == before["ledger.db-wal"], "{name}");
        assert_eq!(after.len(), 3, "{name}: {:?}", after.keys());
        assert!(counter(&path, "last_generation") >= 3 + MARGIN, "{name}");
        assert_eq!(vms(directory.path()).await, ["vm-1", "vm-2", "vm-3"], "{name}");
    }
}

#[tokio::test]
async fn an_earlier_ledger_that_cannot_be_read_is_named_and_one_that_was_never_there_is_not_needed() {
    let (directory, path) = place();
    let (elsewhere, copy) = place();
    ledger_with(directory.path(), 1..4).await;
    backup(&path, &copy, IfThere::Keep).unwrap();
    fs::write(&path, b"not a database, as anyone can see").unwrap();
    let restored = restore(directory.path(), &copy, NOW).unwrap();
    let unread: Vec<&PathBuf> = restored.unread.iter().map(|(path, _)| path).collect();
    assert_eq!(unread, [&path]);

    let fresh = elsewhere.path().join("fresh");
    let restored = restore(&fresh, &copy, NOW).unwrap();
    assert_eq!((restored.moved, restored.unread), (Vec::new(), Vec::new()));
    assert_eq!(vms(&fresh).await.len(), 3);
}

#[tokio::test]
async fn nothing_is_restored_under_a_running_service() {
    let (directory, path) = place();
    let (_elsewhere, copy) = place();
    ledger_with(directory.path(), 1..3).await;
    backup(&path, &copy, IfThere::Keep).unwrap();
    let serving = lock::take(directory.path()).unwrap();
    let before = files(directory.path());
    let refused = restore(directory.path(), &copy, NOW).unwrap_err();
    assert_eq!(refused.exit_status(), exit::STATE_IN_USE);
    for part in ["stop the service first", &std::process::id().to_string()] {
        assert!(refused.to_string().contains(part), "{part}: {refused}");
    }
    assert!(files(directory.path()) == before);
    drop(serving);
    restore(directory.path(), &copy, NOW).unwrap();
}

/// Stops a restore after `steps` of its steps; false if it has no more.
fn interrupted(directory: &Path, backup: &Path, steps: usize) -> bool {
    let (effects, restored) = prepare(directory, backup, NOW).unwrap();
    for step in effects.steps.iter().take(steps) {
        carry_out(step, &restored.ledger).unwrap();
    }
    steps < effects.steps.len()
}

/// The old ledger or the new one is in place, or none is and the service says so.
fn expect_old_or_new_or_refusal(directory: &Path, at: &str) {
    // Looked at in a copy, for to open it is to change it.
    let (seen, path) = place();
    for (name, bytes) in files(directory) {
        fs::write(seen.path().join(name), bytes).unwrap();
    }
    match Ledger::open(seen.path()) {
        Ok(ledger) => {
            let count = ledger.read(|book| book.after(None).count());
            assert!([2, 6].contains(&count), "{at}: {count} leases");
        }
        Err(refused @ OpenError::Restoring { .. }) => {
            assert!(!path.exists(), "{at}: a ledger was made");
            assert!(
                refused.to_string().contains("Run `cowshed ledger restore BACKUP` again"),
                "{at}: {refused}"
            );
            let checked = check(&path).unwrap_err().to_string();
            assert_eq!(checked, refused.to_string(), "{at}");
        }
        Err(other) => panic!("{at}: {other}"),
    }
}

#[tokio::test]
async fn a_restore_that_is_interrupted_anywhere_leaves_one_ledger_or_none_and_can_be_repeated() {
    let (_elsewhere, copy) = place();
    let (made, of) = place();
    ledger_with(made.path(), 1..3).await;
    backup(&of, &copy, IfThere::Keep).unwrap();
    for first in 0.. {
        let mut more = true;
        for second in 0..=first {
            let at = format!("after {first} steps, then {second}");
            let (directory, path) = place();
            killed_with(directory.path(), 1..7).await;
            let before = files(directory.path());
            more = interrupted(directory.path(), &copy, first);
            expect_old_or_new_or_refusal(directory.path(), &at);
            interrupted(directory.path(), &copy, second);
            expect_old_or_new_or_refusal(directory.path(), &at);

            restore(directory.path(), &copy, NOW).unwrap();
            assert!(counter(&path, "last_generation") >= 6 + MARGIN, "{at}");
            assert_eq!(vms(directory.path()).await, ["vm-1", "vm-2"], "{at}");
            let after = files(directory.path());
            let aside = format!("ledger.db{BEFORE_RESTORE}{NOW}");
            for part in ["", "-wal", "-shm"] {
                let (old, kept) =
                    (&before[&format!("ledger.db{part}")], after.get(&format!("{aside}{part}")));
                assert!(kept == Some(old), "{at}: ledger.db{part} is not kept beside the others");
            }
            assert!(!after.contains_key(&format!("ledger.db{RESTORING}")), "{at}");
        }
        if !more {
            break;
        }
    }
}

#[test]
fn a_log_of_nobody_knows_whose_ledger_is_kept_apart() {
    let (directory, path) = place();
    let (elsewhere, copy) = place();
    drop(Ledger::open(elsewhere.path()).unwrap());
    fs::write(beside(&path, "-wal"), b"frames").unwrap();
    let earlier = beside(&path, &format!("{BEFORE_RESTORE}7"));
    fs::write(&earlier, b"an earlier one").unwrap();
    let restored = restore(directory.path(), &copy, NOW).unwrap();
    let kept = beside(&path, &format!("{BEFORE_RESTORE}{NOW}-wal"));
    assert_eq!(restored.moved, [Moved { from: beside(&path, "-wal"), to: kept.clone() }]);
    assert_eq!(fs::read(kept).unwrap(), b"frames");
    assert!(!beside(&earlier, "-wal").exists());
}
