//! One read-only device for all VMs of an image, and the VMs' own scratch disks beside it.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
};

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome, check,
        command::{number, sh, text},
        cow::{
            Disk, acquire, cowshed, host, image, lease, release, release_fully, snapshotter, thin_devices,
            wait_for_devices, wait_gone, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("what_the_kernel_lets_be_written_is_refused", what_the_kernel_lets_be_written_is_refused),
    ("vms_of_an_image_have_one_device", vms_of_an_image_have_one_device),
    ("scratch_disks_are_of_the_size_and_kind_asked_for", scratch_disks_are_as_asked_for),
    ("what_is_open_stays_and_what_is_shared_goes_last", what_is_open_stays_and_what_is_shared_goes_last),
    ("shared_devices_outlive_kills", shared_devices_outlive_kills),
    ("who_renews_what_an_operator_gave_up_is_told", who_renews_what_an_operator_gave_up_is_told),
];

/// containerd's own snapshotter has no devices that the kernel keeps read-only.
fn can_share() -> bool {
    snapshotter() == "cowshed"
}

fn acquire_shared(vm: &str, more: &[&str]) -> Outcome<Value> {
    let tiny = image("tiny:1");
    let arguments = ["acquire", vm, &tiny, "-o", "json", "--mode", "shared-read-only"];
    Ok(cowshed(&[&arguments, more].concat())?.json()?["lease"].clone())
}

fn what_the_kernel_lets_be_written_is_refused() -> Outcome {
    let tiny = image("tiny:1");
    let refused = |arguments: &[&str], status, words: &[&str]| -> Outcome {
        cowshed(&[&["acquire", "shared-no", &tiny], arguments].concat())?.fails(status, words)
    };
    refused(&["--scratch", "1GiB"], 2, &["[SCRATCH_INVALID]", "SHARED_READ_ONLY"])?;
    let small = ["--mode", "shared-read-only", "--scratch", "1MiB"];
    refused(&small, 2, &["[SCRATCH_INVALID]", "16 MiB"])?;
    if !can_share() {
        refused(&["--mode", "shared-read-only"], 6, &["[SNAPSHOTTER_UNFIT]", "COPY_ON_WRITE"])?;
        cowshed(&["release", "shared-no"])?.ok()?;
    }
    Ok(())
}

fn vms_of_an_image_have_one_device() -> Outcome {
    if !can_share() {
        return Ok(());
    }
    let first = acquire_shared("shared-1", &[])?;
    let device = first["device"].clone();
    same!(device["read_only"], true, "whether it is read-only: {device}");
    for vm in ["shared-2", "shared-3"] {
        same!(acquire_shared(vm, &[])?["device"], device, "the device of {vm}");
    }
    same!(acquire_shared("shared-1", &[])?["lease_id"], first["lease_id"], "the lease, asked for again");
    let own = acquire("shared-own", &image("tiny:1"))?;
    let names = [text(&device, "/dm_name")?, own.dm_name.clone()];
    wait_for_devices(&names.into())?;
    let path = text(&device, "/path")?;
    check!(own.path != path, "a VM that wants to write has {path}");

    // The kernel refuses, whatever the caller tries.
    let written = OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(&[0; 4096]));
    check!(written.is_err(), "{path} was written to");
    sh(&format!("! blockdev --setrw {path} || ! dd if=/dev/zero of={path} bs=4096 count=1 oflag=direct"))?;
    let read = sh(&format!(
        "d=$(mktemp -d /tmp/e2e-shared.XXXXXX); mount -o ro {path} $d; ls $d; umount $d; rmdir $d"
    ))?;
    check!(read.contains("etc"), "not the image: {read}");

    // It is verified as any disk is, and cannot be taken for a writable one.
    let id = text(&first, "/lease_id")?;
    cowshed(&["verify", &id, "--path", &path])?.ok()?;
    cowshed(&["verify", &id, "--path", &own.path])?.fails(6, &["path"])?;
    cowshed(&["verify", &id, "--scratch"])?.fails(6, &["scratch"])?;
    cowshed(&["acquire", "shared-1", &image("tiny:1")])?.fails(4, &["[SPEC_CONFLICT]", "mode"])?;

    // What is shared has a lease that is listed if that is asked for, and that nobody can release.
    let listed = |arguments: &[&str]| -> Outcome<Vec<Value>> {
        let all = cowshed(&[&["leases", "-o", "json"], arguments].concat())?.json()?;
        Ok(all["leases"].as_array().cloned().unwrap_or_default())
    };
    same!(listed(&[])?.len(), 4, "leases");
    let all = listed(&["--shared"])?;
    let shared = all.iter().find(|lease| lease["lease_id"] == first["shares"]).ok_or("it is not listed")?;
    let holder = text(shared, "/vm_id")?;
    same!(holder, format!("@{}", text(&first, "/image_digest")?), "who holds it");
    cowshed(&["release", &holder])?.fails(2, &["[VM_ID_INVALID]"])?;
    cowshed(&["audit"])?.ok()?;
    for vm in ["shared-1", "shared-2", "shared-3", "shared-own"] {
        release(vm)?;
    }
    Ok(())
}

