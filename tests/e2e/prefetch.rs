//! Prefetch jobs: what they pull, what they survive, and to whom they give way.

use std::{fs, thread};

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome, check,
        command::{number, text},
        containerd,
        cow::{
            acquire, acquire_as, cowshed, evict, evict_all, host, image, nothing_pulled, release_fully,
            wait_serving,
        },
        fake_image::{FakeImage, digest},
        fake_registry::{Answer, FakeRegistry, Hosts},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("by_hand", by_hand),
    ("goes_on_after_a_kill", goes_on_after_a_kill),
    ("goes_on_within_a_layer", goes_on_within_a_layer),
    ("gives_way_to_a_launcher", gives_way_to_a_launcher),
    ("is_taken_over_by_a_launcher", is_taken_over_by_a_launcher),
    ("of_what_a_launcher_needs_too", of_what_a_launcher_needs_too),
    ("cancelled_leaves_nothing", cancelled_leaves_nothing),
    ("of_a_warm_set", of_a_warm_set),
    ("of_a_file", of_a_file),
];

fn job(name: &str) -> Outcome<Value> {
    cowshed(&["prefetches", name, "-o", "json"])?.json()
}

/// How many of its images are at this stage.
fn count(job: &Value, stage: &str) -> usize {
    let images = job["images"].as_array().map(Vec::as_slice).unwrap_or_default();
    images.iter().filter(|image| image["stage"] == stage).count()
}

fn wait_ended(name: &str, state: &str) -> Outcome<Value> {
    wait_for("the job to end", || {
        let job = job(name)?;
        check!(job["state"] != "running", "{job}");
        Ok(job)
    })
    .and_then(|job| {
        same!(text(&job, "/state")?, state, "how it has ended: {job}");
        Ok(job)
    })
}

/// Images of one layer of so many bytes, each under a tag.
fn serve(registry: &FakeRegistry, seed: u64, count: u64, bytes: usize) -> Outcome<Vec<(String, FakeImage)>> {
    let mut images = Vec::new();
    for n in 0..count {
        let image = FakeImage::new(seed + n, bytes)?;
        registry.serve(&n.to_string(), &image);
        images.push((registry.image(&n.to_string()), image));
    }
    Ok(images)
}

fn names(images: &[(String, FakeImage)]) -> Vec<&str> {
    images.iter().map(|(name, _)| name.as_str()).collect()
}

/// How often the layer was handed out, in whole or in part.
fn asked(registry: &FakeRegistry, image: &FakeImage) -> usize {
    registry.requests(&digest(&image.layer)).iter().filter(|request| request.line.starts_with("GET ")).count()
}

