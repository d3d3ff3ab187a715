//! After every test the host has to be as before it: nobody holds anything, and nothing is left over.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use libtest_mimic::Failed;

use super::{
    Outcome, PATIENCE, check,
    command::{lines, sh},
    cow::{cowshed, host, leases, snapshotter, thin_devices, wait_serving},
    wait_at_most,
};

/// Runs the test, gives back whatever it holds if it failed, and audits.
pub(crate) fn around(test: fn() -> Outcome) -> Outcome {
    let tested = test();
    if tested.is_err() {
        // So that one failure is one failure: what this cannot mend, the audit reports.
        let _mended = mend();
    }
    match (tested, nothing_left()) {
        (Ok(()), audited) => audited,
        (Err(failed), Ok(())) => Err(failed),
        (Err(failed), Err(left)) => {
            Err(Failed::from(format!("{}\nand then, {}", text(&failed), text(&left))))
        }
    }
}

fn text(failed: &Failed) -> &str {
    failed.message().unwrap_or_default()
}

fn mend() -> Outcome {
    for service in ["containerd", "registry", "cowshed"] {
        host("start", service)?;
    }
    wait_serving()?;
    for lease in leases()? {
        cowshed(&["release", lease["vm_id"].as_str().unwrap_or_default()])?.ok()?;
    }
    Ok(())
}

/// Waits until there is no lease, no snapshot of a VM, nothing half pulled and no thin device (images have none).
pub(crate) fn nothing_left() -> Outcome {
    // What once did not go will not go after the next tests either.
    static LEFTOVERS: AtomicBool = AtomicBool::new(false);
    let patience = if LEFTOVERS.load(Ordering::Relaxed) { Duration::from_secs(10) } else { PATIENCE };
    let audited = wait_at_most(patience, "a clean host", || {
        let leases = leases()?;
        check!(leases.is_empty(), "leases: {leases:?}");
        let held = lines("ctr leases ls | sed 1d | { grep cowshed- || true; }")?;
        check!(held.is_empty(), "containerd leases: {held:?}");
        for snapshotter in [snapshotter(), "overlayfs"] {
            let list = format!("ctr snapshots --snapshotter {snapshotter} ls");
            let left = lines(&format!("{list} | {{ grep -E '^(cowshed-vm-|extract-)|Active' || true; }}"))?;
            check!(left.is_empty(), "snapshots of {snapshotter}: {left:?}");
        }
        let writes = lines("ctr content active | sed 1d")?;
        check!(writes.is_empty(), "unfinished writes: {writes:?}");
        let devices = thin_devices()?;
        check!(devices.is_empty(), "thin devices: {devices:?}");
        let mounts = lines("grep -E '/dev/mapper/(vg-pool-snap|cowshed-)|/tmp/e2e' /proc/mounts || true")?;
        check!(mounts.is_empty(), "mounts: {mounts:?}");
        Ok(())
    });
    LEFTOVERS.store(audited.is_err(), Ordering::Relaxed);
    audited
}

/// Bytes of the pool that are in use.
pub(crate) fn pool_used_bytes() -> Outcome<u64> {
    let blocks = sh("dmsetup status vg-pool | awk '{ split($6, data, \"/\"); print data[1] }'")?;
    Ok(blocks.trim().parse::<u64>()? * 64 * 1024)
}
