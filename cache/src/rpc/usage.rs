//! `GetUsage`: who takes how much of the pool, as messages.

use cowshed_proto::v1;

use super::convert;
use crate::{
    error::Result,
    evict::{AllTaken, Taken},
    usage::{Disk, Disks, Order, Usage},
};

/// Of each kind, so many are told of at the most.
const MAX_COUNT: u32 = 1000;

/// Answers it.
///
/// # Errors
/// If the kernel does not answer. What is wrong with images is in the answer.
pub(super) async fn usage(usage: &Usage, request: &v1::GetUsageRequest) -> Result<v1::GetUsageResponse> {
    let mut reply = v1::GetUsageResponse::default();
    if request.vms > 0 {
        let disks = usage.disks().await?;
        let first = disks.first(order(request.order()), count(request.vms));
        reply.vms = first.into_iter().map(vm).collect();
        reply.vms_total = Some(vms_total(&disks));
        reply.rates_over = disks.over.map(|over| convert::duration(convert::micros(over)));
    }
    if request.images > 0 {
        match usage.images().await {
            Ok(taken) => {
                reply.images = taken.images.iter().take(count(request.images)).map(image).collect();
                reply.images_total = Some(images_total(&taken));
            }
            Err(error) => reply.images_problem = error.to_string(),
        }
    }
    Ok(reply)
}

fn order(order: v1::UsageOrder) -> Order {
    match order {
        v1::UsageOrder::Unspecified | v1::UsageOrder::Own => Order::Own,
        v1::UsageOrder::Rate => Order::Rate,
        v1::UsageOrder::Written => Order::Written,
    }
}

fn count(asked: u32) -> usize {
    asked.min(MAX_COUNT) as usize
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn vm(disk: &Disk) -> v1::VmUsage {
    let Disk { lease, load, own, rate } = disk;
    v1::VmUsage {
        vm_id: lease.vm.to_string(),
        lease_id: lease.id.to_string(),
        tenant: lease.spec.tenant.to_string(),
        image: lease.spec.image.clone(),
        state: convert::state(&lease.state).into(),
        path: lease.own_device().map(|device| device.path.clone()).unwrap_or_default(),
        own_bytes: *own,
        mapped_bytes: load.mapped,
        written_bytes: load.written,
        read_bytes: load.read,
        written_bytes_per_second: rate.map(|rate| rate.written),
        grown_bytes_per_second: rate.map(|rate| rate.grown),
    }
}

fn vms_total(disks: &Disks) -> v1::VmUsageTotal {
    let all = disks.all();
    v1::VmUsageTotal {
        vms: number(all.len()),
        own_bytes: disks.own(),
        written_bytes: all.iter().map(|disk| disk.load.written).sum(),
        written_bytes_per_second: disks
            .over
            .map(|_| all.iter().filter_map(|disk| disk.rate).fold(0.0, |sum, rate| sum + rate.written)),
    }
}

fn image(taken: &Taken) -> v1::ImageUsage {
    v1::ImageUsage {
        names: taken.names.clone(),
        target_digest: taken.target.to_string(),
        own_bytes: taken.takes.alone.data.0,
        bytes: taken.takes.layers.data.0,
        disks: number(taken.takes.disks),
        pinned: taken.pinned,
    }
}

fn images_total(taken: &AllTaken) -> v1::ImageUsageTotal {
    v1::ImageUsageTotal {
        images: number(taken.images.len()),
        layers: number(taken.layers),
        layer_bytes: taken.layer_bytes,
        disks: number(taken.disks),
    }
}
