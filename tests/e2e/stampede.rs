//! Crowds, and services that die in the middle of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
};

use cowshed_proto::v1::Lease;
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_all, block_on},
        check,
        command::sh,
        containerd,
        cow::{
            evict, evict_all, host, image, leases, pull, release, snapshots, thin_devices, wait_for_devices,
            wait_gone, wait_serving,
        },
        fake_image::{FakeImage, digest},
        fake_registry::{Answer, FakeRegistry, Hosts},
        registry_log::{describe, mark},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("twenty_vms_one_cold_image", twenty_vms_one_cold_image),
    ("of_one_image_keeps_no_other_waiting", of_one_image_keeps_no_other_waiting),
    ("killed_while_it_pulls", || killed("a-pull", pulling)),
    ("killed_at_the_first_disk", || killed("first", || devices(1))),
    ("killed_at_the_sixth_disk", || killed("sixth", || devices(6))),
    ("containerd_killed_while_a_layer_arrives", containerd_killed_while_a_layer_arrives),
    ("containerd_killed_under_held_disks", containerd_killed_under_held_disks),
];

fn crowd(name: &str, size: usize) -> Vec<String> {
    (0..size).map(|n| format!("crowd-{name}-{n}")).collect()
}

fn device(lease: &Lease) -> String {
    lease.device.as_ref().map(|device| device.dm_name.clone()).unwrap_or_default()
}

fn twenty_vms_one_cold_image() -> Outcome {
    evict_all()?;
    let start = mark()?;
    let vms = crowd("cold", 20);
    let mut devices = BTreeSet::new();
    for (vm, reply) in block_on(acquire_all(&vms, &image("app:1"))) {
        let lease = reply.map_err(|status| format!("{vm}: {status:?}"))?;
        devices.insert(device(&lease));
    }
    same!(devices.len(), 20, "the devices of twenty VMs: {devices:?}");
    start.each_once(&describe("app:1")?.blobs())?;
    wait_for_devices(&devices)?;
    same!(snapshots("Active")?.len(), 20, "the snapshots");
    vms.iter().try_for_each(|vm| release(vm))
}

/// More than are served at a time; whoever wants another image does not come after all of them.
fn of_one_image_keeps_no_other_waiting() -> Outcome {
    let (crowded, other) = (image("tiny:1"), image("app:1"));
    pull(&crowded)?;
    pull(&other)?;
    let vms = crowd("fair", 200);
    let asking = thread::spawn({
        let (vms, crowded) = (vms.clone(), crowded.clone());
        move || block_on(acquire_all(&vms, &crowded))
    });
    let served = || {
        let of_the_crowd = |lease: &&Value| {
            lease["state"] == "granted"
                && lease["vm_id"].as_str().is_some_and(|vm| vm.starts_with("crowd-fair-"))
        };
        Outcome::Ok(leases()?.iter().filter(of_the_crowd).count())
    };
    wait_for("the first disks", || {
        check!(served()? > 0, "none yet");
        Ok(())
    })?;
    let alone = ["crowd-alone".to_owned()];
    let [(_, reply)] = &block_on(acquire_all(&alone, &other))[..] else { return Err("not one reply".into()) };
    let before = served()?;
    for (vm, reply) in asking.join().map_err(|_| "the crowd panicked")? {
        reply.map_err(|status| format!("{vm}: {status:?}"))?;
    }
    reply.as_ref().map_err(|status| format!("crowd-alone: {status:?}"))?;
    // In the order in which they came it would have been all.
    check!(before < 150, "{before} of 200 were served before it");
    vms.iter().chain(&alone).try_for_each(|vm| release(vm))
}

fn pulling() -> Outcome {
    check!(containerd::leases()?.iter().any(|id| id.starts_with("cowshed-pull-")), "no pull is under way");
    Ok(())
}

fn devices(at_least: usize) -> Outcome {
    let granted = snapshots("Active")?.iter().filter(|key| key.starts_with("cowshed-vm-")).count();
    check!(granted >= at_least, "{granted} disks");
    Ok(())
}

