//! Hits while ever more VMs have disks, and the service's memory with the most of them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{Bench, service::Service},
    catalogue::{LIVE, LIVE_MEMORY},
    memory::{megabytes, pid_of},
    prepare::ratio,
    samples::Samples,
    snapshots::meta,
};

const SHELF: u32 = 20;
/// What is given back at a time.
const ROUND: usize = 20;

pub(crate) async fn measure(bench: &Bench) -> Outcome<Vec<Value>> {
    let (levels, count) = bench.of((vec![10, 100, 1_000, 3_000], 60), (vec![10, 30, 60], 10));
    let service = &bench.ours;
    service.keep(SHELF).await?;
    let serve = pid_of("cowshed", Some("serve"))?;
    let (mut by_level, mut memory) = (BTreeMap::new(), BTreeMap::new());
    let begun = Instant::now();
    for level in levels {
        grow_to(service, level).await?;
        by_level.insert(level, hits(service, count).await?);
        memory.insert(level, resident(serve).await?);
        eprintln!("  {level} live after {:.0?}", begun.elapsed());
    }
    tell_of_levels(&by_level, &memory, count, begun.elapsed())?;
    let (first, last) = by_level.first_key_value().zip(by_level.last_key_value()).ok_or("no level")?;
    let most = memory.last_key_value().ok_or("no level")?.1;
    let few = format!("{} live", first.0);
    Ok(vec![
        LIVE.result(ratio(last.1, first.1)?, last.1, Some((&few, first.1))),
        LIVE_MEMORY.result(most.median().ok_or("nothing was measured")?, most, None),
    ])
}

fn tell_of_levels(
    by_level: &BTreeMap<usize, Samples>,
    memory: &BTreeMap<usize, Samples>,
    count: usize,
    took: Duration,
) -> Outcome {
    let curve = |percent| -> Vec<_> {
        by_level.iter().map(|(level, samples)| (level, samples.percentile(percent))).collect()
    };
    let (p50, p99) = (curve(50), curve(99));
    let megabytes: BTreeMap<_, _> =
        memory.iter().map(|(level, mb)| (level.to_string(), mb.median())).collect();
    meta(&json!({
        "conditions": { LIVE.name: format!(
            "{count} hits at each of {:?} leases, {SHELF} spares; all of it took {} s",
            by_level.keys().collect::<Vec<_>>(), took.as_secs()
        ) },
        "live_leases": {
            "serve_mb": megabytes,
            "serve_peak_mb": self::megabytes(pid_of("cowshed", Some("serve"))?, "VmHWM")?,
            "containerd_mb": self::megabytes(pid_of("containerd", None)?, "VmRSS")?,
        },
        "pictures": { "live": {
            "kind": "lines", "title": "A hit, with so many VMs that have disks", "x": "live leases", "y": "ms",
            "lines": { "p50": p50, "p99": p99 },
        } },
    }));
    Ok(())
}

/// Makes disks until so many leases are held.
async fn grow_to(service: &Service, level: usize) -> Outcome {
    let missing = level.saturating_sub(granted(service).await?);
    stream::iter((0..missing).map(|_| async { service.acquire().await.map(drop) }))
        .buffer_unordered(8)
        .try_collect::<Vec<()>>()
        .await?;
    let there = granted(service).await?;
    if there < level { Err(format!("{there} leases are held, not {level}").into()) } else { Ok(()) }
}

async fn granted(service: &Service) -> Outcome<usize> {
    Ok(usize::try_from(service.status().await?.leases.ok_or("no leases are counted")?.granted)?)
}

/// Hits, one at a time, the shelf being full.
async fn hits(service: &Service, count: usize) -> Outcome<Samples> {
    let mut samples = Samples::default();
    while samples.len() < count {
        let mut disks = Vec::new();
        for _ in 0..ROUND.min(count - samples.len()) {
            service.full(SHELF).await?;
            let acquired = service.hit().await?;
            samples.add_time(acquired.took);
            disks.push(acquired.disk);
        }
        service.clear(&disks).await?;
    }
    Ok(samples)
}

async fn resident(serve: u32) -> Outcome<Samples> {
    let mut samples = Samples::default();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        samples.add(megabytes(serve, "VmRSS")?);
    }
    Ok(samples)
}
