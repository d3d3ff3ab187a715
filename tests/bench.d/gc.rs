//! The benchmark `gc`: very many written disks are released at once. How fast their room comes back, and how long whoever
//! asks for a disk meanwhile has to wait.
//!
//! One side after the other, each on an empty disk, so that the machine needs the room of one pool only.

use std::{
    cell::Cell,
    pin::pin,
    time::{Duration, Instant},
};

use clap::Args;
use futures_util::{
    StreamExt as _, TryStreamExt as _,
    future::{Either, select},
    stream,
};
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        IMAGE,
        disks::{Disk, Launcher as _, WRITTEN, all_different, run as run_program, settle, write_all},
        service::{SHELF, Service},
        stock::{self, Stock},
    },
    catalogue::{GC, GC_RATE, GC_STALL},
    conditions, devices,
    samples::{Samples, rounded},
    snapshots::{Effort, meta, tell},
};

/// The disk below the pool.
const DEVICE: &str = "/dev/vdb";
/// Between two disks that are asked for: on neither side is that all there is to do.
const PACE: Duration = Duration::from_millis(500);
/// What has not come back by then is not waited for.
const LIMIT: Duration = Duration::from_secs(900);
/// Looking must not take the processor from what is measured.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);
/// At work at a time while the crowd's disks are made, on both sides.
const MAKERS: usize = 8;

#[derive(Args)]
pub(crate) struct Options {
    /// How much is measured.
    #[arg(long, value_enum, default_value = "full")]
    effort: Effort,
}

/// Who makes disks and takes them back.
trait Keeper {
    fn name(&self) -> &'static str;
    fn pool(&self) -> Outcome<&devices::Pool>;
    /// A disk for a VM, however it is made: with how long its caller waited for it.
    async fn one(&self) -> Outcome<(Disk, Duration)>;
    /// Gives disks back, as a launcher does.
    async fn release(&self, disk: &Disk) -> Outcome;
    /// Does what else a launcher can do so that they go.
    async fn nudge(&self) -> Outcome;
}

impl Keeper for Service {
    fn name(&self) -> &'static str {
        "Acquire"
    }

    fn pool(&self) -> Outcome<&devices::Pool> {
        Ok(Self::pool(self))
    }

    async fn one(&self) -> Outcome<(Disk, Duration)> {
        let acquired = self.acquire().await?;
        Ok((acquired.disk, acquired.took))
    }

    async fn release(&self, disk: &Disk) -> Outcome {
        Self::release(self, disk).await
    }

    /// It goes by itself.
    async fn nudge(&self) -> Outcome {
        Ok(())
    }
}

impl Keeper for Stock {
    fn name(&self) -> &'static str {
        stock::NAME
    }

    fn pool(&self) -> Outcome<&devices::Pool> {
        Self::pool(self)
    }

    async fn one(&self) -> Outcome<(Disk, Duration)> {
        self.launch().await
    }

    async fn release(&self, disk: &Disk) -> Outcome {
        Self::release(self, disk).await
    }

    /// A collection that all of them are in: by itself containerd would begin one before the last is released, and the next
    /// much later.
    async fn nudge(&self) -> Outcome {
        self.collect().await
    }
}

/// What one side has come to.
struct Measured {
    /// Disks that were asked for meanwhile, in ms.
    asked: Samples,
    /// Of them, those that came to nothing.
    failed: usize,
    /// The same before anything was released.
    calm: Samples,
    back: Back,
}

/// What has come back.
#[derive(Clone, Copy)]
struct Back {
    bytes: u64,
    /// Devices that are gone.
    disks: usize,
    after: Duration,
    /// Whether that is all of it.
    all: bool,
}

impl Back {
    /// MB (10^6 bytes) a second.
    fn rate(self) -> f64 {
        self.bytes as f64 / 1e6 / self.after.as_secs_f64()
    }
}