/// A crowd of VMs; when `moment` comes, the service is killed; when it is back, all ask again.
fn killed(name: &str, moment: fn() -> Outcome) -> Outcome {
    evict_all()?;
    let vms = crowd(name, 10);
    let asking = thread::spawn({
        let vms = vms.clone();
        move || block_on(acquire_all(&vms, &image("tiny:1")))
    });
    wait_for("the moment", moment)?;
    host("kill", "cowshed")?;
    let answers = asking.join().map_err(|_| "the crowd panicked")?;
    let granted: BTreeMap<String, Lease> =
        answers.into_iter().filter_map(|(vm, reply)| Some((vm, reply.ok()?))).collect();
    wait_serving()?;
    let held = ask_until_all_are_granted(&vms, &image("tiny:1"))?;
    for (vm, lease) in &granted {
        let now = held.get(vm).ok_or_else(|| format!("{vm} has no lease any more"))?;
        same!(
            (&now.lease_id, device(now)),
            (&lease.lease_id, device(lease)),
            "the lease of {vm} from before"
        );
    }
    let devices: BTreeSet<String> = held.values().map(device).collect();
    same!(devices.len(), vms.len(), "the devices of {} VMs: {devices:?}", vms.len());
    wait_for("what was half made to go", || {
        same!(leases()?.len(), vms.len(), "the leases");
        same!(snapshots("Active")?.len(), vms.len(), "the snapshots");
        same!(thin_devices()?, devices, "the devices of the kernel");
        Ok(())
    })?;
    vms.iter().try_for_each(|vm| release(vm))
}

fn ask_until_all_are_granted(vms: &[String], image: &str) -> Outcome<BTreeMap<String, Lease>> {
    wait_for("all VMs to be granted a disk", || {
        let mut held = BTreeMap::new();
        for (vm, reply) in block_on(acquire_all(vms, image)) {
            let lease = reply.map_err(|status| format!("{vm}: {status:?}"))?;
            held.insert(vm, lease);
        }
        Ok(held)
    })
}

// containerd's own devmapper snapshotter does not survive SIGKILL in the middle of a Prepare: "device … is already there"
// from then on. So it is killed at moments that are known to be between two of them.

fn kill_containerd() -> Outcome {
    host("kill", "containerd")?;
    wait_for("containerd", || containerd::version().map(drop))?;
    wait_serving()
}

fn containerd_killed_while_a_layer_arrives() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let fake = FakeImage::new(41, 300_000)?;
    registry.serve("1", &fake);
    let layer = digest(&fake.layer);
    registry.blob(&layer, Answer::Gated(fake.layer.clone()));
    let (vms, name) = (crowd("cd-pull", 10), registry.image("1"));
    let asking = thread::spawn({
        let (vms, name) = (vms.clone(), name.clone());
        move || block_on(acquire_all(&vms, &name))
    });
    wait_for("the layer to be asked for", || {
        check!(!registry.requests(&layer).is_empty(), "nobody asked");
        Ok(())
    })?;
    kill_containerd()?;
    registry.open_gate();
    let answers = asking.join().map_err(|_| "the crowd panicked")?;
    let held = ask_until_all_are_granted(&vms, &name)?;
    for (vm, lease) in answers.into_iter().filter_map(|(vm, reply)| Some((vm, reply.ok()?))) {
        same!(held.get(&vm).map(|now| &now.lease_id), Some(&lease.lease_id), "the lease of {vm} from before");
    }
    let devices: BTreeSet<String> = held.values().map(device).collect();
    same!(devices.len(), vms.len(), "the devices: {devices:?}");
    wait_for_devices(&devices)?;
    vms.iter().try_for_each(|vm| release(vm))?;
    vms.iter().try_for_each(|vm| wait_gone(vm))?;
    evict(&[&name])
}

fn containerd_killed_under_held_disks() -> Outcome {
    let tiny = image("tiny:1");
    let vms = crowd("cd-held", 5);
    let before = ask_until_all_are_granted(&vms, &tiny)?;
    kill_containerd()?;
    for lease in before.values() {
        let path = lease.device.as_ref().map(|device| device.path.clone()).unwrap_or_default();
        sh(&format!("dd if={path} of=/dev/null bs=1M count=8 iflag=direct status=none"))?;
    }
    let after = ask_until_all_are_granted(&vms, &tiny)?;
    same!(after, before, "the leases afterwards");
    ask_until_all_are_granted(&crowd("cd-later", 2), &tiny)?;
    same!(leases()?.len(), 7, "the leases");
    for vm in vms.into_iter().chain(crowd("cd-later", 2)) {
        release(&vm)?;
    }
    Ok(())
}
