//! Replies as text and as JSON. JSON keys are the API's field names.

use std::fmt::Write as _;

use cowshed_proto::v1;
use serde_json::{Value, json};

use super::{Output, images::image_json};

/// "1 layer", "2 layers"
pub(super) fn count(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

pub(super) fn version(output: Output) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match output {
        Output::Text => format!("cowshed {version}\n"),
        Output::Json => line(&json!({ "version": version })),
    }
}

pub(super) fn acquired(reply: &v1::AcquireResponse, output: Output) -> String {
    let lease = reply.lease.clone().unwrap_or_default();
    let cache = cache_name(reply.cache());
    if output == Output::Json {
        let stages =
            reply.stages.iter().map(|s| json!({ "stage": s.stage, "micros": s.micros })).collect::<Vec<_>>();
        return line(&json!({
            "lease": lease_json(&lease),
            "cache": cache,
            "stages": stages,
            "total_micros": reply.total_micros,
            "existing": reply.existing,
            "spare": reply.spare,
        }));
    }
    let mut text = lease_text(&lease);
    let kind = match (reply.existing, reply.spare) {
        (true, _) => "held already",
        (false, true) => "spare",
        (false, false) => cache,
    };
    let stages = reply.stages.iter().map(|s| format!("{} {}", s.stage, millis(s.micros))).collect::<Vec<_>>();
    let _ = writeln!(text, "time      {} ({kind}: {})", millis(reply.total_micros), stages.join(", "));
    text
}

pub(super) fn released(vm: &str, only: Option<&str>, reply: &v1::ReleaseResponse, output: Output) -> String {
    match (output, &reply.lease) {
        (Output::Json, lease) => line(&json!({ "lease": lease.as_ref().map(lease_json) })),
        (Output::Text, Some(lease)) => {
            let note = note(lease);
            let there = if note.is_empty() { note } else { format!("; its disk is still there: {note}") };
            format!("released lease {} of VM {vm}{there}\n", lease.lease_id)
        }
        (Output::Text, None) => match only {
            Some(lease) => format!("VM {vm} does not hold lease {lease}: nothing to release\n"),
            None => format!("VM {vm} holds nothing to release\n"),
        },
    }
}

pub(super) fn lease(lease: &v1::Lease, output: Output) -> String {
    match output {
        Output::Text => lease_text(lease),
        Output::Json => line(&json!({ "lease": lease_json(lease) })),
    }
}

pub(super) fn leases(leases: &[v1::Lease], output: Output) -> String {
    if output == Output::Json {
        return line(&json!({ "leases": leases.iter().map(lease_json).collect::<Vec<_>>() }));
    }
    let mut rows = vec![["VM", "STATE", "GEN", "DEVICE", "IMAGE", "NOTE"].map(str::to_owned)];
    rows.extend(leases.iter().map(|lease| {
        [
            lease.vm_id.clone(),
            state_name(lease.state()).to_owned(),
            lease.generation.to_string(),
            lease.device.as_ref().map(|d| d.path.clone()).unwrap_or_else(|| "-".to_owned()),
            lease.spec.as_ref().map(|s| s.image.clone()).unwrap_or_default(),
            note(lease),
        ]
    }));
    table(&rows)
}

pub(super) fn offer(image: &str, offer: &v1::OfferResponse, output: Output) -> String {
    let warmth = match offer.warmth() {
        v1::Warmth::Spare => "spare",
        v1::Warmth::Base => "base",
        v1::Warmth::Partial => "partial",
        v1::Warmth::Cold | v1::Warmth::Unspecified => "cold",
    };
    let micros = |time: &Option<prost_types::Duration>| {
        time.as_ref().map(|time| time.seconds * 1_000_000 + i64::from(time.nanos) / 1_000)
    };
    let (p50, p99) = (micros(&offer.expected), micros(&offer.expected_p99));
    if output == Output::Json {
        return line(&json!({
            "accepted": offer.accepted,
            "refusal": offer.refusal.as_ref().map(|why| json!({ "reason": why.reason, "message": why.message })),
            "warmth": warmth,
            "missing_bytes": offer.missing_bytes,
            "expected_micros": p50,
            "expected_p99_micros": p99,
            "samples": offer.samples,
            "data_free_bytes": offer.data_free_bytes,
            "metadata_free_bytes": offer.metadata_free_bytes,
            "spares": offer.spares,
            "data_reserved_bytes": offer.data_reserved_bytes,
        }));
    }
    let mut text = match &offer.refusal {
        Some(why) => format!("{image}: not now: [{}] {}\n", why.reason, why.message),
        None => format!("{image}: {warmth}\n"),
    };
    if warmth == "cold" {
        text.push_str(
            "  image     not known to be here for this platform and tenant; its registry was not asked\n",
        );
    }
    if offer.spares > 0 {
        let _ = writeln!(text, "  spares    {}", offer.spares);
    }
    if let Some(missing) = offer.missing_bytes.filter(|missing| *missing > 0) {
        let _ = writeln!(text, "  missing   {}", bytes(missing));
    }
    let _ = match (p50, p99) {
        (Some(p50), Some(p99)) => writeln!(
            text,
            "  expected  {:.1} ms, rarely more than {:.1} ms (of {})",
            p50 as f64 / 1e3,
            p99 as f64 / 1e3,
            count(offer.samples.into(), "acquire", "acquires")
        ),
        _ => writeln!(text, "  expected  unknown: none like it was acquired yet"),
    };
    let (free, reserved) = (bytes(offer.data_free_bytes), bytes(offer.data_reserved_bytes));
    let _ =
        writeln!(text, "  pool      {free} of data are free, and {reserved} are expected to be written yet");
    text
}