fn by_hand() -> Outcome {
    evict_all()?;
    let (tiny, python) = (image("tiny:1"), image("python:3"));
    let arguments =
        ["prefetch", &tiny, &python, "--name", "by-hand", "--concurrency", "2", "--pin-for", "1h"];
    let said = cowshed(&[&arguments[..], &["--wait"]].concat())?.ok()?;
    check!(said.starts_with("prefetch job by-hand is running"), "its name comes first: {said}");
    for word in ["by-hand is done", &format!("{tiny} done"), &format!("{python} done")] {
        check!(said.contains(word), "{word:?} is not said: {said}");
    }
    let shown = job("by-hand")?;
    same!(text(&shown, "/images/0/cache")?, "miss", "whether it was there: {shown}");
    let here = number(&shown, "/images/1/bytes_fetched")?;
    check!(here > 0 && here == number(&shown, "/images/1/bytes_total")?, "{shown}");
    // The same again is the same job; under another name it finds everything there.
    cowshed(&arguments)?.ok()?;
    let again = cowshed(&["prefetch", &tiny, "--wait", "-o", "json"])?.ok()?;
    let last: Value = serde_json::from_str(again.lines().last().unwrap_or_default())?;
    same!(text(&last, "/images/0/cache")?, "hit", "whether it was there: {last}");
    let other = cowshed(&["prefetch", &tiny, "--name", "by-hand", "--class", "urgent"])?;
    other.fails(4, &["[SPEC_CONFLICT]", "by-hand", "images, class"])?;
    let listed = cowshed(&["prefetches"])?.ok()?;
    check!(listed.contains("by-hand") && listed.contains("normal"), "{listed}");
    // They are pinned.
    cowshed(&["remove-image", &tiny])?.fails(6, &["[IMAGE_PINNED]"])?;
    acquire_as("hit", "prefetch-1", &python)?;
    release_fully("prefetch-1")?;
    for name in [&tiny, &python] {
        cowshed(&["unpin", name])?.ok()?;
    }

    let nothing = image("nothing:1");
    let partly = cowshed(&["prefetch", &nothing, &tiny, "--name", "partly", "--wait"])?;
    partly.fails(1, &["partly", "not to be had"])?;
    check!(partly.stdout.contains(&format!("{nothing} failed")), "{}", partly.stdout);
    let shown = job("partly")?;
    same!(text(&shown, "/images/0/failure/reason")?, "IMAGE_NOT_FOUND", "why: {shown}");
    same!(text(&shown, "/images/1/stage")?, "done", "the other one: {shown}");
    // Nobody listens there: who waits is told so each time, and why it was in vain afterwards as well.
    let nowhere = ["prefetch", "127.0.0.1:1/cowshed/tiny:1", "--name", "late", "--deadline", "4s", "--wait"];
    let late = cowshed(&nowhere)?;
    late.fails(9, &["late", "its deadline has passed"])?;
    check!(late.stdout.contains("tries: 2; the next is in "), "{}", late.stdout);
    check!(late.stdout.contains("; the last: registry"), "{}", late.stdout);
    check!(late.stdout.contains("its deadline has passed; the last try: registry"), "{}", late.stdout);
    let shown = job("late")?;
    same!(text(&shown, "/images/0/failure/reason")?, "REGISTRY_UNAVAILABLE", "why: {shown}");
    cowshed(&["prefetch"])?.fails(2, &["--file"])?;
    cowshed(&["prefetch", "r/A:1"])?.fails(2, &["[IMAGE_REFERENCE_INVALID]", "r/A:1"])?;
    cowshed(&["prefetch", &tiny, &tiny])?.fails(2, &["[PREFETCH_INVALID]", "twice"])?;
    cowshed(&["cancel-prefetch", "nobodys"])?.fails(3, &["[PREFETCH_NOT_FOUND]", "nobodys"])?;
    cowshed(&["prefetches", "by-hand", "--wait"])?.ok()?;
    cowshed(&["prefetches", "partly", "--wait"])?.fails(1, &["partly", "not to be had"])?;
    cowshed(&["cancel-prefetch", "by-hand"])?.ok()?;
    same!(text(&job("by-hand")?, "/state")?, "done", "what has ended stays so");
    evict_all()
}

fn goes_on_after_a_kill() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9100, 6, 400_000)?;
    let gated = digest(&images[3].1.layer);
    registry.blob(&gated, Answer::Gated(images[3].1.layer.clone()));
    let arguments =
        [&["prefetch", "--name", "killed", "--class", "background"], &names(&images)[..]].concat();
    cowshed(&arguments)?.ok()?;
    wait_for("the fourth image", || {
        check!(!registry.requests(&gated).is_empty(), "{}", job("killed")?);
        Ok(())
    })?;
    host("kill", "cowshed")?;
    registry.open_gate();
    wait_serving()?;
    let ended = wait_ended("killed", "done")?;
    same!(count(&ended, "done"), 6, "images that are there: {ended}");
    for (name, image) in &images[..3] {
        same!(asked(&registry, image), 1, "how often {name} was fetched");
    }
    acquire_as("hit", "prefetch-killed", &images[5].0)?;
    release_fully("prefetch-killed")?;
    evict(&names(&images))
}

/// A layer that takes longer than the service runs.
fn goes_on_within_a_layer() -> Outcome {
    const ENOUGH: u64 = 1 << 20;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    for (verb, seed) in [("kill", 9150), ("restart", 9160)] {
        let images = serve(&registry, seed, 1, 6_000_000)?;
        let (name, image) = &images[0];
        let layer = digest(&image.layer);
        // Whole the first time; from then on it honours ranges.
        registry.blob(&layer, Answer::CutOnce(image.layer.clone(), image.layer.len()));
        cowshed(&["prefetch", "--name", verb, "--class", "background", "--rate", "512KiB", name])?.ok()?;
        let fetched = || number(&job(verb)?, "/images/0/bytes_fetched");
        wait_for("a part of the layer", || {
            check!(fetched()? >= ENOUGH, "{}", job(verb)?);
            Ok(())
        })?;
        host(verb, "cowshed")?;
        wait_serving()?;
        wait_ended(verb, "done")?;
        let again: Vec<_> =
            registry.requests(&layer).into_iter().filter(|r| r.line.starts_with("GET ")).collect();
        let from = again.get(1).and_then(|request| request.range.clone()).unwrap_or_default();
        let from = from.trim_start_matches("bytes=").trim_end_matches('-').parse::<u64>().unwrap_or_default();
        check!(from >= ENOUGH, "after a {verb} it was begun anew: {again:?}");
        acquire_as("hit", "prefetch-within", name)?;
        release_fully("prefetch-within")?;
        evict(&[name])?;
    }
    Ok(())
}

