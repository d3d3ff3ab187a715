//! Room in the pool: what goes when it is wanted, what stays, and what is said when there is none.

use std::{
    collections::BTreeSet,
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_request, block_on, client, refusal},
        audit::pool_used_bytes,
        check,
        command::{number, sh},
        containerd,
        cow::{
            Disk, acquire, acquire_as, cowshed, evict, evict_all, host, image, pull, release, release_fully,
            wait_serving,
        },
        fake_image::{FakeImage, digest, gzip, tar},
        fake_registry::{Answer, FakeRegistry, Hosts},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    // Others have prefetched the images before.
    ("dry_run", || with_gc("prefetched_seconds = 1\n", "", dry_run)),
    ("cold_images_go_and_others_stay", || with_gc("", "", cold_images_go_and_others_stay)),
    ("above_the_high_mark", || with_gc(MARKS, "", above_the_high_mark)),
    ("who_would_be_refused_gets_room", || with_gc("", TIGHT, who_would_be_refused_gets_room)),
    // What was fetched for later is kept for a moment only, so that it goes as well.
    ("races", || with_gc("prefetched_seconds = 1\n", "", races)),
];

/// The pool is larger after it: to be the last.
pub(crate) const GROWTH: &[Test] = &[("before_anything_goes", || with_gc(GROWING, "", before_anything_goes))];

const CONFIGURATION: &str = "/etc/cowshed/cowshed.toml";
pub(crate) const MIB: u64 = 1 << 20;
/// So much of the pool, in percent, the tests can fill in a moment.
const MARKS: &str = "data_high_percent = 6\ndata_low_percent = 4\ndata_emergency_percent = 90\n";
/// The same, and the volume group has what is needed.
const GROWING: &str = "data_high_percent = 7\ndata_low_percent = 6\ndata_emergency_percent = 90\ngrow = true\ndata_step = \"256MiB\"\n";
/// New disks are refused when a tenth of the pool is in use.
const TIGHT: &str = "data_headroom_percent = 90\n";
/// More than the pool has: all that can go goes.
const ALL: &str = "20GiB";

/// The test, on a service with these options, and images that may go however young they are; then as before.
pub(crate) fn with_gc(gc: &str, pool: &str, test: impl FnOnce() -> Outcome) -> Outcome {
    let before = fs::read_to_string(CONFIGURATION)?;
    check!(!before.contains("[gc]"), "{CONFIGURATION} has a [gc]:\n{before}");
    evict_all()?;
    let changed = before.replace("[pool]\n", &format!("[pool]\n{pool}"));
    fs::write(CONFIGURATION, format!("{changed}\n[gc]\nmin_age_seconds = 0\n{gc}"))?;
    restart()?;
    let outcome = test();
    fs::write(CONFIGURATION, before)?;
    let restarted = restart();
    // A test that fails may leave a host that does not serve.
    outcome.and(restarted)
}

fn restart() -> Outcome {
    host("restart", "cowshed")?;
    wait_serving()
}

/// An image of one file of so many MiB, which do not take long to make or to send.
fn large(seed: u64, mib: u64) -> Outcome<FakeImage> {
    let block: Vec<u8> =
        (0..4096_u64).map(|n| u8::try_from((n * 31 + seed) % 251).unwrap_or(1) | 1).collect();
    let size = usize::try_from(mib * MIB)?;
    let tar = tar(&format!("etc/large-{seed}"), &block.repeat(size / block.len()));
    Ok(FakeImage::of(gzip(&tar)?, &digest(&tar)))
}

/// Serves and pulls images of so many MiB, each under a tag; their names.
pub(crate) fn cold(registry: &FakeRegistry, seed: u64, count: u64, mib: u64) -> Outcome<Vec<String>> {
    let mut names = Vec::new();
    for n in seed..seed + count {
        registry.serve(&n.to_string(), &large(n, mib)?);
        let name = registry.image(&n.to_string());
        pull(&name)?;
        names.push(name);
    }
    Ok(names)
}

/// `cowshed gc …`, which has to say whether that is enough.
fn gc(arguments: &[&str], is_enough: bool) -> Outcome<Value> {
    let ran = cowshed(&[&["gc", "-o", "json"], arguments].concat())?;
    same!(ran.status, if is_enough { 0 } else { 7 }, "{}{}", ran.stdout, ran.stderr);
    Ok(serde_json::from_str(&ran.stdout)?)
}

