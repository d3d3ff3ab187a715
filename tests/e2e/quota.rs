//! What disks and tenants may have: bursts that are larger than the head-room, quotas by leases and by bytes.

use std::{
    fs,
    time::{Duration, Instant},
};

use cowshed_proto::v1;
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{Refusal, acquire_request, block_on, client, refusal},
        check,
        command::{number, run, sh, text},
        cow::{
            Disk, acquire, cowshed, evict_all, host, image, leases, pull, release, release_fully, snapshots,
            wait_gone, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("burst_larger_than_the_head_room", burst_larger_than_the_head_room),
    ("by_leases", || with(QUOTA_OF_LEASES, by_leases)),
    ("by_bytes", || with(QUOTA_OF_BYTES, by_bytes)),
    ("learnt", || with(LEARNING, learnt)),
];

const CONFIGURATION: &str = "/etc/cowshed/cowshed.toml";
const MIB: u64 = 1 << 20;
const QUOTA_OF_LEASES: &str =
    "[[quota]]\ntenant = \"red\"\nleases = 3\n[[quota]]\ntenant = \"*\"\nleases = 4\n";
const QUOTA_OF_BYTES: &str = "[admission]\nexpected_bytes = \"256MiB\"\nlearn = false\nlook_seconds = 1\n\
    [[quota]]\ntenant = \"red\"\nbytes = \"600MiB\"\n";
const LEARNING: &str = "[admission]\novercommit_percent = 1000\nlook_seconds = 1\n";
/// So many are asked for at once, and so many fit.
const CROWD: usize = 50;
const FIT: usize = 20;
const SPARES: usize = 6;

/// The test, on a service with these sections as well; then as before.
fn with(more: &str, test: fn() -> Outcome) -> Outcome {
    let before = fs::read_to_string(CONFIGURATION)?;
    check!(!before.contains("[admission]"), "{CONFIGURATION} has an [admission]:\n{before}");
    pull(&image("tiny:1"))?;
    configure(&format!("{before}\n{more}"))?;
    let outcome = test();
    configure(&before)?;
    outcome.and(evict_all())
}

fn configure(text: &str) -> Outcome {
    fs::write(CONFIGURATION, text)?;
    host("restart", "cowshed")?;
    wait_serving()
}

fn metric(name: &str) -> Outcome<u64> {
    let text = sh("curl -sf http://127.0.0.1:9850/metrics")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(|| format!("no {name}"))?;
    // In whole bytes.
    Ok(line.trim().parse::<f64>()? as u64)
}

fn quota(part: &str) -> Outcome<u64> {
    metric(&format!("cowshed_quota_{part}{{measure=\"used\",tenant=\"red\"}}"))
}

/// Writes so many MiB where the image has hardly anything: what they have in common counts as nothing new.
fn write(disk: &Disk, mib: u64) -> Outcome {
    let path = &disk.path;
    sh(&format!("dd if=/dev/zero of={path} bs=1M seek=300 count={mib} oflag=direct conv=notrunc status=none"))
        .map(drop)
}

fn acquire_for(tenant: &str, vm: &str) -> Outcome<Disk> {
    let reply = cowshed(&["acquire", vm, &image("tiny:1"), "--tenant", tenant, "-o", "json"])?.json()?;
    Disk::of(&reply["lease"])
}

fn offer_for(tenant: &str) -> Outcome<Value> {
    cowshed(&["offer", &image("tiny:1"), "--tenant", tenant, "-o", "json"])?.json()
}

/// What became of VMs of the tenant that asked all at once, and after which time.
#[derive(Debug, Default)]
struct Crowd {
    granted: Vec<String>,
    spares: usize,
    refused: Vec<(Refusal, Duration)>,
    /// When the last disk was there.
    made: Duration,
}

fn crowd(tenant: &str, vms: &[String]) -> Outcome<Crowd> {
    let image = image("tiny:1");
    let begun = Instant::now();
    let replies = block_on(async {
        let client = client().await?;
        let asked = vms.iter().map(|vm| {
            let request = v1::AcquireRequest { tenant: tenant.to_owned(), ..acquire_request(vm, &image) };
            let mut client = client.clone();
            async move { (client.acquire(request).await, begun.elapsed()) }
        });
        Outcome::Ok(futures_util::future::join_all(asked).await)
    })?;
    let mut crowd = Crowd::default();
    for (vm, (reply, took)) in vms.iter().zip(replies) {
        match reply {
            Ok(reply) => {
                crowd.granted.push(vm.clone());
                crowd.spares += usize::from(reply.get_ref().spare);
                crowd.made = crowd.made.max(took);
            }
            refused => crowd.refused.push((refusal(refused)?, took)),
        }
    }
    Ok(crowd)
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}-{n}")).collect()
}

