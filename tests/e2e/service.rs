//! The service as its operators see it: health, reflection, socket, status, metrics, logs, and how it stops.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _, path::Path, thread};

use serde_json::Value;
use tokio_stream::StreamExt as _;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{
    Test,
    support::{
        Outcome,
        api::{block_on, channel},
        audit::pool_used_bytes,
        check,
        command::{number, run, sh, text},
        containerd,
        cow::{
            REGISTRY, SOCKET, acquire, acquire_as, cowshed, evict_all, image, leases, refused, release_fully,
            snapshotter,
        },
        fake_image::{FakeImage, digest},
        fake_registry::{Answer, FakeRegistry, Hosts},
        same,
        second::Plan,
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("health_and_reflection", health_and_reflection),
    ("socket_is_for_its_owner_only", socket_is_for_its_owner_only),
    ("status_is_true", status_is_true),
    ("metrics_tell_the_story", metrics_tell_the_story),
    ("metrics_listen_on_loopback_only", metrics_listen_on_loopback_only),
    ("logs_in_json", logs_in_json),
    ("stops_in_order", stops_in_order),
    ("stops_within_its_time", stops_within_its_time),
];

fn health_and_reflection() -> Outcome {
    let services = block_on(async {
        let channel = channel(Path::new(SOCKET)).await?;
        for service in ["", "cowshed.v1.Cowshed"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let reply = HealthClient::new(channel.clone()).check(request).await?.into_inner();
            same!(reply.status(), ServingStatus::Serving, "the health of {service:?}");
        }
        let list = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut reflection = ServerReflectionClient::new(channel);
        let stream = reflection.server_reflection_info(tokio_stream::once(list));
        let reply = stream.await?.into_inner().next().await.ok_or("no reply")??;
        match reply.message_response {
            Some(MessageResponse::ListServicesResponse(list)) => Ok(list.service),
            other => Err(libtest_mimic::Failed::from(format!("{other:?}"))),
        }
    })?;
    for name in ["cowshed.v1.Cowshed", "grpc.health.v1.Health"] {
        check!(services.iter().any(|service| service.name == name), "{name} is not among {services:?}");
    }
    Ok(())
}

fn socket_is_for_its_owner_only() -> Outcome {
    let mode = std::fs::metadata(SOCKET)?.permissions().mode() & 0o777;
    same!(format!("{mode:o}"), "600", "the mode of {SOCKET}");
    let other = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let ran = run("bash", &["-c", &format!("{other} cowshed status")])?;
    ran.fails(20, &[SOCKET])
}

fn status_is_true() -> Outcome {
    acquire("service-status", &image("tiny:1"))?;
    let status = cowshed(&["status", "-o", "json"])?.json()?;
    same!(status["serving"], Value::Bool(true), "serving in {status}");
    same!(status["problems"], serde_json::json!([]), "the problems");
    same!(number(&status, "/leases/granted")?, 1, "the granted leases");
    same!(number(&status, "/pulls_in_flight")?, 0, "the pulls");
    same!(text(&status, "/pool/name")?, "vg-pool", "the pool");
    same!(text(&status, "/pool/mode")?, "rw", "its mode");
    same!(number(&status, "/pool/data_used_bytes")?, pool_used_bytes()?, "the bytes in use");
    let total = sh("blockdev --getsize64 /dev/mapper/vg-pool")?;
    same!(number(&status, "/pool/data_total_bytes")?, total.trim().parse::<u64>()?, "the bytes of the pool");
    let version = sh("ctr version | awk '/^Server/ { server = 1 } server && /Version:/ { print $2 }'")?;
    same!(text(&status, "/containerd/version")?, version.trim(), "containerd's version");
    same!(text(&status, "/containerd/snapshotter")?, snapshotter(), "the snapshotter");
    check!(cowshed(&["status"])?.ok()?.contains("vg-pool"), "the text has no pool");
    release_fully("service-status")
}

type Metrics = BTreeMap<String, f64>;

fn scrape() -> Outcome<Metrics> {
    let text = sh("curl -sf http://127.0.0.1:9850/metrics")?;
    let mut metrics = Metrics::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').ok_or_else(|| format!("no value in {line:?}"))?;
        metrics.insert(name.to_owned(), value.parse()?);
    }
    Ok(metrics)
}