/// Names of the images that its steps are about, with what became of them.
fn removed(report: &Value, outcome: &str) -> BTreeSet<String> {
    let steps = report["steps"].as_array().map(Vec::as_slice).unwrap_or_default();
    let of = |step: &Value| step["remove_image"]["names"].as_array().cloned().unwrap_or_default();
    let steps = steps.iter().filter(|step| step["outcome"] == outcome);
    steps.flat_map(of).filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// Fills a VM's disk with so many bytes.
pub(crate) fn write(disk: &Disk, bytes: u64) -> Outcome {
    let mib = bytes.div_ceil(MIB);
    sh(&format!("dd if=/dev/zero of={} bs=1M count={mib} oflag=direct status=none", disk.path)).map(drop)
}

fn dry_run() -> Outcome {
    let names = [image("tiny:1"), image("python:3"), image("app:1")];
    names.iter().try_for_each(|name| pull(name).map(drop))?;
    let quiet = gc(&["--dry-run"], true)?;
    check!(quiet["steps"].as_array().is_some_and(Vec::is_empty), "{quiet}");
    let before = containerd::images()?;
    let plan = gc(&["--dry-run", "--free", ALL], false)?;
    same!(removed(&plan, "planned"), names.iter().cloned().collect(), "what would go: {plan}");
    check!(number(&plan, "/frees/data_bytes")? > MIB, "{plan}");
    check!(number(&plan, "/still_lacking/data_bytes")? > MIB, "{plan}");
    same!(containerd::images()?, before, "images after a dry run");
    let text = cowshed(&["gc", "--dry-run", "--free", ALL])?;
    text.fails(7, &[])?;
    for word in ["remove image", &names[2], "still lacking", "would help", "cowshed pool extend --data +SIZE"]
    {
        check!(text.stdout.contains(word), "{word:?} is not said: {}", text.stdout);
    }
    names.iter().try_for_each(|name| {
        acquire_as("hit", "gc-dry", name)?;
        release_fully("gc-dry")
    })?;
    evict_all()
}

fn cold_images_go_and_others_stay() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let names = cold(&registry, 100, 6, 20)?;
    let [gone, pinned, leased, fetched, marked, wanted] = &names[..] else { return Err("not six".into()) };
    cowshed(&["pin", pinned])?.ok()?;
    acquire("gc-leased", leased)?;
    cowshed(&["prefetch", fetched, "--name", "gc-fetched", "--wait"])?.ok()?;
    sh(&format!("ctr images label {marked} io.cri-containerd.image=managed"))?;
    // It is pulled again, as something else.
    let moved = large(107, 20)?;
    registry.serve("105", &moved);
    registry.blob(&digest(&moved.layer), Answer::Gated(moved.layer.clone()));
    let puller = thread::spawn({
        let wanted = wanted.clone();
        move || pull(&wanted)
    });
    wait_for("the pull to be under way", || {
        check!(!registry.requests(&digest(&moved.layer)).is_empty(), "it has not asked for its layer");
        Ok(())
    })?;
    let before = pool_used_bytes()?;
    let report = gc(&["--free", ALL], false)?;
    same!(removed(&report, "done"), BTreeSet::from([gone.clone()]), "what went: {report}");
    let stay: BTreeSet<String> = names[1..].iter().cloned().collect();
    same!(containerd::images()?, stay, "the images that stay");
    let helps = report["helps"].to_string();
    for word in ["a disk is made of it", "pinned", "fetched for later", "being pulled"] {
        check!(helps.contains(word), "{word:?} is not said: {helps}");
    }
    wait_for("the room to come back", || {
        let freed = before.saturating_sub(pool_used_bytes()?);
        check!(freed >= 19 * MIB, "{freed} bytes have come back");
        Ok(())
    })?;
    let again = gc(&["--free", ALL], false)?;
    check!(removed(&again, "done").is_empty(), "the same again: {again}");
    registry.open_gate();
    puller.join().map_err(|_| "the pull panicked")??;
    acquire_as("hit", "gc-pulled", wanted)?;
    for vm in ["gc-pulled", "gc-leased"] {
        release_fully(vm)?;
    }
    cowshed(&["unpin", pinned])?.ok()?;
    let last = gc(&["--free", ALL], false)?;
    same!(removed(&last, "done").len(), 3, "what was freed by now: {last}");
    same!(containerd::images()?, [fetched, marked].map(String::clone).into(), "what others want");
    evict(&[fetched, marked])
}