fn lease_json(lease: &v1::Lease) -> Value {
    json!({
        "lease_id": lease.lease_id,
        "vm_id": lease.vm_id,
        "tenant": lease.tenant,
        "generation": lease.generation,
        "state": state_name(lease.state()),
        "image": lease.spec.as_ref().map(|s| s.image.clone()),
        "platform": lease.spec.as_ref().and_then(|s| s.platform.clone()),
        "image_digest": lease.image_digest,
        "mode": lease.spec.as_ref().map(|s| mode_name(s.mode())),
        "device": lease.device.as_ref().map(device_json),
        "scratch": lease.scratch.as_ref().map(device_json),
        "shares": lease.shares,
        "process": lease.process.as_ref().map(|p| json!({
            "entrypoint": p.entrypoint,
            "cmd": p.cmd,
            "env": p.env,
            "user": p.user,
            "working_dir": p.working_dir,
        })),
        "created_at": lease.created_at.map(|at| at.to_string()),
        "granted_at": lease.granted_at.map(|at| at.to_string()),
        "released_at": lease.released_at.map(|at| at.to_string()),
        "abandoned": lease.abandoned,
        "waiting_for": lease.waiting_for,
        "ttl": lease.ttl.map(|time| time.to_string()),
        "expires_in": lease.expires_in.map(|time| time.to_string()),
        "suspicion": lease.suspicion.as_ref().map(|s| json!({
            "reason": suspicion_name(s.reason()),
            "since": s.since.map(|at| at.to_string()),
            "reclaimed_in": s.reclaimed_in.map(|time| time.to_string()),
        })),
        "failure": lease.failure.as_ref().map(failure_json),
        "revision": lease.revision,
        "holders": lease.holders.iter().map(|h| json!({ "pid": h.pid, "what": h.what })).collect::<Vec<_>>(),
    })
}

fn device_json(device: &v1::Device) -> Value {
    json!({
        "path": device.path,
        "major": device.major,
        "minor": device.minor,
        "dm_name": device.dm_name,
        "dm_uuid": device.dm_uuid,
        "thin_id": device.thin_id,
        "pool_device": device.pool_device,
        "size_bytes": device.size_bytes,
        "filesystem": device.filesystem,
        "read_only": device.read_only,
    })
}

fn mode_name(mode: v1::DiskMode) -> &'static str {
    match mode {
        v1::DiskMode::Unspecified | v1::DiskMode::CopyOnWrite => "copy-on-write",
        v1::DiskMode::SharedReadOnly => "shared-read-only",
    }
}

pub(super) fn failure_json(failure: &v1::Failure) -> Value {
    json!({
        "reason": failure.reason,
        "message": failure.message,
        "at": failure.at.map(|at| at.to_string()),
    })
}

fn suspicion_name(reason: v1::SuspicionReason) -> &'static str {
    match reason {
        v1::SuspicionReason::Unspecified => "unknown",
        v1::SuspicionReason::Expired => "expired",
        v1::SuspicionReason::EarlierBoot => "earlier_boot",
    }
}

