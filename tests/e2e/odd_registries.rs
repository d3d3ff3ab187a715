//! Registries that serve wrong bytes, stop in the middle, say nothing, or refuse.

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        audit::nothing_left,
        check,
        command::{lines, run, text},
        containerd,
        cow::{acquire_as, cowshed, evict, evict_all, refused, release, release_fully, wait_gone},
        fake_image::{FakeImage, digest, gzip, noise, tar},
        fake_registry::{Answer, FakeRegistry, Hosts, Request},
        same,
        second::Plan,
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("good_one_works", good_one_works),
    ("wrong_bytes_of_a_layer", wrong_bytes_of_a_layer),
    ("wrong_bytes_of_a_configuration", wrong_bytes_of_a_configuration),
    ("more_bytes_than_promised", more_bytes_than_promised),
    ("layer_is_gone", layer_is_gone),
    ("broken_off_download_goes_on", broken_off_download_goes_on),
    ("mirror_that_fails_in_mid_layer", mirror_that_fails_in_mid_layer),
    ("stalled_download_ends", stalled_download_ends),
    ("one_that_drips_holds_up_nobody_else", one_that_drips_holds_up_nobody_else),
    ("bodies_without_end", bodies_without_end),
    ("tokens", tokens),
    ("indexes_within_indexes", indexes_within_indexes),
    ("images_that_say_too_much", images_that_say_too_much),
    ("foreign_layers", foreign_layers),
    ("images_larger_than_the_configuration_allows", images_larger_than_the_configuration_allows),
    ("denied", denied),
    ("server_error", server_error),
    ("manifest_of_another_digest", manifest_of_another_digest),
    ("manifest_that_is_none", manifest_that_is_none),
    ("what_is_here_is_taken_and_told", what_is_here_is_taken_and_told),
    ("moved_tag_is_found_in_time", moved_tag_is_found_in_time),
    ("layer_of_another_diff_id", layer_of_another_diff_id),
    ("layer_of_garbage", layer_of_garbage),
    ("layer_that_ends_too_early", layer_that_ends_too_early),
];

fn registry_with(tag: &str, image: &FakeImage) -> Outcome<FakeRegistry> {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    registry.serve(tag, image);
    Ok(registry)
}

/// Refused with this, and neither the image nor any of its blobs is left.
fn refused_without_a_trace(
    name: &str,
    image: &FakeImage,
    status: i32,
    reason: &str,
    words: &[&str],
) -> Outcome {
    refused("odd", name, status, reason, words)?;
    no_trace_of(name, image)
}

fn no_trace_of(name: &str, image: &FakeImage) -> Outcome {
    nothing_left()?;
    check!(!containerd::images()?.contains(name), "{name} is listed");
    wait_for("its blobs to go", || {
        let blobs = containerd::blobs()?;
        for digest in [&image.manifest, &image.config, &image.layer].map(|bytes| digest(bytes)) {
            check!(!blobs.contains(&digest), "{digest} is left");
        }
        Ok(())
    })
}

