//! Our values as messages of the API.

use std::time::{Duration, UNIX_EPOCH};

use cowshed_leases::{DeviceIdentity, Grant, Lease, Process, State, UnixMicros};
use cowshed_proto::v1;
use prost_types::Timestamp;

use crate::{
    image::{Cache, ImageInfo},
    stages::Stage,
};

pub(super) fn lease(lease: &Lease, waiting: Option<String>) -> v1::Lease {
    let grant = lease.grant();
    let released = match lease.state {
        State::Releasing { since, .. } => Some(since),
        State::Preparing | State::Granted(_) => None,
    };
    v1::Lease {
        lease_id: lease.id.to_string(),
        vm_id: lease.vm.to_string(),
        generation: lease.generation.0,
        state: state(&lease.state).into(),
        spec: Some(v1::DiskSpec {
            image: lease.spec.image.clone(),
            platform: Some(lease.spec.platform.clone()),
        }),
        image_digest: grant.map(|grant| grant.image_digest.clone()),
        device: grant.map(|grant| device(&grant.device, grant)),
        process: grant.map(|grant| process(&grant.process)),
        created_at: Some(timestamp(lease.created_at)),
        granted_at: grant.map(|grant| timestamp(grant.at)),
        released_at: released.map(timestamp),
        waiting_for: waiting,
    }
}

fn device(device: &DeviceIdentity, grant: &Grant) -> v1::Device {
    v1::Device {
        path: device.path.clone(),
        major: device.number.major,
        minor: device.number.minor,
        dm_name: device.dm_name.clone(),
        dm_uuid: device.dm_uuid.clone(),
        thin_id: device.thin_id,
        pool_device: device.pool.to_string(),
        size_bytes: device.size_bytes,
        filesystem: grant.filesystem.clone(),
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
        State::Releasing { .. } => v1::LeaseState::Releasing,
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

pub(super) fn image(image: ImageInfo) -> v1::Image {
    v1::Image {
        name: image.name,
        target_digest: image.target_digest,
        manifest_digest: image.manifest_digest,
        platform: image.platform,
        compressed_bytes: image.compressed_bytes,
        layers: image.layers,
        unpacked: image.unpacked,
        created_at: image.created_at.map(Timestamp::from),
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn timestamp(at: UnixMicros) -> Timestamp {
    let since = Duration::from_micros(u64::try_from(at.0).unwrap_or_default());
    (UNIX_EPOCH + since).into()
}
