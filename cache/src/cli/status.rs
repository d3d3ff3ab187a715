//! The status: for people as bars on a terminal and as lines elsewhere, for programs as JSON with the API's field names.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, stdout},
    time::Duration,
};

use cowshed_proto::v1;
use serde_json::{Value, json};

use super::{
    Output,
    show::{bytes, count, line, share, state_name, table},
};

/// How it may look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Lines.
    Plain,
    /// Bars.
    Bars,
    /// Bars, coloured.
    Coloured,
}

impl Look {
    /// For what stdout is, and says to be able to.
    pub(super) fn of_stdout() -> Self {
        let says = |name: &str| std::env::var_os(name).unwrap_or_default();
        match (stdout().is_terminal(), says("NO_COLOR").is_empty() && says("TERM") != "dumb") {
            (false, _) => Self::Plain,
            (true, false) => Self::Bars,
            (true, true) => Self::Coloured,
        }
    }

    fn paint(self, colour: Colour, text: &str) -> String {
        let code = match (self, colour) {
            (Self::Plain | Self::Bars, _) => return text.to_owned(),
            (Self::Coloured, Colour::Good) => 32,
            (Self::Coloured, Colour::Warning) => 33,
            (Self::Coloured, Colour::Bad) => 31,
            (Self::Coloured, Colour::Heading) => 1,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colour {
    Good,
    Warning,
    Bad,
    Heading,
}

/// Cells of a bar.
const BAR: usize = 30;
/// A pool that is full sooner than this is told as one that fills, in seconds (a month).
const FAR: i64 = 30 * 86_400;

pub(super) fn status(
    status: &v1::GetStatusResponse,
    usage: Option<&v1::GetUsageResponse>,
    look: Look,
    output: Output,
) -> String {
    if output == Output::Json {
        return line(&status_json(status, usage));
    }
    let mut text = head(status, look);
    if let Some(c) = &status.containerd {
        let _ = writeln!(
            text,
            "containerd  {} at {}, namespace {}, snapshotter {}",
            c.version, c.address, c.namespace, c.snapshotter
        );
    }
    text.push_str(&pool(status, look));
    let _ = match status.leases {
        None => writeln!(text, "leases      unknown, without the ledger"),
        Some(leases) => writeln!(
            text,
            "leases      {} granted, {} preparing, {} suspect, {} releasing, {} failed",
            leases.granted, leases.preparing, leases.suspect, leases.releasing, leases.failed
        ),
    };
    let _ = match (status.spares_off, status.spares, status.spares_in_the_making) {
        (true, 0, _) => writeln!(text, "spares      off ([spares] enabled = false)"),
        (true, ready, _) => writeln!(text, "spares      off ([spares] enabled = false), {ready} are to go"),
        (false, ready, 0) => writeln!(text, "spares      {ready} ready"),
        (false, ready, making) => writeln!(text, "spares      {ready} ready, {making} being made"),
    };
    if let Some(total) = usage.and_then(|usage| usage.images_total) {
        let v1::ImageUsageTotal { images, layers, layer_bytes, disks } = total;
        let _ = writeln!(
            text,
            "snapshots   {}, {} of {} with {}",
            count(disks.into(), "disk", "disks"),
            count(layers.into(), "layer", "layers"),
            count(images.into(), "image", "images"),
            bytes(layer_bytes)
        );
    }
    let _ = writeln!(text, "pulls       {} in flight", status.pulls_in_flight);
    let _ = writeln!(text, "prefetch    {}", count(status.prefetch_jobs.into(), "job runs", "jobs run"));
    for problem in &status.warm_set_problems {
        let _ = writeln!(text, "warm set    {}", look.paint(Colour::Warning, problem));
    }
    if let Some(usage) = usage {
        text.push_str(&of_vms(usage, look));
        text.push_str(&of_images(usage, look));
    }
    text
}

/// The version, whether it serves, and why not.
pub(super) fn head(status: &v1::GetStatusResponse, look: Look) -> String {
    let serving = if status.serving {
        look.paint(Colour::Good, "serving")
    } else {
        look.paint(Colour::Bad, "NOT SERVING")
    };
    let mut text = format!("cowshed     {}, {serving}\n", status.version);
    if !status.rescue.is_empty() {
        let causes = look.paint(Colour::Bad, &status.rescue.join(", "));
        let _ = writeln!(text, "rescue      {causes}: not all of the work can be done");
    }
    for problem in &status.problems {
        let _ = writeln!(text, "problem     {}", look.paint(Colour::Bad, problem));
    }
    text
}

/// The pool: how full, and how soon.
pub(super) fn pool(status: &v1::GetStatusResponse, look: Look) -> String {
    let Some(pool) = &status.pool else { return String::new() };
    let mode = if pool.mode == "rw" { pool.mode.clone() } else { look.paint(Colour::Bad, &pool.mode) };
    let mut text = format!("pool        {} ({mode})\n", pool.name);
    let parts = [
        ("data", pool.data_used_bytes, pool.data_total_bytes, pool.data_bytes_per_second, pool.data_full_in),
        (
            "metadata",
            pool.metadata_used_bytes,
            pool.metadata_total_bytes,
            pool.metadata_bytes_per_second,
            pool.metadata_full_in,
        ),
    ];
    for (name, used, total, rate, full_in) in parts {
        let mut line = format!("  {name:<8}  ");
        if look != Look::Plain {
            let _ = write!(line, "{} ", bar(used, total, look));
        }
        let _ = writeln!(text, "{line}{}{}", share(used, total), trend(rate, full_in));
    }
    if let Some(free) = pool.group_free_bytes {
        let _ = writeln!(text, "  group     {} free", bytes(free));
    }
    text
}

/// Said only if it fills or empties by a kilobyte a second.
fn trend(rate: Option<f64>, full_in: Option<prost_types::Duration>) -> String {
    let Some(rate) = rate.filter(|rate| rate.abs() >= 1024.0) else { return String::new() };
    let per_second = format!("{}/s", bytes(rate.abs() as u64));
    match full_in.filter(|time| rate > 0.0 && time.seconds < FAR) {
        Some(time) => format!(", + {per_second}: full in {}", span(time.seconds)),
        None if rate > 0.0 => format!(", + {per_second}"),
        None => format!(", - {per_second}"),
    }
}

/// The two largest units of a time.
fn span(seconds: i64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

fn bar(used: u64, total: u64, look: Look) -> String {
    let share = if total == 0 { 0.0 } else { (used as f64 / total as f64).min(1.0) };
    // What is in use is to be seen.
    let full = ((share * BAR as f64).round() as usize).max(usize::from(used > 0));
    let colour = match share {
        share if share < 0.75 => Colour::Good,
        share if share < 0.9 => Colour::Warning,
        _ => Colour::Bad,
    };
    format!("[{}{}]", look.paint(colour, &"█".repeat(full)), "░".repeat(BAR - full))
}

/// VMs, in their order; with what they write where that is known.
pub(super) fn of_vms(usage: &v1::GetUsageResponse, look: Look) -> String {
    let Some(total) = usage.vms_total else { return String::new() };
    let mut text = format!(
        "\n{}\n",
        look.paint(
            Colour::Heading,
            &match total.vms {
                1 => format!("1 VM's disk has at least {} of its own", bytes(total.own_bytes)),
                vms => format!("{vms} VMs' disks have at least {} of their own", bytes(total.own_bytes)),
            }
        )
    );
    if usage.vms.is_empty() {
        return text;
    }
    let mut rows = vec![["VM", "STATE", "OWN", "WRITTEN", "WRITES/s", "GROWS/s", "IMAGE"].map(str::to_owned)];
    rows.extend(usage.vms.iter().map(|vm| {
        [
            vm.vm_id.clone(),
            state_name(vm.state()).to_owned(),
            vm.own_bytes.map_or_else(unknown, bytes),
            bytes(vm.written_bytes),
            vm.written_bytes_per_second.map_or_else(unknown, |rate| bytes(rate as u64)),
            vm.grown_bytes_per_second.map_or_else(unknown, signed),
            vm.image.clone(),
        ]
    }));
    text.push_str(&table(&rows));
    text
}

pub(super) fn of_images(usage: &v1::GetUsageResponse, look: Look) -> String {
    if !usage.images_problem.is_empty() {
        return format!("\nimages      unknown: {}\n", look.paint(Colour::Warning, &usage.images_problem));
    }
    let Some(total) = usage.images_total else { return String::new() };
    let images = count(total.images.into(), "image's", "images'");
    let heading = format!("{images} layers have at least {}", bytes(total.layer_bytes));
    let mut text = format!("\n{}\n", look.paint(Colour::Heading, &heading));
    if usage.images.is_empty() {
        return text;
    }
    let mut rows = vec![["IMAGE", "OWN", "ALL", "DISKS", "NOTE"].map(str::to_owned)];
    rows.extend(usage.images.iter().map(|image| {
        [
            image.names.join(" "),
            bytes(image.own_bytes),
            bytes(image.bytes),
            image.disks.to_string(),
            if image.pinned { "pinned".to_owned() } else { String::new() },
        ]
    }));
    text.push_str(&table(&rows));
    text
}

fn unknown() -> String {
    "-".to_owned()
}

fn signed(rate: f64) -> String {
    let sign = if rate < 0.0 { "-" } else { "" };
    format!("{sign}{}", bytes(rate.abs() as u64))
}

fn seconds(time: prost_types::Duration) -> f64 {
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

pub(super) fn status_json(status: &v1::GetStatusResponse, usage: Option<&v1::GetUsageResponse>) -> Value {
    json!({
        "version": status.version,
        "serving": status.serving,
        "problems": status.problems,
        "rescue": status.rescue,
        "containerd": status.containerd.as_ref().map(|c| json!({
            "address": c.address,
            "version": c.version,
            "namespace": c.namespace,
            "snapshotter": c.snapshotter,
        })),
        "pool": status.pool.as_ref().map(|pool| json!({
            "name": pool.name,
            "data_used_bytes": pool.data_used_bytes,
            "data_total_bytes": pool.data_total_bytes,
            "data_bytes_per_second": pool.data_bytes_per_second,
            "data_full_in_seconds": pool.data_full_in.map(seconds),
            "metadata_used_bytes": pool.metadata_used_bytes,
            "metadata_total_bytes": pool.metadata_total_bytes,
            "metadata_bytes_per_second": pool.metadata_bytes_per_second,
            "metadata_full_in_seconds": pool.metadata_full_in.map(seconds),
            "group_free_bytes": pool.group_free_bytes,
            "mode": pool.mode,
        })),
        "leases": status.leases.map(|leases| json!({
            "granted": leases.granted,
            "preparing": leases.preparing,
            "suspect": leases.suspect,
            "releasing": leases.releasing,
            "failed": leases.failed,
        })),
        "spares": status.spares,
        "spares_in_the_making": status.spares_in_the_making,
        "spares_off": status.spares_off,
        "pulls_in_flight": status.pulls_in_flight,
        "prefetch_jobs": status.prefetch_jobs,
        "warm_set_problems": status.warm_set_problems,
        "started_at": status.started_at.map(|at| at.to_string()),
        "usage": usage.map(usage_json),
    })
}

fn usage_json(usage: &v1::GetUsageResponse) -> Value {
    let vm = |vm: &v1::VmUsage| {
        json!({
            "vm_id": vm.vm_id,
            "lease_id": vm.lease_id,
            "tenant": vm.tenant,
            "image": vm.image,
            "state": state_name(vm.state()),
            "path": vm.path,
            "own_bytes": vm.own_bytes,
            "mapped_bytes": vm.mapped_bytes,
            "written_bytes": vm.written_bytes,
            "read_bytes": vm.read_bytes,
            "written_bytes_per_second": vm.written_bytes_per_second,
            "grown_bytes_per_second": vm.grown_bytes_per_second,
        })
    };
    let image = |image: &v1::ImageUsage| {
        json!({
            "names": image.names,
            "target_digest": image.target_digest,
            "own_bytes": image.own_bytes,
            "bytes": image.bytes,
            "disks": image.disks,
            "pinned": image.pinned,
        })
    };
    json!({
        "vms": usage.vms.iter().map(vm).collect::<Vec<_>>(),
        "vms_total": usage.vms_total.map(|total| json!({
            "vms": total.vms,
            "own_bytes": total.own_bytes,
            "written_bytes": total.written_bytes,
            "written_bytes_per_second": total.written_bytes_per_second,
        })),
        "rates_over_seconds": usage.rates_over.map(seconds),
        "images": usage.images.iter().map(image).collect::<Vec<_>>(),
        "images_total": usage.images_total.map(|total| json!({
            "images": total.images,
            "layers": total.layers,
            "layer_bytes": total.layer_bytes,
            "disks": total.disks,
        })),
        "images_problem": usage.images_problem,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn full() -> v1::GetStatusResponse {
        v1::GetStatusResponse {
            version: "1.2.3".to_owned(),
            serving: true,
            pool: Some(v1::PoolStatus {
                name: "vg-pool".to_owned(),
                data_used_bytes: 8 * GIB,
                data_total_bytes: 10 * GIB,
                metadata_used_bytes: 1 << 20,
                metadata_total_bytes: 128 << 20,
                mode: "rw".to_owned(),
                data_bytes_per_second: Some(1048576.0),
                metadata_bytes_per_second: Some(-2048.0),
                data_full_in: Some(prost_types::Duration { seconds: 2048, nanos: 0 }),
                metadata_full_in: None,
                group_free_bytes: Some(3 * GIB),
            }),
            leases: Some(v1::LeaseCounts { granted: 2, ..v1::LeaseCounts::default() }),
            ..v1::GetStatusResponse::default()
        }
    }

    fn usage() -> v1::GetUsageResponse {
        let vm = v1::VmUsage {
            vm_id: "vm-1".to_owned(),
            image: "r.example/app:1".to_owned(),
            state: v1::LeaseState::Granted.into(),
            own_bytes: Some(50 << 20),
            written_bytes: 60 << 20,
            written_bytes_per_second: Some(1024.0),
            grown_bytes_per_second: Some(-512.0),
            ..v1::VmUsage::default()
        };
        let unseen = v1::VmUsage { vm_id: "vm-2".to_owned(), own_bytes: None, ..v1::VmUsage::default() };
        v1::GetUsageResponse {
            vms: vec![vm, unseen],
            vms_total: Some(v1::VmUsageTotal { vms: 2, own_bytes: 50 << 20, ..v1::VmUsageTotal::default() }),
            images: vec![v1::ImageUsage {
                names: vec!["r.example/app:1".to_owned()],
                own_bytes: 7 << 20,
                bytes: 9 << 20,
                disks: 2,
                pinned: true,
                ..v1::ImageUsage::default()
            }],
            images_total: Some(v1::ImageUsageTotal { images: 1, layers: 3, layer_bytes: 9 << 20, disks: 2 }),
            ..v1::GetUsageResponse::default()
        }
    }

    #[test]
    fn elsewhere_than_on_a_terminal_it_is_plain_lines() {
        let text = status(&full(), Some(&usage()), Look::Plain, Output::Text);
        assert!(!text.contains('\x1b') && !text.contains('█'), "{text}");
        for expected in [
            "cowshed     1.2.3, serving\n",
            "  data      8.00 GiB of 10.00 GiB (80.0 %), + 1.00 MiB/s: full in 34 min 8 s\n",
            "  metadata  1.00 MiB of 128.00 MiB (0.8 %), - 2.00 KiB/s\n",
            "  group     3.00 GiB free\n",
            "snapshots   2 disks, 3 layers of 1 image with 9.00 MiB\n",
            "\n2 VMs' disks have at least 50.00 MiB of their own\n",
            "vm-1  granted  50.00 MiB  60.00 MiB  1.00 KiB  -512 B   r.example/app:1\n",
            "r.example/app:1  7.00 MiB  9.00 MiB  2      pinned\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
        let without = status(&full(), None, Look::Plain, Output::Text);
        assert!(!without.contains("VMs'") && !without.contains("snapshots"), "{without}");
    }

    #[test]
    fn on_a_terminal_it_has_bars_and_colours_if_they_are_wanted() {
        let bars = status(&full(), None, Look::Bars, Output::Text);
        let bar = format!("[{}{}] 8.00 GiB", "█".repeat(24), "░".repeat(6));
        assert!(bars.contains(&bar) && !bars.contains('\x1b'), "{bars}");
        assert!(bars.contains(&format!("[█{}] 1.00 MiB", "░".repeat(29))), "a little is to be seen: {bars}");
        let coloured = status(&full(), None, Look::Coloured, Output::Text);
        assert!(coloured.contains(&format!("[\x1b[33m{}\x1b[0m", "█".repeat(24))), "{coloured}");
        assert_eq!(bar_of(0, 0), "░".repeat(30));
        assert_eq!(bar_of(7, 5), "█".repeat(30));
    }

    fn bar_of(used: u64, total: u64) -> String {
        bar(used, total, Look::Bars).trim_matches(['[', ']']).to_owned()
    }

    #[test]
    fn what_does_not_serve_says_why() {
        let rescue = v1::GetStatusResponse {
            problems: vec!["there is no thin pool vg-pool".to_owned()],
            rescue: vec!["pool".to_owned()],
            ..v1::GetStatusResponse::default()
        };
        let text = status(&rescue, None, Look::Plain, Output::Text);
        for expected in
            ["NOT SERVING", "rescue      pool: not all", "problem     there is no", "leases      unknown"]
        {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }

    #[test]
    fn times_are_told_in_two_units() {
        let table = [(0, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")];
        for (seconds, told) in table {
            assert_eq!(span(seconds), told);
        }
    }

    #[test]
    fn json_has_all_that_the_api_says() {
        let value = status_json(&full(), Some(&usage()));
        assert_eq!(value["pool"]["data_full_in_seconds"], 2048.0);
        assert_eq!(value["pool"]["metadata_full_in_seconds"], Value::Null);
        assert_eq!(value["usage"]["vms"][0]["own_bytes"], 50 << 20);
        assert_eq!(value["usage"]["vms"][1]["own_bytes"], Value::Null);
        assert_eq!(value["usage"]["images"][0]["names"][0], "r.example/app:1");
        assert_eq!(status_json(&full(), None)["usage"], Value::Null);
    }
}
