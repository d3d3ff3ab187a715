//! Acquiring: what a launcher gets, that it gets it once, and that it is still there after a restart.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _};

use cowshed_proto::v1;
use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome,
        api::{block_on, client, refusal},
        check,
        command::{number, sh, text},
        cow::{
            Disk, acquire, acquire_as, acquire_reply, cowshed, evict, host, image, lease, leases, refused,
            release_fully, wait_serving,
        },
        registry_log::describe,
        same,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("a_miss_and_then_hits", a_miss_and_then_hits),
    ("the_reply_is_what_the_kernel_says", the_reply_is_what_the_kernel_says),
    ("the_reply_has_the_images_process", the_reply_has_the_images_process),
    ("the_same_wish_gets_the_same_lease", the_same_wish_gets_the_same_lease),
    ("another_image_is_a_conflict", another_image_is_a_conflict),
    ("ten_vms_have_ten_disks", ten_vms_have_ten_disks),
    ("one_vm_does_not_see_what_another_writes", one_vm_does_not_see_what_another_writes),
    ("leases_are_found_and_paged", leases_are_found_and_paged),
    ("leases_survive_a_restart_and_a_kill", leases_survive_a_restart_and_a_kill),
];

fn release_all(disks: &[Disk]) -> Outcome {
    for disk in disks {
        cowshed(&["release", &disk.vm])?.ok()?;
    }
    disks.iter().try_for_each(|disk| release_fully(&disk.vm))
}

fn stages(reply: &Value) -> Outcome<Vec<String>> {
    reply["stages"].as_array().into_iter().flatten().map(|stage| text(stage, "/stage")).collect()
}

fn a_miss_and_then_hits() -> Outcome {
    evict(&[&image("app:1")])?;
    let miss = acquire_reply("life-1", &image("app:1"))?;
    same!(text(&miss, "/cache")?, "miss", "the first: {miss}");
    same!(
        stages(&miss)?,
        ["resolve", "pull", "intent", "lease", "prepare", "verify", "confirm"],
        "its stages"
    );
    let hit = acquire_reply("life-2", &image("app:1"))?;
    same!(text(&hit, "/cache")?, "hit", "the second: {hit}");
    same!(stages(&hit)?, ["resolve", "intent", "lease", "prepare", "verify", "confirm"], "its stages");
    let sum: u64 = hit["stages"].as_array().into_iter().flatten().filter_map(|s| s["micros"].as_u64()).sum();
    check!(sum > 0 && sum <= number(&hit, "/total_micros")?, "the stages do not fit into the total: {hit}");
    release_all(&[Disk::of(&miss["lease"])?, Disk::of(&hit["lease"])?])
}

fn the_reply_is_what_the_kernel_says() -> Outcome {
    let reply = acquire_reply("life-1", &image("tiny:1"))?;
    let disk = Disk::of(&reply["lease"])?;
    let device = &reply["lease"]["device"];
    let rdev = fs::metadata(&disk.path)?.rdev();
    let (major, minor) = ((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00));
    same!((number(device, "/major")?, number(device, "/minor")?), (major, minor), "the device number");
    same!(disk.path, format!("/dev/mapper/{}", disk.dm_name), "the path");
    // "0 SECTORS thin POOL ID"
    let table = sh(&format!("dmsetup table {}", disk.dm_name))?;
    let words: Vec<&str> = table.split_whitespace().collect();
    same!(
        words[2..5],
        ["thin", text(device, "/pool_device")?.as_str(), disk.thin_id.to_string().as_str()],
        "the table"
    );
    let size = sh(&format!("blockdev --getsize64 {}", disk.path))?;
    same!(number(device, "/size_bytes")?.to_string(), size.trim(), "the size");
    let filesystem = sh(&format!("blkid -p -o value -s TYPE {}", disk.path))?;
    same!(text(device, "/filesystem")?, filesystem.trim(), "the filesystem");
    release_all(&[disk])
}

fn the_reply_has_the_images_process() -> Outcome {
    let disk = acquire("life-1", &image("app:1"))?;
    let lease = lease("life-1")?;
    same!(text(&lease, "/image_digest")?, describe("app:1")?.digest, "the image's digest");
    same!(text(&lease, "/image")?, image("app:1"), "the image's name");
    same!(text(&lease, "/platform")?, "linux/amd64", "the platform");
    let process = &lease["process"];
    same!(text(process, "/user")?, "app", "the user");
    same!(text(process, "/working_dir")?, "/srv/app", "the working directory");
    same!(process["entrypoint"], serde_json::json!(["/usr/bin/python3", "app.py"]), "the entrypoint");
    check!(process["env"].as_array().is_some_and(|env| !env.is_empty()), "no environment: {process}");
    release_all(&[disk])
}

fn the_same_wish_gets_the_same_lease() -> Outcome {
    let first = acquire("life-1", &image("tiny:1"))?;
    let reply = acquire_reply("life-1", &image("tiny:1"))?;
    same!(Disk::of(&reply["lease"])?, first, "the second disk");
    same!(reply["existing"], true, "whether it was held: {reply}");
    same!(stages(&reply)?, ["ledger"], "its stages");
    same!(leases()?.len(), 1, "the number of leases");
    release_all(&[first])
}

