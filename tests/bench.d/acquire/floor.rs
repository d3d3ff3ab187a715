//! What a hit cannot be faster than: one write that is durable, and one call over the Unix socket.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, time::Instant};

use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{Outcome, samples::Samples};

/// On the volume that the ledger is on.
const FILE: &str = "/var/lib/cowshed/bench-floor";
const PAGE: usize = 4096;

/// 4 KiB over what is there, and fdatasync, so often.
pub(crate) async fn durable_writes(count: usize) -> Outcome<Samples> {
    tokio::task::spawn_blocking(move || {
        let file = File::options().create(true).truncate(false).write(true).open(Path::new(FILE))?;
        let mut samples = Samples::default();
        file.write_all_at(&vec![1; count * PAGE], 0)?;
        file.sync_all()?;
        for number in 0..count {
            let begun = Instant::now();
            file.write_all_at(&[2; PAGE], u64::try_from(number * PAGE)?)?;
            file.sync_data()?;
            samples.add_time(begun.elapsed());
        }
        Ok(samples)
    })
    .await?
}

/// Calls of the health service, which does nothing.
pub(crate) async fn round_trips(channel: Channel, count: usize) -> Outcome<Samples> {
    let mut client = HealthClient::new(channel);
    let mut samples = Samples::default();
    for _ in 0..count {
        let begun = Instant::now();
        let reply = client.check(HealthCheckRequest::default()).await?.into_inner();
        samples.add_time(begun.elapsed());
        if reply.status() != ServingStatus::Serving {
            return Err("the service is not healthy".into());
        }
    }
    Ok(samples)
}
