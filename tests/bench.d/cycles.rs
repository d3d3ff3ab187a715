//! Prepare and Remove in turn, for some time, with all that removal costs.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::CYCLES,
    devices,
    prepare::ratio,
    samples::Samples,
    side::{Disk, Side},
    snapshots::{Sides, meta},
};

const WORKERS: usize = 4;

pub(crate) async fn measure(sides: &Sides) -> Outcome<Value> {
    let (rounds, seconds) = sides.of((3, 25), (1, 15));
    let conditions = format!("{rounds} rounds, {WORKERS} workers for {seconds} s");
    meta(&json!({ "conditions": { CYCLES.name: conditions } }));
    let time = Duration::from_secs(seconds);
    let (ours, peer) = sides.in_turn(rounds, async |side| round(side, time).await).await?;
    // rates: the faster one has the higher
    let value = ratio(&ours, &peer)?;
    Ok(CYCLES.result(value, &ours, Some((&sides.peer.snapshotter, &peer))))
}

/// Cycles a second. What is left when the time is over is collected, and that counts.
async fn round(side: &Side, time: Duration) -> Outcome<Samples> {
    let begun = Instant::now();
    let done = try_join_all((0..WORKERS).map(|_| work(side, begun + time))).await?.concat();
    let worked = begun.elapsed();
    let there = devices::names()?;
    let left = done.iter().filter(|disk| there.contains(&disk.device)).count();
    side.collect().await?;
    devices::wait_gone(&done).await?;
    let took = begun.elapsed();
    let rate = f64::from(u32::try_from(done.len())?) / took.as_secs_f64();
    eprintln!(
        "  {}: {} cycles in {worked:.1?}, {left} devices left, gone after {took:.1?}: {rate:.2} a second",
        side.snapshotter,
        done.len()
    );
    side.rest().await?;
    Ok(Samples::of(rate))
}

async fn work(side: &Side, until: Instant) -> Outcome<Vec<Disk>> {
    let mut done = Vec::new();
    while Instant::now() < until {
        let (disk, _) = side.prepare().await?;
        side.remove(&disk).await?;
        done.push(disk);
    }
    Ok(done)
}
