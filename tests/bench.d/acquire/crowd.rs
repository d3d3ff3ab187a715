//! Hits while many written disks, all released at once, are being reclaimed.

use std::{
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt as _, TryStreamExt as _,
    future::{Either, select},
    stream,
};
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        Bench,
        disks::{Disk, WRITTEN, all_different, write_all},
        service::{SHELF, Service},
    },
    catalogue::CROWD,
    samples::{Samples, rounded},
    snapshots::meta,
};

/// Between two hits: fewer than can be made again meanwhile.
const PACE: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(900);

/// Hits, one in each interval.
#[derive(Default)]
struct Paced {
    hits: Samples,
    disks: Vec<Disk>,
    /// How often there was no spare to be had at that time.
    dry: usize,
}

pub(crate) async fn measure(bench: &Bench) -> Outcome<Value> {
    let (count, idle) = bench.of((500, 200), (10, 20));
    let service = &bench.ours;
    let block = service.pool().block_bytes()?;
    meta(&json!({ "conditions": { CROWD.name: format!(
        "{count} disks, {} MiB of each in use: 4 KiB are written to every block of {} KiB there, and the pool gives the \
         whole block; one hit every {} ms; idle: {idle} hits, the {count} disks being there; reclaiming: from the first Release until all blocks are free",
        WRITTEN >> 20, block >> 10, PACE.as_millis()
    ) } }));
    service.keep(SHELF).await?;
    let before = service.pool().used_blocks()?;
    let begun = Instant::now();
    let crowd = acquire(service, count).await?;
    write_all(&crowd, block).await?;
    service.full(SHELF).await?;
    let written = u64::try_from(count)? * WRITTEN / block;
    if service.pool().used_blocks()? < before + written {
        return Err(format!("fewer than {written} blocks of the pool are in use by what was written").into());
    }
    eprintln!("  {count} disks written after {:.0?}", begun.elapsed());

    let calm = paced(service, |done| done >= idle).await?;
    service.clear(&calm.disks).await?;
    service.full(SHELF).await?;
    let (busy, took) = while_reclaimed(service, &crowd, before + written / 20).await?;
    let (with, without) = (busy.hits.summary(), calm.hits.summary());
    eprintln!("  idle {without}, reclaiming {with}, done after {took:.1?}");
    meta(&json!({ "crowd": {
        "idle": calm.hits.distribution(), "reclaiming": busy.hits.distribution(),
        "seconds_of_reclaiming": took.as_secs_f64().round(),
        "times_without_a_spare": { "idle": calm.dry, "reclaiming": busy.dry },
    } }));
    service.clear(&busy.disks).await?;
    let p99 = |samples: &Samples| samples.percentile(99).ok_or("nothing was measured");
    let value = rounded(p99(&busy.hits)? / p99(&calm.hits)?);
    Ok(CROWD.result(value, &busy.hits, Some(("idle", &calm.hits))))
}

async fn acquire(service: &Service, count: usize) -> Outcome<Vec<Disk>> {
    let acquired = stream::iter((0..count).map(|_| service.acquire())).buffer_unordered(8);
    let disks: Vec<Disk> = acquired.map_ok(|acquired| acquired.disk).try_collect().await?;
    all_different("Acquire", &disks)?;
    Ok(disks)
}

/// Hits until it is over; that is told how many there are.
async fn paced(service: &Service, over: impl Fn(usize) -> bool) -> Outcome<Paced> {
    let mut paced = Paced::default();
    let mut ticks = tokio::time::interval(PACE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !over(paced.hits.len()) {
        ticks.tick().await;
        if service.offer().await?.spares == 0 {
            paced.dry += 1;
            service.ready(1).await?;
        }
        let acquired = service.hit().await?;
        paced.hits.add_time(acquired.took);
        paced.disks.push(acquired.disk);
    }
    Ok(paced)
}

/// Releases the crowd; hits until its blocks are free, and how long that was.
async fn while_reclaimed(service: &Service, crowd: &[Disk], free_again: u64) -> Outcome<(Paced, Duration)> {
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let reclaim = pin!(async {
        let reclaimed = reclaim(service, crowd, free_again).await;
        over.store(true, Ordering::Relaxed);
        reclaimed.map(|()| begun.elapsed())
    });
    let hits = pin!(paced(service, |_| over.load(Ordering::Relaxed)));
    let (hits, took) = match select(reclaim, hits).await {
        Either::Left((took, hits)) => (hits.await?, took?),
        // they end before it only when they fail
        Either::Right((hits, reclaim)) => (hits?, reclaim.await?),
    };
    service.gone(crowd).await?;
    Ok((hits, took))
}

async fn reclaim(service: &Service, crowd: &[Disk], free_again: u64) -> Outcome {
    service.release_all(crowd).await?;
    let begun = Instant::now();
    loop {
        // the pool may let whoever asks wait: not on the thread that measures
        let pool = service.pool().clone();
        if tokio::task::spawn_blocking(move || pool.used_blocks()).await?? <= free_again {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            return Err("the blocks of the released disks do not become free".into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
