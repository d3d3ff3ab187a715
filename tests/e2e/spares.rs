//! Disks made ahead of need: handed out once, kept over deaths, gone when nobody wants them.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use cowshed_proto::v1;
use libtest_mimic::Failed;
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_all, block_on, client},
        check,
        command::{number, run, sh, text},
        cow::{
            Disk, acquire, acquire_reply, cowshed, evict_all, host, image, nothing_pulled, pull, release,
            release_fully, snapshots, snapshotter, wait_gone, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("by_hand", || with_spares("", by_hand)),
    ("is_the_image_and_nothing_else", || with_spares("", is_the_image_and_nothing_else)),
    ("killed_while_they_are_made_and_handed_out", || with_spares("", killed)),
    ("moved_tag", || with_spares("", moved_tag)),
    ("pool_that_is_too_full_for_them", || with_spares("pool_max_percent = 0", too_full)),
    ("offer", || with_spares("", offer)),
];

const CONFIGURATION: &str = "/etc/cowshed/cowshed.toml";

/// The test, on a service that makes spares, and on one that does not again.
fn with_spares(more: &str, test: fn() -> Outcome) -> Outcome {
    let before = fs::read_to_string(CONFIGURATION)?;
    let off = "[spares]\nenabled = false";
    check!(before.contains(off), "{CONFIGURATION} has spares already:\n{before}");
    evict_all()?;
    fs::write(CONFIGURATION, before.replace(off, &format!("[spares]\n{more}")))?;
    restart()?;
    let outcome = test();
    fs::write(CONFIGURATION, before)?;
    restart()?;
    let gone = wait_for("the spares to go", || {
        same!(snapshots("Active")?.len(), 0, "active snapshots");
        Ok(())
    });
    outcome.and(gone)
}

fn restart() -> Outcome {
    host("restart", "cowshed")?;
    wait_serving()
}

/// What `cowshed images` says of it.
fn listed(name: &str) -> Outcome<Value> {
    let all = cowshed(&["images", "-o", "json"])?.json()?;
    let images = all["images"].as_array().cloned().unwrap_or_default();
    let found = images.into_iter().find(|image| image["name"] == name);
    found.ok_or_else(|| format!("no {name} in {all}").into())
}

fn wait_ready(name: &str, count: u64) -> Outcome {
    wait_for("the spares to be made", || {
        let image = listed(name)?;
        same!(number(&image, "/spares")?, count, "spares of {image}");
        Ok(())
    })
}

/// Whether the reply's disk was a spare.
fn is_spare(reply: &Value) -> bool {
    reply["spare"] == true
}

fn by_hand() -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    cowshed(&["pin", &tiny, "--spares", "3"])?.ok()?;
    wait_ready(&tiny, 3)?;
    let status = cowshed(&["status"])?.ok()?;
    check!(status.contains("3 ready"), "{status}");
    let mut devices = BTreeSet::new();
    for n in 0..3 {
        let reply = acquire_reply(&format!("spare-{n}"), &tiny)?;
        check!(is_spare(&reply), "it was made for it: {reply}");
        same!(text(&reply, "/cache")?, "hit", "whether the image was there");
        check!(devices.insert(Disk::of(&reply["lease"])?.dm_name), "a device twice: {reply}");
    }
    // The same again is the same.
    let again = acquire_reply("spare-0", &tiny)?;
    check!(again["existing"] == true && !is_spare(&again), "{again}");
    cowshed(&["acquire", "spare-0", &image("app:1")])?.fails(4, &["[SPEC_CONFLICT]"])?;
    let text_of_it = cowshed(&["acquire", "spare-9", &tiny])?.ok()?;
    check!(!text_of_it.is_empty(), "nothing is printed");
    for n in [0, 1, 2, 9] {
        release_fully(&format!("spare-{n}"))?;
    }
    // They hold nothing up: the image goes, and they first.
    cowshed(&["remove-image", &tiny])?.fails(6, &["[IMAGE_PINNED]"])?;
    cowshed(&["unpin", &tiny])?.ok()?;
    cowshed(&["remove-image", &tiny])?.ok()?;
    nothing_pulled()
}