fn gives_way_to_a_launcher() -> Outcome {
    let (registry, launchers) =
        (FakeRegistry::start(Hosts::PlainHttp)?, FakeRegistry::start(Hosts::PlainHttp)?);
    let images = serve(&registry, 9200, 10, 300_000)?;
    let wanted = serve(&launchers, 9300, 1, 300_000)?;
    let (name, urgent) = &wanted[0];
    launchers.blob(&digest(&urgent.layer), Answer::Gated(urgent.layer.clone()));
    // The job is at its first image, and cannot go on.
    let first = &images[0].1;
    registry.blob(&digest(&first.layer), Answer::Gated(first.layer.clone()));
    let arguments =
        [&["prefetch", "--name", "gives-way", "--class", "background"], &names(&images)[..]].concat();
    cowshed(&arguments)?.ok()?;
    let is_asked = |registry: &FakeRegistry, image: &FakeImage| {
        wait_for("the layer to be asked for", || {
            check!(asked(registry, image) > 0, "it is not");
            Ok(())
        })
    };
    is_asked(&registry, first)?;
    let launcher = thread::spawn({
        let name = name.clone();
        move || acquire("prefetch-launcher", &name)
    });
    is_asked(&launchers, urgent)?;
    // Now it could, but for the launcher.
    registry.open_gate();
    wait_for("the job to give way", || {
        let job = job("gives-way")?;
        same!(count(&job, "giving way"), 1, "images that give way: {job}");
        Ok(())
    })?;
    same!(count(&job("gives-way")?, "done"), 0, "what was pulled beside the launcher");
    let fetched = images.iter().map(|(_, image)| asked(&registry, image)).sum::<usize>();
    same!(fetched, 1, "layers that the job has asked for");
    launchers.open_gate();
    launcher.join().map_err(|_| "the launcher panicked")??;
    wait_ended("gives-way", "done")?;
    release_fully("prefetch-launcher")?;
    evict(&[&names(&images)[..], &[name]].concat())
}

/// At a kilobyte a second it would take half an hour.
fn is_taken_over_by_a_launcher() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9400, 1, 2_000_000)?;
    let (name, image) = &images[0];
    cowshed(&["prefetch", "--name", "taken-over", "--class", "background", "--rate", "1KiB", name])?.ok()?;
    wait_for("its first bytes", || {
        check!(asked(&registry, image) > 0, "{}", job("taken-over")?);
        Ok(())
    })?;
    acquire_as("miss", "prefetch-taker", name)?;
    same!(asked(&registry, image), 1, "how often it was fetched");
    wait_ended("taken-over", "done")?;
    release_fully("prefetch-taker")?;
    evict(&[name])
}

/// Another image, of the same layer.
fn of_what_a_launcher_needs_too() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9500, 1, 2_000_000)?;
    let (name, image) = &images[0];
    let config = String::from_utf8_lossy(&image.config).into_owned();
    let diff_id =
        config.split("\"diff_ids\":[\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    let twin = FakeImage::saying(image.layer.clone(), diff_id, "amd64", r#"{"Cmd":["/bin/true"]}"#);
    registry.serve("twin", &twin);
    let twin = registry.image("twin");
    cowshed(&["prefetch", "--name", "shared", "--class", "background", "--rate", "1KiB", name])?.ok()?;
    wait_for("its first bytes", || {
        check!(asked(&registry, image) > 0, "{}", job("shared")?);
        Ok(())
    })?;
    acquire_as("miss", "prefetch-twin", &twin)?;
    same!(asked(&registry, image), 1, "how often the layer was fetched");
    wait_ended("shared", "done")?;
    release_fully("prefetch-twin")?;
    evict(&[name, &twin])
}