fn another_image_is_a_conflict() -> Outcome {
    let held = acquire("life-1", &image("tiny:1"))?;
    let (tiny, app) = (image("tiny:1"), image("app:1"));
    refused("life-1", &app, 4, "SPEC_CONFLICT", &["life-1", &held.lease, "image", &tiny, &app])?;
    let spec = v1::DiskSpec { image: app, platform: None, ..Default::default() };
    let request =
        v1::AcquireRequest { vm_id: "life-1".into(), spec: Some(spec), ..v1::AcquireRequest::default() };
    let refused = block_on(async { refusal(client().await?.acquire(request).await) })?;
    same!(
        (refused.code, refused.domain.as_str()),
        (tonic::Code::AlreadyExists, "cowshed.v1"),
        "the code and domain"
    );
    same!(refused.metadata.get("differs").map(String::as_str), Some("image"), "what differs");
    same!(acquire("life-1", &tiny)?, held, "the lease afterwards");
    release_all(&[held])
}

fn ten_vms_have_ten_disks() -> Outcome {
    let disks: Vec<Disk> =
        (0..10).map(|n| acquire(&format!("life-{n}"), &image("tiny:1"))).collect::<Result<_, _>>()?;
    let paths: BTreeSet<&String> = disks.iter().map(|disk| &disk.path).collect();
    let ids: BTreeSet<u64> = disks.iter().map(|disk| disk.thin_id).collect();
    let names: BTreeSet<&String> = disks.iter().map(|disk| &disk.lease).collect();
    same!((paths.len(), ids.len(), names.len()), (10, 10, 10), "devices, thin ids and leases that differ");
    release_all(&disks)
}

fn one_vm_does_not_see_what_another_writes() -> Outcome {
    let (one, other) = (acquire("life-1", &image("tiny:1"))?, acquire("life-2", &image("tiny:1"))?);
    let seen = sh(&format!(
        "at=$(mktemp -d /tmp/e2e-XXXX); trap 'umount -q $at || true; rmdir $at' EXIT
         mount {one} $at; echo secret > $at/written; umount $at
         mount {other} $at; ls $at; umount $at
         mount {one} $at; cat $at/written; umount $at",
        one = one.path,
        other = other.path
    ))?;
    let lines: Vec<&str> = seen.lines().collect();
    check!(lines.contains(&"bin") && !lines.contains(&"written"), "the other disk has {seen}");
    same!(lines.last(), Some(&"secret"), "what the first disk has");
    release_all(&[one, other])
}

fn leases_are_found_and_paged() -> Outcome {
    let disks: Vec<Disk> =
        (0..5).map(|n| acquire(&format!("life-{n}"), &image("tiny:1"))).collect::<Result<_, _>>()?;
    let (mut listed, mut pages, mut token) = (BTreeSet::new(), 0, String::new());
    loop {
        let states = vec![v1::LeaseState::Granted.into()];
        let request = v1::ListLeasesRequest { page_size: 2, page_token: token, states, shared: false };
        let page =
            block_on(async { Ok::<_, libtest_mimic::Failed>(client().await?.list_leases(request).await?) })?;
        let page = page.into_inner();
        check!(page.leases.len() <= 2, "a page has {} leases", page.leases.len());
        listed.extend(page.leases.into_iter().map(|lease| lease.lease_id));
        pages += 1;
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    same!(pages, 3, "pages");
    same!(listed, disks.iter().map(|disk| disk.lease.clone()).collect::<BTreeSet<_>>(), "the listed leases");
    let releasing =
        v1::ListLeasesRequest { states: vec![v1::LeaseState::Releasing.into()], ..Default::default() };
    let none =
        block_on(async { Ok::<_, libtest_mimic::Failed>(client().await?.list_leases(releasing).await?) })?;
    same!(none.into_inner().leases.len(), 0, "leases that are being released");
    let by = v1::get_lease_request::By::LeaseId(disks[3].lease.clone());
    let request = v1::GetLeaseRequest { by: Some(by) };
    let found =
        block_on(async { Ok::<_, libtest_mimic::Failed>(client().await?.get_lease(request).await?) })?;
    same!(found.into_inner().lease.unwrap_or_default().vm_id, "life-3", "the VM of a lease");
    cowshed(&["leases", "nobody"])?.fails(3, &["LEASE_NOT_FOUND", "nobody"])?;
    release_all(&disks)
}

fn leases_survive_a_restart_and_a_kill() -> Outcome {
    let names = ["life-0", "life-1", "life-2"];
    let before: Vec<Disk> = names.iter().map(|vm| acquire(vm, &image("tiny:1"))).collect::<Result<_, _>>()?;
    for verb in ["restart", "kill"] {
        host(verb, "cowshed")?;
        wait_serving()?;
        let after: Vec<Disk> =
            names.iter().map(|vm| acquire_as("hit", vm, &image("tiny:1"))).collect::<Result<_, _>>()?;
        same!(after, before, "the disks after a {verb}");
    }
    release_all(&before)
}
