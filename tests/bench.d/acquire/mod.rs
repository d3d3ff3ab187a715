//! The benchmark `acquire`: a disk for a VM from Cowshed against one by other means, all of them on one host and in turn.

mod base;
mod bursts;
mod crowd;
pub(crate) mod disks;
mod floor;
mod hits;
mod live;
mod lvm;
mod reflink;
pub(crate) mod service;
pub(crate) mod stock;
mod sustained;

use std::{collections::BTreeMap, time::Instant};

use clap::Args;
use serde_json::{Value, json};

use self::{
    disks::{Disk, Launcher},
    lvm::Lvm,
    reflink::Reflink,
    service::Service,
    stock::Stock,
};
use crate::{
    Outcome,
    catalogue::{self, Figure},
    conditions,
    samples::Samples,
    snapshots::{Effort, check_names, is_wanted, meta, tell},
};

/// What VMs want.
pub(crate) const IMAGE: &str = "127.0.0.1:5000/cowshed/app:1";
/// Disks that each side has besides those that are measured.
const STANDING: usize = 10;

#[derive(Args)]
pub(crate) struct Options {
    /// Only these figures.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// How much is measured.
    #[arg(long, value_enum, default_value = "full")]
    effort: Effort,
}

/// Who is measured.
struct Bench {
    ours: Service,
    stock: Stock,
    lvm: Lvm,
    reflink: Reflink,
    effort: Effort,
}

impl Bench {
    async fn new(effort: Effort) -> Outcome<Self> {
        let (ours, source) = Service::new(IMAGE).await?;
        let bench = Self {
            ours,
            stock: Stock::new(IMAGE).await?,
            lvm: Lvm::new(&source).await?,
            reflink: Reflink::new(&source).await?,
            effort,
        };
        // none of them is measured while it has none, or has made none
        for _ in 0..STANDING {
            bench.ours.acquire().await?;
            bench.stock.launch().await?;
            bench.lvm.launch().await?;
            bench.reflink.launch().await?;
        }
        Ok(bench)
    }

    /// The number for this effort.
    fn of<T>(&self, full: T, quick: T) -> T {
        if self.effort == Effort::Full { full } else { quick }
    }
}

pub(crate) fn run(options: Options) -> Outcome {
    check_names(&options.only, &catalogue::ACQUIRE)?;
    // One thread: a reply is not handed from one to another before it is seen.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(measure_all(options))
}

async fn measure_all(options: Options) -> Outcome {
    conditions::set_rcu_expedited(0)?;
    let begun = Instant::now();
    let bench = Bench::new(options.effort).await?;
    meta(&conditions::of_acquire(options.effort, &bench.ours.status().await?, STANDING)?);
    meta(&json!({ "seconds": { "set-up": begun.elapsed().as_secs() } }));
    let mut failed = 0;
    for measurement in Measurement::ALL {
        let figures = measurement.figures();
        if !is_wanted(&options.only, figures) {
            continue;
        }
        let begun = Instant::now();
        let results = measurement.run(&bench).await;
        failed += usize::from(!tell(figures, &results, begun));
    }
    if failed > 0 { Err(format!("{failed} of the measurements failed").into()) } else { Ok(()) }
}

/// What is measured in one go.
#[derive(Clone, Copy)]
enum Measurement {
    Hits,
    BurstsOfHits,
    Sustained,
    Crowd,
    Base,
    BurstsOfMisses,
    Live,
}

impl Measurement {
    /// In this order: the service is started anew where spares go on and off, and the last leaves most behind.
    const ALL: [Self; 7] = [
        Self::Hits,
        Self::BurstsOfHits,
        Self::Sustained,
        Self::Crowd,
        Self::Base,
        Self::BurstsOfMisses,
        Self::Live,
    ];

    fn figures(self) -> &'static [&'static Figure] {
        match self {
            Self::Hits => {
                &[&catalogue::HIT, &catalogue::HIT_P99, &catalogue::HIT_TO_REFLINK, &catalogue::OFFER]
            }
            Self::BurstsOfHits => &[&catalogue::HITS_AT_ONCE],
            Self::Sustained => &[&catalogue::SUSTAINED],
            Self::Crowd => &[&catalogue::CROWD],
            Self::Base => &[&catalogue::BASE],
            Self::BurstsOfMisses => &[&catalogue::BASES_AT_ONCE],
            Self::Live => &[&catalogue::LIVE, &catalogue::LIVE_MEMORY],
        }
    }

    async fn run(self, bench: &Bench) -> Outcome<Vec<Value>> {
        match self {
            Self::Hits => hits::measure(bench).await,
            Self::BurstsOfHits => Ok(vec![bursts::of_hits(bench).await?]),
            Self::Sustained => Ok(vec![sustained::measure(bench).await?]),
            Self::Crowd => Ok(vec![crowd::measure(bench).await?]),
            Self::Base => Ok(vec![base::measure(bench).await?]),
            Self::BurstsOfMisses => Ok(vec![bursts::of_misses(bench).await?]),
            Self::Live => live::measure(bench).await,
        }
    }
}

/// Disks made one after the other, and given back: how long each took.
async fn one_by_one(launcher: &impl Launcher, count: usize) -> Outcome<Samples> {
    let (mut samples, mut disks) = (Samples::default(), Vec::<Disk>::new());
    for _ in 0..count {
        let (disk, took) = launcher.launch().await?;
        samples.add_time(took);
        disks.push(disk);
    }
    disks::all_different(launcher.name(), &disks)?;
    launcher.clear(&disks).await?;
    Ok(samples)
}

/// Samples by what they are of, for a picture of how they are distributed, and for the page.
fn distributions(of: &BTreeMap<&str, &Samples>) -> Value {
    let rows: BTreeMap<_, _> = of.iter().map(|(name, samples)| (name, samples.values())).collect();
    for (name, samples) in of {
        eprintln!("  {name}: {}", samples.distribution());
    }
    let told: BTreeMap<_, _> = of.iter().map(|(name, samples)| (name, samples.distribution())).collect();
    json!({
        "pictures": { "latency": {
            "kind": "histograms", "title": "How long until there is a disk, one at a time", "unit": "ms", "rows": rows,
        } },
        "distributions_in_ms": told,
    })
}
