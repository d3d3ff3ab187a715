//! How long leases hold, and requests that come again.

use std::{fs::File, os::unix::fs::FileExt as _};

use cowshed_proto::v1;
use serde_json::Value;
use tonic::Code;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_request, block_on, channel, client, refusal},
        check,
        command::text,
        cow::{
            Disk, acquire, cowshed, host, image, lease, release, release_fully, thin_devices, wait_gone,
            wait_serving,
        },
        same,
        second::{Plan, Second},
        wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("an_expired_lease_comes_back_with_its_contents", an_expired_lease_comes_back_with_its_contents),
    ("an_expired_disk_goes_when_its_grace_is_over_and_it_is_closed", an_expired_disk_goes_when_closed),
    ("fresh_replaces_an_expired_disk", fresh_replaces_an_expired_disk),
    ("keep_alive_renews_many", keep_alive_renews_many),
    ("requests_are_known_after_a_restart", requests_are_known_after_a_restart),
    ("an_old_generation_can_do_nothing", an_old_generation_can_do_nothing),
    ("wrong_terms_are_named", wrong_terms_are_named),
];

/// A service whose expired leases have this grace.
fn with_grace(seconds: u64) -> Outcome<Second> {
    Plan::new(&format!("[leases]\nexpired_grace_seconds = {seconds}\n"))?.start()
}

fn acquire_from(second: &Second, arguments: &[&str]) -> Outcome<Disk> {
    let reply = second.cowshed(&[&["acquire", "-o", "json"], arguments].concat())?.json()?;
    Disk::of(&reply["lease"])
}

fn lease_of(second: &Second, vm: &str) -> Outcome<Value> {
    Ok(second.cowshed(&["leases", vm, "-o", "json"])?.json()?["lease"].clone())
}

fn wait_for_state(second: &Second, vm: &str, state: &str) -> Outcome<Value> {
    wait_for(&format!("{vm} to be {state}"), || {
        let lease = lease_of(second, vm)?;
        same!(text(&lease, "/state")?, state, "the state of {lease}");
        Ok(lease)
    })
}

fn an_expired_lease_comes_back_with_its_contents() -> Outcome {
    let second = with_grace(600)?;
    let tiny = image("tiny:1");
    let disk = acquire_from(&second, &["terms-back", &tiny, "--ttl", "1"])?;
    File::options().write(true).open(&disk.path)?.write_all_at(b"mine", 300 << 20)?;
    let suspect = wait_for_state(&second, "terms-back", "suspect")?;
    same!(text(&suspect, "/suspicion/reason")?, "expired", "why {suspect}");
    check!(suspect["suspicion"]["reclaimed_in"].is_string(), "no time in {suspect}");
    let again = acquire_from(&second, &["terms-back", &tiny, "--ttl", "3600"])?;
    same!(again, disk, "the disk, acquired again");
    let mut bytes = [0; 4];
    File::open(&again.path)?.read_exact_at(&mut bytes, 300 << 20)?;
    same!(&bytes, b"mine", "what was on it");
    let granted = lease_of(&second, "terms-back")?;
    same!(text(&granted, "/state")?, "granted", "the state of {granted}");
    same!(text(&granted, "/ttl")?, "3600s", "the ttl of {granted}");
    // Renewed: the same by its id.
    second.cowshed(&["renew", &disk.lease, "--ttl", "1"])?.ok()?;
    wait_for_state(&second, "terms-back", "suspect")?;
    let renewed = second.cowshed(&["renew", &disk.lease, "--ttl", "3600", "-o", "json"])?.json()?;
    same!(text(&renewed, "/lease/state")?, "granted", "the state of {renewed}");
    second.release_all()
}

fn an_expired_disk_goes_when_closed() -> Outcome {
    let second = with_grace(1)?;
    let disk = acquire_from(&second, &["terms-goes", &image("tiny:1"), "--ttl", "1"])?;
    let open = File::options().read(true).write(true).open(&disk.path)?;
    let waiting = wait_for("the reclaimer to wait for the device", || {
        let lease = lease_of(&second, "terms-goes")?;
        same!(text(&lease, "/state")?, "suspect", "the state of {lease}");
        let why = text(&lease, "/waiting_for")?;
        check!(why.contains("open"), "it waits for {why:?}");
        Ok(lease)
    })?;
    let own = u64::from(std::process::id());
    let holders = waiting["holders"].as_array().cloned().unwrap_or_default();
    check!(holders.iter().any(|holder| holder["pid"] == own), "process {own} is not among {holders:?}");
    open.write_all_at(b"still mine", 512 << 20)?;
    open.sync_all()?;
    check!(thin_devices()?.contains(&disk.dm_name), "{} is gone while it is open", disk.path);
    drop(open);
    wait_for("the disk to go", || second.cowshed(&["leases", "terms-goes"])?.fails(3, &["LEASE_NOT_FOUND"]))?;
    check!(!thin_devices()?.contains(&disk.dm_name), "{} is still there", disk.path);
    second.cowshed(&["renew", &disk.lease])?.fails(3, &["[LEASE_NOT_FOUND]", &disk.lease])
}

