//! Rescue mode: what cannot be used ends nothing, is told of, and is used again when it can be.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    Test,
    broken_state::Tmpfs,
    support::{
        Outcome,
        api::{block_on, channel},
        check,
        command::{Ran, run, sh, text},
        cow::{
            Disk, SOCKET, acquire, collect, cowshed, host, image, lease, leases, pull, refused, release,
            service_pid, thin_devices, wait_for_devices, wait_gone, wait_serving,
        },
        same,
        second::{Plan, Second},
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("damaged_ledger_is_left_alone_and_restored_beside", damaged_ledger_is_left_alone_and_restored_beside),
    ("state_directory_that_cannot_be_written", state_directory_that_cannot_be_written),
    ("ledger_that_cannot_be_read", ledger_that_cannot_be_read),
    ("containerd_stopped", containerd_stopped),
    ("containerd_hangs", containerd_hangs),
];

/// With the snapshotter of the same process.
pub(crate) const OWN: &[Test] = &[
    ("nothing_is_removed_while_the_ledger_is_unknown", nothing_is_removed_while_the_ledger_is_unknown),
    ("damaged_snapshot_store_is_left_alone", damaged_snapshot_store_is_left_alone),
];

/// A call that waits for nothing but the kernel; the host is emulated.
const PROMPT: Duration = Duration::from_secs(40);
const METRICS: &str = "127.0.0.1:9851";
const STATE: &str = "/var/lib/cowshed";

fn health(socket: &Path, service: &str) -> Outcome<ServingStatus> {
    block_on(async {
        let request = HealthCheckRequest { service: service.to_owned() };
        let reply = HealthClient::new(channel(socket).await?).check(request).await?;
        Ok(reply.into_inner().status())
    })
}

/// Health and metrics say that exactly these causes keep it from its work.
fn told(socket: &Path, metrics: &str, causes: &[&str]) -> Outcome {
    wait_for("health and metrics to tell", || {
        let expected = if causes.is_empty() { ServingStatus::Serving } else { ServingStatus::NotServing };
        same!(health(socket, "cowshed.v1.Cowshed")?, expected, "the health of the API");
        same!(health(socket, "")?, ServingStatus::Serving, "the health of the process");
        let scraped = sh(&format!("curl -sf http://{metrics}/metrics"))?;
        for cause in ["containerd", "ledger", "pool", "snapshotter"] {
            let line =
                format!("cowshed_rescue{{cause=\"{cause}\"}} {}\n", i32::from(causes.contains(&cause)));
            let rescue: Vec<&str> = scraped.lines().filter(|line| line.contains("_rescue")).collect();
            check!(scraped.contains(&line), "{line:?} is not in {rescue:?}");
        }
        check!(scraped.contains("cowshed_pool_up 1\n"), "the pool is not up in {scraped}");
        Ok(())
    })
}

fn host_told(causes: &[&str]) -> Outcome {
    told(Path::new(SOCKET), "127.0.0.1:9850", causes)
}

/// All files of a store but its lock and its index.
fn contents(directory: &Path, store: &str) -> Outcome<BTreeMap<PathBuf, Vec<u8>>> {
    let mut contents = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let (path, name) = entry.map(|e| (e.path(), e.file_name().to_string_lossy().into_owned()))?;
        if name.starts_with(store) && !name.ends_with("-shm") && !name.ends_with(".lock") && path.is_file() {
            contents.insert(path.clone(), fs::read(path)?);
        }
    }
    Ok(contents)
}

type Damage = fn(&fs::File, u64) -> std::io::Result<()>;

const DAMAGES: [(&str, Damage); 4] = [
    ("its header overwritten", |file, _| file.write_all_at(&[0xff; 64], 0)),
    ("cut off", |file, length| file.set_len(length / 2)),
    ("emptied", |file, _| file.set_len(0)),
    // The root of the first table: any other may be a free one, whose contents are nobody's.
    ("a page overwritten", |file, _| file.write_all_at(&[0xa5; 4096], 4096)),
];

fn damage(path: &Path, damage: Damage) -> Outcome {
    let file = fs::File::options().write(true).open(path)?;
    Ok(damage(&file, file.metadata()?.len())?)
}