/// A spare has what a disk that is made for its VM has.
fn is_the_image_and_nothing_else() -> Outcome {
    let python = image("python:3");
    let made = acquire("made", &python)?;
    cowshed(&["pin", &python, "--spares", "2"])?.ok()?;
    wait_ready(&python, 2)?;
    let reply = acquire_reply("ready", &python)?;
    check!(is_spare(&reply), "{reply}");
    let ready = Disk::of(&reply["lease"])?;
    let sum = |disk: &Disk| {
        let script = format!(
            "d=$(mktemp -d); mount -o ro,noload {} $d && (cd $d && find . -xdev | sort | xargs -d '\\n' stat -c '%n %a %u %g %s %Y' | grep -v lost+found | sha256sum); umount $d; rmdir $d",
            disk.path
        );
        sh(&script)
    };
    let (of_made, of_ready) = (sum(&made)?, sum(&ready)?);
    check!(of_made.len() > 60, "nothing was summed: {of_made:?}");
    same!(of_ready, of_made, "what is on the disks");
    for vm in ["made", "ready"] {
        release_fully(vm)?;
    }
    cowshed(&["unpin", &python])?.ok().map(drop)
}

/// SIGKILL for cowshed, or containerd, or both, while spares are made and handed out.
fn killed() -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    cowshed(&["pin", &tiny, "--spares", "8"])?.ok()?;
    wait_ready(&tiny, 8)?;
    let mut held: BTreeSet<String> = BTreeSet::new();
    for round in 0..6 {
        let vms: Vec<String> = (0..6).map(|n| format!("killed-{round}-{n}")).collect();
        let killer = thread::spawn(move || {
            block_on(async { tokio::time::sleep(Duration::from_millis(40 * round)).await });
            let victims: &[&str] = match round % 3 {
                0 => &["cowshed"],
                1 => &["containerd"],
                _ => &["cowshed", "containerd"],
            };
            victims.iter().try_for_each(|victim| host("kill", victim))
        });
        for (_, reply) in block_on(acquire_all(&vms, &tiny)) {
            // Whoever was not answered asks again below.
            if let Ok(lease) = reply {
                check!(lease.device.is_some(), "{lease:?}");
            }
        }
        killer.join().map_err(|_| "the killer panicked")??;
        wait_serving()?;
        for vm in &vms {
            let reply = wait_for("an answer", || acquire_reply(vm, &tiny))?;
            let device = Disk::of(&reply["lease"])?.dm_name;
            check!(held.insert(device.clone()), "{device} was handed out twice: {reply}");
        }
        let all = cowshed(&["leases", "-o", "json"])?.json()?;
        let leases = all["leases"].as_array().cloned().unwrap_or_default();
        let granted = leases.iter().filter(|lease| lease["state"] == "granted").count();
        same!(granted, held.len(), "leases that are granted: {all}");
    }
    // None is lost for longer than a pass.
    wait_ready(&tiny, 8)?;
    let last = acquire_reply("killed-last", &tiny)?;
    check!(is_spare(&last), "eight are ready: {last}");
    let device = Disk::of(&last["lease"])?.dm_name;
    check!(held.insert(device.clone()), "{device} was handed out twice: {last}");
    release(&text(&last, "/lease/vm_id")?)?;
    run("cowshed", &["audit"])?.ok()?;
    for round in 0..6 {
        for n in 0..6 {
            release(&format!("killed-{round}-{n}"))?;
        }
    }
    wait_gone("killed-5-5")?;
    cowshed(&["unpin", &tiny])?.ok().map(drop)
}

/// Spares are of what the name means now.
fn moved_tag() -> Outcome {
    let (old, new) = (image("app:1"), image("app:2"));
    let first = pull(&old)?;
    let second = pull(&new)?;
    let (before, after) = (text(&first, "/image/manifest_digest")?, text(&second, "/image/manifest_digest")?);
    check!(before != after, "both are {before}");
    cowshed(&["pin", &old, "--spares", "2"])?.ok()?;
    wait_ready(&old, 2)?;
    sh(&format!("ctr images tag --force {new} {old}"))?;
    let reply = wait_for("the tag to have moved", || {
        let vm = format!("moved-{}", uuid());
        let reply = acquire_reply(&vm, &old)?;
        release(&vm)?;
        same!(text(&reply, "/lease/image_digest")?, after.clone(), "what it is made of");
        Ok(reply)
    })?;
    check!(!reply.is_null(), "no reply");
    wait_ready(&old, 2)?;
    let reply = acquire_reply("moved", &old)?;
    check!(is_spare(&reply), "{reply}");
    same!(text(&reply, "/lease/image_digest")?, after, "what the spare is made of");
    release_fully("moved")?;
    cowshed(&["unpin", &old])?.ok().map(drop)
}

fn uuid() -> String {
    fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default().trim().to_owned()
}