fn what_is_here_is_taken_and_told() -> Outcome {
    let image = FakeImage::new(31, 100_000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    let first = cowshed(&["pull", &name])?;
    check!(!first.stderr.contains("warning"), "{}", first.stderr);
    let again = cowshed(&["pull", &name])?.ok()?;
    same!(again.lines().count(), 1, "what was there is no progress: {again}");
    check!(again.contains("was there already: 1 layer,"), "{again}");
    registry.manifest("1", Answer::Status(503));
    let ran = cowshed(&["pull", &name, "-o", "json"])?;
    check!(ran.stderr.contains("warning: ") && ran.stderr.contains("503"), "{}", ran.stderr);
    let printed = ran.ok()?;
    let last: Value = serde_json::from_str(printed.lines().last().unwrap_or_default())?;
    check!(text(&last, "/not_refreshed")?.contains("503"), "{last}");
    same!(text(&last, "/cache")?, "hit", "{last}");
    let job = cowshed(&["prefetch", &name, "--wait"])?.ok()?;
    check!(job.contains("what was here is used") && job.contains("503"), "{job}");
    // Who wants to know what the registry says is told.
    cowshed(&["acquire", "odd-always", &name, "--pull", "always"])?.fails(8, &["REGISTRY_UNAVAILABLE"])?;
    evict_all()
}

fn moved_tag_is_found_in_time() -> Outcome {
    let (old, new) = (FakeImage::new(33, 1000)?, FakeImage::new(34, 1000)?);
    let registry = registry_with("1", &old)?;
    let name = registry.image("1");
    let service = Plan::new("[images]\nrevalidate_seconds = 1\n")?.start()?;
    let is_made_of = |image: &FakeImage| -> Outcome {
        let got = service.cowshed(&["acquire", "odd-moved", &name, "-o", "json"])?.json()?;
        service.release_all()?;
        same!(text(&got, "/lease/image_digest")?, digest(&image.manifest), "what it is made of");
        Ok(())
    };
    is_made_of(&old)?;
    registry.serve("1", &new);
    wait_for("the tag to have moved", || is_made_of(&new))?;
    // One that is down changes nothing.
    registry.manifest("1", Answer::Status(503));
    is_made_of(&new)?;
    same!(service.stop()?, 0, "the exit status of the second service");
    evict_all()
}

fn good_one_works() -> Outcome {
    let image = FakeImage::new(1, 100_000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    let disk = acquire_as("miss", "odd-good", &name)?;
    let mount = format!("d=$(mktemp -d /tmp/e2e-mount.XXXXXX); mount -o ro {} $d", disk.path);
    let size = lines(&format!("{mount}; stat -c %s $d/etc/noise; umount $d; rmdir $d"))?;
    same!(size, ["100000"], "the size of the file");
    release("odd-good")?;
    wait_gone("odd-good")?;
    evict(&[&name])
}

fn wrong_bytes_of_a_layer() -> Outcome {
    let image = FakeImage::new(2, 200_000)?;
    let registry = registry_with("1", &image)?;
    let mut wrong = image.layer.clone();
    wrong[150_000] ^= 1;
    registry.blob(&digest(&image.layer), Answer::Bytes(wrong));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name, &digest(&image.layer)])?;
    // Repaired, it can be had.
    registry.serve("1", &image);
    acquire_as("miss", "odd-repaired", &name)?;
    release("odd-repaired")?;
    wait_gone("odd-repaired")?;
    evict(&[&name])
}

fn wrong_bytes_of_a_configuration() -> Outcome {
    let image = FakeImage::new(3, 1000)?;
    let registry = registry_with("1", &image)?;
    let mut wrong = image.config.clone();
    wrong[5] ^= 1;
    registry.blob(&digest(&image.config), Answer::Bytes(wrong));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name, &digest(&image.config)])
}

fn more_bytes_than_promised() -> Outcome {
    let image = FakeImage::new(4, 50_000)?;
    let registry = registry_with("1", &image)?;
    let more = [image.layer.clone(), noise(5, 3_000_000)].concat();
    registry.blob(&digest(&image.layer), Answer::Bytes(more));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name, &digest(&image.layer)])
}

fn layer_is_gone() -> Outcome {
    let image = FakeImage::new(6, 1000)?;
    let registry = registry_with("1", &image)?;
    registry.blob(&digest(&image.layer), Answer::Status(404));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 3, "IMAGE_NOT_FOUND", &[&name, &digest(&image.layer)])
}

fn broken_off_download_goes_on() -> Outcome {
    let image = FakeImage::new(7, 5_000_000)?;
    let registry = registry_with("1", &image)?;
    let layer = digest(&image.layer);
    registry.blob(&layer, Answer::CutOnce(image.layer.clone(), 3_000_000));
    let name = registry.image("1");
    acquire_as("miss", "odd-cut", &name)?;
    let asked = registry.requests(&layer);
    same!(asked.len(), 2, "the requests {asked:?}");
    same!(asked[0].range, None, "the range of the first request");
    went_on(&asked[1], 3_000_000)?;
    release("odd-cut")?;
    wait_gone("odd-cut")?;
    evict(&[&name])
}

