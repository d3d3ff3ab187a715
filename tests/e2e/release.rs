//! Giving back: what goes, when, and what must not.

use std::{fs::File, os::unix::fs::FileExt as _};

use cowshed_proto::v1::{self, get_lease_request::By};
use tonic::Code;

use crate::{
    Test,
    support::{
        Outcome,
        api::{block_on, client, refusal},
        check,
        command::{sh, text},
        cow::{
            acquire, acquire_reply, cowshed, image, lease, release, release_fully, thin_devices, wait_gone,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("of_an_unknown_vm_succeeds", of_an_unknown_vm_succeeds),
    ("twice_succeeds", twice_succeeds),
    ("keeps_the_disk_while_its_device_is_open", keeps_the_disk_while_open),
    ("keeps_the_disk_while_it_is_mounted", keeps_the_disk_while_mounted),
    ("and_acquire_again_gives_another_disk", and_acquire_again_gives_another_disk),
    ("of_a_stale_lease_does_nothing", of_a_stale_lease_does_nothing),
    ("frees_the_pool", frees_the_pool),
];

fn of_an_unknown_vm_succeeds() -> Outcome {
    let reply = cowshed(&["release", "never-seen", "-o", "json"])?.json()?;
    check!(reply["lease"].is_null(), "a lease was released: {reply}");
    check!(cowshed(&["release", "never-seen"])?.ok()?.contains("never-seen"), "the VM is not named");
    Ok(())
}

fn twice_succeeds() -> Outcome {
    let disk = acquire("release-twice", &image("tiny:1"))?;
    let reply = cowshed(&["release", "release-twice", "-o", "json"])?.json()?;
    same!(text(&reply, "/lease/lease_id")?, disk.lease, "the lease that is released");
    same!(text(&reply, "/lease/state")?, "releasing", "its state");
    release("release-twice")?;
    wait_gone("release-twice")?;
    release("release-twice")
}

/// Waits until the service says that it waits because the device is open.
fn wait_for_the_fence(vm: &str) -> Outcome {
    wait_for("the release to wait for the device", || {
        let lease = lease(vm)?;
        same!(text(&lease, "/state")?, "releasing", "the state of {lease}");
        let why = text(&lease, "/waiting_for")?;
        check!(why.contains("open"), "it waits for {why:?}");
        Ok(())
    })
}

fn keeps_the_disk_while_open() -> Outcome {
    let disk = acquire("release-open", &image("tiny:1"))?;
    let open = File::options().read(true).write(true).open(&disk.path)?;
    release("release-open")?;
    wait_for_the_fence("release-open")?;
    let mut superblock = [0; 4096];
    open.read_exact_at(&mut superblock, 0)?;
    same!(&superblock[1080..1082], &[0x53, 0xef], "ext4's magic number");
    open.write_all_at(b"still mine", 512 << 20)?;
    open.sync_all()?;
    check!(thin_devices()?.contains(&disk.dm_name), "{} is gone while it is open", disk.path);
    drop(open);
    wait_gone("release-open")?;
    check!(!thin_devices()?.contains(&disk.dm_name), "{} is still there", disk.path);
    check!(!std::path::Path::new(&disk.path).exists(), "{} is still there", disk.path);
    Ok(())
}

fn keeps_the_disk_while_mounted() -> Outcome {
    let disk = acquire("release-mounted", &image("tiny:1"))?;
    let directory = sh(&format!("d=$(mktemp -d /tmp/e2e-mount.XXXXXX); mount {} $d; echo $d", disk.path))?;
    let directory = directory.trim();
    let tested = release("release-mounted").and_then(|()| wait_for_the_fence("release-mounted"));
    let written =
        sh(&format!("cat {directory}/etc/tiny; echo more > {directory}/more; sync {directory}/more"));
    sh(&format!("umount {directory}; rmdir {directory}"))?;
    tested?;
    same!(written?.trim(), "a tiny image", "a file of the mounted disk");
    wait_gone("release-mounted")
}

fn and_acquire_again_gives_another_disk() -> Outcome {
    let tiny = image("tiny:1");
    let old = acquire("release-again", &tiny)?;
    let open = File::open(&old.path)?;
    release("release-again")?;
    let reply = acquire_reply("release-again", &tiny)?;
    same!(reply["existing"], serde_json::Value::Bool(false), "existing in {reply}");
    let new = crate::support::cow::Disk::of(&reply["lease"])?;
    check!(new.lease != old.lease, "the lease is the old one");
    check!(new.generation > old.generation, "generation {} after {}", new.generation, old.generation);
    check!(new.path != old.path && new.thin_id != old.thin_id, "the device is the old one: {new:?} {old:?}");
    let by_id = |id: String| {
        block_on(async move {
            let request = v1::GetLeaseRequest { by: Some(By::LeaseId(id)) };
            let reply = client().await?.get_lease(request).await;
            Ok::<_, libtest_mimic::Failed>(reply.map(|reply| reply.into_inner().lease.unwrap_or_default()))
        })
    };
    same!(by_id(old.lease.clone())??.state(), v1::LeaseState::Releasing, "the state of the old one");
    same!(text(&lease("release-again")?, "/lease_id")?, new.lease, "the VM's lease");
    drop(open);
    wait_for("the old disk to go", || {
        let error = refusal(by_id(old.lease.clone())?)?;
        same!(error.code, Code::NotFound, "{error:?}");
        Ok(())
    })?;
    same!(text(&lease("release-again")?, "/state")?, "granted", "the state of the new one");
    File::open(&new.path)?;
    release("release-again")
}

fn of_a_stale_lease_does_nothing() -> Outcome {
    let tiny = image("tiny:1");
    let old = acquire("release-stale", &tiny)?;
    release_fully("release-stale")?;
    let new = acquire("release-stale", &tiny)?;
    let reply = cowshed(&["release", "release-stale", "--lease", &old.lease, "-o", "json"])?.json()?;
    check!(reply["lease"]["lease_id"] != new.lease.as_str(), "the new lease was released: {reply}");
    same!(text(&lease("release-stale")?, "/state")?, "granted", "the state of the new lease");
    same!(acquire("release-stale", &tiny)?, new, "the disk");
    let bad = cowshed(&["release", "release-stale", "--lease", "nonsense"])?;
    bad.fails(2, &["[LEASE_ID_INVALID]", "nonsense"])?;
    cowshed(&["release", "release-stale", "--lease", &new.lease])?.ok()?;
    wait_gone("release-stale")
}

fn frees_the_pool() -> Outcome {
    use crate::support::audit::pool_used_bytes;
    let tiny = image("tiny:1");
    let before = {
        acquire("release-frees", &tiny)?;
        release_fully("release-frees")?;
        pool_used_bytes()?
    };
    let disk = acquire("release-frees", &tiny)?;
    sh(&format!("dd if=/dev/urandom of={} bs=1M seek=200 count=32 oflag=direct status=none", disk.path))?;
    let written = pool_used_bytes()?;
    check!(written >= before + (32 << 20), "{before} bytes were in use, {written} are");
    release_fully("release-frees")?;
    wait_for("the blocks to be free", || {
        let after = pool_used_bytes()?;
        check!(after <= before, "{before} bytes were in use before, {after} are");
        Ok(())
    })
}
