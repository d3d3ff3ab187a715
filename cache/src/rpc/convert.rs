//! Our values as messages of the API.

use std::time::Duration;

use cowshed_leases::{
    DeviceIdentity, Lease, Mode, Moment, Process, State, Suspicion, Ttl, UnixMicros, Uptime,
};
use cowshed_proto::v1;
use prost_types::Timestamp;

use crate::{
    clock::timestamp,
    image::{Cache, ImageInfo},
    keeping::Kept,
    kernel::Holder,
    stages::Stage,
};

/// Of the holders the caller knows more.
pub(super) fn lease(lease: &Lease, waiting: Option<String>, now: &Moment) -> v1::Lease {
    let grant = lease.grant();
    let released = match lease.state {
        State::Releasing { since, .. } => Some(since),
        _ => None,
    };
    v1::Lease {
        lease_id: lease.id.to_string(),
        vm_id: lease.vm.to_string(),
        generation: lease.generation.0,
        state: state(&lease.state).into(),
        spec: Some(v1::DiskSpec {
            image: lease.spec.image.clone(),
            platform: Some(lease.spec.platform.clone()),
            mode: mode(lease.spec.mode).into(),
            scratch: lease.spec.scratch.map(|s| v1::ScratchSpec { size_bytes: s.size_bytes, raw: s.raw }),
        }),
        image_digest: grant.map(|grant| grant.image_digest.clone()),
        device: grant.map(|grant| device(&grant.device, &grant.filesystem)),
        process: grant.map(|grant| process(&grant.process)),
        created_at: Some(timestamp(lease.created_at)),
        granted_at: grant.map(|grant| timestamp(grant.at)),
        released_at: released.map(timestamp),
        waiting_for: waiting,
        ttl: lease.term.ttl.map(|ttl| duration(Ttl::micros(ttl))),
        expires_in: expires_in(lease, now),
        suspicion: suspicion(lease, now),
        failure: match &lease.state {
            State::Failed { failure, since, .. } => {
                Some(self::failure(&failure.reason, &failure.message, Some(*since)))
            }
            _ => None,
        },
        revision: lease.revision.0,
        holders: Vec::new(),
        scratch: grant.and_then(|grant| grant.scratch.as_ref()).map(|s| device(&s.device, &s.filesystem)),
        shares: lease.shares.as_ref().map(ToString::to_string),
        abandoned: matches!(lease.state, State::Releasing { abandoned: true, .. }),
        tenant: lease.spec.tenant.to_string(),
    }
}

fn mode(mode: Mode) -> v1::DiskMode {
    match mode {
        Mode::CopyOnWrite => v1::DiskMode::CopyOnWrite,
        Mode::SharedReadOnly => v1::DiskMode::SharedReadOnly,
    }
}

/// How long it holds.
pub(super) fn expires_in(lease: &Lease, now: &Moment) -> Option<prost_types::Duration> {
    let until = lease
        .term
        .until
        .filter(|_| matches!(lease.state, State::Granted(_)) && lease.term.boot == now.boot)?;
    Some(remaining(until, now))
}

fn suspicion(lease: &Lease, now: &Moment) -> Option<v1::Suspicion> {
    let State::Suspect { why, since, boot, until, .. } = &lease.state else { return None };
    let reason = match why {
        Suspicion::Expired => v1::SuspicionReason::Expired,
        Suspicion::EarlierBoot => v1::SuspicionReason::EarlierBoot,
    };
    let reclaimed_in = Some(*until).filter(|_| *boot == now.boot).map(|until| remaining(until, now));
    Some(v1::Suspicion { reason: reason.into(), since: Some(timestamp(*since)), reclaimed_in })
}

pub(super) fn failure(reason: &str, message: &str, at: Option<UnixMicros>) -> v1::Failure {
    v1::Failure { reason: reason.to_owned(), message: message.to_owned(), at: at.map(timestamp) }
}

pub(super) fn holder(holder: Holder) -> v1::Holder {
    match holder {
        Holder::Process { pid, command } => v1::Holder { pid: Some(pid), what: command },
        Holder::Mount(_) | Holder::Device(_) => v1::Holder { pid: None, what: holder.to_string() },
    }
}

fn remaining(until: Uptime, now: &Moment) -> prost_types::Duration {
    duration(until.0.saturating_sub(now.up.0))
}

pub(super) fn duration(micros: u64) -> prost_types::Duration {
    let seconds = i64::try_from(micros / 1_000_000).unwrap_or(i64::MAX);
    let nanos = i32::try_from(micros % 1_000_000).unwrap_or_default() * 1000;
    prost_types::Duration { seconds, nanos }
}

fn device(device: &DeviceIdentity, filesystem: &str) -> v1::Device {
    v1::Device {
        path: device.path.clone(),
        major: device.number.major,
        minor: device.number.minor,
        dm_name: device.dm_name.clone(),
        dm_uuid: device.dm_uuid.clone(),
        thin_id: device.thin_id,
        pool_device: device.pool.to_string(),
        size_bytes: device.size_bytes,
        filesystem: filesystem.to_owned(),
        read_only: device.read_only,
    }
}

fn process(process: &Process) -> v1::ProcessConfig {
    v1::ProcessConfig {
        entrypoint: process.entrypoint.clone(),
        cmd: process.cmd.clone(),
        env: process.env.clone(),
        user: process.user.clone(),
        working_dir: process.working_dir.clone(),
    }
}

pub(super) fn state(state: &State) -> v1::LeaseState {
    match state {
        State::Preparing => v1::LeaseState::Preparing,
        State::Granted(_) => v1::LeaseState::Granted,
        State::Suspect { .. } => v1::LeaseState::Suspect,
        State::Releasing { .. } => v1::LeaseState::Releasing,
        State::Failed { .. } => v1::LeaseState::Failed,
    }
}

pub(super) fn cache(cache: Cache) -> v1::CacheResult {
    match cache {
        Cache::Hit => v1::CacheResult::Hit,
        Cache::Miss => v1::CacheResult::Miss,
    }
}

pub(super) fn stage((stage, took): (Stage, Duration)) -> v1::StageTime {
    v1::StageTime { stage: stage.as_str().to_owned(), micros: micros(took) }
}

pub(super) fn image((image, kept): (ImageInfo, Kept)) -> v1::Image {
    v1::Image {
        name: image.name,
        target_digest: image.target_digest,
        manifest_digest: image.manifest_digest,
        platform: image.platform,
        compressed_bytes: image.compressed_bytes,
        layers: image.layers,
        unpacked: image.unpacked,
        created_at: image.created_at.map(Timestamp::from),
        last_used_at: kept.last_use.map(timestamp),
        pinned: kept.pin.is_some(),
        pinned_until: kept.pin.and_then(|pin| pin.until).map(timestamp),
        leases: kept.leases,
        disk_bytes: image.on_disk.map(|size| size.bytes),
        exclusive_disk_bytes: image.on_disk.map(|size| size.exclusive),
        // Whoever knows them adds them.
        spares: 0,
        spares_wanted: 0,
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