fn fresh_replaces_an_expired_disk() -> Outcome {
    let second = with_grace(600)?;
    let tiny = image("tiny:1");
    let old = acquire_from(&second, &["terms-fresh", &tiny, "--ttl", "1"])?;
    wait_for_state(&second, "terms-fresh", "suspect")?;
    let new = acquire_from(&second, &["terms-fresh", &tiny, "--fresh"])?;
    check!(new.lease != old.lease && new.path != old.path, "{new:?} is the old one");
    check!(new.generation > old.generation, "generation {} after {}", new.generation, old.generation);
    // It is not expired now.
    same!(acquire_from(&second, &["terms-fresh", &tiny, "--fresh"])?, new, "the disk, asked for again");
    second.release_all()
}

fn keep_alive_renews_many() -> Outcome {
    let second = with_grace(600)?;
    let tiny = image("tiny:1");
    let a = acquire_from(&second, &["terms-alive-a", &tiny, "--ttl", "3600"])?;
    let b = acquire_from(&second, &["terms-alive-b", &tiny, "--ttl", "1"])?;
    wait_for_state(&second, "terms-alive-b", "suspect")?;
    let unknown = "0".repeat(32);
    let ids = vec![a.lease.clone(), unknown.clone(), b.lease.clone()];
    let answers: Vec<v1::KeepAliveResponse> = block_on(async {
        let mut client = v1::cowshed_client::CowshedClient::new(channel(second.socket()).await?);
        let requests = vec![v1::KeepAliveRequest { lease_ids: ids.clone() }; 2];
        let mut stream = client.keep_alive(tokio_stream::iter(requests)).await?.into_inner();
        let mut answers = Vec::new();
        while let Some(answer) = stream.message().await? {
            answers.push(answer);
        }
        Ok::<_, libtest_mimic::Failed>(answers)
    })?;
    same!(answers.len(), 2, "answers");
    for answer in answers {
        let told: Vec<String> = answer.renewals.iter().map(|r| r.lease_id.clone()).collect();
        same!(told, ids, "the leases of an answer");
        check!(answer.renewals[0].expires_in.is_some_and(|t| t.seconds > 3000), "{:?}", answer.renewals[0]);
        check!(answer.renewals[2].failure.is_none(), "{:?}", answer.renewals[2]);
        let failure = answer.renewals[1].failure.clone().ok_or("the unknown lease was renewed")?;
        same!(failure.reason, "LEASE_NOT_FOUND", "{failure:?}");
    }
    second.release_all()
}

fn requests_are_known_after_a_restart() -> Outcome {
    let tiny = image("tiny:1");
    let named = |vm: &str, id: &str| v1::AcquireRequest {
        request_id: Some(id.to_owned()),
        ..acquire_request(vm, &tiny)
    };
    let ask = |request: v1::AcquireRequest| {
        block_on(async move { Ok::<_, libtest_mimic::Failed>(client().await?.acquire(request).await) })
    };
    let first = ask(named("terms-request", "r-1"))??.into_inner().lease.ok_or("no lease")?;
    cowshed(&["release", "terms-request", "--request-id", "r-2"])?.ok()?;
    wait_gone("terms-request")?;
    host("restart", "cowshed")?;
    wait_serving()?;
    let over = refusal(ask(named("terms-request", "r-1"))?)?;
    same!((over.code, over.reason.as_str()), (Code::Aborted, "REQUEST_OVER"), "{over:?}");
    check!(over.message.contains(&first.lease_id), "{}", over.message);
    let next = acquire("terms-request", &tiny)?;
    let nothing = cowshed(&["release", "terms-request", "--request-id", "r-2", "-o", "json"])?.json()?;
    check!(nothing["lease"].is_null(), "a late release has released {nothing}");
    same!(text(&lease("terms-request")?, "/lease_id")?, next.lease, "the lease after a late release");
    let reused = refusal(ask(named("terms-other", "r-2"))?)?;
    same!((reused.code, reused.reason.as_str()), (Code::InvalidArgument, "REQUEST_ID_REUSED"), "{reused:?}");
    release("terms-request")
}

fn an_old_generation_can_do_nothing() -> Outcome {
    let tiny = image("tiny:1");
    let old = acquire("terms-generation", &tiny)?;
    let open = File::open(&old.path)?;
    release("terms-generation")?;
    let new = acquire("terms-generation", &tiny)?;
    cowshed(&["renew", &old.lease])?.fails(6, &["[LEASE_RELEASED]", &old.lease])?;
    cowshed(&["release", "terms-generation", "--generation", &old.generation.to_string()])?.ok()?;
    same!(text(&lease("terms-generation")?, "/lease_id")?, new.lease, "the VM's lease");
    same!(text(&lease("terms-generation")?, "/state")?, "granted", "its state");
    drop(open);
    release_fully("terms-generation")
}

fn wrong_terms_are_named() -> Outcome {
    let tiny = image("tiny:1");
    cowshed(&["acquire", "terms-wrong", &tiny, "--ttl", "0"])?.fails(2, &["[TTL_INVALID]", "ttl"])?;
    cowshed(&["acquire", "terms-wrong", &tiny, "--request-id", "a b"])?
        .fails(2, &["[REQUEST_ID_INVALID]", "request_id"])?;
    cowshed(&["renew", "nonsense"])?.fails(2, &["[LEASE_ID_INVALID]", "nonsense"])?;
    cowshed(&["leases", "terms-wrong"])?.fails(3, &["[LEASE_NOT_FOUND]"])
}