/// Up, without its ledger, and says so.
fn is_in_rescue(second: &Second, words: &[&str]) -> Outcome {
    let status = second.cowshed(&["status"])?;
    status.fails(8, words)?;
    let json: Value = serde_json::from_str(&second.cowshed(&["status", "-o", "json"])?.stdout)?;
    same!(json["serving"], Value::Bool(false), "serving in {json}");
    same!(json["leases"], Value::Null, "the leases");
    same!(text(&json, "/pool/name")?, "vg-pool", "the pool");
    check!(json["containerd"]["version"].is_string(), "no containerd in {json}");
    second.refuses("rescue-no", &image("tiny:1"), 8, "LEDGER_UNUSABLE", words)?;
    for call in [&["leases"][..], &["leases", "x"], &["release", "x"], &["images"], &["audit"], &["watch"]] {
        second.cowshed(call)?.fails(8, &["[LEDGER_UNUSABLE]"])?;
    }
    told(second.socket(), METRICS, &["ledger"])
}

fn damaged_ledger_is_left_alone_and_restored_beside() -> Outcome {
    let tiny = image("tiny:1");
    let mut plan = Plan::new("")?;
    plan.metrics = METRICS;
    let mut second = plan.start()?;
    let held = second.cowshed(&["acquire", "rescue-1", &tiny, "-o", "json"])?.json()?;
    let (ledger, backup) = (second.plan.state.join("ledger.db"), second.plan.directory.path().join("backup"));
    let config = second.plan.config().display().to_string();
    let backup = backup.display().to_string();
    run("cowshed", &["ledger", "backup", &backup, "--config", &config])?.ok()?;
    second.terminate()?;
    same!(second.wait()?, 0, "the exit status");
    let good = fs::read(&ledger)?;
    for (what, how) in DAMAGES {
        fs::write(&ledger, &good)?;
        damage(&ledger, how)?;
        let before = contents(&second.plan.state, "ledger.db")?;
        second.start_again_in_rescue()?;
        is_in_rescue(&second, &["damaged", &ledger.display().to_string()])?;
        check!(contents(&second.plan.state, "ledger.db")? == before, "{what}: something was changed");
        if what != DAMAGES[3].0 {
            second.terminate()?;
            same!(second.wait()?, 0, "{what}: the exit status");
        }
    }
    // Away for a moment, as by hand: not made anew.
    let aside = second.plan.directory.path().join("aside");
    fs::rename(&ledger, &aside)?;
    wait_for("the word that it is missing", || second.cowshed(&["status"])?.fails(8, &["is missing"]))?;
    check!(!ledger.exists(), "a ledger was made");
    fs::rename(&aside, &ledger)?;
    run("cowshed", &["ledger", "restore", &backup, "--config", &config])?.ok()?;
    wait_for("full service", || second.cowshed(&["status"])?.ok().map(drop))?;
    told(second.socket(), METRICS, &[])?;
    let kept = second.cowshed(&["leases", "rescue-1", "-o", "json"])?.json()?;
    same!(kept["lease"]["lease_id"], held["lease"]["lease_id"], "the lease");
    let again = second.cowshed(&["acquire", "rescue-1", &tiny, "-o", "json"])?.json()?;
    same!(again["existing"], Value::Bool(true), "existing");
    let busy = run("cowshed", &["ledger", "restore", &backup, "--config", &config])?;
    busy.fails(22, &["has the state directory"])?;
    let log = second.log();
    for words in ["rescue mode", "this cause of rescue mode is gone", "serving"] {
        check!(log.contains(words), "{words:?} is not in its log: {log}");
    }
    same!(log.matches("rescue mode: not all").count(), 1, "how often its log says so: {log}");
    second.release_all()?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

fn state_directory_that_cannot_be_written() -> Outcome {
    let mut plan = Plan::new("")?;
    plan.metrics = METRICS;
    let state = plan.state.display().to_string();
    let path = plan.state.clone();
    let _tmpfs = Tmpfs::mount(&path, "ro")?;
    let second = plan.start_in_rescue()?;
    is_in_rescue(&second, &[&state, "[state] directory"])?;
    sh(&format!("mount -o remount,rw {state}"))?;
    wait_for("full service", || second.cowshed(&["status"])?.ok().map(drop))?;
    second.cowshed(&["acquire", "rescue-ro", &image("tiny:1")])?.ok()?;
    second.release_all()?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

fn ledger_that_cannot_be_read() -> Outcome {
    let mut plan = Plan::new("")?;
    plan.metrics = METRICS;
    let (ledger, aside) = (plan.state.join("ledger.db"), plan.directory.path().join("aside"));
    let mut second = plan.start()?;
    second.terminate()?;
    same!(second.wait()?, 0, "the exit status");
    fs::rename(&ledger, &aside)?;
    fs::create_dir(&ledger)?;
    second.start_again_in_rescue()?;
    is_in_rescue(&second, &["cannot be opened", &ledger.display().to_string()])?;
    fs::remove_dir(&ledger)?;
    wait_for("the word that it is missing", || second.cowshed(&["status"])?.fails(8, &["is missing"]))?;
    fs::rename(&aside, &ledger)?;
    wait_for("full service", || second.cowshed(&["status"])?.ok().map(drop))?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

/// Puts the host's store back when dropped, unless it was put back in order: one failure is one failure.
struct PutBack<'a>(&'a Path, Vec<u8>);

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        if cowshed(&["status"]).is_ok_and(|ran| ran.status == 0) {
            return;
        }
        // What this cannot mend, the audit reports.
        let _mended = host("stop", "cowshed").and_then(|()| Ok(fs::write(self.0, &self.1)?));
        let _started = host("start", "cowshed");
    }
}