/// That what had come before it was broken off after so many bytes was not asked for again, but for the last piece.
fn went_on(request: &Request, after: u64) -> Outcome {
    let from = request.range.as_ref();
    let from = from.and_then(|range| range.strip_prefix("bytes=")?.split('-').next()?.parse::<u64>().ok());
    check!(from.is_some_and(|from| (1 << 20..=after).contains(&from)), "it did not go on: {request:?}");
    Ok(())
}

/// The rest comes from the next one.
fn mirror_that_fails_in_mid_layer() -> Outcome {
    let image = FakeImage::new(40, 5_000_000)?;
    let (mirror, other) = (registry_with("1", &image)?, registry_with("1", &image)?);
    let layer = digest(&image.layer);
    mirror.blob(&layer, Answer::CutOnce(image.layer.clone(), 3_000_000));
    other.blob(&layer, Answer::Ranges(image.layer.clone()));
    mirror.mirrored_by(&other)?;
    let name = mirror.image("1");
    acquire_as("miss", "odd-mirror", &name)?;
    let (begun, rest) = (mirror.requests(&layer), other.requests(&layer));
    same!((begun.len(), rest.len()), (1, 1), "the requests {begun:?} {rest:?}");
    same!(begun[0].range, None, "the range of the first request");
    went_on(&rest[0], 3_000_000)?;
    release("odd-mirror")?;
    wait_gone("odd-mirror")?;
    evict(&[&name])
}

fn stalled_download_ends() -> Outcome {
    let image = FakeImage::new(8, 1000)?;
    let registry = registry_with("1", &image)?;
    let layer = digest(&image.layer);
    registry.blob(&layer, Answer::Stall);
    registry.manifest("stalled", Answer::Stall);
    let second = Plan::new("[registry]\nread_timeout_seconds = 2\n")?.start()?;
    let name = registry.image("1");
    second.refuses("odd", &name, 8, "REGISTRY_UNAVAILABLE", &[&name, &layer])?;
    no_trace_of(&name, &image)?;
    let name = registry.image("stalled");
    second.refuses("odd", &name, 8, "REGISTRY_UNAVAILABLE", &[&name])?;
    no_trace_of(&name, &image)?;
    same!(second.stop()?, 0, "the exit status of the second service");
    Ok(())
}

/// The same image at two registries: who pulls it from the good one waits a minute at the most.
fn one_that_drips_holds_up_nobody_else() -> Outcome {
    let image = FakeImage::new(30, 100_000)?;
    let (bad, good) = (registry_with("1", &image)?, registry_with("1", &image)?);
    let layer = digest(&image.layer);
    bad.blob(&layer, Answer::Drip(image.layer.clone()));
    let slow = bad.image("1");
    let pulling = std::thread::spawn(move || cowshed(&["pull", &slow]));
    wait_for("the layer to drip", || {
        check!(!bad.requests(&layer).is_empty(), "it was not asked for");
        Ok(())
    })?;
    acquire_as("miss", "odd-beside", &good.image("1"))?;
    // What the other one has fetched is there for this one too, as soon as it has lost its patience.
    pulling.join().map_err(|_| "the thread panicked")??.ok()?;
    same!(good.requests(&layer).len(), 1, "the requests for the layer");
    release("odd-beside")?;
    wait_gone("odd-beside")?;
    evict(&[&bad.image("1"), &good.image("1")])
}

fn bodies_without_end() -> Outcome {
    let image = FakeImage::new(31, 1000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    registry.manifest("1", Answer::Endless(200));
    refused_without_a_trace(&name, &image, 6, "IMAGE_UNSUPPORTED", &[&name, "8388608 bytes"])?;
    registry.manifest("1", Answer::Endless(403));
    refused_without_a_trace(&name, &image, 5, "REGISTRY_DENIED", &[&name])?;
    registry.serve("1", &image);
    registry.blob(&digest(&image.layer), Answer::Endless(404));
    refused_without_a_trace(&name, &image, 3, "IMAGE_NOT_FOUND", &[&name])?;
    registry.blob(&digest(&image.layer), Answer::Endless(200));
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name])
}