/// A miss, a hit, the same again, an unknown image, two releases.
fn metrics_tell_the_story() -> Outcome {
    evict_all()?;
    let tiny = image("tiny:1");
    wait_for("it to be known that it is gone", || {
        let offer = cowshed(&["offer", &tiny, "-o", "json"])?.json()?;
        same!(text(&offer, "/warmth")?, "cold", "what is offered: {offer}");
        Ok(())
    })?;
    let before = scrape()?;
    acquire_as("miss", "service-m1", &tiny)?;
    acquire_as("hit", "service-m2", &tiny)?;
    acquire("service-m2", &tiny)?;
    refused("service-m3", &format!("{REGISTRY}/cowshed/nowhere:1"), 3, "IMAGE_NOT_FOUND", &[])?;
    let held = scrape()?;
    release_fully("service-m1")?;
    release_fully("service-m2")?;
    let after = scrape()?;
    let grew = |from: &Metrics, to: &Metrics, name: &str| {
        to.get(name).copied().unwrap_or_default() - from.get(name).copied().unwrap_or_default()
    };
    for (name, by) in [
        ("cowshed_acquires_total{cache=\"miss\",result=\"ok\"}", 1.0),
        ("cowshed_acquires_total{cache=\"hit\",result=\"ok\"}", 2.0),
        ("cowshed_acquires_total{cache=\"none\",result=\"IMAGE_NOT_FOUND\"}", 1.0),
        ("cowshed_acquire_duration_seconds_count{cache=\"miss\"}", 1.0),
        ("cowshed_acquire_duration_seconds_count{cache=\"hit\"}", 1.0),
        ("cowshed_acquire_stage_duration_seconds_count{stage=\"prepare\"}", 2.0),
        ("cowshed_acquire_offered_total{got=\"cold\",offered=\"cold\"}", 1.0),
        ("cowshed_acquire_offered_total{got=\"base\",offered=\"base\"}", 1.0),
        ("cowshed_acquire_offered_total{got=\"refused\",offered=\"cold\"}", 1.0),
        ("cowshed_pulls_total{result=\"miss\"}", 1.0),
        ("cowshed_pulls_total{result=\"IMAGE_NOT_FOUND\"}", 1.0),
        ("cowshed_layer_unpack_duration_seconds_count", 1.0),
        ("cowshed_grpc_calls_total{code=\"Ok\",method=\"Acquire\"}", 3.0),
        ("cowshed_grpc_calls_total{code=\"NotFound\",method=\"Acquire\"}", 1.0),
    ] {
        same!(grew(&before, &held, name), by, "how much {name} grew");
    }
    let tiny_bytes = crate::support::registry_log::describe("tiny:1")?.layers[0].1 as f64;
    let fetched = grew(&before, &held, "cowshed_pull_bytes_total");
    check!(
        fetched >= tiny_bytes && fetched < tiny_bytes + 100_000.0,
        "{fetched} bytes were fetched for {tiny_bytes}"
    );
    same!(held.get("cowshed_leases{state=\"granted\"}"), Some(&2.0), "the leases while they are held");
    same!(after.get("cowshed_leases{state=\"granted\"}"), Some(&0.0), "the leases afterwards");
    same!(grew(&held, &after, "cowshed_releases_total{result=\"ok\"}"), 2.0, "the releases");
    wait_for("the reclaimed disks to be counted", || {
        same!(grew(&held, &scrape()?, "cowshed_reclaimed_snapshots_total"), 2.0, "the disks that are gone");
        Ok(())
    })?;
    same!(after.get("cowshed_pool_up"), Some(&1.0), "whether the pool works");
    same!(after.get("cowshed_pulls_in_flight"), Some(&0.0), "the pulls under way");
    let now = scrape()?;
    let used = pool_used_bytes()? as f64;
    same!(now.get("cowshed_pool_bytes{measure=\"used\",part=\"data\"}"), Some(&used), "the pool's bytes");
    check!(now.keys().any(|name| name.starts_with("cowshed_build_info{version=")), "no version");
    check!(now.keys().all(|name| !name.contains("service-m1")), "a VM's name is in a metric");
    Ok(())
}

fn metrics_listen_on_loopback_only() -> Outcome {
    let listening = sh("ss -Hltn sport = :9850")?;
    same!(listening.lines().count(), 1, "the listeners {listening}");
    check!(listening.contains("127.0.0.1:9850"), "it listens elsewhere: {listening}");
    sh("curl -sf http://127.0.0.1:9850/metrics | grep '^# HELP cowshed_acquires_total'")?;
    let code = sh("curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:9850/other")?;
    same!(code, "404", "the answer to another path");
    Ok(())
}