fn metric(name: &str) -> Outcome<f64> {
    let text = sh("curl -sf http://127.0.0.1:9850/metrics")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(|| format!("no {name}"))?;
    Ok(line.trim().parse()?)
}

/// Nobody asks for it.
fn above_the_high_mark() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let names = cold(&registry, 200, 2, 120)?;
    let tiny = image("tiny:1");
    let writer = acquire("gc-writer", &tiny)?;
    let total = pool_total_bytes()?;
    let high = total / 100 * 6;
    write(&writer, high + 20 * MIB - pool_used_bytes()?)?;
    let mut count = 0;
    wait_for("the images to go", || {
        // VMs come and go meanwhile.
        count += 1;
        let vm = format!("gc-high-{count}");
        acquire(&vm, &tiny)?;
        release(&vm)?;
        let left = containerd::images()?;
        check!(!names.iter().any(|name| left.contains(name)), "{left:?}");
        Ok(())
    })?;
    check!(containerd::images()?.contains(&tiny), "an image in use is gone");
    check!(
        metric("cowshed_gc_runs_total{outcome=\"met\",trigger=\"pressure\"}")? >= 1.0,
        "no run is counted"
    );
    check!(
        metric("cowshed_gc_freed_bytes_total{part=\"data\",reason=\"cold\"}")? >= 2e8,
        "few bytes are counted"
    );
    wait_for("the room to come back", || {
        let used = pool_used_bytes()?;
        check!(used < total / 100 * 4, "{used} bytes are in use");
        Ok(())
    })?;
    release_fully("gc-writer")?;
    for n in 1..=count {
        release_fully(&format!("gc-high-{n}"))?;
    }
    evict_all()
}

fn who_would_be_refused_gets_room() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let names = cold(&registry, 300, 2, 120)?;
    let tiny = image("tiny:1");
    let writers = [acquire("gc-full-1", &tiny)?, acquire("gc-full-2", &tiny)?];
    let tenth = pool_total_bytes()? / 10;
    let missing = tenth + 60 * MIB - pool_used_bytes()?;
    writers.iter().try_for_each(|disk| write(disk, missing / 2))?;
    check!(pool_used_bytes()? > tenth, "the pool is not as full as it should be");
    // Who asks before is told so, once it is known.
    wait_for("an offer with room that could be made", || {
        let offer = cowshed(&["offer", &tiny, "-o", "json"])?.json()?;
        check!(offer["accepted"] == true && number(&offer, "/data_free_bytes")? == 0, "{offer}");
        Ok(())
    })?;
    let begun = Instant::now();
    acquire_as("hit", "gc-served", &tiny)?;
    let (took, left) = (begun.elapsed(), containerd::images()?);
    check!(!names.iter().any(|name| left.contains(name)), "{left:?} after {took:?}");
    check!(
        metric("cowshed_gc_runs_total{outcome=\"met\",trigger=\"admission\"}")? >= 1.0,
        "no run is counted"
    );
    // Nothing is left.
    write(&acquire("gc-full-3", &tiny)?, 250 * MIB)?;
    let mut client = block_on(client())?;
    let mut times = Vec::new();
    for n in 0..6 {
        let begun = Instant::now();
        let refused = block_on(async {
            refusal(client.acquire(acquire_request(&format!("gc-refused-{n}"), &tiny)).await)
        })?;
        times.push(begun.elapsed());
        same!(refused.reason, "POOL_FULL", "{refused:?}");
        for word in ["data_headroom_percent", "lacking: ", "cowshed pool extend"] {
            check!(refused.message.contains(word), "{word:?} is not said: {}", refused.message);
        }
        check!(refused.metadata.contains_key("helps"), "{refused:?}");
        // Every other one a moment later, when it is looked at anew.
        let moment = Duration::from_millis(if n % 2 == 0 { 1 } else { 1_500 });
        block_on(async { tokio::time::sleep(moment).await });
    }
    // It is not waited for what cannot come.
    check!(times.iter().all(|took| *took < Duration::from_secs(10)), "refusals took {times:?}");
    // What VMs have is learnt for a moment each time, until it is known.
    wait_for("a refusal that names the VMs", || {
        let refused =
            block_on(async { refusal(client.acquire(acquire_request("gc-refused-last", &tiny)).await) })?;
        check!(refused.message.contains("release VM gc-full-"), "{}", refused.message);
        Ok(())
    })?;
    // What would help helps.
    release_fully("gc-full-3")?;
    wait_for("room", || acquire("gc-helped", &tiny).map(drop))?;
    for vm in ["gc-full-1", "gc-full-2", "gc-served", "gc-helped"] {
        release_fully(vm)?;
    }
    evict_all()
}

