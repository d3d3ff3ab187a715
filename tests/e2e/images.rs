//! Pulled images: what containerd then has, and what is fetched.

use std::collections::BTreeSet;

use cowshed_proto::v1;
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{block_on, client},
        check,
        command::{lines, number, sh, text},
        cow::{
            acquire_as, acquire_reply, collect, cowshed, evict, evict_all, image, pull, release,
            release_fully, snapshotter,
        },
        registry_log::{describe, mark},
        same,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("shared_layers_are_fetched_once", shared_layers_are_fetched_once),
    ("containerd_knows_what_was_pulled", containerd_knows_what_was_pulled),
    ("containerd_runs_what_was_pulled", containerd_runs_what_was_pulled),
    ("docker_schema_2", docker_schema_2),
    ("an_index_gives_the_platform", an_index_gives_the_platform),
    ("by_digest", by_digest),
    ("a_pull_of_what_is_there_is_a_hit", a_pull_of_what_is_there_is_a_hit),
    ("each_platform_that_is_there_is_listed", each_platform_that_is_there_is_listed),
    ("images_are_listed", images_are_listed),
    ("layers_are_unpacked_as_they_were_built", layers_are_unpacked_as_they_were_built),
    ("a_removed_image_is_pulled_again", a_removed_image_is_pulled_again),
    ("a_collection_takes_nothing_that_is_held", a_collection_takes_nothing_that_is_held),
];

fn shared_layers_are_fetched_once() -> Outcome {
    evict_all()?;
    let (python, app) = (describe("python:3")?, describe("app:1")?);
    let start = mark()?;
    pull(&image("python:3"))?;
    start.each_once(&python.blobs())?;
    let start = mark()?;
    let pulled = pull(&image("app:1"))?;
    same!(text(&pulled, "/cache")?, "miss", "the cache of {pulled}");
    let there = python.blobs();
    let new: Vec<String> = app.blobs().into_iter().filter(|blob| !there.contains(blob)).collect();
    same!(new.len(), 3, "app:1 has two layers and a configuration of its own: {new:?}");
    start.each_once(&new)?;
    // All of python:3 is in app:1 as well.
    let listed = cowshed(&["images", "-o", "json"])?.json()?;
    let on_disk = |name: &str| {
        let images = listed["images"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = images.iter().find(|listed| listed["name"] == image(name)).ok_or("it is not listed")?;
        Outcome::Ok((number(found, "/disk_bytes")?, number(found, "/exclusive_disk_bytes")?))
    };
    let ((below, of_below), (all, own)) = (on_disk("python:3")?, on_disk("app:1")?);
    check!(below > 10 << 20 && of_below == 0, "python:3 takes {below}, {of_below} of them alone");
    check!(own > 0 && all == below + own, "app:1 takes {all}, {own} of them alone, and python:3 {below}");
    Ok(())
}

fn containerd_knows_what_was_pulled() -> Outcome {
    let name = image("app:1");
    pull(&name)?;
    let listed = sh(&format!("ctr images ls name=={name} | sed 1d"))?;
    let described = describe("app:1")?;
    for expected in [name.as_str(), &described.digest, "linux/amd64"] {
        check!(listed.contains(expected), "{expected} is not in {listed}");
    }
    // What it is when it is inflated is written down soon after.
    let (layer, _) = &described.layers[0];
    crate::support::wait_for("the layer's label", || {
        let content = sh(&format!("ctr content ls | grep {layer}"))?;
        check!(content.contains("containerd.io/uncompressed=sha256:"), "{content}");
        Ok(())
    })?;
    let content: u64 = described.layers.iter().map(|(_, size)| size).sum();
    let mib = listed.split_whitespace().skip_while(|word| *word != described.digest).nth(1);
    let mib: f64 = mib.unwrap_or_default().parse()?;
    let expected = content as f64 / f64::from(1 << 20);
    check!((mib - expected).abs() < 0.2, "its size is {expected} MiB, containerd lists {mib}");
    let checked = sh(&format!("ctr images check --snapshotter {} name=={name} | sed 1d", snapshotter()))?;
    check!(checked.contains("complete (5/5)") && checked.contains("true"), "ctr images check: {checked}");
    Ok(())
}

fn containerd_runs_what_was_pulled() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let run = format!("ctr run --rm --snapshotter {} {name} e2e-run", snapshotter());
    same!(sh(&format!("{run} /bin/busybox cat /etc/tiny"))?.trim(), "a tiny image", "what a container says");
    Ok(())
}

