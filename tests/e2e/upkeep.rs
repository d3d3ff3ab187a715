//! What an operator does: audits and repairs, drains, and a containerd that has lost its store.

use std::{fs::File, os::unix::fs::FileExt as _};

use crate::{
    Test,
    support::{
        Outcome, check,
        command::sh,
        containerd,
        cow::{
            acquire, collect, cowshed, evict_all, host, image, pull, refused, release, release_fully,
            snapshots, snapshotter, thin_devices, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("a_deleted_containerd_lease_is_found_and_made_again", a_deleted_containerd_lease_is_made_again),
    ("what_is_not_ours_is_reported_and_left_alone", what_is_not_ours_is_left_alone),
    ("a_containerd_that_lost_its_store_takes_no_held_disk", a_containerd_that_lost_its_store),
    ("draining_takes_on_nothing_new", draining_takes_on_nothing_new),
];

fn a_deleted_containerd_lease_is_made_again() -> Outcome {
    let disk = acquire("upkeep-lease", &image("tiny:1"))?;
    let key = format!("cowshed-vm-{}", disk.lease);
    check!(cowshed(&["audit"])?.ok()?.contains("agree"), "something is found");
    // Without a collection, which would take the snapshot as well.
    sh(&format!("ctr leases delete {key}"))?;
    let found = cowshed(&["audit"])?;
    found.fails(6, &["left"])?;
    check!(found.stdout.contains(&disk.lease) && found.stdout.contains("upkeep-lease"), "{found:?}");
    check!(containerd::leases()?.iter().all(|lease| *lease != key), "a look has changed something");
    check!(cowshed(&["audit", "--repair"])?.ok()?.contains("done: "), "it is not mended");
    collect()?;
    check!(snapshots("Active")?.contains(&key), "containerd has collected {key}");
    check!(cowshed(&["audit"])?.ok()?.contains("agree"), "something is left");
    release_fully("upkeep-lease")
}

fn what_is_not_ours_is_left_alone() -> Outcome {
    let stray = format!("cowshed-vm-{}", "7".repeat(32));
    sh(&format!("ctr leases create --id {stray} cowshed.io/lease=x"))?;
    let tested = (|| {
        let found = cowshed(&["audit", "--repair"])?;
        found.fails(6, &["left"])?;
        check!(found.stdout.contains(&stray) && found.stdout.contains("left alone"), "{found:?}");
        check!(containerd::leases()?.contains(&stray), "{stray} was deleted");
        Ok(())
    })();
    sh(&format!("ctr leases delete {stray}"))?;
    tested
}

/// On the stock snapshotter nothing stands between containerd and its disks.
fn a_containerd_that_lost_its_store() -> Outcome {
    if snapshotter() != "cowshed" {
        return Ok(());
    }
    evict_all()?;
    let tiny = image("tiny:1");
    pull(&tiny)?;
    let disk = acquire("upkeep-lost", &tiny)?;
    File::options().write(true).open(&disk.path)?.write_all_at(b"mine", 300 << 20)?;
    let store = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";
    host("stop", "containerd")?;
    sh(&format!("mv {store} {store}.kept"))?;
    host("start", "containerd")?;
    wait_serving()?;
    // A removal makes containerd look for what it does not know.
    sh(
        "ctr snapshots --snapshotter cowshed prepare upkeep-x > /dev/null; ctr snapshots --snapshotter cowshed rm upkeep-x",
    )?;
    collect()?;
    let tested = (|| {
        check!(thin_devices()?.contains(&disk.dm_name), "{} is gone", disk.path);
        refused("upkeep-lost", &tiny, 6, "DEVICE_MISMATCH", &["lost its record", "the device is there"])?;
        let found = cowshed(&["audit"])?;
        check!(found.stdout.contains("put containerd's store back"), "{found:?}");
        Ok(())
    })();
    host("stop", "containerd")?;
    sh(&format!("mv {store}.kept {store}"))?;
    host("start", "containerd")?;
    wait_serving()?;
    tested?;
    same!(acquire("upkeep-lost", &tiny)?, disk, "the disk, when the store is back");
    let mut bytes = [0; 4];
    File::open(&disk.path)?.read_exact_at(&mut bytes, 300 << 20)?;
    same!(&bytes, b"mine", "what was on it");
    release_fully("upkeep-lost")
}

fn draining_takes_on_nothing_new() -> Outcome {
    let tiny = image("tiny:1");
    let held = acquire("upkeep-held", &tiny)?;
    check!(cowshed(&["drain"])?.ok()?.contains("done"), "it does not end");
    let tested = (|| {
        refused("upkeep-new", &tiny, 8, "DRAINING", &["drain --undo"])?;
        cowshed(&["pull", &tiny])?.fails(8, &["[DRAINING]"])?;
        same!(acquire("upkeep-held", &tiny)?, held, "the disk of a VM that has one");
        cowshed(&["status"])?.fails(8, &["draining"])?;
        release("upkeep-held")?;
        check!(cowshed(&["drain", "--leases"])?.ok()?.contains("leases held: 0: done"), "leases are left");
        Ok(())
    })();
    cowshed(&["drain", "--undo"])?.ok()?;
    tested?;
    wait_serving()?;
    acquire("upkeep-new", &tiny)?;
    release_fully("upkeep-new")?;
    wait_for("the other one to go", || cowshed(&["leases", "upkeep-held"])?.fails(3, &["LEASE_NOT_FOUND"]))
}
