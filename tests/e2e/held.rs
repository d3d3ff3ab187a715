//! Held leases in a crowd, in lists, and over a restart.

use std::{collections::BTreeSet, fs::File};

use cowshed_proto::v1::{self, get_lease_request::By};
use serde_json::Value;
use tonic::Code;

use crate::{
    Test,
    support::{
        Outcome,
        api::{acquire_all, block_on, client, refusal},
        check,
        command::text,
        cow::{
            Disk, acquire, acquire_reply, cowshed, host, image, lease, leases, release, release_fully,
            thin_devices, wait_for_devices, wait_gone, wait_serving,
        },
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("one_vm_that_asks_five_times_at_once", one_vm_that_asks_five_times_at_once),
    ("ten_vms_at_once_have_ten_devices", ten_vms_at_once_have_ten_devices),
    ("another_platform_is_a_conflict", another_platform_is_a_conflict),
    ("lists_by_state", lists_by_state),
    ("found_until_they_are_gone", found_until_they_are_gone),
    ("released_ones_still_wait_after_a_restart", released_ones_still_wait_after_a_restart),
];

fn one_vm_that_asks_five_times_at_once() -> Outcome {
    let vms = vec!["held-five".to_owned(); 5];
    let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
    for (_, reply) in block_on(acquire_all(&vms, &image("tiny:1"))) {
        let lease = reply?;
        ids.insert(lease.lease_id);
        names.insert(lease.device.ok_or("no device")?.dm_name);
    }
    same!((ids.len(), names.len()), (1, 1), "leases and devices of one VM: {ids:?}, {names:?}");
    same!(leases()?.len(), 1, "leases");
    wait_for_devices(&names)?;
    release("held-five")
}

fn ten_vms_at_once_have_ten_devices() -> Outcome {
    let vms: Vec<String> = (0..10).map(|n| format!("held-ten-{n}")).collect();
    let (mut names, mut ids, mut generations) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (vm, reply) in block_on(acquire_all(&vms, &image("tiny:1"))) {
        let lease = reply?;
        same!(lease.vm_id, vm, "the VM of {lease:?}");
        let device = lease.device.ok_or("no device")?;
        File::open(&device.path)?;
        names.insert(device.dm_name);
        ids.insert(device.thin_id);
        generations.insert(lease.generation);
    }
    same!((names.len(), ids.len(), generations.len()), (10, 10, 10), "devices, thin ids and generations");
    wait_for_devices(&names)?;
    vms.iter().try_for_each(|vm| release(vm))
}

fn another_platform_is_a_conflict() -> Outcome {
    let held = acquire("held-platform", &image("tiny:1"))?;
    let ran = cowshed(&["acquire", "held-platform", &image("tiny:1"), "--platform", "linux/arm64"])?;
    ran.fails(4, &["[SPEC_CONFLICT]", "platform", "linux/arm64", "linux/amd64"])?;
    let full =
        cowshed(&["acquire", "held-platform", &image("tiny:1"), "--platform", "linux/amd64", "-o", "json"])?;
    same!(Disk::of(&full.json()?["lease"])?, held, "the disk, asked for by the host's own platform");
    release("held-platform")
}

fn get(by: By) -> Outcome<Result<v1::Lease, tonic::Status>> {
    block_on(async move {
        let reply = client().await?.get_lease(v1::GetLeaseRequest { by: Some(by) }).await;
        Ok(reply.map(|reply| reply.into_inner().lease.unwrap_or_default()))
    })
}

fn list(request: v1::ListLeasesRequest) -> Outcome<Result<v1::ListLeasesResponse, tonic::Status>> {
    block_on(async move { Ok(client().await?.list_leases(request).await.map(tonic::Response::into_inner)) })
}

fn lists_by_state() -> Outcome {
    let vms: Vec<String> = (0..3).map(|n| format!("held-state-{n}")).collect();
    let disks = vms.iter().map(|vm| acquire(vm, &image("tiny:1"))).collect::<Result<Vec<_>, _>>()?;
    // What is being released stays as long as it is open.
    let open = File::open(&disks[2].path)?;
    release(&vms[2])?;
    for (state, count) in
        [(v1::LeaseState::Granted, 2), (v1::LeaseState::Releasing, 1), (v1::LeaseState::Preparing, 0)]
    {
        let some = list(v1::ListLeasesRequest { states: vec![state.into()], ..Default::default() })??.leases;
        same!(some.len(), count, "leases that are {state:?}");
        check!(some.iter().all(|lease| lease.state() == state), "another state among {some:?}");
    }
    let all = list(v1::ListLeasesRequest::default())??;
    let ids: Vec<String> = all.leases.into_iter().map(|lease| lease.lease_id).collect();
    check!(ids.len() == 3 && ids.is_sorted() && all.next_page_token.is_empty(), "all leases: {ids:?}");
    let error =
        refusal(list(v1::ListLeasesRequest { page_token: "bogus".to_owned(), ..Default::default() })?)?;
    same!((error.code, error.reason.as_str()), (Code::InvalidArgument, "PAGE_TOKEN_INVALID"), "{error:?}");
    check!(error.message.contains("bogus"), "{error:?}");
    drop(open);
    vms[..2].iter().try_for_each(|vm| release(vm))?;
    vms.iter().try_for_each(|vm| wait_gone(vm))
}

fn found_until_they_are_gone() -> Outcome {
    let disk = acquire("held-found", &image("tiny:1"))?;
    let by_vm = get(By::VmId("held-found".to_owned()))??;
    same!(by_vm, get(By::LeaseId(disk.lease.clone()))??, "the lease by its VM and by its id");
    same!(by_vm.lease_id, disk.lease, "the lease id");
    check!(by_vm.granted_at.is_some() && by_vm.released_at.is_none(), "the times of {by_vm:?}");
    release_fully("held-found")?;
    for by in [By::VmId("held-found".to_owned()), By::LeaseId(disk.lease)] {
        let error = refusal(get(by)?)?;
        same!((error.code, error.reason.as_str()), (Code::NotFound, "LEASE_NOT_FOUND"), "{error:?}");
    }
    let error = refusal(get(By::LeaseId("no-id".to_owned()))?)?;
    same!((error.code, error.reason.as_str()), (Code::InvalidArgument, "LEASE_ID_INVALID"), "{error:?}");
    check!(error.message.contains("no-id"), "{error:?}");
    Ok(())
}

fn released_ones_still_wait_after_a_restart() -> Outcome {
    let tiny = image("tiny:1");
    let (kept, given) = (acquire("held-kept", &tiny)?, acquire("held-given", &tiny)?);
    let open = File::open(&given.path)?;
    release("held-given")?;
    host("restart", "cowshed")?;
    wait_serving()?;
    let again = acquire_reply("held-kept", &tiny)?;
    same!(again["existing"], Value::Bool(true), "existing in {again}");
    same!(Disk::of(&again["lease"])?, kept, "the disk");
    wait_for("the reason of the wait", || {
        let lease = lease("held-given")?;
        same!(text(&lease, "/state")?, "releasing", "the state");
        check!(text(&lease, "/waiting_for")?.contains("open"), "{lease}");
        Ok(())
    })?;
    check!(thin_devices()?.contains(&given.dm_name), "the open device is gone");
    drop(open);
    wait_gone("held-given")?;
    let later = acquire("held-later", &tiny)?;
    check!(later.generation > given.generation, "generations went back: {later:?} after {given:?}");
    release("held-kept")?;
    release("held-later")
}