/// The host's ledger is damaged, with a disk in use, and one that nobody holds.
fn nothing_is_removed_while_the_ledger_is_unknown() -> Outcome {
    let disk = acquire("rescue-held", &image("tiny:1"))?;
    wait_for_devices(&[disk.dm_name.clone()].into())?;
    host("stop", "cowshed")?;
    let (ledger, keep) = (Path::new(STATE).join("ledger.db"), Path::new(STATE).join("keep.db"));
    fs::copy(&ledger, &keep)?;
    let _put_back = PutBack(&ledger, fs::read(&ledger)?);
    damage(&ledger, DAMAGES[0].1)?;
    host("start", "cowshed")?;
    wait_for("the word of it", || cowshed(&["status"])?.fails(8, &["damaged", "ledger.db"]))?;
    host_told(&["ledger"])?;
    sh(&format!("dd if={} of=/dev/null bs=64k count=16 iflag=direct status=none", disk.path))?;
    sh("ctr snapshots --snapshotter cowshed prepare rescue-free > /dev/null")?;
    let with_free = thin_devices()?;
    sh("ctr snapshots --snapshotter cowshed rm rescue-free")?;
    collect()?;
    same!(thin_devices()?, with_free, "the devices after a collection");
    sh("grep -q 'was not let remove' /var/log/cowshed-host/cowshed.log")?;
    let before = contents(Path::new(STATE), "ledger.db")?;
    let pid = service_pid()?;
    let restored = run("cowshed", &["ledger", "restore", &keep.display().to_string()])?.ok()?;
    check!(before.values().any(|bytes| bytes.starts_with(&[0xff; 64])), "nothing was damaged: {restored}");
    wait_serving()?;
    same!(service_pid()?, pid, "the process in the lock file");
    host_told(&[])?;
    same!(Disk::of(&lease("rescue-held")?)?, disk, "the disk after the restore");
    // What nobody holds is swept up, what somebody holds is not.
    wait_for("the free one to go", || {
        same!(thin_devices()?.len(), 1, "devices");
        check!(thin_devices()?.contains(&disk.dm_name), "the disk is gone");
        Ok(())
    })?;
    fs::remove_file(&keep)?;
    release("rescue-held")?;
    wait_gone("rescue-held")
}

