//! Under which conditions was measured.

use std::{fs, path::Path, process::Command, thread};

use cowshed_proto::v1::GetStatusResponse;
use serde_json::{Value, json};

use crate::{
    Outcome,
    snapshots::{Effort, Sides},
};

const RCU: &str = "/sys/kernel/rcu_expedited";
const CONTAINERD: &str = "/etc/containerd/config.toml";

pub(crate) fn rcu_expedited() -> Outcome<u8> {
    Ok(text(RCU)?.parse()?)
}

/// Whether the kernel's grace periods are short, for everybody on this host.
pub(crate) fn set_rcu_expedited(value: u8) -> Outcome {
    fs::write(RCU, value.to_string()).map_err(|e| format!("{RCU}: {e}").into())
}

/// The machine's and the kernel's.
fn of_machine() -> Outcome<Value> {
    let cpu = text("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let memory = text("/proc/meminfo")?;
    Ok(json!({
        "kernel": text("/proc/sys/kernel/osrelease")?,
        "cores": thread::available_parallelism()?.get(),
        "cpu": model.trim_start_matches([' ', '\t', ':']),
        "emulated": model.contains("TCG") || model.contains("QEMU"),
        "memory": memory.lines().next().unwrap_or_default().trim_start_matches("MemTotal:").trim(),
        "rcu_expedited": rcu_expedited()?,
        "udev": if Path::new("/run/udev/control").exists() { "running" } else { "not running" },
    }))
}

pub(crate) fn of_images(effort: Effort) -> Outcome<Value> {
    let igzip = Command::new("igzip").arg("--version").output();
    let version = Command::new("containerd").arg("--version").output()?;
    merged(
        of_machine()?,
        json!({
            "sides": { "ours": "cowshed pull", "peer": "ctr images pull, devmapper" },
            "effort": format!("{effort:?}").to_lowercase(),
            "containerd": String::from_utf8_lossy(&version.stdout).split_whitespace().nth(2),
            "igzip": if igzip.is_ok() { "installed" } else { "not installed" },
            "peer_configuration": "async_remove, discard_blocks, ext4; the blobs' registry is the host's own",
        }),
    )
}

/// `status` is the service's.
pub(crate) fn of_acquire(effort: Effort, status: &GetStatusResponse, standing: usize) -> Outcome<Value> {
    let containerd = status.containerd.as_ref().ok_or("the service has no containerd")?;
    merged(
        of_machine()?,
        json!({
            "sides": { "ours": "Acquire on the cowshed snapshotter", "peer": "containerd alone, devmapper" },
            "effort": format!("{effort:?}").to_lowercase(),
            "containerd": containerd.version,
            "standing_disks_per_side": standing,
            "peer_configuration": "devmapper: async_remove, discard_blocks, base_image_size 1GB, ext4; lvcreate: a thin pool \
                of its own, LVM2's defaults, the origin not active; reflink: mkfs.xfs with reflink=1 on a logical volume, \
                loop devices with direct I/O",
        }),
    )
}

/// `status` is the service's.
pub(crate) fn of_gc(effort: Effort, status: &GetStatusResponse) -> Outcome<Value> {
    let containerd = status.containerd.as_ref().ok_or("the service has no containerd")?;
    let configuration = text(CONTAINERD)?;
    let settings = ["discard_blocks", "async_remove", "pause_threshold", "mutation_threshold"];
    let lines = configuration.lines().map(str::trim);
    let of_peer: Vec<&str> =
        lines.filter(|line| settings.iter().any(|name| line.starts_with(name))).collect();
    merged(
        of_machine()?,
        json!({
            "sides": { "ours": "cowshed serve on the cowshed snapshotter", "peer": "containerd alone, devmapper" },
            "effort": format!("{effort:?}").to_lowercase(),
            "containerd": containerd.version,
            "peer_configuration": of_peer.join(", "),
        }),
    )
}

fn merged(mut one: Value, other: Value) -> Outcome<Value> {
    let (Some(all), Value::Object(more)) = (one.as_object_mut(), other) else {
        return Err("no object".into());
    };
    all.extend(more);
    Ok(one)
}

pub(crate) async fn of_host(sides: &Sides, standing: usize) -> Outcome<Value> {
    let here = json!({
        "sides": { "ours": sides.ours.snapshotter, "peer": sides.peer.snapshotter },
        "pools": { "ours": sides.ours.pool()?.name, "peer": sides.peer.pool()?.name },
        "effort": format!("{:?}", sides.effort).to_lowercase(),
        "containerd": sides.ours.version().await?,
        "standing_devices_per_side": standing,
        "peer_configuration": "async_remove, discard_blocks, base_image_size 1GB, ext4",
    });
    merged(of_machine()?, here)
}

fn text(path: &str) -> Outcome<String> {
    Ok(fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?.trim().to_owned())
}
