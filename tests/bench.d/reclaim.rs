//! Prepare while many written devices are being reclaimed.

use std::{
    io::{Seek as _, SeekFrom, Write as _},
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use futures_util::future::{Either, select};
use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::RECLAIM,
    devices,
    samples::{Samples, rounded},
    side::{Disk, Holder, Side},
    snapshots::{Sides, meta},
};

/// Bytes written to each of the devices that are reclaimed.
const WRITTEN: usize = 4 << 20;
/// As many Prepares as that are enough for an idle p99, and after that time there are enough. All that are made during a
/// reclaim count.
const IDLE_SAMPLES: usize = 150;
const IDLE_TIME: Duration = Duration::from_secs(20);
const RECLAIM_TIME: Duration = Duration::from_secs(90);

/// One side's Prepares.
#[derive(Default)]
struct Measured {
    idle: Samples,
    reclaiming: Samples,
    /// How long each reclaim took, if its end was awaited.
    seconds: Vec<Option<f64>>,
}

/// What becomes of a reclaim that is still under way when the time is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Afterwards {
    Wait,
    Leave,
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
            // who came while containerd's collection held its lock
            "longest_ms": self.reclaiming.percentile(100).map(rounded),
            "seconds": self.seconds,
        }))
    }
}

/// Each side against itself: three rounds of ours, for a p99 that does not hang on one sample, then one of the peer's,
/// which takes minutes. What the peer's still reclaims when its time is over is left to it.
pub(crate) async fn measure(sides: &Sides) -> Outcome<Value> {
    let (victims, rounds) = (sides.of(200, 30), sides.of(3, 1));
    let conditions = format!(
        "{rounds} rounds of ours and one of the peer's; {victims} devices of {} MiB; idle: {IDLE_SAMPLES} Prepares or \
         {} s, the {victims} devices being there; reclaiming: until it is done, or for {} s",
        WRITTEN >> 20,
        IDLE_TIME.as_secs(),
        RECLAIM_TIME.as_secs()
    );
    meta(&json!({ "conditions": { RECLAIM.name: conditions } }));
    let (mut ours, mut peer) = (Measured::default(), Measured::default());
    for _ in 0..rounds {
        round(&sides.ours, victims, Afterwards::Wait, &mut ours).await?;
    }
    round(&sides.peer, victims, Afterwards::Leave, &mut peer).await?;
    meta(&json!({ "reclaim": { "ours": ours.story()?, "peer": peer.story()? } }));
    Ok(RECLAIM.result(ours.ratio()?, &ours.reclaiming, Some((&sides.peer.snapshotter, &peer.reclaiming))))
}

async fn round(side: &Side, count: usize, afterwards: Afterwards, measured: &mut Measured) -> Outcome {
    const LEASE: &str = "bench-victims";
    let pool = side.pool()?;
    side.make_lease(LEASE).await?;
    let before = pool.used_blocks()?;
    let mut victims = Vec::new();
    for _ in 0..count {
        victims.push(side.prepare_held(Holder::Lease(LEASE)).await?.0);
    }
    write_all(&victims).await?;
    side.rest().await?;
    let written = u64::try_from(count * WRITTEN)? / pool.block_bytes()?;
    // the Prepares beside it may write a little
    let free_again = before + written / 20;
    if pool.used_blocks()? < before + written {
        return Err(format!("{} has fewer blocks in use than were written", pool.name).into());
    }

    let begun = Instant::now();
    let (idle, disks) = sample(side, |count| count >= IDLE_SAMPLES || begun.elapsed() > IDLE_TIME).await?;
    side.clear(&disks).await?;

    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let reclaim = pin!(async {
        let reclaimed = reclaim(side, LEASE, &victims, free_again).await;
        over.store(true, Ordering::Relaxed);
        reclaimed.map(|()| begun.elapsed())
    });
    let sample = pin!(sample(side, |_| over.load(Ordering::Relaxed) || begun.elapsed() > RECLAIM_TIME));
    let (reclaimed, (reclaiming, disks)) = match select(reclaim, sample).await {
        Either::Left((reclaimed, sample)) => (Some(reclaimed?), sample.await?),
        Either::Right((sampled, reclaim)) if afterwards == Afterwards::Wait => {
            (Some(reclaim.await?), sampled?)
        }
        Either::Right((sampled, _)) => (None, sampled?),
    };
    let (without, with) = (idle.summary(), reclaiming.summary());
    eprintln!("  {}: idle {without}, reclaiming {with}, done after {reclaimed:.1?}", side.snapshotter);
    measured.idle.extend(idle);
    measured.reclaiming.extend(reclaiming);
    measured.seconds.push(reclaimed.map(|took| took.as_secs_f64().round()));
    if afterwards == Afterwards::Wait { side.clear(&disks).await } else { Ok(()) }
}

/// Prepares one after the other until it is over; that is told how many there are.
async fn sample(side: &Side, over: impl Fn(usize) -> bool) -> Outcome<(Samples, Vec<Disk>)> {
    let (mut samples, mut disks) = (Samples::default(), Vec::new());
    while !over(samples.len()) {
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
        tokio::time::sleep(Duration::from_millis(200)).await;
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
