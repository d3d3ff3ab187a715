//! Which images stay: pins, what is in use, and removals.

use cowshed_proto::v1;
use serde_json::Value;
use tonic::Code;

use crate::{
    Test,
    support::{
        Outcome,
        api::{block_on, client, refusal},
        check,
        command::{number, sh, text},
        containerd,
        cow::{
            acquire, acquire_as, acquire_reply, cowshed, evict_all, host, image, nothing_pulled, pull,
            release, release_fully, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("a_pinned_image_stays_until_it_is_unpinned", a_pinned_image_stays_until_it_is_unpinned),
    ("a_pin_ends_by_itself", a_pin_ends_by_itself),
    ("pins_and_uses_survive_a_restart", pins_and_uses_survive_a_restart),
    ("what_is_in_use_stays_until_its_disks_are_gone", what_is_in_use_stays_until_its_disks_are_gone),
    ("one_name_of_many_goes_alone", one_name_of_many_goes_alone),
    ("what_only_it_has_held_goes_with_it", what_only_it_has_held_goes_with_it),
    ("what_is_not_there", what_is_not_there),
];

/// The image as `cowshed images` has it.
fn listed(name: &str) -> Outcome<Value> {
    let all = cowshed(&["images", "-o", "json"])?.json()?;
    let images = all["images"].as_array().ok_or("no images")?;
    let found = images.iter().find(|one| one["name"] == name).cloned();
    found.ok_or_else(|| format!("{name} is not listed: {all}").into())
}

fn is_listed(name: &str) -> Outcome<bool> {
    Ok(containerd::images()?.contains(name))
}

/// `cowshed rmi`, to be done; the reply.
fn remove(name: &str) -> Outcome<Value> {
    cowshed(&["rmi", name, "-o", "json"])?.json()
}

fn a_pinned_image_stays_until_it_is_unpinned() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let reply = cowshed(&["pin", &name, "-o", "json"])?.json()?;
    same!(reply["image"]["name"], name.as_str(), "what is pinned");
    same!(reply["image"]["pinned"], true, "whether it is pinned: {reply}");
    check!(reply["image"]["pinned_until"].is_null(), "it has an end: {reply}");
    same!(listed(&name)?["pinned"], true, "as it is listed");
    check!(cowshed(&["images"])?.ok()?.contains("PINNED"), "the table has no pins");
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_PINNED]", "cowshed unpin", &name])?;
    check!(is_listed(&name)?, "it is gone although it is pinned");
    let pulled = pull(&name)?;
    same!(pulled["image"]["pinned"], true, "as a pull tells of it: {pulled}");
    let reply = cowshed(&["unpin", &name, "-o", "json"])?.json()?;
    same!(reply["was_pinned"], true, "{reply}");
    let again = cowshed(&["unpin", &name, "-o", "json"])?.json()?;
    same!(again["was_pinned"], false, "{again}");
    same!(remove(&name)?["existed"], true, "the removal");
    check!(!is_listed(&name)?, "it is still there");
    Ok(())
}

fn a_pin_ends_by_itself() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    cowshed(&["pin", &name])?.ok()?;
    // The new end replaces the old one.
    let reply = cowshed(&["pin", &name, "--for", "1h", "-o", "json"])?.json()?;
    check!(reply["image"]["pinned_until"].is_string(), "it has no end: {reply}");
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_PINNED]", " until "])?;
    let reply = cowshed(&["pin", &name, "--for", "2s"])?.ok()?;
    check!(reply.contains("pinned until"), "{reply}");
    wait_for("the pin to end", || {
        same!(listed(&name)?["pinned"], false, "whether it is pinned");
        Ok(())
    })?;
    cowshed(&["rmi", &name])?.ok()?;
    cowshed(&["pin", &name, "--for", "soon"])?.fails(2, &["soon"])
}

fn pins_and_uses_survive_a_restart() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    cowshed(&["pin", &name, "--for", "1h"])?.ok()?;
    acquire("pins-restart", &name)?;
    let used = listed(&name)?;
    same!(number(&used, "/leases")?, 1, "the leases of {used}");
    text(&used, "/last_used_at")?;
    release_fully("pins-restart")?;
    let before = listed(&name)?;
    same!(number(&before, "/leases")?, 0, "the leases of {before}");
    text(&before, "/last_used_at")?;
    host("restart", "cowshed")?;
    wait_serving()?;
    same!(listed(&name)?, before, "the image after the restart");
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_PINNED]"])?;
    cowshed(&["unpin", &name])?.ok().map(drop)
}

fn what_is_in_use_stays_until_its_disks_are_gone() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let held = acquire_as("hit", "pins-held", &name)?;
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_IN_USE]", "pins-held"])?;
    let refused = block_on(async {
        let request = v1::RemoveImageRequest { image: name.clone() };
        refusal(client().await?.remove_image(request).await)
    })?;
    same!(refused.code, Code::FailedPrecondition, "the code");
    same!(refused.metadata.get("vm_ids").map(String::as_str), Some("pins-held"), "{refused:?}");
    // Another hit: nothing of it was touched.
    acquire_as("hit", "pins-held-2", &name)?;
    release("pins-held-2")?;
    let open = std::fs::File::open(&held.path)?;
    release("pins-held")?;
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_IN_USE]", "pins-held"])?;
    drop(open);
    release_fully("pins-held")?;
    release_fully("pins-held-2")?;
    same!(remove(&name)?["existed"], true, "the removal");
    acquire_as("miss", "pins-again", &name)?;
    release_fully("pins-again")
}

fn one_name_of_many_goes_alone() -> Outcome {
    let (name, other) = (image("tiny:1"), image("tiny:pins"));
    pull(&name)?;
    sh(&format!("ctr images tag --force {name} {other}"))?;
    acquire("pins-tags", &name)?;
    let reply = remove(&other)?;
    same!((&reply["existed"], &reply["untagged"]), (&Value::Bool(true), &Value::Bool(true)), "{reply}");
    check!(!is_listed(&other)? && is_listed(&name)?, "the wrong name is gone");
    cowshed(&["rmi", &name])?.fails(6, &["[IMAGE_IN_USE]"])?;
    release_fully("pins-tags")
}

fn what_only_it_has_held_goes_with_it() -> Outcome {
    evict_all()?;
    let names = [image("tiny:1"), image("app:1")];
    for name in &names {
        pull(name)?;
    }
    // One that cannot go does not hold the others up.
    let reply = acquire_reply("pins-all", &names[0])?;
    same!(text(&reply, "/lease/state")?, "granted", "{reply}");
    let ran = cowshed(&["rmi", &names[0], &names[1]])?;
    ran.fails(6, &["[IMAGE_IN_USE]", &names[0]])?;
    check!(ran.stdout.contains(&format!("image {} is gone", names[1])), "{}", ran.stdout);
    release_fully("pins-all")?;
    cowshed(&["rmi", &names[0]])?.ok()?;
    nothing_pulled()
}

fn what_is_not_there() -> Outcome {
    let name = image("tiny:1");
    remove(&name)?;
    cowshed(&["pin", &name])?.fails(3, &["[IMAGE_NOT_FOUND]", "cowshed pull"])?;
    let reply = remove(&name)?;
    same!((&reply["existed"], &reply["untagged"]), (&Value::Bool(false), &Value::Bool(false)), "{reply}");
    cowshed(&["unpin", &name])?.ok()?;
    for verb in ["pin", "unpin", "rmi"] {
        cowshed(&[verb, "a b"])?.fails(2, &["[IMAGE_REFERENCE_INVALID]"])?;
    }
    Ok(())
}