fn pool_total_bytes() -> Outcome<u64> {
    number(&cowshed(&["status", "-o", "json"])?.json()?, "/pool/data_total_bytes")
}

/// A VM writes, the pool grows, and nobody notices.
fn before_anything_goes() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let names = cold(&registry, 500, 1, 60)?;
    let tiny = image("tiny:1");
    let writer = acquire("gc-grows", &tiny)?;
    let before = pool_total_bytes()?;
    write(&writer, before / 100 * 7 + 20 * MIB - pool_used_bytes()?)?;
    let mut count = 0;
    let grown = wait_for("the pool to grow", || {
        // VMs come meanwhile.
        count += 1;
        acquire(&format!("gc-grows-{count}"), &tiny)?;
        let now = pool_total_bytes()?;
        check!(now >= before + 256 * MIB, "{now} bytes of {before}");
        Ok(now)
    })?;
    // What was on its way is over.
    wait_for("the next extension", || {
        let extended = metric("cowshed_pool_extensions_total{part=\"data\",result=\"ok\"}")?;
        check!(extended >= 1.0, "{extended} extensions are counted");
        Ok(())
    })?;
    check!(grown % (4 * MIB) == 0, "{grown} bytes are no whole extents");
    let left = containerd::images()?;
    check!(names.iter().all(|name| left.contains(name)), "an image went: {left:?}");
    write(&writer, 8 * MIB)?;
    for vm in std::iter::once("gc-grows".to_owned()).chain((1..=count).map(|n| format!("gc-grows-{n}"))) {
        release_fully(&vm)?;
    }
    evict_all()
}

/// Disks are acquired, images pulled, fetched ahead of need and pinned while everything that can go goes, again and again.
fn races() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let names = cold(&registry, 400, 4, 2)?;
    let until = Instant::now() + Duration::from_secs(40);
    let collector = thread::spawn(move || {
        let mut done = 0;
        while Instant::now() < until {
            done += removed(&gc(&["--free", ALL], false)?, "done").len();
        }
        Outcome::Ok(done)
    });
    let launchers: Vec<_> = names
        .iter()
        .cloned()
        .enumerate()
        .map(|(n, name)| {
            thread::spawn(move || {
                for round in 0.. {
                    if Instant::now() > until {
                        break;
                    }
                    let vm = format!("gc-race-{n}-{round}");
                    acquire(&vm, &name)?;
                    release_fully(&vm)?;
                    // Now nobody needs it.
                    let moment = Duration::from_millis(100 * u64::try_from((n + 3 * round) % 7)?);
                    block_on(async { tokio::time::sleep(moment).await });
                    match (n + round) % 4 {
                        0 => drop(pull(&name)?),
                        2 => drop(cowshed(&["prefetch", &name, "--wait"])?.ok()?),
                        // It may have gone since.
                        1 if cowshed(&["pin", &name])?.status == 0 => {
                            check!(containerd::images()?.contains(&name), "{name} went while it was pinned");
                            cowshed(&["unpin", &name])?.ok()?;
                        }
                        _ => {}
                    }
                }
                Outcome::Ok(())
            })
        })
        .collect();
    for launcher in launchers {
        launcher.join().map_err(|_| "a launcher panicked")??;
    }
    let removed = collector.join().map_err(|_| "the collector panicked")??;
    check!(removed > 3, "only {removed} images went");
    wait_for("a clean audit", || {
        let found = cowshed(&["audit", "-o", "json"])?.json()?;
        check!(found["findings"].as_array().is_some_and(Vec::is_empty), "{found}");
        Ok(())
    })?;
    evict_all()
}