fn scratch_disks_are_as_asked_for() -> Outcome {
    if !can_share() {
        return Ok(());
    }
    let formatted = acquire_shared("scratch-formatted", &["--scratch", "100MiB"])?;
    let raw = acquire_shared("scratch-raw", &["--scratch", "64MiB", "--scratch-raw"])?;
    for (lease, size, filesystem) in [(&formatted, 100 << 20, "ext4"), (&raw, 64 << 20, "")] {
        same!(number(lease, "/scratch/size_bytes")?, size, "its size");
        same!(text(lease, "/scratch/filesystem")?, filesystem, "its filesystem");
        same!(lease["scratch"]["read_only"], false, "whether it is read-only");
        let (id, path) = (text(lease, "/lease_id")?, text(lease, "/scratch/path")?);
        same!(sh(&format!("blockdev --getsize64 {path}"))?.trim(), size.to_string(), "by the kernel");
        cowshed(&["verify", &id, "--scratch", "--path", &path])?.ok()?;
        cowshed(&["verify", &id, "--path", &path])?.fails(6, &["path"])?;
    }
    same!(formatted["device"], raw["device"], "what they share");
    let path = text(&formatted, "/scratch/path")?;
    sh(&format!(
        "d=$(mktemp -d /tmp/e2e-scratch.XXXXXX); mount {path} $d; echo kept > $d/x; umount $d; rmdir $d"
    ))?;
    let path = text(&raw, "/scratch/path")?;
    // Nobody's bytes, and none of a filesystem's.
    sh(&format!("cmp -n {} /dev/zero {path}", 64 << 20))?;
    sh(&format!("! blkid -p {path}"))?;
    sh(&format!("printf mine | dd of={path} bs=512 conv=sync oflag=direct status=none"))?;
    // Another VM's is its own.
    let other = acquire_shared("scratch-other", &["--scratch", "64MiB", "--scratch-raw"])?;
    sh(&format!("cmp -n {} /dev/zero {}", 64 << 20, text(&other, "/scratch/path")?))?;
    let again = acquire_shared("scratch-raw", &["--scratch", "64MiB", "--scratch-raw"])?;
    same!(again["scratch"], raw["scratch"], "its scratch disk, asked for again");
    same!(sh(&format!("head -c 4 {path}"))?, "mine", "what the VM wrote");
    let larger =
        ["acquire", "scratch-raw", &image("tiny:1"), "--mode", "shared-read-only", "--scratch", "1GiB"];
    cowshed(&larger)?.fails(4, &["[SPEC_CONFLICT]", "scratch"])?;
    cowshed(&["audit"])?.ok()?;
    for vm in ["scratch-formatted", "scratch-raw", "scratch-other"] {
        release(vm)?;
    }
    Ok(())
}

fn what_is_open_stays_and_what_is_shared_goes_last() -> Outcome {
    if !can_share() {
        return Ok(());
    }
    let [a, b] = ["last-a", "last-b"].map(|vm| acquire_shared(vm, &["--scratch", "16MiB"]));
    let (a, b) = (a?, b?);
    let open = |lease: &Value, what: &str| -> Outcome<File> { Ok(File::open(text(lease, what)?)?) };
    let (root, scratch) = (open(&b, "/device/path")?, open(&b, "/scratch/path")?);
    release_fully("last-a")?;
    check!(!std::path::Path::new(&text(&a, "/scratch/path")?).exists(), "its scratch disk is there");
    release("last-b")?;
    wait_for("who has it open", || {
        let waiting = lease("last-b")?;
        check!(waiting["waiting_for"].as_str().is_some_and(|why| why.contains("open")), "{waiting}");
        Ok(())
    })?;
    drop(scratch);
    wait_gone("last-b")?;
    let name = text(&b, "/device/dm_name")?;
    wait_for_devices(&[name].into())?;
    // Who comes now does not get what is on its way out.
    let next = acquire_shared("last-next", &[])?;
    check!(next["device"]["path"] != b["device"]["path"], "what was given back is given out again");
    release_fully("last-next")?;
    drop(root);
    wait_for_devices(&[].into())
}

fn shared_devices_outlive_kills() -> Outcome {
    if !can_share() {
        return Ok(());
    }
    let before = acquire_shared("kills-a", &["--scratch", "16MiB"])?;
    for service in ["cowshed", "containerd"] {
        host("kill", service)?;
        wait_serving()?;
        let after = wait_for("the disk again", || acquire_shared("kills-a", &["--scratch", "16MiB"]))?;
        same!(Disk::of(&after)?, Disk::of(&before)?, "the disk after a kill of {service}");
        same!(after["scratch"], before["scratch"], "its scratch disk");
        same!(acquire_shared("kills-b", &[])?["device"], before["device"], "what another gets");
        release_fully("kills-b")?;
    }
    cowshed(&["audit"])?.ok()?;
    release("kills-a")
}

fn who_renews_what_an_operator_gave_up_is_told() -> Outcome {
    let disk = acquire("abandoned", &image("tiny:1"))?;
    let open = File::open(&disk.path)?;
    cowshed(&["release", "abandoned", "--abandon"])?.ok()?;
    same!(lease("abandoned")?["abandoned"], true, "whether it was given up");
    cowshed(&["renew", &disk.lease])?.fails(6, &["[LEASE_RELEASED]", "operator"])?;
    check!(thin_devices()?.contains(&disk.dm_name), "an open device was removed");
    drop(open);
    wait_gone("abandoned")
}
