//! Prepare while many written devices are being reclaimed.

use std::{
    io::{Seek as _, SeekFrom, Write as _},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::RECLAIM,
    devices,
    samples::{Samples, rounded},
    side::{Disk, Holder, Side},
    snapshots::{Sides, meta},
};

/// How many devices are reclaimed, and bytes written to each.
const VICTIMS: usize = 200;
const WRITTEN: usize = 4 << 20;
/// As many Prepares as that are enough for a p99, and after that time there are enough.
const SAMPLES: usize = 150;
const IDLE_TIME: Duration = Duration::from_secs(30);

/// One side's Prepares.
#[derive(Default)]
struct Measured {
    idle: Samples,
    reclaiming: Samples,
    seconds: Vec<u64>,
}

impl Measured {
    fn ratio(&self) -> Outcome<f64> {
        let p99 = |samples: &Samples| samples.percentile(99).ok_or("nothing was measured");
        Ok(p99(&self.reclaiming)? / p99(&self.idle)?)
    }

    fn story(&self) -> Outcome<Value> {
        Ok(json!({
            "idle": self.idle.summary(),
            "reclaiming": self.reclaiming.summary(),
            "ratio_of_p99": rounded(self.ratio()?),
            "reclaim_seconds": self.seconds,
        }))
    }
}

/// Rounds until each side has enough samples; a slow one has them in its first.
pub(crate) async fn measure(sides: &Sides) -> Outcome<Value> {
    let conditions = format!(
        "{VICTIMS} devices of {} MiB; idle: {SAMPLES} Prepares or {} s a round, the {VICTIMS} devices being there",
        WRITTEN >> 20,
        IDLE_TIME.as_secs()
    );
    meta(&json!({ "conditions": { RECLAIM.name: conditions } }));
    let (mut ours, mut peer) = (Measured::default(), Measured::default());
    for _ in 0..sides.of(3, 1) {
        for (side, measured) in [(&sides.ours, &mut ours), (&sides.peer, &mut peer)] {
            // a round of the stock snapshotter's takes minutes
            let enough = measured.reclaiming.len() >= SAMPLES || measured.seconds.iter().sum::<u64>() > 30;
            if !enough {
                round(side, measured).await?;
            }
        }
    }
    meta(&json!({ "reclaim": { "ours": ours.story()?, "peer": peer.story()? } }));
    Ok(RECLAIM.result(ours.ratio()?, &ours.reclaiming, Some((&sides.peer.snapshotter, &peer.reclaiming))))
}

async fn round(side: &Side, measured: &mut Measured) -> Outcome {
    const LEASE: &str = "bench-victims";
    let pool = side.pool()?;
    side.make_lease(LEASE).await?;
    let before = pool.used_blocks()?;
    let mut victims = Vec::new();
    for _ in 0..VICTIMS {
        victims.push(side.prepare_held(Holder::Lease(LEASE)).await?.0);
    }
    write_all(&victims).await?;
    side.rest().await?;
    let written = u64::try_from(VICTIMS * WRITTEN)? / pool.block_bytes()?;
    // the Prepares beside it may write a little
    let free_again = before + written / 20;
    if pool.used_blocks()? < before + written {
        return Err(format!("{} has fewer blocks in use than were written", pool.name).into());
    }

    let begun = Instant::now();
    let (idle, disks) = sample(side, || measured_enough(begun)).await?;
    side.clear(&disks).await?;

    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let reclaim = async {
        let reclaimed = reclaim(side, LEASE, &victims, free_again).await;
        over.store(true, Ordering::Relaxed);
        reclaimed.map(|()| begun.elapsed())
    };
    let (took, sampled) = tokio::join!(reclaim, sample(side, || over.load(Ordering::Relaxed)));
    let (took, (reclaiming, disks)) = (took?, sampled?);
    eprintln!(
        "  {}: idle {}, while reclaiming for {took:.1?} {}",
        side.snapshotter,
        idle.summary(),
        reclaiming.summary()
    );
    side.clear(&disks).await?;
    measured.idle.extend(idle);
    measured.reclaiming.extend(reclaiming);
    measured.seconds.push(took.as_secs());
    Ok(())
}

fn measured_enough(begun: Instant) -> bool {
    begun.elapsed() > IDLE_TIME
}

/// Prepares one after the other until it is over, or there are enough.
async fn sample(side: &Side, over: impl Fn() -> bool) -> Outcome<(Samples, Vec<Disk>)> {
    let (mut samples, mut disks) = (Samples::default(), Vec::new());
    while !over() && samples.len() < SAMPLES {
        let (disk, took) = side.prepare().await?;
        samples.add_time(took);
        disks.push(disk);
    }
    Ok((samples, disks))
}

/// Ends the victims' lease, and waits until all that was written is free.
async fn reclaim(side: &Side, lease: &str, victims: &[Disk], free_again: u64) -> Outcome {
    side.end_lease(lease).await?;
    devices::wait_gone(victims).await?;
    let begun = Instant::now();
    while side.pool()?.used_blocks()? > free_again {
        if begun.elapsed() > Duration::from_secs(300) {
            return Err("the blocks of the reclaimed devices do not become free".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Writes to each device, past the filesystem's first part, and syncs it.
async fn write_all(disks: &[Disk]) -> Outcome {
    let paths: Vec<String> = disks.iter().map(|disk| disk.path.clone()).collect();
    tokio::task::spawn_blocking(move || {
        let noise = vec![0x5a; WRITTEN];
        for path in paths {
            let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
            file.seek(SeekFrom::Start(256 << 20))?;
            file.write_all(&noise)?;
            file.sync_all()?;
        }
        Ok(())
    })
    .await?
}