impl Measured {
    fn longest(&self) -> Outcome<f64> {
        self.asked.percentile(100).ok_or_else(|| "no disk was asked for meanwhile".into())
    }

    fn story(&self) -> Outcome<Value> {
        Ok(json!({
            "mb_back": rounded(self.back.bytes as f64 / 1e6),
            "disks_gone": self.back.disks,
            "seconds": rounded(self.back.after.as_secs_f64()),
            "all_of_it": self.back.all,
            "mb_a_second": rounded(self.back.rate()),
            "disks_a_second": rounded(self.back.disks as f64 / self.back.after.as_secs_f64()),
            "longest_ms": rounded(self.longest()?),
            "asked_for_meanwhile": self.asked.distribution(),
            "of_them_failed": self.failed,
            "before": self.calm.distribution(),
        }))
    }
}

pub(crate) fn run(options: Options) -> Outcome {
    // One thread: a reply is not handed from one to another before it is seen.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure_both(options.effort))
}

async fn measure_both(effort: Effort) -> Outcome {
    conditions::set_rcu_expedited(0)?;
    let begun = Instant::now();
    let results = results(effort).await;
    if tell(&GC, &results, begun) { Ok(()) } else { Err("nothing could be compared".into()) }
}

async fn results(effort: Effort) -> Outcome<Vec<Value>> {
    let (count, calm) = if effort == Effort::Full { (500, 40) } else { (20, 5) };
    let (service, _) = Service::new(IMAGE).await?;
    meta(&conditions::of_gc(effort, &service.status().await?)?);
    let block = service.pool().block_bytes()?;
    meta(&json!({ "conditions": { GC_RATE.name: format!(
        "{count} disks, {} MiB of each in use: 4 KiB are written to every block of {} KiB there, and the pool gives the whole \
         block; a disk is asked for every {} ms; what has not come back after {} s is not waited for, and the rate is of \
         what has; each side on an empty disk, ours first, with {SHELF} spares", WRITTEN >> 20, block >> 10,
        PACE.as_millis(), LIMIT.as_secs()
    ) } }));
    service.keep(SHELF).await?;
    let ours = measure(&service, count, calm, async || service.full(SHELF).await.map(drop)).await?;
    drop(service);
    to_stock().await?;
    let stock = Stock::new(IMAGE).await?;
    let rest = async || stock.pool()?.wait_at_rest().await;
    let peer = measure(&stock, count, calm, rest).await?;
    meta(&json!({ "gc": { "ours": ours.story()?, "peer": peer.story()? } }));
    let rate = |side: &Measured| Samples::of(rounded(side.back.rate()));
    Ok(vec![
        GC_RATE.result(ours.back.rate() / peer.back.rate(), &rate(&ours), Some((stock::NAME, &rate(&peer)))),
        GC_STALL.result(peer.longest()? / ours.longest()?, &ours.asked, Some((stock::NAME, &peer.asked))),
    ])
}

/// The same host with an empty disk, and containerd's own snapshotter alone.
async fn to_stock() -> Outcome {
    run_program("cowshed-host", &["down"]).await?;
    run_program("blkdiscard", &["--force", DEVICE]).await?;
    settle().await?;
    run_program("cowshed-host", &["up", "--snapshotter", "devmapper", "--no-cowshed"]).await.map(drop)
}

/// One side. `ready` waits until it has nothing to do.
async fn measure(
    keeper: &impl Keeper,
    count: usize,
    calm: usize,
    ready: impl AsyncFn() -> Outcome,
) -> Outcome<Measured> {
    let pool = keeper.pool()?;
    let block = pool.block_bytes()?;
    let before = pool.used_blocks()?;
    let begun = Instant::now();
    let crowd: Vec<Disk> = stream::iter((0..count).map(|_| keeper.one()))
        .buffer_unordered(MAKERS)
        .map_ok(|(disk, _)| disk)
        .try_collect()
        .await?;
    all_different(keeper.name(), &crowd)?;
    write_all(&crowd, block).await?;
    ready().await?;
    let written = u64::try_from(count)? * WRITTEN / block;
    if pool.used_blocks()? < before + written {
        return Err(format!("fewer than {written} blocks of the pool are in use by what was written").into());
    }
    eprintln!("  {}: {count} disks written after {:.0?}", keeper.name(), begun.elapsed());
    let calm = asked(keeper, |done| done >= calm).await?;
    ready().await?;
    let measured = while_reclaimed(keeper, &crowd, before + written / 20, calm.0).await?;
    eprintln!("  {}: {}", keeper.name(), measured.story()?);
    Ok(measured)
}