fn damaged_snapshot_store_is_left_alone() -> Outcome {
    let tiny = image("tiny:1");
    let disk = acquire("rescue-store", &tiny)?;
    let store = Path::new(STATE).join("snapshots.db");
    host("stop", "cowshed")?;
    let good = fs::read(&store)?;
    let _put_back = PutBack(&store, good.clone());
    for (what, how) in DAMAGES {
        fs::write(&store, &good)?;
        damage(&store, how)?;
        let before = contents(Path::new(STATE), "snapshots.db")?;
        host("start", "cowshed")?;
        wait_for("the word of it", || cowshed(&["status"])?.fails(8, &["damaged", "snapshots.db"]))?;
        host_told(&["snapshotter"])?;
        refused("rescue-more", &tiny, 8, "SNAPSHOTTER_UNUSABLE", &["snapshots.db"])?;
        same!(leases()?.len(), 1, "the leases");
        check!(cowshed(&["verify", &disk.lease])?.ok()?.contains(&disk.lease), "{what}: no lease");
        cowshed(&["renew", &disk.lease])?.ok()?;
        check!(contents(Path::new(STATE), "snapshots.db")? == before, "{what}: something was changed");
        if what != DAMAGES[3].0 {
            host("stop", "cowshed")?;
        }
    }
    release("rescue-store")?;
    same!(text(&lease("rescue-store")?, "/state")?, "releasing", "the state");
    // As a restored copy comes: under another name, then renamed.
    let beside = store.with_extension("beside");
    fs::write(&beside, &good)?;
    fs::rename(&beside, &store)?;
    wait_serving()?;
    host_told(&[])?;
    wait_gone("rescue-store")?;
    acquire("rescue-more", &tiny)?;
    release("rescue-more")
}

/// What a launcher with a disk needs works by the kernel and the ledger alone.
fn works_without_containerd(disk: &Disk) -> Outcome {
    let prompt = |arguments: &[&str]| -> Outcome<Ran> {
        let begun = Instant::now();
        let ran = cowshed(arguments)?;
        let took = begun.elapsed();
        check!(took < PROMPT, "{arguments:?} took {took:?}: {ran:?}");
        Ok(ran)
    };
    let listed = prompt(&["leases", "-o", "json"])?.json()?;
    same!(listed["leases"].as_array().map(Vec::len), Some(2), "the leases in {listed}");
    prompt(&["leases", &disk.vm])?.ok()?;
    prompt(&["verify", &disk.lease, "--path", &disk.path])?.ok()?;
    prompt(&["renew", &disk.lease])?.ok()?;
    prompt(&["acquire", &disk.vm, &image("tiny:1")])?.ok()?;
    prompt(&["release", "rescue-c2"])?.ok()?;
    same!(text(&lease("rescue-c2")?, "/state")?, "releasing", "the state of what was released");
    prompt(&["status"])?.fails(8, &["containerd"])?;
    let refused = prompt(&["acquire", "rescue-c3", &image("tiny:1")])?;
    refused.fails(8, &["[CONTAINERD_UNAVAILABLE]"])
}

fn containerd_stopped() -> Outcome {
    pull(&image("tiny:1"))?;
    let disk = acquire("rescue-c1", &image("tiny:1"))?;
    acquire("rescue-c2", &image("tiny:1"))?;
    host_told(&[])?;
    host("stop", "containerd")?;
    host_told(&["containerd"])?;
    works_without_containerd(&disk)?;
    host("start", "containerd")?;
    host_told(&[])?;
    wait_gone("rescue-c2")?;
    release("rescue-c1")?;
    wait_gone("rescue-c1")
}

/// Goes on when dropped.
struct Stopped(String);

impl Stopped {
    fn containerd() -> Outcome<Self> {
        let pid = sh("pgrep -o -x containerd")?.trim().to_owned();
        sh(&format!("kill -STOP {pid}"))?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // The next test finds out if it does not.
        let _goes_on = sh(&format!("kill -CONT {}", self.0));
    }
}

fn containerd_hangs() -> Outcome {
    pull(&image("tiny:1"))?;
    let disk = acquire("rescue-c1", &image("tiny:1"))?;
    acquire("rescue-c2", &image("tiny:1"))?;
    let stopped = Stopped::containerd()?;
    // Before anybody has noticed: a few seconds of waiting.
    let begun = Instant::now();
    cowshed(&["verify", &disk.lease, "--path", &disk.path])?.ok()?;
    cowshed(&["renew", &disk.lease])?.ok()?;
    check!(begun.elapsed() < PROMPT, "the first two calls took {:?}", begun.elapsed());
    host_told(&["containerd"])?;
    works_without_containerd(&disk)?;
    drop(stopped);
    host_told(&[])?;
    acquire("rescue-c3", &image("tiny:1"))?;
    wait_gone("rescue-c2")?;
    for vm in ["rescue-c1", "rescue-c3"] {
        release(vm)?;
        wait_gone(vm)?;
    }
    Ok(())
}