/// None is made, and VMs get theirs all the same.
fn too_full() -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    cowshed(&["pin", &tiny, "--spares", "3"])?.ok()?;
    wait_for("them to be wanted", || {
        same!(number(&listed(&tiny)?, "/spares_wanted")?, 3, "how many are wanted");
        Ok(())
    })?;
    let reply = acquire_reply("too-full", &tiny)?;
    check!(!is_spare(&reply), "{reply}");
    same!(number(&listed(&tiny)?, "/spares")?, 0, "how many there are");
    release_fully("too-full")?;
    cowshed(&["unpin", &tiny])?.ok().map(drop)
}

fn offer() -> Outcome {
    let tiny = image("tiny:1");
    let said = |name: &str| cowshed(&["offer", name, "-o", "json"])?.json();
    let cold = said(&tiny)?;
    same!(text(&cold, "/warmth")?, "cold", "what is offered: {cold}");
    check!(cold["accepted"] == true && cold["missing_bytes"].is_null(), "{cold}");
    pull(&tiny)?;
    // What we have pulled is known at once.
    let base = said(&tiny)?;
    check!(base["warmth"] == "base" || base["warmth"] == "spare", "{base}");
    same!(number(&base, "/missing_bytes")?, 0, "what is missing: {base}");
    acquire("offered", &tiny)?;
    cowshed(&["pin", &tiny, "--spares", "2"])?.ok()?;
    wait_ready(&tiny, 2)?;
    let reply = acquire_reply("offered-too", &tiny)?;
    check!(is_spare(&reply), "{reply}");
    wait_ready(&tiny, 2)?;
    let spare = said(&tiny)?;
    same!((text(&spare, "/warmth")?, number(&spare, "/spares")?), ("spare".to_owned(), 2), "{spare}");
    check!(number(&spare, "/expected_micros")? > 0 && number(&spare, "/samples")? == 1, "{spare}");
    check!(number(&spare, "/data_free_bytes")? > 1 << 20, "{spare}");
    cowshed(&["offer", "r/A:1"])?.fails(2, &["[IMAGE_REFERENCE_INVALID]"])?;
    cowshed(&["drain"])?.ok()?;
    let refused = said(&tiny)?;
    check!(refused["accepted"] == false, "{refused}");
    same!(text(&refused, "/refusal/reason")?, "DRAINING", "why: {refused}");
    cowshed(&["drain", "--undo"])?.ok()?;
    let shared = cowshed(&["offer", &tiny, "-o", "json", "--mode", "shared-read-only"])?.json()?;
    if snapshotter() == "cowshed" {
        check!(shared["accepted"] == true, "{shared}");
        same!(refusal_with_scratch(&tiny, 16 << 40)?, "SCRATCH_INVALID", "a disk larger than the pool");
        same!(refusal_with_scratch(&tiny, 16 << 20)?, "", "a small one");
    } else {
        same!(text(&shared, "/refusal/reason")?, "SNAPSHOTTER_UNFIT", "why: {shared}");
    }
    for vm in ["offered", "offered-too"] {
        release_fully(vm)?;
    }
    cowshed(&["unpin", &tiny])?.ok()?;
    partial()
}

/// Why a disk that is shared, with a scratch disk of this size, is not offered.
fn refusal_with_scratch(image: &str, size_bytes: u64) -> Outcome<String> {
    let spec = v1::DiskSpec {
        image: image.to_owned(),
        mode: v1::DiskMode::SharedReadOnly.into(),
        scratch: Some(v1::ScratchSpec { size_bytes, raw: true }),
        ..v1::DiskSpec::default()
    };
    let request = v1::OfferRequest { spec: Some(spec), tenant: String::new() };
    let offer = block_on(async { Ok::<_, Failed>(client().await?.offer(request).await?.into_inner()) })?;
    Ok(offer.refusal.map(|refusal| refusal.reason).unwrap_or_default())
}

/// What another client has fetched, and not unpacked.
fn partial() -> Outcome {
    let app = image("app:1");
    sh(&format!("ctr content fetch --hosts-dir /etc/containerd/certs.d {app} > /dev/null"))?;
    wait_for("it to be looked at", || {
        let offer = cowshed(&["offer", &app, "-o", "json"])?.json()?;
        same!(text(&offer, "/warmth")?, "partial", "{offer}");
        same!(number(&offer, "/missing_bytes")?, 0, "what is missing: {offer}");
        Ok(())
    })?;
    pull(&app)?;
    let offer = cowshed(&["offer", &app, "-o", "json"])?.json()?;
    same!(text(&offer, "/warmth")?, "base", "{offer}");
    Ok(())
}