fn cancelled_leaves_nothing() -> Outcome {
    evict_all()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9600, 2, 2_000_000)?;
    let arguments = ["prefetch", "--name", "cancelled", "--rate", "1KiB", &images[0].0, &images[1].0];
    cowshed(&arguments)?.ok()?;
    wait_for("its first bytes", || {
        check!(asked(&registry, &images[0].1) > 0, "{}", job("cancelled")?);
        Ok(())
    })?;
    let said = cowshed(&["cancel-prefetch", "cancelled"])?.ok()?;
    check!(said.contains("cancelled is cancelled"), "{said}");
    let shown = job("cancelled")?;
    same!(count(&shown, "given up"), 2, "what its images are at: {shown}");
    crate::support::audit::nothing_left()?;
    same!(asked(&registry, &images[1].1), 0, "what was pulled after the end");
    check!(containerd::images()?.is_empty(), "{:?}", containerd::images());
    // It can be had all the same.
    acquire_as("miss", "prefetch-after", &images[0].0)?;
    release_fully("prefetch-after")?;
    evict(&[&images[0].0])?;
    nothing_pulled()
}

const WARM: &str = "/etc/cowshed/warm.d";

struct WarmFile;

impl WarmFile {
    fn write(text: &str) -> Outcome<Self> {
        fs::create_dir_all(WARM)?;
        fs::write(format!("{WARM}/e2e.toml"), text)?;
        Ok(Self)
    }
}

impl Drop for WarmFile {
    fn drop(&mut self) {
        // A directory that is not empty is not ours.
        let _gone = fs::remove_file(format!("{WARM}/e2e.toml"));
        let _empty = fs::remove_dir(WARM);
    }
}

fn of_a_warm_set() -> Outcome {
    evict_all()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9700, 2, 200_000)?;
    let is_there = |name: &str| {
        wait_for("the image", || {
            check!(containerd::images()?.contains(name), "{name} is not there");
            Ok(())
        })
    };
    let file = WarmFile::write(&format!("images = [{:?}]\n", images[0].0))?;
    is_there(&images[0].0)?;
    fs::write(
        format!("{WARM}/e2e.toml"),
        format!("images = [{:?}, {:?}]\nrate = '1KiB'\n", images[0].0, images[1].0),
    )?;
    wait_for("the second image's first bytes", || {
        check!(asked(&registry, &images[1].1) > 0, "it was not asked for");
        Ok(())
    })?;
    // A file that is half written is told, and changes nothing.
    fs::write(format!("{WARM}/e2e.toml"), "images = [")?;
    wait_for("the status to say so", || {
        let status = cowshed(&["status", "-o", "json"])?.json()?;
        let said = status["warm_set_problems"][0].as_str().unwrap_or_default().to_owned();
        check!(said.starts_with(&format!("{WARM}/e2e.toml: ")), "{status}");
        same!(number(&status, "/prefetch_jobs")?, 1, "jobs that run");
        Ok(())
    })?;
    // What is no longer in the set is not pulled to its end.
    drop(file);
    crate::support::audit::nothing_left()?;
    check!(!containerd::images()?.contains(&images[1].0), "it was pulled to its end");
    let same_file = cowshed(&["prefetch", "--file", "/nowhere/warm.toml"])?;
    same_file.fails(2, &["/nowhere/warm.toml"])?;
    evict_all()
}

fn of_a_file() -> Outcome {
    evict_all()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let images = serve(&registry, 9800, 2, 100_000)?;
    let file = tempfile::NamedTempFile::new()?;
    let [first, second] = [&images[0].0, &images[1].0];
    fs::write(
        file.path(),
        format!("images = [{first:?}, {second:?}]\nclass = 'background'\npin_for = '1h'\n"),
    )?;
    let path = file.path().display().to_string();
    let said = cowshed(&["prefetch", "--file", &path, "--name", "of-a-file", "--wait"])?.ok()?;
    for word in ["of-a-file is done", &format!("{first} done"), &format!("{second} done")] {
        check!(said.contains(word), "{word:?} is not said: {said}");
    }
    let shown = job("of-a-file")?;
    same!(text(&shown, "/class")?, "background", "what the file says: {shown}");
    for (name, image) in &images {
        same!(asked(&registry, image), 1, "how often {name} was fetched");
        cowshed(&["remove-image", name])?.fails(6, &["[IMAGE_PINNED]"])?;
        acquire_as("hit", "prefetch-file", name)?;
        release_fully("prefetch-file")?;
        cowshed(&["unpin", name])?.ok()?;
    }
    evict_all()
}
