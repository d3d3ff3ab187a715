//! Snapshotters and pools that cannot serve: refused with the reason, before anything is made.

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        audit::pool_used_bytes,
        check,
        command::sh,
        containerd,
        cow::{acquire, image, pull, release_fully, snapshots},
        same,
        second::Plan,
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("snapshotter_missing", snapshotter_missing),
    ("snapshotter_unfit", snapshotter_unfit),
    ("pool_missing", pool_missing),
    ("pool_full", pool_full),
];

fn snapshotter_missing() -> Outcome {
    let second = Plan::new("[containerd]\nsnapshotter = \"nothere\"\n")?.start()?;
    let status = second.cowshed(&["status"])?;
    status.fails(8, &["nothere"])?;
    second.refuses("pool-1", &image("tiny:1"), 8, "SNAPSHOTTER_MISSING", &["nothere"])?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

fn snapshotter_unfit() -> Outcome {
    let second = Plan::new("[containerd]\nsnapshotter = \"overlayfs\"\n")?.start()?;
    second.refuses("pool-2", &image("tiny:1"), 6, "SNAPSHOTTER_UNFIT", &["[containerd] snapshotter"])?;
    wait_for("its leases to go", || {
        let left = second.cowshed(&["leases", "-o", "json"])?.json()?;
        check!(left["leases"].as_array().is_some_and(Vec::is_empty), "{left}");
        Ok(())
    })?;
    let mut left = containerd::snapshots("overlayfs")?;
    left.retain(|(_, kind)| *kind != "Committed");
    check!(left.is_empty(), "snapshots of overlayfs: {left:?}");
    same!(second.stop()?, 0, "the exit status");
    // The image that it has unpacked there as well still serves where it is right.
    acquire("pool-2", &image("tiny:1"))?;
    release_fully("pool-2")
}

fn pool_missing() -> Outcome {
    let second = Plan::new("[pool]\nname = \"vg-nothere\"\n")?.start()?;
    second.refuses("pool-3", &image("tiny:1"), 8, "POOL_MISSING", &["vg-nothere"])?;
    second.cowshed(&["status"])?.fails(8, &["vg-nothere"])?;
    let pulled = second.cowshed(&["pull", &image("tiny:1")])?;
    pulled.fails(8, &["[POOL_MISSING]"])?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

/// The pool is filled, by a VM that writes, beyond what a second service has to leave free.
fn pool_full() -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    let second = Plan::new("[pool]\ndata_headroom_percent = 90\n")?.start()?;
    second.cowshed(&["acquire", "pool-4", &tiny])?.ok()?;
    let writers = [acquire("pool-writer-1", &tiny)?, acquire("pool-writer-2", &tiny)?];
    for disk in &writers {
        sh(&format!("dd if=/dev/zero of={} bs=4M count=150 oflag=direct status=none", disk.path))?;
    }
    let used = pool_used_bytes()?;
    check!(used > 1 << 30, "{used} bytes are in use, a tenth of the pool should be");
    let before = snapshots("Active")?;
    second.refuses(
        "pool-5",
        &tiny,
        7,
        "POOL_FULL",
        &["vg-pool", "data_headroom_percent", "cowshed pool extend"],
    )?;
    second.cowshed(&["pull", &tiny])?.fails(7, &["[POOL_FULL]"])?;
    same!(snapshots("Active")?, before, "the snapshots after the refusal");
    second.cowshed(&["status"])?.fails(8, &["vg-pool"])?;
    // Who has a disk keeps it, and can give it back.
    let again = second.cowshed(&["acquire", "pool-4", &tiny, "-o", "json"])?.json()?;
    same!(again["existing"], Value::Bool(true), "existing");
    for disk in &writers {
        release_fully(&disk.vm)?;
    }
    wait_for("room", || second.cowshed(&["acquire", "pool-5", &tiny])?.ok().map(drop))?;
    second.release_all()?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}
