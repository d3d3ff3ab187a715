//! Pulls that are shared, watched, left alone, and run side by side.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    thread,
};

use cowshed_proto::v1::{LayerStage, PullImageResponse, PullStage};
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_request, block_on, client, pull_request},
        check,
        command::spawn,
        containerd,
        cow::{acquire_as, cowshed, evict_all, image, pull, release, snapshots, wait_serving},
        fake_image::{FakeImage, digest},
        fake_registry::{Answer, FakeRegistry, Hosts},
        registry_log::{describe, mark},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("two_callers_of_one_pull_see_it_to_the_end", two_callers_of_one_pull),
    ("images_pulled_together_share_their_layers", images_pulled_together_share_their_layers),
    ("goes_on_when_its_caller_goes_away", goes_on_when_its_caller_goes_away),
    ("goes_on_when_the_command_is_killed", goes_on_when_the_command_is_killed),
    ("acquire_goes_on_when_its_caller_goes_away", acquire_goes_on_when_its_caller_goes_away),
    ("killed_service_leaves_nothing_of_it", killed_service_leaves_nothing_of_it),
];

/// Every picture that one caller saw.
async fn watch(name: &str) -> Outcome<Vec<PullImageResponse>> {
    let mut stream = client().await?.pull_image(pull_request(name)).await?.into_inner();
    let mut pictures = Vec::new();
    while let Some(picture) = stream.message().await? {
        pictures.push(picture);
    }
    Ok(pictures)
}

fn two_callers_of_one_pull() -> Outcome {
    evict_all()?;
    let name = image("python:3");
    let described = describe("python:3")?;
    let start = mark()?;
    let (a, b) = block_on(async { tokio::join!(watch(&name), watch(&name)) });
    for pictures in [a?, b?] {
        let (last, before) = pictures.split_last().ok_or("no picture")?;
        same!(last.stage(), PullStage::Done, "the last stage");
        same!(last.image.as_ref().map(|image| image.name.clone()), Some(name.clone()), "the image");
        same!(last.image.as_ref().map(|image| image.unpacked), Some(true), "whether it is unpacked");
        check!(before.iter().all(|picture| picture.image.is_none()), "an image before the end");
        check!(before.iter().any(|picture| picture.stage() == PullStage::Layers), "no stage LAYERS");
        let layers: Vec<(String, u64)> =
            last.layers.iter().map(|l| (l.digest.clone(), l.bytes_total)).collect();
        same!(layers, described.layers, "the layers and their sizes");
        check!(
            last.layers.iter().all(|l| l.bytes_fetched == l.bytes_total && l.stage() == LayerStage::Done),
            "layers are not done at the end: {:?}",
            last.layers
        );
        progress_goes_forward(&pictures)?;
    }
    start.each_once(&described.blobs())
}

/// Bytes and stages of a layer never go back, and between nothing and all something was seen.
fn progress_goes_forward(pictures: &[PullImageResponse]) -> Outcome {
    let mut seen: BTreeMap<String, Vec<(u64, i32)>> = BTreeMap::new();
    for layer in pictures.iter().flat_map(|picture| &picture.layers) {
        seen.entry(layer.digest.clone()).or_default().push((layer.bytes_fetched, layer.stage));
    }
    for (digest, steps) in &seen {
        check!(steps.is_sorted(), "{digest} went back: {steps:?}");
    }
    let partly = pictures
        .iter()
        .flat_map(|picture| &picture.layers)
        .any(|layer| layer.bytes_fetched > 0 && layer.bytes_fetched < layer.bytes_total);
    check!(partly, "no bytes were seen to arrive: {seen:?}");
    Ok(())
}

fn images_pulled_together_share_their_layers() -> Outcome {
    evict_all()?;
    let start = mark()?;
    let pullers = ["app:1", "app:2"].map(|name| thread::spawn(move || pull(&image(name)).map(drop)));
    for puller in pullers {
        puller.join().map_err(|_| "a pull panicked")??;
    }
    start.each_once(&[describe("app:1")?.blobs(), describe("app:2")?.blobs()].concat())?;
    same!(
        snapshots("Committed")?.len(),
        5,
        "the layers that were unpacked: two shared, two of app:1, one of app:2"
    );
    Ok(())
}

