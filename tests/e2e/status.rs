//! What an operator sees of the pool and of who takes it, and what the disk below the pool is told of what is free.

use std::time::Duration;

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::block_on,
        audit::pool_used_bytes,
        check,
        command::{number, sh, spawn, text},
        cow::{Disk, acquire, cowshed, image, release_fully},
        pause, same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("who_takes_most_is_told", who_takes_most),
    ("who_writes_is_told", who_writes),
    ("on_a_terminal_and_elsewhere", on_a_terminal),
    ("what_guests_discard_reaches_the_disk_below", discarded_by_guests),
    ("what_is_deleted_reaches_the_disk_below", trimmed),
];

const MIB: u64 = 1 << 20;
/// Where next to nothing of the image is, in MiB: here and there a block of its filesystem is mapped already.
const FREE: u64 = 500;

/// Writes so many MiB to a disk, past the image.
fn write(disk: &Disk, mib: u64) -> Outcome {
    sh(&format!(
        "dd if=/dev/zero of={} bs=1M seek={FREE} count={mib} oflag=direct conv=notrunc status=none",
        disk.path
    ))
    .map(drop)
}

/// What a VM takes, by the status.
fn of<'a>(status: &'a Value, vm: &str) -> Outcome<&'a Value> {
    let vms = status["usage"]["vms"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = vms.iter().find(|of| of["vm_id"] == vm);
    found.ok_or_else(|| format!("{vm} is not in {status}").into())
}

fn between(what: &str, bytes: u64, mib: (u64, u64)) -> Outcome {
    check!((mib.0 * MIB..=mib.1 * MIB).contains(&bytes), "{what}: {bytes} bytes are not {mib:?} MiB");
    Ok(())
}

fn who_takes_most() -> Outcome {
    let tiny = image("tiny:1");
    let (quiet, writer) = (acquire("status-quiet", &tiny)?, acquire("status-writer", &tiny)?);
    let other = acquire("status-other", &image("app:1"))?;
    write(&writer, 50)?;
    write(&other, 20)?;
    // What was looked at a second ago is told again.
    let status = wait_for("the status to tell", || {
        let status = cowshed(&["status", "--top", "2", "-o", "json"])?.json()?;
        same!(text(&status, "/usage/vms/0/vm_id")?, "status-writer", "who has most: {status}");
        same!(text(&status, "/usage/vms/1/vm_id")?, "status-other", "who has most after that: {status}");
        between("what the writer has", number(of(&status, "status-writer")?, "/own_bytes")?, (49, 51))?;
        Ok(status)
    })?;
    between("what the other one has", number(of(&status, "status-other")?, "/own_bytes")?, (19, 21))?;
    same!(status["usage"]["vms"].as_array().map(Vec::len), Some(2), "VMs told of");
    same!(number(&status, "/usage/vms_total/vms")?, 3, "VMs in all");
    between("what all have", number(&status, "/usage/vms_total/own_bytes")?, (68, 73))?;
    between("written", number(of(&status, "status-writer")?, "/written_bytes")?, (50, 60))?;
    check!(number(&status, "/pool/data_used_bytes")? > 70 * MIB, "{status}");
    same!(status["rescue"], serde_json::json!([]), "what it is rescued from");
    // Images are looked at every ten seconds.
    wait_for("the status to tell of both images", || {
        let status = cowshed(&["status", "--top", "2", "-o", "json"])?.json()?;
        let images = status["usage"]["images"].as_array().cloned().unwrap_or_default();
        let bytes = |image: &Value| image["own_bytes"].as_u64().unwrap_or_default();
        check!(
            images.len() == 2 && bytes(&images[0]) >= bytes(&images[1]) && bytes(&images[1]) > 0,
            "{status}"
        );
        let all = cowshed(&["status", "--top", "100", "-o", "json"])?.json()?;
        let images = all["usage"]["images"].as_array().cloned().unwrap_or_default();
        let of_tiny = images.iter().find(|of| of["names"][0] == tiny).map(|of| of["disks"].clone());
        same!(of_tiny, Some(serde_json::json!(2)), "disks of {tiny}: {all}");
        check!(number(&all, "/usage/images_total/disks")? >= 3, "{all}");
        Ok(())
    })?;
    same!(
        cowshed(&["status", "--top", "0", "-o", "json"])?.json()?["usage"],
        Value::Null,
        "what was not asked for"
    );
    // A disk that has gone takes nothing, and is not told of.
    let vms = [quiet, writer, other].map(|disk| disk.vm);
    vms.iter().try_for_each(|vm| release_fully(vm))?;
    wait_for("the status to forget", || {
        let status = cowshed(&["status", "-o", "json"])?.json()?;
        same!(number(&status, "/usage/vms_total/vms")?, 0, "VMs with disks");
        Ok(())
    })
}

