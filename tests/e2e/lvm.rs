//! The pool's own commands: made in each way, taken over, extended while disks are written, killed in between, locked out, full,
//! repaired.

mod repair;

use std::{
    fs,
    path::Path,
    process::Child,
    time::{Duration, Instant},
};

use devicemapper::{DM, DevId, DmFlags, DmName};
use serde_json::{Value, json};

use crate::{
    Test,
    support::{
        Outcome, check,
        command::{Ran, lines, number, run, sh, spawn, text},
        cow::{acquire, cowshed, image, release_fully},
        same, wait_at_most, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("made_on_a_file_and_back_after_a_reboot", made_on_a_file),
    ("made_on_disks_and_in_a_group", made_on_disks),
    ("what_is_on_a_disk_is_not_overwritten", nothing_is_overwritten),
    ("unfit_pools_are_not_taken_over", unfit),
    ("extended_while_disks_are_written", extended_while_written),
    ("killed_while_the_pool_stands_still", killed),
    ("locked_out_is_said_in_time", locked_out),
    ("a_missing_disk_is_said", missing_disk),
    ("a_full_pool_s_writers_wait_and_go_on", full),
    ("checked_while_used", checked),
    ("repaired_with_what_was_there_kept", repair::repaired),
    ("not_repaired_beside_the_service", repair::refused),
];

/// Names of what these tests make.
const GROUP: &str = "e2e-lvm";
const POOL: &str = "e2e--lvm-pool";
const FILE: &str = "/tmp/e2e-lvm";
const MIB: u64 = 1 << 20;

/// Runs a test that makes the group, and clears away after it whatever comes of it.
fn with_group(test: impl FnOnce() -> Outcome) -> Outcome {
    let tested = test();
    let cleared = sh(&format!(
        "for disk in $(dmsetup ls | awk '/^cowshed-e2e/ {{ print $1 }}'); do dmsetup remove --retry $disk; done
         vgs {GROUP} > /dev/null 2>&1 && {{ vgchange -an {GROUP} 2>&1; vgremove --force --yes {GROUP} 2>&1; }}
         for file in {FILE}*; do
             [ ! -e $file ] || {{ losetup -j $file | cut -d: -f1 | xargs -r -n1 losetup -d; rm -f $file; }}
         done"
    ));
    tested?;
    cleared.map(drop)
}

/// `cowshed pool …`
fn pool(arguments: &[&str]) -> Outcome<Ran> {
    cowshed(&[&["pool"], arguments].concat())
}

/// The same, to succeed, as JSON.
fn pool_json(arguments: &[&str]) -> Outcome<Value> {
    pool(&[arguments, &["-o", "json"]].concat())?.json()
}

fn loop_device(name: &str, mib: u64) -> Outcome<String> {
    let device = sh(&format!("truncate -s {mib}M {FILE}-{name}; losetup -f --show {FILE}-{name}"))?;
    Ok(device.trim().to_owned())
}

/// A pool with this much data, in a group with this much in all.
fn small_pool(group_mib: u64, data_mib: u64) -> Outcome {
    let disk = loop_device("disk", group_mib)?;
    let size = format!("{data_mib}MiB");
    pool(&["create", "--group", GROUP, "--device", &disk, "--size", &size, "--metadata", "4MiB"])?
        .ok()
        .map(drop)
}

/// A disk in it, as Cowshed would make one.
fn thin(name: &str, id: u32, mib: u64) -> Outcome<String> {
    sh(&format!(
        "dmsetup message {POOL} 0 'create_thin {id}'
         dmsetup create {name} --table '0 {} thin /dev/mapper/{POOL} {id}'; udevadm settle",
        mib * 2048
    ))?;
    Ok(format!("/dev/mapper/{name}"))
}

fn made_on_a_file() -> Outcome {
    with_group(|| {
        let create = [
            "create",
            "--loop",
            "/tmp/e2e-lvm-file",
            "--size",
            "1GiB",
            "--group",
            GROUP,
            "--snapshots",
            "100",
        ];
        let told = pool_json(&[&create[..], &["--dry-run"]].concat())?;
        check!(
            told["status"].is_null() && !Path::new("/tmp/e2e-lvm-file").exists(),
            "a dry run has made it: {told}"
        );
        let made = pool_json(&create)?;
        let steps = |reply: &Value| reply["steps"].as_array().map(Vec::len);
        same!(steps(&told), steps(&made), "steps told and done");
        fit(&made)?;
        same!(number(&made, "/division/snapshots")?, 100, "the snapshots that were counted with");

        let again = pool_json(&create)?;
        check!(again["division"].is_null() && steps(&again) == Some(0), "it was made again: {again}");
        // What a reboot does.
        sh(&format!(
            "vgchange -an {GROUP} 2>&1; losetup -j /tmp/e2e-lvm-file | cut -d: -f1 | xargs losetup -d; udevadm settle"
        ))?;
        let back = pool_json(&create)?;
        check!(back["division"].is_null(), "it was made anew: {back}");
        same!(
            text(&back, "/status/active/dm_uuid")?,
            text(&made, "/status/active/dm_uuid")?,
            "the pool's uuid"
        );
        fit(&back)
    })
}

/// That a pool is as Cowshed wants it, by the kernel.
fn fit(reply: &Value) -> Outcome {
    same!(reply["status"]["warnings"], json!([]), "what is wrong with it");
    same!(number(reply, "/status/lvm/transaction_id")?, 0, "the transaction id");
    let (table, status) = (sh(&format!("dmsetup table {POOL}"))?, sh(&format!("dmsetup status {POOL}"))?);
    check!(!table.contains("skip_block_zeroing") && table.contains(" 128 "), "its table: {table}");
    check!(
        status.contains("queue_if_no_space") && status.contains(" discard_passdown"),
        "its status: {status}"
    );
    Ok(())
}

fn made_on_disks() -> Outcome {
    with_group(|| {
        let (a, b) = (loop_device("a", 600)?, loop_device("b", 600)?);
        let create = ["create", "--group", GROUP, "--device", &a, "--device", &b];
        let made = pool_json(&[&create[..], &["--size", "700MiB", "--metadata", "16MiB"]].concat())?;
        fit(&made)?;
        same!(number(&made, "/status/lvm/data_bytes")?, 700 * MIB, "bytes of data");
        same!(number(&made, "/status/lvm/metadata_bytes")?, 16 * MIB, "bytes of metadata");
        // A second one in the same group, which LVM2 gives the same reserve.
        let second =
            ["create", "--group", GROUP, "--name", "second", "--size", "100MiB", "--metadata", "16MiB"];
        let second = pool_json(&second)?;
        same!(text(&second, "/status/pool")?, "e2e--lvm-second", "the second's name");
        pool(&["create", "--group", GROUP, "--name", "third", "--size", "10GiB"])?
            .fails(7, &["--size", GROUP])?;
        // A group that somebody has made before.
        sh(&format!("vgremove --force --yes {GROUP} 2>&1; vgcreate {GROUP} {a} 2>&1"))?;
        let without_pool =
            pool_json(&["create", "--group", GROUP, "--size", "200MiB", "--metadata", "8MiB"])?;
        fit(&without_pool)?;
        pool(&["create", "--group", GROUP, "--device", &b])?.fails(6, &[&format!("vgextend {GROUP} {b}")])?;
        pool(&["create", "--group", "e2e-none"])?.fails(6, &["e2e-none", "--device"])
    })
}

fn nothing_is_overwritten() -> Outcome {
    with_group(|| {
        let disk = loop_device("ext4", 200)?;
        sh(&format!("mkfs.ext4 -q {disk}"))?;
        pool(&["create", "--group", GROUP, "--device", &disk])?.fails(1, &["ext4", "wipefs"])?;
        sh(&format!("e2fsck -fn {disk} 2>&1"))?;
        let other = sh("pvs --noheadings -o pv_name -S vg_name=vg")?;
        pool(&["create", "--group", GROUP, "--device", other.trim()])?.fails(6, &["in the volume group vg"])
    })
}

fn unfit() -> Outcome {
    with_group(|| {
        let disk = loop_device("disk", 400)?;
        sh(&format!("vgcreate {GROUP} {disk} 2>&1"))?;
        let make = "lvcreate --yes --type thin-pool -L 64M --poolmetadatasize 4M -c 64k";
        for (options, more, word) in [
            ("--zero n", "", "--zero y e2e-lvm/pool"),
            ("--zero y", "lvchange --errorwhenfull y e2e-lvm/pool 2>&1", "--errorwhenfull n e2e-lvm/pool"),
            ("--zero y", "lvcreate -V 32M --thinpool pool -n disk e2e-lvm 2>&1", "1 thin volumes"),
        ] {
            sh(&format!("{make} {options} -n pool {GROUP} 2>&1; {more}"))?;
            pool(&["create", "--group", GROUP])?.fails(6, &["cannot be taken over", word])?;
            let status = pool_json(&["status", "e2e-lvm/pool"])?;
            check!(status["warnings"].to_string().contains(word), "{word} is not warned of: {status}");
            sh(&format!("lvremove --force --yes {GROUP} 2>&1"))?;
        }
        sh(&format!("{make} --zero y -n pool {GROUP} 2>&1"))?;
        fit(&pool_json(&["create", "--group", GROUP])?)
    })
}

/// Writes blocks past the page cache until it is told to end, or one fails.
struct Writer {
    child: Child,
    stop: String,
}

impl Writer {
    fn begin(disk: &str) -> Outcome<Self> {
        let stop = format!("/tmp/e2e-stop-{}", Path::new(disk).file_name().unwrap_or_default().display());
        let _left = fs::remove_file(&stop);
        let script = format!(
            "n=0; while [ ! -e {stop} ]; do
               dd if=/dev/urandom of={disk} bs=64k count=4 seek=$((n % 2000 * 4)) oflag=direct conv=notrunc status=none || exit 1
               n=$((n + 1)); done; echo $n"
        );
        Ok(Self { child: spawn("bash", &["-c", &script])?, stop })
    }

    /// How many it has written; fails if one has.
    fn end(self) -> Outcome<u64> {
        fs::write(&self.stop, "")?;
        let output = self.child.wait_with_output()?;
        fs::remove_file(&self.stop)?;
        check!(output.status.success(), "a write has failed: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
    }
}

/// By the service's own pool: VMs write, others come and go, and it grows.
fn extended_while_written() -> Outcome {
    let tiny = image("tiny:1");
    let disks = [acquire("lvm-writer-1", &tiny)?, acquire("lvm-writer-2", &tiny)?];
    let writers = [Writer::begin(&disks[0].path)?, Writer::begin(&disks[1].path)?];
    let extended = (0..4).try_for_each(|round| -> Outcome {
        // Half of them while dmeventd looks after the pool, as it does after a boot.
        sh(&format!("lvchange --monitor {} vg/pool 2>&1", if round < 2 { "n" } else { "y" }))?;
        for (part, option, step) in [("data", "--data", 64 * MIB), ("metadata", "--metadata", 8 * MIB)] {
            let before = pool_json(&["status"])?;
            let grown = pool_json(&["extend", option, &format!("+{}MiB", step / MIB)])?;
            let after = pool_json(&["status"])?;
            let size = |status: &Value| number(status, &format!("/active/{part}/size_bytes"));
            same!(size(&after)?, size(&before)? + step, "bytes of {part}, by the kernel: {grown}");
            same!(number(&grown, "/extended/0/to_bytes")?, size(&after)?, "bytes of {part} as told: {grown}");
            let stall =
                grown.pointer("/extended/0/stall_seconds").and_then(Value::as_f64).unwrap_or_default();
            tell(&format!("{part} extended: {}", grown["extended"][0]));
            check!(stall < 30.0, "the disks stood still for {stall} s");
        }
        let vm = format!("lvm-comer-{round}");
        acquire(&vm, &tiny)?;
        release_fully(&vm)
    });
    let written: Outcome<Vec<u64>> = writers.into_iter().map(Writer::end).collect();
    extended?;
    let written = written?;
    check!(written.iter().all(|count| *count > 0), "nothing was written: {written:?}");
    same!(number(&pool_json(&["status"])?, "/lvm/transaction_id")?, 0, "the transaction id");
    disks.iter().try_for_each(|disk| release_fully(&disk.vm))
}

#[allow(clippy::print_stdout, reason = "what was measured")]
fn tell(what: &str) {
    println!("     {what}");
}

/// What is left suspended by one that was killed goes on, and the next extension finds everything in order.
fn killed() -> Outcome {
    let tiny = image("tiny:1");
    let disk = acquire("lvm-killed", &tiny)?;
    let writer = Writer::begin(&disk.path)?;
    let killed = kill_until_it_stood_still();
    let written = writer.end();
    let (rounds, stood) = killed?;
    tell(&format!("{rounds} were killed, {stood} while the pool stood still; {} writes", written?));
    let before = number(&pool_json(&["status"])?, "/active/data/size_bytes")?;
    let by_lvm = sh("lvs --noheadings --units b --nosuffix -o lv_size vg/pool")?.trim().parse::<u64>()?;
    check!(before <= by_lvm, "the kernel has {before} bytes and LVM2 {by_lvm}");
    pool(&["extend", "--data", "+16MiB"])?.ok()?;
    let after = number(&pool_json(&["status"])?, "/active/data/size_bytes")?;
    same!(after, by_lvm + 16 * MIB, "bytes of data after one that was not killed");
    sh("vgck vg 2>&1")?;
    release_fully(&disk.vm)
}

/// How many were killed, and how many of them while the pool stood still.
fn kill_until_it_stood_still() -> Outcome<(u32, u32)> {
    let (mut rounds, mut stood) = (0, 0);
    let begun = Instant::now();
    while (stood < 2 || rounds < 8) && begun.elapsed() < Duration::from_secs(200) {
        let extending = spawn("cowshed", &["pool", "extend", "--data", "+8MiB"])?;
        let hit = kill_child_when_still(rounds)?;
        let output = extending.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        rounds += 1;
        if hit.is_some() {
            check!(
                !output.status.success() && said.contains("signal 9"),
                "killed, it ended with {}: {said}",
                output.status
            );
        }
        if hit == Some(true) {
            stood += 1;
        }
        check!(!stands_still()?, "the pool stands still after it was killed: {said}");
    }
    check!(rounds > 0 && stood > 0, "none of {rounds} was killed while the pool stood still");
    Ok((rounds, stood))
}

/// Kills the child while the pool stands still (true), or, every third time, at some other moment (false). None: it was faster.
fn kill_child_when_still(round: u32) -> Outcome<Option<bool>> {
    let dm = DM::new()?;
    let name = DmName::new("vg-pool")?;
    let until = Instant::now() + Duration::from_secs(30);
    let mut child = None;
    let anywhere = (round % 3 == 2).then(|| Duration::from_millis(u64::from(round) * 37 % 400));
    let mut seen = Instant::now();
    while Instant::now() < until {
        if child.is_none() {
            child = lvextend_child()?;
            seen = Instant::now();
            continue;
        }
        let still = dm.device_info(&DevId::Name(name))?.flags().contains(DmFlags::DM_SUSPEND);
        if let Some(pid) = child.filter(|_| still || anywhere.is_some_and(|after| seen.elapsed() > after)) {
            let sent = run("kill", &["-9", &pid.to_string()])?;
            return Ok((sent.status == 0).then_some(still));
        }
        if child.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            return Ok(None);
        }
    }
    Ok(None)
}

fn lvextend_child() -> Outcome<Option<u32>> {
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        if words.contains(&&b"lvm-child"[..]) && words.contains(&&b"lvextend"[..]) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

fn stands_still() -> Outcome<bool> {
    let names = lines(
        "dmsetup info -c --noheadings -o name,suspended --separator ' ' | awk '$2 == \"Suspended\" { print $1 }'",
    )?;
    Ok(!names.is_empty())
}

/// The lock's holder is named, and nothing hangs.
fn locked_out() -> Outcome {
    let mut holder = spawn("flock", &["/run/lock/lvm/V_vg", "sleep", "600"])?;
    let locked = wait_for("the lock", || {
        check!(run("flock", &["--nonblock", "/run/lock/lvm/V_vg", "true"])?.status != 0, "nobody has it");
        Ok(())
    });
    let tested = locked.and_then(|()| {
        let begun = Instant::now();
        let pid = holder.id().to_string();
        pool(&["extend", "--data", "+8MiB"])?.fails(8, &["locked by process", &pid, "V_vg"])?;
        let took = begun.elapsed();
        check!(took < Duration::from_secs(30), "it took {took:?}");
        // What the kernel knows is told all the same.
        let status = pool_json(&["status"])?;
        check!(
            text(&status, "/lvm_error")?.contains("locked") && status["active"]["mode"] == "rw",
            "{status}"
        );
        Ok(())
    });
    sh(&format!("pkill -P {} || true", holder.id()))?;
    holder.kill()?;
    holder.wait()?;
    tested?;
    pool(&["extend", "--data", "+8MiB"])?.ok().map(drop)
}

fn missing_disk() -> Outcome {
    with_group(|| {
        let (a, b) = (loop_device("a", 300)?, loop_device("b", 300)?);
        let create = ["create", "--group", GROUP, "--device", &a, "--size", "100MiB", "--metadata", "4MiB"];
        pool(&create)?.ok()?;
        sh(&format!("vgextend {GROUP} {b} 2>&1; losetup -d {b}; udevadm settle"))?;
        let named = format!("{GROUP}/pool");
        let missing = pool(&["extend", &named, "--data", "+8MiB"])?;
        missing.fails(6, &["lacks 1 of its 2 disks", "vgreduce"])?;
        sh(&format!("vgreduce --removemissing {GROUP} 2>&1"))?;
        pool(&["extend", &named, "--data", "+8MiB"])?.ok()?;
        pool(&["extend", &named, "--data", "10GiB"])?.fails(7, &["vgextend e2e-lvm"])?;
        sh(&format!("vgchange --permission r {GROUP} 2>&1 || vgchange -pr {GROUP} 2>&1 || true"))?;
        Ok(())
    })
}

/// Whoever writes past the end of the pool waits, gets no error, and goes on when there is room.
fn full() -> Outcome {
    with_group(|| {
        small_pool(400, 64)?;
        same!(
            number(&pool_json(&["status", "e2e-lvm/pool"])?, "/no_space_timeout_seconds")?,
            0,
            "the module's patience"
        );
        let disk = thin("cowshed-e2e-1", 1, 200)?;
        let dd = format!("if=/dev/zero of={disk} bs=1M count=96 oflag=direct status=none");
        let mut writer = spawn("dd", &dd.split(' ').collect::<Vec<_>>())?;
        wait_for("the pool to be full", || {
            let status = pool_json(&["status", "e2e-lvm/pool"])?;
            same!(text(&status, "/active/mode")?, "out_of_data_space", "the pool's mode");
            Ok(())
        })?;
        // It would have failed at once if it were to.
        let waits = wait_at_most(Duration::from_secs(3), "an error", || {
            check!(writer.try_wait()?.is_some(), "it waits");
            Ok(())
        });
        check!(waits.is_err(), "who writes to a full pool does not wait");
        pool(&["extend", "e2e-lvm/pool", "--data", "+64MiB"])?.ok()?;
        let output = writer.wait_with_output()?;
        check!(output.status.success(), "a write has failed: {}", String::from_utf8_lossy(&output.stderr));
        same!(text(&pool_json(&["status", "e2e-lvm/pool"])?, "/active/mode")?, "rw", "the pool's mode");
        Ok(())
    })
}

fn checked() -> Outcome {
    let disk = acquire("lvm-checked", &image("tiny:1"))?;
    let writer = Writer::begin(&disk.path)?;
    let checked = pool_json(&["check"]);
    let checked_again = pool_json(&["check"]);
    writer.end()?;
    for checked in [checked?, checked_again?] {
        same!(checked["sound"], Value::Bool(true), "whether the metadata are sound: {checked}");
    }
    let held = sh("dmsetup status vg-pool | awk '{ print $7 }'")?;
    same!(held.trim(), "-", "the metadata snapshot");
    release_fully(&disk.vm)
}