/// One is asked for, and used; one that is none does no harm.
fn tokens() -> Outcome {
    let image = FakeImage::new(32, 1000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    registry.answer("/v2/", Answer::Challenge("/token".to_owned()));
    registry.answer("/token", Answer::Bytes(br#"{"token":"abc"}"#.to_vec()));
    cowshed(&["pull", &name])?.ok()?;
    let asked = registry.requests("/token?");
    check!(asked.iter().all(|r| r.line.contains("repository%3Aodd%2Fimage%3Apull")), "{asked:?}");
    same!(asked.len(), 1, "the requests for a token");
    evict(&[&name])?;
    for odd in [Answer::Bytes(br#"{"token":"a\nb"}"#.to_vec()), Answer::Endless(200), Answer::Status(500)] {
        let registry = registry_with("1", &image)?;
        registry.answer("/v2/", Answer::Challenge("/token".to_owned()));
        registry.answer("/token", odd);
        registry.manifest("1", Answer::Status(401));
        refused_without_a_trace(&registry.image("1"), &image, 5, "REGISTRY_DENIED", &["401"])?;
    }
    Ok(())
}

/// Of which none says for what it is.
fn indexes_within_indexes() -> Outcome {
    let image = FakeImage::new(31, 1000)?;
    let registry = registry_with("1", &image)?;
    let (mut document, mut media_type) = (image.manifest.clone(), "manifest");
    for depth in 1..=6 {
        let (digest, size) = (digest(&document), document.len());
        document = format!(
            r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{{"mediaType":"application/vnd.oci.image.{media_type}.v1+json","digest":"{digest}","size":{size}}}]}}"#
        )
        .into_bytes();
        media_type = "index";
        registry.manifest(&self::digest(&document), Answer::Bytes(document.clone()));
        registry.manifest(&format!("deep-{depth}"), Answer::Bytes(document.clone()));
    }
    for depth in [2, 5] {
        let name = registry.image(&format!("deep-{depth}"));
        acquire_as("miss", "odd-nested", &name)?;
        release_fully("odd-nested")?;
        evict(&[&name])?;
    }
    let name = registry.image("deep-6");
    refused("odd-nested", &name, 6, "IMAGE_UNSUPPORTED", &[&name, "5 deep"])
}

fn images_that_say_too_much() -> Outcome {
    let tar = tar("etc/noise", &noise(33, 1000));
    let (layer, diff_id) = (gzip(&tar)?, digest(&tar));
    let many = format!(r#"{{"Env":["A={}"]}}"#, "x".repeat(70_000));
    let image = FakeImage::saying(layer.clone(), &diff_id, "amd64", &many);
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 6, "IMAGE_UNSUPPORTED", &[&name, "65536 are allowed"])?;
    let image = FakeImage::saying(layer, &diff_id, &"x".repeat(200_000), "{}");
    registry.serve("1", &image);
    refused_without_a_trace(&name, &image, 6, "IMAGE_UNSUPPORTED", &[&name, "200000 bytes"])
}

/// They are fetched from where the image is, or not at all.
fn foreign_layers() -> Outcome {
    let mut image = FakeImage::new(34, 1000)?;
    let own = "application/vnd.oci.image.layer.v1.tar+gzip";
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let elsewhere = FakeRegistry::start(Hosts::PlainHttp)?;
    let urls = format!(r#"{foreign}","urls":["http://{}/layer"],"x":""#, elsewhere.authority);
    image.manifest = String::from_utf8(image.manifest)?.replace(own, &urls).into_bytes();
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    let layer = digest(&image.layer);
    registry.blob(&layer, Answer::Status(404));
    let words = [name.as_str(), &layer, foreign, &registry.authority, "`urls`"];
    refused_without_a_trace(&name, &image, 3, "IMAGE_NOT_FOUND", &words)?;
    registry.serve("1", &image);
    acquire_as("miss", "odd-foreign", &name)?;
    let asked = elsewhere.requests("");
    check!(asked.is_empty(), "what `urls` names was asked: {asked:?}");
    release_fully("odd-foreign")?;
    evict(&[&name])
}

/// Before a layer is asked for, whatever is unpacked already.
fn images_larger_than_the_configuration_allows() -> Outcome {
    let image = FakeImage::new(35, 100_000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    let second = Plan::new("[images]\nimage_size_max = \"64 KiB\"\n")?.start()?;
    let words = [name.as_str(), "65536 are allowed", "image_size_max"];
    second.refuses("odd", &name, 6, "IMAGE_UNSUPPORTED", &words)?;
    check!(registry.requests(&digest(&image.layer)).is_empty(), "its layer was asked for");
    acquire_as("miss", "odd-large", &name)?;
    // Another image whose configuration says that it is the same, with other layers.
    let layer = noise(36, 200_000);
    let of = |layer: &[u8]| format!(r#"{}","size":{}"#, digest(layer), layer.len());
    let manifest = String::from_utf8(image.manifest)?.replace(&of(&image.layer), &of(&layer));
    let other = FakeImage { manifest: manifest.into_bytes(), config: image.config, layer };
    registry.serve("2", &other);
    second.refuses("odd", &registry.image("2"), 6, "IMAGE_UNSUPPORTED", &words[1..])?;
    check!(registry.requests(&digest(&other.layer)).is_empty(), "its layer was asked for");
    same!(second.stop()?, 0, "the exit status of the second service");
    release_fully("odd-large")?;
    evict(&[&name])
}

fn denied() -> Outcome {
    let image = FakeImage::new(9, 1000)?;
    let registry = registry_with("1", &image)?;
    for code in [401, 403] {
        registry.manifest("1", Answer::Status(code));
        let name = registry.image("1");
        refused_without_a_trace(&name, &image, 5, "REGISTRY_DENIED", &[&name, &registry.authority])?;
    }
    registry.serve("1", &image);
    registry.blob(&digest(&image.layer), Answer::Status(403));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 5, "REGISTRY_DENIED", &[&name, &registry.authority])
}

fn server_error() -> Outcome {
    let image = FakeImage::new(10, 1000)?;
    let registry = registry_with("1", &image)?;
    registry.manifest("1", Answer::Status(500));
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 8, "REGISTRY_UNAVAILABLE", &[&name, &registry.authority])?;
    registry.serve("1", &image);
    registry.blob(&digest(&image.layer), Answer::Status(500));
    refused_without_a_trace(&name, &image, 8, "REGISTRY_UNAVAILABLE", &[&name, &registry.authority])
}

fn manifest_of_another_digest() -> Outcome {
    let (image, other) = (FakeImage::new(21, 1000)?, FakeImage::new(22, 1000)?);
    let registry = registry_with("1", &image)?;
    let wanted = digest(&image.manifest);
    registry.manifest(&wanted, Answer::Bytes(other.manifest.clone()));
    let name = registry.image(&wanted);
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&wanted])
}