fn who_writes() -> Outcome {
    let tiny = image("tiny:1");
    let (_quiet, writer) = (acquire("status-quiet", &tiny)?, acquire("status-writer", &tiny)?);
    let script = format!(
        "while dd if=/dev/zero of={} bs=1M seek={FREE} count=8 oflag=direct conv=notrunc status=none; do sleep 0.1; done",
        writer.path
    );
    let mut writing = spawn("bash", &["-c", &script])?;
    let told = (|| {
        // What somebody has asked for a moment ago, before these disks were there, is told once more.
        block_on(async { tokio::time::sleep(Duration::from_millis(1_500)).await });
        let once = cowshed(&["top", "--once", "--interval", "2", "-o", "json"])?.json()?;
        same!(text(&once, "/usage/vms/0/vm_id")?, "status-writer", "who writes most: {once}");
        let rate = |vm: &str| -> Outcome<f64> {
            let rate = of(&once, vm)?["written_bytes_per_second"].as_f64();
            rate.ok_or_else(|| format!("no rate of {vm} in {once}").into())
        };
        check!(rate("status-writer")? > 1e6 && rate("status-quiet")? < 1.0, "{once}");
        let over = once.pointer("/usage/rates_over_seconds").and_then(Value::as_f64).unwrap_or_default();
        check!((1.0..30.0).contains(&over), "the rates are over {over} s");
        let plain = cowshed(&["top", "--once"])?.ok()?;
        let row = plain.lines().find(|line| line.starts_with("status-writer ")).unwrap_or_default();
        check!(!plain.contains('\x1b') && row.contains("granted") && row.contains("MiB"), "{plain}");
        let counted = sh("curl -sf http://127.0.0.1:9850/metrics | grep -E '^cowshed_vm_(written|disk)'")?;
        let is_there =
            ["cowshed_vm_disks 2", "cowshed_vm_written_bytes_total"].map(|name| counted.contains(name));
        check!(is_there == [true, true], "{counted}");
        Ok(())
    })();
    // What it has started ends with its next write, and the disk goes then.
    writing.kill()?;
    writing.wait()?;
    told?;
    ["status-quiet", "status-writer"].iter().try_for_each(|vm| release_fully(vm))
}

/// What the command prints on a terminal.
fn on_terminal(variables: &str, command: &str) -> Outcome<String> {
    sh(&format!("export TERM=xterm {variables}; script -qec {command:?} /dev/null < /dev/null"))
}

fn on_a_terminal() -> Outcome {
    let disk = acquire("status-vm", &image("tiny:1"))?;
    let plain = cowshed(&["status"])?.ok()?;
    check!(!plain.contains('\x1b') && !plain.contains('█') && plain.contains("  data      "), "{plain}");
    let coloured = on_terminal("", "cowshed status")?;
    check!(
        coloured.contains('█') && coloured.contains("\x1b[32m") && coloured.contains("status-vm"),
        "{coloured}"
    );
    let bars = on_terminal("NO_COLOR=1", "cowshed status")?;
    check!(bars.contains('█') && !bars.contains('\x1b'), "{bars}");
    let live = on_terminal("", "timeout --foreground -s INT 4 cowshed top --by own || true")?;
    let (begins, ends) = ("\x1b[?1049h", "\x1b[?1049l");
    check!(
        live.contains(begins) && live.trim_end().ends_with(ends),
        "the terminal is not as it was: {live:?}"
    );
    check!(
        live.matches("\x1b[H").count() >= 2 && live.contains("status-vm"),
        "it was not looked at again: {live:?}"
    );
    release_fully(&disk.vm)
}

/// Bytes that the pool's disk was told to forget since the host booted.
fn told_below() -> Outcome<u64> {
    let disk = sh("basename $(vgs --noheadings -o pv_name vg | xargs readlink -f)")?;
    let sectors = sh(&format!("awk '{{ print $14 }}' /sys/class/block/{}/stat", disk.trim()))?;
    Ok(sectors.trim().parse::<u64>()? * 512)
}

fn discarded_by_guests() -> Outcome {
    let disk = acquire("status-discards", &image("tiny:1"))?;
    write(&disk, 64)?;
    let (used, told) = (pool_used_bytes()?, told_below()?);
    sh(&format!("blkdiscard -o {} -l {} {}", FREE * MIB, 64 * MIB, disk.path))?;
    wait_for("the blocks to be free", || {
        between("freed", used.saturating_sub(pool_used_bytes()?), (64, 65))
    })?;
    between("told to the disk below", told_below()? - told, (64, 65))?;
    release_fully(&disk.vm)
}

fn trimmed() -> Outcome {
    let (disk, idle) = (acquire("status-trim", &image("tiny:1"))?, acquire("status-idle", &image("tiny:1"))?);
    write(&disk, 128)?;
    let (used, told) = (pool_used_bytes()?, told_below()?);
    // One that has hardly anything of its own is deleted as it is.
    release_fully(&idle.vm)?;
    (0..10).for_each(|_| pause());
    same!(told_below()?, told, "what the disk below was told of a disk that has nothing");
    release_fully(&disk.vm)?;
    wait_for("the blocks to be free", || {
        let freed = used.saturating_sub(pool_used_bytes()?);
        check!(freed >= 128 * MIB, "{freed} bytes are free by now");
        Ok(())
    })?;
    between("told to the disk below", told_below()? - told, (128, 140))?;
    let counted = sh(
        "curl -sf http://127.0.0.1:9850/metrics | awk '/^cowshed_snapshotter_trimmed_bytes_total/ { print $2 }'",
    )?;
    check!(counted.trim().parse::<u64>()? >= 128 * MIB, "trimmed, by the metric: {counted}");
    Ok(())
}
