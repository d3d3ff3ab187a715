//! Under which conditions was measured.

use std::{fs, path::Path, thread};

use serde_json::{Value, json};

use crate::{Outcome, snapshots::Sides};

const RCU: &str = "/sys/kernel/rcu_expedited";

pub(crate) fn rcu_expedited() -> Outcome<u8> {
    Ok(text(RCU)?.parse()?)
}

/// Whether the kernel's grace periods are short, for everybody on this host.
pub(crate) fn set_rcu_expedited(value: u8) -> Outcome {
    fs::write(RCU, value.to_string()).map_err(|e| format!("{RCU}: {e}").into())
}

pub(crate) async fn of_host(sides: &Sides, standing: usize) -> Outcome<Value> {
    let cpu = text("/proc/cpuinfo")?;
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let memory = text("/proc/meminfo")?;
    Ok(json!({
        "sides": { "ours": sides.ours.snapshotter, "peer": sides.peer.snapshotter },
        "pools": { "ours": sides.ours.pool()?.name, "peer": sides.peer.pool()?.name },
        "effort": format!("{:?}", sides.effort).to_lowercase(),
        "containerd": sides.ours.version().await?,
        "kernel": text("/proc/sys/kernel/osrelease")?,
        "cores": thread::available_parallelism()?.get(),
        "cpu": model.trim_start_matches([' ', '\t', ':']),
        "emulated": model.contains("TCG") || model.contains("QEMU"),
        "memory": memory.lines().next().unwrap_or_default().trim_start_matches("MemTotal:").trim(),
        "rcu_expedited": rcu_expedited()?,
        "udev": if Path::new("/run/udev/control").exists() { "running" } else { "not running" },
        "standing_devices_per_side": standing,
        "peer_configuration": "async_remove, discard_blocks, base_image_size 1GB, ext4",
    }))
}

fn text(path: &str) -> Outcome<String> {
    Ok(fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?.trim().to_owned())
}
