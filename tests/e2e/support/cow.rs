//! Cowshed as its command line has it, and the host's services.

use std::{collections::BTreeSet, sync::LazyLock};

use cowshed_proto::v1;
use devicemapper::{DM, DevId, DmFlags, DmOptions};
use serde_json::Value;

use super::{
    Outcome,
    api::{block_on, client, refusal},
    check,
    command::{Ran, number, run, sh, text},
    containerd, same, wait_for,
};

pub(crate) use super::containerd::collect;

pub(crate) use super::cowshed::SOCKET;

pub(crate) const REGISTRY: &str = "127.0.0.1:5000";

/// The snapshotter that this host's cowshed works with: SNAPSHOTTER, or cowshed's own default.
pub(crate) fn snapshotter() -> &'static str {
    static NAME: LazyLock<String> =
        LazyLock::new(|| std::env::var("SNAPSHOTTER").unwrap_or_else(|_| "cowshed".to_owned()));
    &NAME
}

/// A test image of the host's registry by its short name, such as "tiny:1".
pub(crate) fn image(name: &str) -> String {
    format!("{REGISTRY}/cowshed/{name}")
}

/// A granted disk, as `cowshed acquire` printed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) vm: String,
    pub(crate) lease: String,
    pub(crate) generation: u64,
    pub(crate) path: String,
    pub(crate) dm_name: String,
    pub(crate) thin_id: u64,
}

impl Disk {
    pub(crate) fn of(lease: &Value) -> Outcome<Self> {
        Ok(Self {
            vm: text(lease, "/vm_id")?,
            lease: text(lease, "/lease_id")?,
            generation: number(lease, "/generation")?,
            path: text(lease, "/device/path")?,
            dm_name: text(lease, "/device/dm_name")?,
            thin_id: number(lease, "/device/thin_id")?,
        })
    }
}

/// `cowshed …`, whatever comes of it.
pub(crate) fn cowshed(arguments: &[&str]) -> Outcome<Ran> {
    run("cowshed", arguments)
}

/// `cowshed acquire`, to be granted; the whole reply.
pub(crate) fn acquire_reply(vm: &str, image: &str) -> Outcome<Value> {
    cowshed(&["acquire", vm, image, "-o", "json"])?.json()
}

/// `cowshed acquire`, to be granted.
pub(crate) fn acquire(vm: &str, image: &str) -> Outcome<Disk> {
    let reply = acquire_reply(vm, image)?;
    same!(text(&reply, "/lease/state")?, "granted", "the state of {reply}");
    Disk::of(&reply["lease"])
}

/// `cowshed acquire`, with the hit or miss that it has to be.
pub(crate) fn acquire_as(cache: &str, vm: &str, image: &str) -> Outcome<Disk> {
    let reply = acquire_reply(vm, image)?;
    same!(text(&reply, "/cache")?, cache, "whether {image} was there: {reply}");
    Disk::of(&reply["lease"])
}

/// `cowshed acquire`, to be refused with this status and reason, naming all of `words`.
pub(crate) fn refused(vm: &str, image: &str, status: i32, reason: &str, words: &[&str]) -> Outcome {
    let ran = cowshed(&["acquire", vm, image])?;
    ran.fails(status, &[&format!("[{reason}]")])?;
    ran.fails(status, words)
}

pub(crate) fn release(vm: &str) -> Outcome {
    cowshed(&["release", vm])?.ok().map(drop)
}

/// Releases, and waits until the disk is gone.
pub(crate) fn release_fully(vm: &str) -> Outcome {
    release(vm)?;
    wait_gone(vm)
}

/// Waits until the VM has no lease in any state.
pub(crate) fn wait_gone(vm: &str) -> Outcome {
    wait_for("the lease to go", || {
        let by = v1::get_lease_request::By::VmId(vm.to_owned());
        let reply = block_on(async {
            Outcome::Ok(client().await?.get_lease(v1::GetLeaseRequest { by: Some(by) }).await)
        })?;
        same!(refusal(reply)?.reason, "LEASE_NOT_FOUND", "why {vm} has no lease");
        Ok(())
    })
}

/// The VM's lease.
pub(crate) fn lease(vm: &str) -> Outcome<Value> {
    Ok(cowshed(&["leases", vm, "-o", "json"])?.json()?["lease"].clone())
}