fn manifest_that_is_none() -> Outcome {
    let image = FakeImage::new(23, 1000)?;
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    for text in ["<html>not found</html>", "{}", r#"{"schemaVersion":1,"fsLayers":[]}"#] {
        registry.manifest("1", Answer::Bytes(text.as_bytes().to_vec()));
        let ran = cowshed(&["acquire", "odd", &name])?;
        ran.fails(6, &["[IMAGE_UNSUPPORTED]", &name])?;
    }
    nothing_left()
}

fn layer_of_another_diff_id() -> Outcome {
    let tar = tar("etc/noise", &noise(24, 1000));
    let image = FakeImage::of(gzip(&tar)?, &digest(b"something else"));
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    let words = [name.as_str(), &digest(b"something else"), &digest(&tar)];
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &words)
}

fn layer_of_garbage() -> Outcome {
    let garbage = noise(25, 100_000);
    let image = FakeImage::of(garbage.clone(), &digest(&garbage));
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name, &digest(&garbage)])
}

fn layer_that_ends_too_early() -> Outcome {
    let tar = tar("etc/noise", &noise(26, 100_000));
    let mut layer = gzip(&tar)?;
    layer.truncate(60_000);
    let image = FakeImage::of(layer, &digest(&tar));
    let registry = registry_with("1", &image)?;
    let name = registry.image("1");
    refused_without_a_trace(&name, &image, 10, "IMAGE_CORRUPT", &[&name, &digest(&image.layer)])?;
    run("cowshed", &["status"])?.ok().map(drop)
}