/// What there is to say of a lease besides its state.
fn note(lease: &v1::Lease) -> String {
    let mut notes = Vec::new();
    if let Some(time) = &lease.expires_in {
        notes.push(format!("expires in {} s", time.seconds));
    }
    if let Some(suspicion) = &lease.suspicion {
        let why = match suspicion.reason() {
            v1::SuspicionReason::EarlierBoot => "of an earlier boot",
            _ => "expired",
        };
        let left = suspicion.reclaimed_in.map(|time| format!(", kept for {} s", time.seconds));
        notes.push(format!("{why}{}", left.unwrap_or_default()));
    }
    notes.extend(lease.failure.as_ref().map(|failure| format!("[{}] {}", failure.reason, failure.message)));
    notes.extend(lease.abandoned.then(|| "given up by an operator".to_owned()));
    notes.extend(lease.waiting_for.clone());
    notes.extend(lease.holders.iter().map(|holder| match holder.pid {
        Some(pid) => format!("held by {} (pid {pid})", holder.what),
        None => format!("held: {}", holder.what),
    }));
    notes.join("; ")
}

fn lease_text(lease: &v1::Lease) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "vm        {} ({})", lease.vm_id, state_name(lease.state()));
    let _ = writeln!(text, "lease     {}, generation {}", lease.lease_id, lease.generation);
    for (what, device) in [("device ", &lease.device), ("scratch", &lease.scratch)] {
        if let Some(device) = device {
            let _ = writeln!(text, "{what}   {}", device.path);
            let _ = writeln!(text, "          {}", device_text(device));
        }
    }
    if let Some(shared) = &lease.shares {
        let _ = writeln!(text, "          shared with other VMs, under lease {shared}");
    }
    if let Some(spec) = &lease.spec {
        let _ = writeln!(text, "image     {} ({})", spec.image, spec.platform.clone().unwrap_or_default());
    }
    if let Some(digest) = &lease.image_digest {
        let _ = writeln!(text, "          {digest}");
    }
    if let Some(p) = &lease.process {
        let command: Vec<&String> = p.entrypoint.iter().chain(&p.cmd).collect();
        let user = if p.user.is_empty() { "root" } else { &p.user };
        let directory = if p.working_dir.is_empty() { "/" } else { &p.working_dir };
        let variables = count(p.env.len() as u64, "variable", "variables");
        let _ = writeln!(text, "process   {command:?} as {user} in {directory}, {variables}");
    }
    let note = note(lease);
    if !note.is_empty() {
        let _ = writeln!(text, "note      {note}");
    }
    text
}

fn device_text(device: &v1::Device) -> String {
    let uuid = device.dm_uuid.as_ref().map(|uuid| format!(", uuid {uuid}")).unwrap_or_default();
    let filesystem = if device.filesystem.is_empty() { "raw" } else { &device.filesystem };
    let v1::Device { major, minor, thin_id, pool_device, .. } = device;
    let read_only = if device.read_only { ", read-only" } else { "" };
    format!(
        "{major}:{minor}, thin id {thin_id} in pool {pool_device}{uuid}, {}, {filesystem}{read_only}",
        bytes(device.size_bytes)
    )
}

pub(super) fn verified(reply: &v1::VerifyDeviceResponse, output: Output) -> String {
    if output == Output::Json {
        let differences = reply.differences.iter();
        let differences = differences
            .map(|d| json!({ "field": d.field, "expected": d.expected, "found": d.found }))
            .collect::<Vec<_>>();
        return line(&json!({
            "verified": reply.verified,
            "differences": differences,
            "lease": reply.lease.as_ref().map(lease_json),
        }));
    }
    let lease = reply.lease.clone().unwrap_or_default();
    let device = lease.device.map(|device| device.path).unwrap_or_default();
    if reply.verified {
        format!("{device} is the disk of VM {}, lease {}\n", lease.vm_id, lease.lease_id)
    } else {
        String::new()
    }
}

/// All that differs, in words.
pub(super) fn differences(reply: &v1::VerifyDeviceResponse) -> String {
    let differ = reply.differences.iter();
    let words: Vec<String> =
        differ.map(|d| format!("{} should be {:?} and is {:?}", d.field, d.expected, d.found)).collect();
    words.join(", ")
}

/// What does not agree, and what is done about it.
pub(super) fn findings(findings: &[v1::Finding], output: Output) -> String {
    if output == Output::Json {
        let findings = findings.iter().map(|f| {
            json!({
                "subject": f.subject,
                "problem": f.problem,
                "remedy": f.remedy,
                "mended": f.mended,
                "error": f.error,
            })
        });
        return line(&json!({ "findings": findings.collect::<Vec<_>>() }));
    }
    if findings.is_empty() {
        return "ledger, containerd and kernel agree\n".to_owned();
    }
    let mut text = String::new();
    for finding in findings {
        let mark = if finding.mended { "done: " } else { "to do: " };
        let _ = writeln!(text, "{}: {}", finding.subject, finding.problem);
        let _ = writeln!(text, "    {mark}{}", finding.remedy);
        if !finding.error.is_empty() {
            let _ = writeln!(text, "    failed: {}", finding.error);
        }
    }
    text
}