/// A registry that hands the layer out when its gate is opened.
fn gated(seed: u64) -> Outcome<(FakeRegistry, String, String)> {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let fake = FakeImage::new(seed, 300_000)?;
    registry.serve("1", &fake);
    let layer = digest(&fake.layer);
    registry.blob(&layer, Answer::Gated(fake.layer.clone()));
    let name = registry.image("1");
    Ok((registry, name, layer))
}

fn wait_until_asked(registry: &FakeRegistry, layer: &str) -> Outcome {
    wait_for("the layer to be asked for", || {
        check!(!registry.requests(layer).is_empty(), "nobody asked");
        Ok(())
    })
}

fn wait_until_pulled(name: &str) -> Outcome {
    wait_for("the image", || {
        let listed = cowshed(&["images", "-o", "json"])?.json()?;
        let there = listed["images"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|one| one["name"] == name && one["unpacked"] == true);
        check!(there, "it is not in {listed}");
        Ok(())
    })
}

fn goes_on_when_its_caller_goes_away() -> Outcome {
    let (registry, name, layer) = gated(11)?;
    block_on(async {
        let mut stream = client().await?.pull_image(pull_request(&name)).await?.into_inner();
        check!(stream.message().await?.is_some(), "no first picture");
        Ok::<_, libtest_mimic::Failed>(())
    })?;
    wait_until_asked(&registry, &layer)?;
    registry.open_gate();
    wait_until_pulled(&name)?;
    same!(registry.requests(&layer).len(), 1, "how often the layer was asked for");
    crate::support::cow::evict(&[&name])
}

fn goes_on_when_the_command_is_killed() -> Outcome {
    let (registry, name, layer) = gated(12)?;
    let mut command = spawn("cowshed", &["pull", &name, "-o", "json"])?;
    let stdout = command.stdout.take().ok_or("no stdout")?;
    let first = BufReader::new(stdout).lines().next().ok_or("no line")??;
    let first: Value = serde_json::from_str(&first)?;
    check!(first["stage"].is_string(), "no stage in {first}");
    wait_until_asked(&registry, &layer)?;
    command.kill()?;
    command.wait()?;
    // Whoever asks now joins what goes on.
    let second = thread::spawn({
        let name = name.clone();
        move || pull(&name).map(drop)
    });
    registry.open_gate();
    second.join().map_err(|_| "the second pull panicked")??;
    same!(registry.requests(&layer).len(), 1, "how often the layer was asked for");
    crate::support::cow::evict(&[&name])
}

fn acquire_goes_on_when_its_caller_goes_away() -> Outcome {
    let (registry, name, layer) = gated(13)?;
    let mut command = spawn("cowshed", &["acquire", "pulls-gone", &name])?;
    wait_until_asked(&registry, &layer)?;
    command.kill()?;
    command.wait()?;
    registry.open_gate();
    // It is granted although nobody waits for it, and found by who asks next.
    wait_for("the lease", || {
        let lease = crate::support::cow::lease("pulls-gone")?;
        check!(lease["state"] == "granted", "{lease}");
        Ok(())
    })?;
    let reply = block_on(async {
        let reply = client().await?.acquire(acquire_request("pulls-gone", &name)).await?;
        Ok::<_, libtest_mimic::Failed>(reply.into_inner())
    })?;
    check!(reply.existing, "a new lease was made: {reply:?}");
    release("pulls-gone")?;
    crate::support::cow::wait_gone("pulls-gone")?;
    crate::support::cow::evict(&[&name])
}

fn killed_service_leaves_nothing_of_it() -> Outcome {
    let (registry, name, layer) = gated(14)?;
    let mut command = spawn("cowshed", &["acquire", "pulls-killed", &name])?;
    wait_until_asked(&registry, &layer)?;
    check!(
        containerd::leases()?.iter().any(|id| id.starts_with("cowshed-pull-")),
        "no containerd lease holds the pull"
    );
    crate::support::cow::host("kill", "cowshed")?;
    check!(!command.wait()?.success(), "the acquire of a killed service succeeded");
    wait_serving()?;
    crate::support::audit::nothing_left()?;
    check!(!containerd::images()?.contains(&name), "the unfinished image is listed");
    registry.open_gate();
    acquire_as("miss", "pulls-killed", &name)?;
    release("pulls-killed")?;
    crate::support::cow::wait_gone("pulls-killed")?;
    crate::support::cow::evict(&[&name])
}