fn burst_larger_than_the_head_room() -> Outcome {
    let before = fs::read_to_string(CONFIGURATION)?;
    evict_all()?;
    let off = "[spares]\nenabled = false";
    check!(before.contains(off), "{CONFIGURATION} has spares already:\n{before}");
    let with_spares = before.replace(off, "[spares]\nimage_max = 6");
    configure(&with_spares)?;
    let outcome = burst(&with_spares);
    // The audit after it finds what is left otherwise.
    let _unpinned = cowshed(&["unpin", &image("tiny:1")]);
    configure(&before)?;
    let gone = wait_for("the spares to go", || {
        same!(snapshots("Active")?.len(), 0, "active snapshots");
        Ok(())
    });
    outcome.and(gone).and(evict_all())
}

fn wait_for_spares() -> Outcome {
    wait_for("the spares", || {
        let status = cowshed(&["status", "-o", "json"])?.json()?;
        same!(number(&status, "/spares")?, u64::try_from(SPARES)?, "spares in {status}");
        Ok(())
    })
}

fn burst(configuration: &str) -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    cowshed(&["pin", &tiny, "--spares", &SPARES.to_string()])?.ok()?;
    wait_for_spares()?;
    // So much that a few blocks more or less make no difference.
    let free = number(&offer_for("default")?, "/data_free_bytes")?;
    let expected = free * 2 / (2 * u64::try_from(FIT)? + 1);
    let limits = format!(
        "[admission]\novercommit_percent = 100\nexpected_bytes = \"{expected}\"\nlearn = false\nlook_seconds = 1\n"
    );
    configure(&format!("{configuration}\n{limits}"))?;
    wait_for_spares()?;
    let first = crowd("default", &names("burst", CROWD))?;
    tell(&first);
    same!(
        (first.granted.len(), first.refused.len()),
        (FIT, CROWD - FIT),
        "who was granted a disk, and who not"
    );
    check!((1..FIT).contains(&first.spares), "{} were spares", first.spares);
    for (refused, _) in &first.refused {
        same!(refused.reason, "POOL_FULL", "{refused:?}");
        same!(refused.code, tonic::Code::ResourceExhausted, "{refused:?}");
        for word in ["overcommit_percent", "are still expected", "cowshed pool extend"] {
            check!(refused.message.contains(word), "{word:?} is not said: {}", refused.message);
        }
        same!(refused.metadata.get("expected_bytes"), Some(&expected.to_string()), "{refused:?}");
    }
    // Nothing is half made: what is there is granted, or a spare.
    cowshed(&["audit"])?.ok()?;
    let held = leases()?;
    same!(held.iter().filter(|lease| lease["state"] == "granted").count(), FIT, "granted leases: {held:?}");
    same!(held.len(), FIT, "leases: {held:?}");
    // Later ones are refused in a moment, one by one.
    let mut times = Vec::new();
    for n in 0..10 {
        let alone = crowd("default", &[format!("burst-late-{n}")])?;
        same!(alone.granted.len(), 0, "granted beyond what fits: {alone:?}");
        times.extend(alone.refused.iter().map(|(_, took)| *took));
    }
    times.sort();
    println_times("refused one by one", &times);
    check!(times[times.len() / 2] < Duration::from_millis(100), "refusals took {times:?}");
    let refused = offer_for("default")?;
    check!(refused["accepted"] == false, "{refused}");
    same!(text(&refused, "/refusal/reason")?, "POOL_FULL", "why: {refused}");
    // What is written is reserved no more, and is not free either.
    let disk = Disk::of(&cowshed(&["leases", &first.granted[0], "-o", "json"])?.json()?["lease"])?;
    let reserved = metric("cowshed_reserved_bytes ")?;
    write(&disk, 128)?;
    wait_for("what was written to be seen", || {
        let now = metric("cowshed_reserved_bytes ")?;
        let written = reserved.saturating_sub(now);
        check!((118 * MIB..160 * MIB).contains(&written), "{now} bytes of {reserved} are reserved");
        Ok(())
    })?;
    same!(crowd("default", &names("burst-after", 3))?.granted.len(), 0, "granted after some was written");
    // A restart forgets nothing.
    host("restart", "cowshed")?;
    wait_serving()?;
    same!(crowd("default", &names("burst-again", 3))?.granted.len(), 0, "granted after a restart");
    // As many as are released are admitted.
    let (gone, stay) = first.granted.split_at(5);
    gone.iter().try_for_each(|vm| release(vm))?;
    gone.iter().try_for_each(|vm| wait_gone(vm))?;
    let next = wait_for("what was written to come back", || {
        let offered = offer_for("default")?;
        check!(offered["accepted"] == true, "{offered}");
        crowd("default", &names("burst-next", 10))
    })?;
    check!((4..=5).contains(&next.granted.len()), "granted after five releases: {:?}", next.granted);
    cowshed(&["audit"])?.ok()?;
    stay.iter().chain(&next.granted).try_for_each(|vm| release(vm))?;
    stay.iter().chain(&next.granted).try_for_each(|vm| wait_gone(vm))
}