/// What a drain still waits for, or has left.
pub(super) fn rest(rest: &v1::DrainResponse, output: Output) -> String {
    let v1::DrainResponse { acquires, pulls, leases, done } = rest;
    if output == Output::Json {
        return line(&json!({ "acquires": acquires, "pulls": pulls, "leases": leases, "done": done }));
    }
    let done = if *done { ": done" } else { "" };
    format!("acquires under way: {acquires}, pulls under way: {pulls}, leases held: {leases}{done}\n")
}

/// An event as a line.
pub(super) fn event(response: &v1::WatchResponse, output: Output) -> String {
    use v1::watch_response::Event;
    let revision = response.revision;
    if output == Output::Json {
        let event = match &response.event {
            Some(Event::Lease(lease)) => json!({ "lease": lease_json(lease) }),
            Some(Event::LeaseGone(gone)) => json!({ "lease_gone": {
                "lease_id": gone.lease_id, "vm_id": gone.vm_id, "generation": gone.generation } }),
            Some(Event::Image(image)) => json!({ "image": image_json(image) }),
            Some(Event::ImageGone(name)) => json!({ "image_gone": name }),
            Some(Event::Synced(synced)) => {
                json!({ "synced": { "leases": synced.leases, "images": synced.images } })
            }
            None => json!({}),
        };
        return line(&json!({ "event": event, "revision": revision }));
    }
    let what = match &response.event {
        Some(Event::Lease(lease)) => {
            let note = note(lease);
            let note = if note.is_empty() { note } else { format!(" ({note})") };
            format!("VM {} lease {} {}{note}", lease.vm_id, lease.lease_id, state_name(lease.state()))
        }
        Some(Event::LeaseGone(gone)) => format!("VM {} lease {} gone", gone.vm_id, gone.lease_id),
        Some(Event::Image(image)) => {
            format!("image {} {}", image.name, if image.unpacked { "unpacked" } else { "not unpacked" })
        }
        Some(Event::ImageGone(name)) => format!("image {name} gone"),
        Some(Event::Synced(synced)) => {
            format!("that was all {}", if synced.leases { "leases" } else { "images" })
        }
        None => "an event of a later version".to_owned(),
    };
    format!("{revision:>8}  {what}\n")
}

pub(super) fn state_name(state: v1::LeaseState) -> &'static str {
    match state {
        v1::LeaseState::Unspecified => "unknown",
        v1::LeaseState::Preparing => "preparing",
        v1::LeaseState::Granted => "granted",
        v1::LeaseState::Suspect => "suspect",
        v1::LeaseState::Releasing => "releasing",
        v1::LeaseState::Failed => "failed",
    }
}

pub(super) fn cache_name(cache: v1::CacheResult) -> &'static str {
    match cache {
        v1::CacheResult::Unspecified => "unknown",
        v1::CacheResult::Hit => "hit",
        v1::CacheResult::Miss => "miss",
    }
}

pub(super) fn line(value: &Value) -> String {
    format!("{value}\n")
}

fn millis(micros: u64) -> String {
    format!("{:.1} ms", micros as f64 / 1e3)
}

pub(super) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

pub(super) fn share(used: u64, total: u64) -> String {
    let percent = if total == 0 { 0.0 } else { used as f64 * 100.0 / total as f64 };
    format!("{} of {} ({percent:.1} %)", bytes(used), bytes(total))
}

/// Columns as wide as their widest cell; the last is not padded.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = [["A", "B"], ["long", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }

    #[test]
    fn an_offer_of_what_is_not_known_says_so() {
        let of = |warmth: v1::Warmth| {
            let reply = v1::OfferResponse { accepted: true, warmth: warmth.into(), ..Default::default() };
            offer("a:1", &reply, Output::Text)
        };
        let cold = of(v1::Warmth::Cold);
        let says = "not known to be here for this platform and tenant; its registry was not asked\n";
        assert!(cold.starts_with("a:1: cold\n") && cold.contains(says), "{cold}");
        assert!(!of(v1::Warmth::Base).contains("not known"));
    }

    #[test]
    fn shares_of_nothing_are_nothing() {
        assert_eq!(share(0, 0), "0 B of 0 B (0.0 %)");
        assert_eq!(share(1 << 29, 1 << 30), "512.00 MiB of 1.00 GiB (50.0 %)");
    }
}
