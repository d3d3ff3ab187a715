//! What becomes of the pool under the snapshotter: it is extended, its name is somebody else's, a power cut leaves it odd.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use tonic::{Code, Status};

use super::{client, failed, refused, remove_all};
use crate::support::{
    Outcome,
    api::block_on,
    check,
    command::{Ran, run, sh},
    cow::{host, wait_serving},
    same,
    snapshots::Snapshots,
    thin_metadata::leak_a_block,
    wait_for,
};

const WORKERS: usize = 4;
const EXTENSIONS: u64 = 5;
/// Of the volume group, LVM2's default; each extension is of two.
const EXTENT: u64 = 4 << 20;

/// LVM2 suspends the pool whenever it extends it, and the kernel then activates nothing.
pub(super) fn extended_while_used() -> Outcome {
    let client = client()?;
    block_on(client.prepare("extended-a", "", &[]))?;
    block_on(client.commit("extended-parent", "extended-a", &[]))?;
    let before = data_bytes()?;
    let (made, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (extended, used) = thread::scope(|scope| {
        let use_it = |worker| use_until(&client, worker, &made, &over);
        let workers: Vec<_> = (0..WORKERS).map(|worker| scope.spawn(move || use_it(worker))).collect();
        let extended = extend(&made, &over);
        over.store(true, Ordering::Relaxed);
        (extended, workers.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>())
    });
    for worker in used {
        worker
            .map_err(|_| "a worker has panicked")?
            .map_err(|status| format!("while it was extended: {status:?}"))?;
    }
    extended?;
    same!(data_bytes()?, before + EXTENSIONS * 2 * EXTENT, "bytes of the pool's data");
    remove_all(&client)
}

/// Prepares and removes until all is over, or something fails.
fn use_until(client: &Snapshots, worker: usize, made: &AtomicUsize, over: &AtomicBool) -> Result<(), Status> {
    let mut round = 0;
    let used = loop {
        if over.load(Ordering::Relaxed) {
            break Ok(());
        }
        let key = format!("extended-{worker}-{round}");
        let used = block_on(async {
            client.prepare(&key, "extended-parent", &[]).await?;
            client.remove(&key).await
        });
        if used.is_err() {
            break used;
        }
        made.fetch_add(1, Ordering::Relaxed);
        round += 1;
    };
    over.store(true, Ordering::Relaxed);
    used
}

/// Extends the pool, each time while the workers are at it.
fn extend(made: &AtomicUsize, over: &AtomicBool) -> Outcome {
    for _ in 0..EXTENSIONS {
        let seen = made.load(Ordering::Relaxed);
        wait_for("the workers to be at it", || {
            let now = made.load(Ordering::Relaxed);
            check!(now >= seen + WORKERS || over.load(Ordering::Relaxed), "{now} were made");
            Ok(())
        })?;
        sh("lvextend -l +2 vg/pool 2>&1")?;
    }
    Ok(())
}

fn data_bytes() -> Outcome<u64> {
    Ok(sh("blockdev --getsize64 /dev/mapper/vg-pool")?.trim().parse()?)
}

/// Found while it serves, and at its start.
pub(super) fn a_pool_of_another_uuid() -> Outcome {
    let client = client()?;
    let disk = block_on(client.prepare("uuid-a", "", &[]))?.path;
    let other = OtherPool::in_place_of_ours()?;
    let served = served_in_its_place(&client, &disk, &other);
    other.give_back()?;
    served?;
    wait_for("a snapshot", || Ok(block_on(client.prepare("uuid-b", "", &[])).map(drop)?))?;

    let other = OtherPool::in_place_of_ours()?;
    let started = host("restart", "cowshed").and_then(|()| started_in_its_place(&client, &disk, &other));
    let stopped = host("stop", "cowshed");
    other.give_back()?;
    started?;
    stopped?;
    host("start", "cowshed")?;
    wait_serving()?;
    wait_for("a snapshot", || Ok(block_on(client.prepare("uuid-c", "", &[])).map(drop)?))?;
    remove_all(&client)
}

fn served_in_its_place(client: &Snapshots, disk: &str, other: &OtherPool) -> Outcome {
    let before = other.status()?;
    // containerd 1.7 has no word for Internal, and passes it on as Unknown.
    let codes = [Code::Unavailable, Code::Internal, Code::Unknown];
    failed(block_on(client.prepare("uuid-b", "", &[])), &codes, &["vg-pool", OtherPool::UUID])?;
    same!(block_on(client.list())?.len(), 1, "snapshots listed");
    same!(block_on(client.mounts("uuid-a"))?.path, disk, "the device of what is active");
    sh(&format!("dd if={disk} of=/dev/null bs=64k count=1 iflag=direct status=none"))?;
    same!(other.status()?, before, "the other pool's status");
    Ok(())
}

fn started_in_its_place(client: &Snapshots, disk: &str, other: &OtherPool) -> Outcome {
    let before = other.status()?;
    wait_for("a refusal that says why", || {
        let made = block_on(client.prepare("uuid-c", "", &[]));
        refused(made, Code::FailedPrecondition, &["vg-pool", OtherPool::UUID, "name the right pool"])
    })?;
    same!(block_on(client.list())?.len(), 2, "snapshots listed");
    same!(block_on(client.mounts("uuid-a"))?.path, disk, "the device of what is active");
    same!(other.status()?, before, "the other pool's status");
    Ok(())
}

/// A small pool that has our pool's name, while ours, which stays active, has another.
struct OtherPool;

impl OtherPool {
    const UUID: &str = "E2E-OTHER";

    fn in_place_of_ours() -> Outcome<Self> {
        sh(&format!(
            "truncate -s 4M /tmp/e2e-other-metadata; truncate -s 64M /tmp/e2e-other-data
             metadata=$(losetup -f --show /tmp/e2e-other-metadata); data=$(losetup -f --show /tmp/e2e-other-data)
             dmsetup rename vg-pool e2e-ours
             dmsetup create vg-pool --uuid {} --table \"0 131072 thin-pool $metadata $data 128 0\"",
            Self::UUID
        ))?;
        Ok(Self)
    }

    /// Changes with whatever is made in it.
    fn status(&self) -> Outcome<String> {
        sh("dmsetup status vg-pool")
    }

    fn give_back(self) -> Outcome {
        sh("dmsetup remove --retry vg-pool; dmsetup rename e2e-ours vg-pool
            losetup -j /tmp/e2e-other-metadata | cut -d: -f1 | xargs losetup -d
            losetup -j /tmp/e2e-other-data | cut -d: -f1 | xargs losetup -d
            rm /tmp/e2e-other-*")
        .map(drop)
    }
}

/// LVM2 does not activate such a pool by itself, and does when it is configured as `deploy/` has it.
pub(super) fn leaked_blocks_do_not_keep_a_pool_down() -> Outcome {
    let configuration = fs::read_to_string("/share/host/lvm/thin_check.conf")?;
    sh("truncate -s 160M /tmp/e2e-leak; vgcreate e2e-leak $(losetup -f --show /tmp/e2e-leak) 2>&1
        lvcreate --type thin-pool -L 64M --poolmetadatasize 8M -c 64k --zero y -n pool e2e-leak 2>&1
        lvcreate -V 32M --thinpool pool -n disk e2e-leak 2>&1")?;
    let tested = leaked(&without_comments(&configuration));
    sh("vgchange -an e2e-leak 2>&1; vgremove -y e2e-leak 2>&1
        losetup -j /tmp/e2e-leak | cut -d: -f1 | xargs losetup -d; rm /tmp/e2e-leak")?;
    tested
}

/// As `--config` wants it.
fn without_comments(configuration: &str) -> String {
    configuration.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n")
}

fn leaked(configuration: &str) -> Outcome {
    let disk = "/dev/e2e-leak/disk";
    sh(&format!("dd if=/dev/urandom of={disk} bs=1M count=4 conv=fsync status=none"))?;
    let sum = || sh(&format!("dd if={disk} bs=1M iflag=direct status=none | sha256sum"));
    let written = sum()?;
    let metadata = Metadata::of_inactive()?;
    metadata.check()?.ok()?;
    let leak = leak_a_block(Path::new(Metadata::PATH));
    let found = metadata.check();
    metadata.close()?;
    leak?;
    let found = found?;
    check!(found.status != 0 && found.stderr.contains("1 data blocks have leaked"), "{found:?}");

    let refused = run("vgchange", &["-ay", "e2e-leak"])?;
    check!(refused.status != 0 && !Path::new(disk).exists(), "LVM2's default is to activate it: {refused:?}");
    check!(refused.stderr.contains("Manual repair required"), "{refused:?}");
    run("vgchange", &["--config", configuration, "-ay", "e2e-leak"])?.ok()?;
    same!(sum()?, written, "what was written to the disk");
    let metadata = Metadata::of_inactive()?;
    let clean = metadata.check();
    metadata.close()?;
    clean?.ok().map(drop)
}

/// The metadata of the pool, which is inactive meanwhile. LVM2 itself would let it be read only.
struct Metadata;

impl Metadata {
    const PATH: &str = "/dev/mapper/e2e-metadata";

    fn of_inactive() -> Outcome<Self> {
        sh("table=$(dmsetup table e2e--leak-pool_tmeta); vgchange -an e2e-leak 2>&1
            dmsetup create e2e-metadata --table \"$table\"")?;
        Ok(Self)
    }

    fn check(&self) -> Outcome<Ran> {
        run("thin_check", &[Self::PATH])
    }

    fn close(self) -> Outcome {
        sh("dmsetup remove --retry e2e-metadata").map(drop)
    }
}