/// Releases the crowd; asks for disks until so many blocks are in use only, or it takes too long.
async fn while_reclaimed(
    keeper: &impl Keeper,
    crowd: &[Disk],
    free_again: u64,
    calm: Samples,
) -> Outcome<Measured> {
    let over = Cell::new(false);
    let reclaim = pin!(async {
        let back = reclaim(keeper, crowd, free_again).await;
        over.set(true);
        back
    });
    let asking = pin!(asked(keeper, |_| over.get()));
    let (back, (asked, failed)) = match select(reclaim, asking).await {
        // who waits now has to be heard to the end
        Either::Left((back, asking)) => (back?, asking.await?),
        // they end before it only when they fail
        Either::Right((asked, reclaim)) => (reclaim.await?, asked?),
    };
    Ok(Measured { asked, failed, calm, back })
}

/// Disks, one in each interval, until it is over; that is told how many there are. How long each took, and how many came to
/// nothing: their callers waited all the same.
async fn asked(keeper: &impl Keeper, over: impl Fn(usize) -> bool) -> Outcome<(Samples, usize)> {
    let (mut samples, mut failed) = (Samples::default(), 0);
    let mut ticks = tokio::time::interval(PACE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !over(samples.len()) {
        ticks.tick().await;
        let begun = Instant::now();
        match keeper.one().await {
            Ok((_, took)) => samples.add_time(took),
            Err(error) => {
                eprintln!("  {}: after {:.1?}: {error}", keeper.name(), begun.elapsed());
                samples.add_time(begun.elapsed());
                failed += 1;
            }
        }
    }
    Ok((samples, failed))
}

/// Releases them all, and waits until the kernel shows their blocks as free.
async fn reclaim(keeper: &impl Keeper, crowd: &[Disk], free_again: u64) -> Outcome<Back> {
    let used = async || {
        let pool = keeper.pool()?.clone();
        // the pool may let whoever asks wait: not on the thread that measures
        tokio::task::spawn_blocking(move || pool.used_blocks()).await?
    };
    let (block, at_first) = (keeper.pool()?.block_bytes()?, used().await?);
    let begun = Instant::now();
    let released = pin!(async {
        let all = stream::iter(crowd.iter().map(|disk| keeper.release(disk))).buffer_unordered(16);
        all.try_collect::<Vec<()>>().await?;
        let nudged = keeper.nudge().await;
        // what is gone the kernel says
        nudged.or_else(|error| {
            eprintln!("  {}: {error}", keeper.name());
            Outcome::Ok(())
        })
    });
    let looked = pin!(async {
        loop {
            tokio::time::sleep(BETWEEN_LOOKS).await;
            let (now, after) = (used().await?, begun.elapsed());
            let all = now <= free_again;
            if all || after > LIMIT {
                let there = tokio::task::spawn_blocking(devices::names).await??;
                let disks = crowd.iter().filter(|disk| !there.contains(&disk.device)).count();
                // what is asked for meanwhile is written to a little, and is not what comes back
                return Outcome::Ok(Back { bytes: at_first.saturating_sub(now) * block, disks, after, all });
            }
        }
    });
    match select(released, looked).await {
        Either::Left((released, looked)) => {
            released?;
            looked.await
        }
        Either::Right((back, _)) => back,
    }
}