#[allow(clippy::print_stdout, reason = "like the results")]
fn tell(crowd: &Crowd) {
    let mut times: Vec<Duration> = crowd.refused.iter().map(|(_, took)| *took).collect();
    times.sort();
    println_times("refused in the burst", &times);
    println!(
        "{} granted, {} of them spares, the last after {:?}",
        crowd.granted.len(),
        crowd.spares,
        crowd.made
    );
}

#[allow(clippy::print_stdout, reason = "like the results")]
fn println_times(what: &str, times: &[Duration]) {
    let at = |part: usize| times.get(times.len().saturating_sub(1) * part / 100);
    println!("{what}: {} after {:?} (median), {:?} (last)", times.len(), at(50), at(100));
}

fn by_leases() -> Outcome {
    let first = crowd("red", &names("red", 10))?;
    tell(&first);
    same!((first.granted.len(), first.refused.len()), (3, 7), "who was granted a disk, and who not");
    for (refused, _) in &first.refused {
        same!(refused.reason, "QUOTA_EXCEEDED", "{refused:?}");
        same!(refused.code, tonic::Code::ResourceExhausted, "{refused:?}");
        for (key, value) in [("tenant", "red"), ("field", "leases"), ("limit", "3"), ("has", "3")] {
            same!(refused.metadata.get(key).map(String::as_str), Some(value), "{key} of {refused:?}");
        }
    }
    cowshed(&["audit"])?.ok()?;
    same!(quota("leases")?, 3, "what is counted");
    // The same again is the same.
    acquire_for("red", &first.granted[0])?;
    same!(quota("leases")?, 3, "what is counted");
    let refused = offer_for("red")?;
    same!(text(&refused, "/refusal/reason")?, "QUOTA_EXCEEDED", "what is offered: {refused}");
    // Others have their own.
    same!(crowd("blue", &names("blue", 6))?.granted.len(), 4, "any other tenant's");
    acquire("none-says", &image("tiny:1"))?;
    host("restart", "cowshed")?;
    wait_serving()?;
    same!(crowd("red", &names("red-again", 2))?.granted.len(), 0, "granted after a restart");
    release(&first.granted[0])?;
    // It counts no more, whether it is gone or not.
    acquire_for("red", "red-next")?;
    let all: Vec<String> = leases()?.iter().filter_map(|l| l["vm_id"].as_str().map(str::to_owned)).collect();
    all.iter().try_for_each(|vm| release(vm))?;
    all.iter().try_for_each(|vm| wait_gone(vm))
}

fn by_bytes() -> Outcome {
    let first = crowd("red", &names("red", 3))?;
    same!((first.granted.len(), first.refused.len()), (2, 1), "who was granted a disk, and who not");
    same!(first.refused[0].0.metadata.get("field").map(String::as_str), Some("bytes"), "{first:?}");
    same!(quota("bytes")?, 512 * MIB, "what is counted");
    let [writer, other] = &first.granted[..] else { return Err("not two".into()) };
    let disk = Disk::of(&cowshed(&["leases", writer, "-o", "json"])?.json()?["lease"])?;
    write(&disk, 400)?;
    wait_for("what was written to be seen", || {
        let used = quota("bytes")?;
        check!((640 * MIB..700 * MIB).contains(&used), "{used} bytes are counted");
        Ok(())
    })?;
    release(other)?;
    // The one that has written is in the way.
    let refused = cowshed(&["acquire", "red-next", &image("tiny:1"), "--tenant", "red"])?;
    refused.fails(7, &["[QUOTA_EXCEEDED]", &format!("VM {writer}")])?;
    release(writer)?;
    acquire_for("red", "red-next")?;
    // What was released a moment ago is on its way.
    wait_for("a clean audit", || {
        let audited = run("cowshed", &["audit"])?;
        same!(audited.status, 0, "the audit's status: {audited:?}");
        Ok(())
    })?;
    for vm in [writer, other, "red-next"] {
        release_fully(vm)?;
    }
    Ok(())
}

fn learnt() -> Outcome {
    let tiny = image("tiny:1");
    let disk = acquire("learnt-1", &tiny)?;
    same!(
        metric("cowshed_reserved_bytes ")?,
        256 * MIB,
        "what is expected of a disk of which nothing is known"
    );
    write(&disk, 500)?;
    release_fully("learnt-1")?;
    acquire("learnt-2", &tiny)?;
    let expected = metric("cowshed_reserved_bytes ")?;
    check!((480 * MIB..540 * MIB).contains(&expected), "{expected} bytes are expected of the next");
    release_fully("learnt-2")?;
    // That one has written nothing: a little less is expected.
    acquire("learnt-3", &tiny)?;
    let less = metric("cowshed_reserved_bytes ")?;
    check!(less < expected && less > expected / 2, "{less} bytes are expected after {expected}");
    release_fully("learnt-3")
}