fn logs_in_json() -> Outcome {
    let second = Plan::new("[log]\nformat = \"json\"\n")?.start()?;
    second.cowshed(&["acquire", "service-json", &image("tiny:1")])?.ok()?;
    second.refuses("service-bad", "127.0.0.1:1/x:1", 8, "REGISTRY_UNAVAILABLE", &[])?;
    second.release_all()?;
    let log = second.plan.directory.path().join("log");
    second.terminate()?;
    let mut second = second;
    same!(second.wait()?, 0, "the exit status");
    let text = std::fs::read_to_string(log)?;
    let mut records = Vec::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).map_err(|e| format!("{line:?} is no JSON: {e}"))?;
        check!(record["level"].is_string() && record["message"].is_string(), "no level or message in {line}");
        check!(record["timestamp"].is_string(), "no timestamp in {line}");
        records.push(record);
    }
    for (message, more) in
        [("granted", "service-json"), ("refused", "REGISTRY_UNAVAILABLE"), ("serving", "0.1.0")]
    {
        let told = records.iter().any(|r| r["message"] == message && r.to_string().contains(more));
        check!(told, "nothing says {message:?} of {more}: {text}");
    }
    Ok(())
}

/// A registry that holds the layer back, and an acquire that waits for it.
fn second_that_pulls(
    server: &'static str,
    seed: u64,
) -> Outcome<(FakeRegistry, crate::support::second::Second, String)> {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let fake = FakeImage::new(seed, 10_000)?;
    registry.serve("1", &fake);
    registry.blob(&digest(&fake.layer), Answer::Gated(fake.layer.clone()));
    let mut plan = Plan::new("")?;
    plan.server = server;
    let second = plan.start()?;
    Ok((registry, second, digest(&fake.layer)))
}

fn stops_in_order() -> Outcome {
    let (registry, mut second, layer) = second_that_pulls("", 31)?;
    let name = registry.image("1");
    let (socket, asked) = (second.socket().display().to_string(), name.clone());
    let waiting = thread::spawn(move || {
        run("cowshed", &["acquire", "service-stop", &asked, "-o", "json", "--socket", &socket])
    });
    wait_for("the layer to be asked for", || {
        check!(!registry.requests(&layer).is_empty(), "nobody asked");
        Ok(())
    })?;
    second.terminate()?;
    wait_for("the word that it stops", || {
        check!(second.log().contains("stopping"), "{}", second.log());
        Ok(())
    })?;
    // Nothing new is begun, what was begun is finished.
    let late = second.cowshed(&["acquire", "service-late", &image("tiny:1")])?;
    check!(late.status == 8 || late.status == 20, "a new acquire while it stops: {late:?}");
    registry.open_gate();
    let granted = waiting.join().map_err(|_| "the acquire panicked")??.json()?;
    same!(second.wait()?, 0, "the exit status; its log: {}", second.log());
    let state = second.plan.state.clone();
    let mut again = Plan::new("")?;
    again.state = state;
    let again = again.start()?;
    let kept = again.cowshed(&["leases", "service-stop", "-o", "json"])?.json()?;
    same!(kept["lease"]["lease_id"], granted["lease"]["lease_id"], "the lease after the next start");
    same!(kept["lease"]["state"], "granted", "its state");
    again.release_all()?;
    same!(again.stop()?, 0, "the exit status");
    crate::support::cow::evict(&[&name])
}

fn stops_within_its_time() -> Outcome {
    let (registry, mut second, layer) = second_that_pulls("stop_timeout_seconds = 1", 32)?;
    let name = registry.image("1");
    let (socket, asked) = (second.socket().display().to_string(), name.clone());
    let waiting =
        thread::spawn(move || run("cowshed", &["acquire", "service-slow", &asked, "--socket", &socket]));
    wait_for("the layer to be asked for", || {
        check!(!registry.requests(&layer).is_empty(), "nobody asked");
        Ok(())
    })?;
    second.terminate()?;
    // The gate stays shut: the stop gives up after stop_timeout_seconds.
    same!(second.wait()?, 0, "the exit status; its log: {}", second.log());
    let refused = waiting.join().map_err(|_| "the acquire panicked")??;
    check!(refused.status != 0, "it was granted: {refused:?}");
    // The next start clears away what was begun.
    let mut again = Plan::new("")?;
    again.state = second.plan.state.clone();
    let again = again.start()?;
    wait_for("the pull's containerd lease to go", || {
        let mut left = containerd::leases()?;
        left.retain(|id| id.starts_with("cowshed-pull-"));
        check!(left.is_empty(), "{left:?}");
        Ok(())
    })?;
    same!(again.stop()?, 0, "the exit status");
    check!(leases()?.is_empty(), "the first service has leases");
    Ok(())
}