/// All leases.
pub(crate) fn leases() -> Outcome<Vec<Value>> {
    let all = cowshed(&["leases", "-o", "json"])?.json()?;
    all["leases"].as_array().cloned().ok_or_else(|| format!("no leases in {all}").into())
}

/// Removes images from containerd, and what only they held.
pub(crate) fn evict(images: &[&str]) -> Outcome {
    images.iter().try_for_each(|name| containerd::remove_image(name))
}

/// Leaves no image in containerd, no layer and no blob.
pub(crate) fn evict_all() -> Outcome {
    containerd::images()?.iter().try_for_each(|name| containerd::remove_image(name))?;
    nothing_pulled()
}

/// Waits until there is no layer and no blob, by collections if need be.
pub(crate) fn nothing_pulled() -> Outcome {
    wait_for("an empty content store", || {
        // A collection that is under way may have begun before the last removal.
        let (blobs, layers) = (containerd::blobs()?, containerd::snapshots(snapshotter())?);
        if !(blobs.is_empty() && layers.is_empty()) {
            collect()?;
        }
        check!(blobs.is_empty() && layers.is_empty(), "{blobs:?} {layers:?}");
        Ok(())
    })
}

/// Pulls, so that it is there.
pub(crate) fn pull(image: &str) -> Outcome<Value> {
    let printed = cowshed(&["pull", image, "-o", "json"])?.ok()?;
    let last = printed.lines().last().unwrap_or_default();
    let last: Value = serde_json::from_str(last).map_err(|e| format!("{last:?} is no JSON: {e}"))?;
    same!(text(&last, "/image/name")?, image, "the name of what was pulled");
    Ok(last)
}

/// Names of the thin devices that there are, besides LVM's own and those that the snapshotter has made ahead of need.
pub(crate) fn thin_devices() -> Outcome<BTreeSet<String>> {
    let heirs = heirs()?;
    let mut thin = all_thin_devices()?;
    thin.retain(|name| !heirs.contains(name));
    Ok(thin)
}

/// The device-mapper names of what the snapshotter has made ahead of need, as its store says; none without a store.
pub(crate) fn heirs() -> Outcome<BTreeSet<String>> {
    let query = "SELECT 'cowshed-' || (SELECT value FROM facts WHERE name = 'store_id') || '-' || id
                 FROM snapshots WHERE kind = 'heir'";
    let store = "/var/lib/cowshed/snapshots.db";
    let names = sh(&format!("test ! -e {store} || sqlite3 -readonly {store} \"{query}\""))?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

fn all_thin_devices() -> Outcome<BTreeSet<String>> {
    let dm = DM::new()?;
    let mut thin = BTreeSet::new();
    for (name, _, _) in dm.list_devices()? {
        // One that has gone meanwhile has no table.
        let table =
            dm.table_status(&DevId::Name(&name), DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE));
        if table.is_ok_and(|(_, targets)| targets.iter().any(|target| target.2 == "thin")) {
            thin.insert(name.to_string());
        }
    }
    Ok(thin)
}

/// Waits until the thin devices are these: an image's layers are active for a moment after its pull.
pub(crate) fn wait_for_devices(devices: &BTreeSet<String>) -> Outcome {
    wait_for("the layers to be put to rest", || {
        same!(thin_devices()?, *devices, "the devices of the kernel");
        Ok(())
    })
}

/// Keys of the snapshots of this kind.
pub(crate) fn snapshots(kind: &str) -> Outcome<BTreeSet<String>> {
    let all = containerd::snapshots(snapshotter())?;
    Ok(all.into_iter().filter(|(_, of)| *of == kind).map(|(key, _)| key).collect())
}

/// `cowshed-host VERB SERVICE`
pub(crate) fn host(verb: &str, service: &str) -> Outcome {
    run("cowshed-host", &[verb, service])?.ok().map(drop)
}

/// Waits until the service serves.
pub(crate) fn wait_serving() -> Outcome {
    wait_for("cowshed to serve", || {
        let request = v1::GetStatusRequest::default();
        let reply = block_on(async { Outcome::Ok(client().await?.get_status(request).await?) })?;
        let status = reply.into_inner();
        check!(status.serving, "it does not: {:?}", status.problems);
        Ok(())
    })
}

/// The service's process id.
pub(crate) fn service_pid() -> Outcome<String> {
    Ok(std::fs::read_to_string("/var/lib/cowshed/lock")?.trim().to_owned())
}