fn docker_schema_2() -> Outcome {
    let name = image("app:docker");
    pull(&image("app:1"))?;
    let start = mark()?;
    let reply = acquire_reply("image-docker", &name)?;
    same!(text(&reply, "/lease/image_digest")?, describe("app:docker")?.digest, "the digest");
    let fetched = start.blobs()?;
    let layers = describe("app:1")?.layers;
    check!(
        layers.iter().all(|(layer, _)| !fetched.contains_key(layer)),
        "layers that are there were fetched: {fetched:?}"
    );
    check!(
        sh(&format!("ctr images ls name=={name}"))?.contains("docker.distribution.manifest.v2"),
        "the type"
    );
    same!(text(&reply, "/lease/process/user")?, "app", "the user");
    release_fully("image-docker")?;
    evict(&[&name])
}

fn an_index_gives_the_platform() -> Outcome {
    let name = image("app:multi");
    let reply = acquire_reply("image-multi", &name)?;
    same!(text(&reply, "/lease/image_digest")?, describe("app:1")?.digest, "the manifest for amd64");
    same!(text(&reply, "/lease/platform")?, "linux/amd64", "the platform");
    let pulled = pull(&name)?;
    check!(
        pulled["image"]["target_digest"] != pulled["image"]["manifest_digest"],
        "the target is no index: {pulled}"
    );
    release_fully("image-multi")?;
    evict(&[&name])
}

fn by_digest() -> Outcome {
    let described = describe("tiny:1")?;
    let name = format!("{}@{}", image("tiny"), described.digest);
    let reply = acquire_reply("image-digest", &name)?;
    same!(text(&reply, "/lease/image_digest")?, described.digest, "the digest");
    same!(text(&reply, "/lease/image")?, name, "the image");
    acquire_as("hit", "image-digest-2", &name)?;
    release("image-digest")?;
    release("image-digest-2")
}

fn a_pull_of_what_is_there_is_a_hit() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let start = mark()?;
    let again = pull(&name)?;
    same!(text(&again, "/cache")?, "hit", "the cache of {again}");
    same!(text(&again, "/stage")?, "done", "the stage");
    check!(start.blobs()?.is_empty(), "blobs were fetched: {:?}", start.blobs()?);
    Ok(())
}

fn images_are_listed() -> Outcome {
    pull(&image("tiny:1"))?;
    let listed = cowshed(&["images", "-o", "json"])?.json()?;
    let images = listed["images"].as_array().ok_or("no images")?;
    let names: Vec<&str> = images.iter().filter_map(|image| image["name"].as_str()).collect();
    let of_ctr = lines("ctr images ls -q")?;
    same!(
        names.iter().copied().collect::<BTreeSet<_>>(),
        of_ctr.iter().map(String::as_str).collect(),
        "the images"
    );
    check!(names.is_sorted(), "not by name: {names:?}");
    let tiny =
        images.iter().find(|one| one["name"] == image("tiny:1").as_str()).ok_or("tiny:1 is not listed")?;
    let described = describe("tiny:1")?;
    same!(text(tiny, "/manifest_digest")?, described.digest, "the digest");
    same!(number(tiny, "/layers")?, 1, "the number of layers");
    same!(number(tiny, "/compressed_bytes")?, described.layers[0].1, "its bytes");
    same!(tiny["unpacked"], Value::Bool(true), "whether it is unpacked");
    let reply = block_on(async {
        let request = v1::ListImagesRequest { platform: None };
        Ok::<_, libtest_mimic::Failed>(client().await?.list_images(request).await?.into_inner())
    })?;
    same!(reply.images.len(), images.len(), "the images over gRPC");
    Ok(())
}

