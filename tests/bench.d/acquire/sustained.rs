//! Acquire and Release in turn, for a minute, with all that it costs to take the disks back.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        Bench,
        disks::{Disk, Launcher as _},
        service::{SHELF, Service},
        stock::Stock,
    },
    catalogue::SUSTAINED,
    samples::{Samples, rounded},
    snapshots::meta,
};

/// Workers that are tried; each side has those that are best for it.
const WORKERS: [usize; 3] = [2, 4, 8];
/// Of both sides, if there is no time to try.
const USUAL: [usize; 1] = [4];

/// Whose cycles they are.
trait Cycles {
    /// One disk, made and given back.
    async fn cycle(&self) -> Outcome<Disk>;
    /// Waits until these are gone, with everything that was in them.
    async fn gone(&self, disks: &[Disk]) -> Outcome;
    /// Waits until another round can begin.
    async fn ready(&self) -> Outcome;
}

struct OfOurs<'a> {
    service: &'a Service,
    spares: AtomicUsize,
}

impl Cycles for OfOurs<'_> {
    async fn cycle(&self) -> Outcome<Disk> {
        let acquired = self.service.acquire().await?;
        self.spares.fetch_add(usize::from(acquired.reply.spare), Ordering::Relaxed);
        self.service.release(&acquired.disk).await?;
        Ok(acquired.disk)
    }

    async fn gone(&self, disks: &[Disk]) -> Outcome {
        self.service.gone(disks).await
    }

    async fn ready(&self) -> Outcome {
        self.service.full(SHELF).await?;
        self.spares.store(0, Ordering::Relaxed);
        Ok(())
    }
}

impl Cycles for Stock {
    async fn cycle(&self) -> Outcome<Disk> {
        let (disk, _) = self.launch().await?;
        self.release(&disk).await?;
        Ok(disk)
    }

    async fn gone(&self, disks: &[Disk]) -> Outcome {
        Self::gone(self, disks).await
    }

    async fn ready(&self) -> Outcome {
        self.pool()?.wait_at_rest().await
    }
}

/// What a round came to.
struct Round {
    cycles: usize,
    /// Until the last Release.
    worked: Duration,
    /// Until the last disk was gone.
    took: Duration,
}

impl Round {
    fn rate(&self) -> f64 {
        self.cycles as f64 / self.took.as_secs_f64()
    }

    fn story(&self) -> Value {
        json!({
            "cycles": self.cycles,
            "a_second_until_the_last_release": rounded(self.cycles as f64 / self.worked.as_secs_f64()),
            "seconds_until_the_last_disk_was_gone": self.took.as_secs_f64().round(),
        })
    }
}

pub(crate) async fn measure(bench: &Bench) -> Outcome<Value> {
    let time = Duration::from_secs(bench.of(60, 10));
    let trial = Duration::from_secs(bench.of(8, 3));
    bench.ours.keep(SHELF).await?;
    let cycles = OfOurs { service: &bench.ours, spares: AtomicUsize::new(0) };
    let tried = bench.of(WORKERS.as_slice(), USUAL.as_slice());
    let our_workers = best(&cycles, tried, trial).await?;
    let stock_workers = best(&bench.stock, tried, trial).await?;
    meta(&json!({ "conditions": { SUSTAINED.name: format!(
        "{} s by {our_workers} workers of ours and {stock_workers} of the peer's, the best of {tried:?} for each in \
         {} s; the shelf having {SHELF} spares at the start", time.as_secs(), trial.as_secs()
    ) } }));
    let ours = round(&cycles, our_workers, time).await?;
    let spares = cycles.spares.load(Ordering::Relaxed);
    cycles.ready().await?;
    let stock = round(&bench.stock, stock_workers, time).await?;
    meta(&json!({ "sustained": {
        "ours": ours.story(), "peer": stock.story(), "spares_of_ours": spares,
    } }));
    let name = bench.stock.name();
    let value = ours.rate() / stock.rate();
    Ok(SUSTAINED.result(value, &Samples::of(ours.rate()), Some((name, &Samples::of(stock.rate())))))
}

/// The number of workers with the most cycles a second.
async fn best(cycles: &impl Cycles, tried: &[usize], time: Duration) -> Outcome<usize> {
    let mut rates = BTreeMap::new();
    for workers in tried.iter().copied() {
        cycles.ready().await?;
        rates.insert(workers, round(cycles, workers, time).await?.rate());
    }
    cycles.ready().await?;
    let best = rates.into_iter().max_by(|one, other| one.1.total_cmp(&other.1));
    Ok(best.ok_or("no number of workers was tried")?.0)
}

async fn round(cycles: &impl Cycles, workers: usize, time: Duration) -> Outcome<Round> {
    let begun = Instant::now();
    let work = async || {
        let mut done = Vec::new();
        while begun.elapsed() < time {
            done.push(cycles.cycle().await?);
        }
        Outcome::Ok(done)
    };
    let done = try_join_all((0..workers).map(|_| work())).await?.concat();
    let worked = begun.elapsed();
    cycles.gone(&done).await?;
    let round = Round { cycles: done.len(), worked, took: begun.elapsed() };
    eprintln!("  {workers} workers: {} cycles, {:.2} a second", round.cycles, round.rate());
    Ok(round)
}
