//! After every test the host has to be as before it: nobody holds anything, and nothing is left over.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use cowshed_proto::v1;
use libtest_mimic::Failed;

use super::{
    Outcome, PATIENCE,
    api::{block_on, client},
    check,
    command::sh,
    containerd,
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
    let jobs = cowshed(&["prefetches", "-o", "json"])?.json()?;
    for job in jobs["jobs"].as_array().into_iter().flatten().filter(|job| job["state"] == "running") {
        cowshed(&["cancel-prefetch", job["job_id"].as_str().unwrap_or_default()])?.ok()?;
    }
    Ok(())
}

/// Waits until there is no lease, no snapshot of a VM, nothing half pulled and no thin device (images have none).
pub(crate) fn nothing_left() -> Outcome {
    // What once did not go will not go after the next tests either.
    static LEFTOVERS: AtomicBool = AtomicBool::new(false);
    let patience = if LEFTOVERS.load(Ordering::Relaxed) { Duration::from_secs(10) } else { PATIENCE };
    let audited = wait_at_most(patience, "a clean host", || {
        let request = v1::ListLeasesRequest::default();
        let leases =
            block_on(async { Outcome::Ok(client().await?.list_leases(request).await?) })?.into_inner().leases;
        check!(leases.is_empty(), "leases: {leases:?}");
        let mut held = containerd::leases()?;
        held.retain(|id| id.starts_with("cowshed-"));
        check!(held.is_empty(), "containerd leases: {held:?}");
        for snapshotter in [snapshotter(), "overlayfs"] {
            let mut left = containerd::snapshots(snapshotter)?;
            left.retain(|(key, kind)| {
                *kind == "Active" || key.starts_with("cowshed-vm-") || key.starts_with("extract-")
            });
            check!(left.is_empty(), "snapshots of {snapshotter}: {left:?}");
        }
        let writes = containerd::writes()?;
        check!(writes.is_empty(), "unfinished writes: {writes:?}");
        let devices = thin_devices()?;
        check!(devices.is_empty(), "thin devices: {devices:?}");
        let mounts = fs::read_to_string("/proc/mounts")?;
        let ours = ["/dev/mapper/vg-pool-snap", "/dev/mapper/cowshed-", "/tmp/e2e"];
        let mounts: Vec<_> =
            mounts.lines().filter(|line| ours.iter().any(|mark| line.contains(mark))).collect();
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