fn each_platform_that_is_there_is_listed() -> Outcome {
    evict_all()?;
    let rows = |name: &str| {
        let listed = cowshed(&["images", "-o", "json"])?.json()?;
        let images = listed["images"].as_array().ok_or("no images")?;
        let rows = images.iter().filter(|listed| listed["name"] == name);
        let row = |row: &Value| {
            Outcome::Ok((text(row, "/platform")?, number(row, "/layers")?, row["unpacked"] == true))
        };
        rows.map(row).collect::<Outcome<Vec<_>>>()
    };
    let (only, multi) = (image("tiny:arm64only"), image("app:multi"));
    for name in [&only, &multi] {
        cowshed(&["pull", name, "--platform", "linux/arm64"])?.ok()?;
        same!(rows(name)?, [("linux/arm64".to_owned(), 1, true)], "what is there of {name}");
    }
    cowshed(&["acquire", "image-arm", &only, "--platform", "linux/arm64"])?.ok()?;
    let listed = cowshed(&["images", "-o", "json"])?.json()?;
    let of_it =
        listed["images"].as_array().into_iter().flatten().find(|listed| listed["name"] == only.as_str());
    same!(of_it.map(|image| image["leases"].clone()), Some(1.into()), "leases in {listed}");
    let table = cowshed(&["images"])?.ok()?;
    check!(table.lines().any(|line| line.starts_with(&only) && line.contains("linux/arm64")), "{table}");
    release_fully("image-arm")?;
    pull(&multi)?;
    let platforms: Vec<String> = rows(&multi)?.into_iter().map(|(platform, _, _)| platform).collect();
    same!(platforms, ["linux/amd64", "linux/arm64"], "once for each");
    evict_all()
}

fn layers_are_unpacked_as_they_were_built() -> Outcome {
    let reply = acquire_reply("image-content", &image("app:1"))?;
    let path = text(&reply, "/lease/device/path")?;
    let script = format!(
        "d=$(mktemp -d /tmp/e2e-mount.XXXXXX); mount {path} $d; trap 'umount $d; rmdir $d' EXIT; cd $d/srv/app
         stat -c '%n %U %u %h' app.py linked-by-layer-4.txt same-file.txt; ls; cat same-file.txt; cd /"
    );
    let seen = sh(&script)?;
    check!(!seen.contains("removed-by-layer-4"), "the white-out was not applied: {seen}");
    check!(seen.contains("of layer 3"), "the hard link into a lower layer has no content: {seen}");
    for file in ["linked-by-layer-4.txt", "same-file.txt"] {
        let line = seen.lines().find(|line| line.starts_with(file)).unwrap_or_default();
        check!(line.ends_with("1000 2"), "{file} has not the owner 1000 and two links: {seen}");
    }
    release("image-content")
}

fn a_removed_image_is_pulled_again() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let held = acquire_as("hit", "image-evict-1", &name)?;
    evict(&[&name])?;
    // The disk of a VM does not need the image any more.
    sh(&format!("dd if={} of=/dev/null bs=1M count=8 status=none", held.path))?;
    acquire_as("miss", "image-evict-2", &name)?;
    acquire_as("hit", "image-evict-3", &name)?;
    release_fully("image-evict-1")?;
    release_fully("image-evict-2")?;
    release_fully("image-evict-3")?;
    evict(&[&name])?;
    let layer = describe("tiny:1")?.layers[0].0.clone();
    let start = mark()?;
    acquire_as("miss", "image-evict-4", &name)?;
    // By digest it may be held by another name, as in the test before.
    let fetched = start.blobs()?;
    check!(fetched.get(&layer).is_none_or(|count| *count == 1), "{fetched:?}");
    release("image-evict-4")
}

fn a_collection_takes_nothing_that_is_held() -> Outcome {
    let name = image("tiny:1");
    pull(&name)?;
    let held = acquire_as("hit", "image-gc", &name)?;
    collect()?;
    acquire_as("hit", "image-gc-2", &name)?;
    same!(text(&pull(&name)?, "/cache")?, "hit", "a pull after the collection");
    // The disk stays although its image goes.
    evict(&[&name])?;
    collect()?;
    sh(&format!("dd if={} of=/dev/null bs=1M count=8 status=none", held.path))?;
    release("image-gc")?;
    release("image-gc-2")
}
