//! The benchmark `snapshots`: two snapshotters of one containerd on one host, round by round in turn.
//!
//! Results leave as lines: `@figure JSON` as soon as a figure is measured, `@meta JSON` for conditions, to be merged.
//! What is said on the way goes to stderr.

use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::{self, Figure},
    conditions, cycles, devices, memory, prepare, reclaim,
    side::Side,
    starts, unpack,
};

#[derive(Args)]
pub(crate) struct Options {
    /// The snapshotter under test, by the name that containerd has for it.
    #[arg(long, default_value = "cowshed")]
    ours: String,
    /// What it is compared with.
    #[arg(long, default_value = "devmapper")]
    peer: String,
    /// Only these figures.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// /sys/kernel/rcu_expedited, for both sides.
    #[arg(long, default_value_t = 0)]
    rcu_expedited: u8,
    /// Disks that each side has besides those that are measured.
    #[arg(long, default_value_t = 20)]
    standing: usize,
    /// How much is measured.
    #[arg(long, value_enum, default_value = "full")]
    effort: Effort,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Effort {
    /// What the figures need.
    Full,
    /// Less of everything, to see that it works: figures that this would make untrue keep their counts.
    Quick,
}

/// The two sides.
pub(crate) struct Sides {
    pub(crate) ours: Side,
    pub(crate) peer: Side,
    pub(crate) effort: Effort,
}

impl Sides {
    /// The number for this effort.
    pub(crate) fn of<T>(&self, full: T, quick: T) -> T {
        if self.effort == Effort::Full { full } else { quick }
    }
}

pub(crate) fn run(options: Options) -> Outcome {
    for name in &options.only {
        if !catalogue::ALL.iter().any(|figure| figure.name == name) {
            return Err(format!("there is no figure {name}").into());
        }
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure_all(options))
}

async fn measure_all(options: Options) -> Outcome {
    conditions::set_rcu_expedited(options.rcu_expedited)?;
    let before = devices::names()?.len();
    let sides = Sides {
        ours: Side::new("a", &options.ours, options.standing).await?,
        peer: Side::new("b", &options.peer, options.standing).await?,
        effort: options.effort,
    };
    meta(&conditions::of_host(&sides, options.standing).await?);
    let mut failed = 0;
    for figure in catalogue::ALL {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == figure.name) {
            continue;
        }
        let live = devices::names()?.len().saturating_sub(before);
        let (name, begun) = (figure.name, Instant::now());
        eprintln!("{name} …");
        match measure(figure, &sides).await {
            Ok(result) => {
                println!("@figure {result}");
                meta(&json!({ "sample_units": { name: figure.sample_unit } }));
            }
            Err(error) => {
                failed += 1;
                eprintln!("{name}: {error}");
                meta(&json!({ "failed": { name: error.to_string() } }));
            }
        }
        let seconds = begun.elapsed().as_secs();
        eprintln!("{name}: {seconds} s");
        meta(&json!({ "live_devices_at_start": { name: live }, "seconds": { name: seconds } }));
    }
    if failed > 0 {
        return Err(format!("{failed} figures could not be measured").into());
    }
    Ok(())
}

async fn measure(figure: &'static Figure, sides: &Sides) -> Outcome<Value> {
    match figure.name {
        name if name == catalogue::PREPARE.name => prepare::one_at_a_time(sides).await,
        name if name == catalogue::AT_ONCE.name => prepare::at_once(sides).await,
        name if name == catalogue::CYCLES.name => cycles::measure(sides).await,
        name if name == catalogue::RECLAIM.name => reclaim::measure(sides).await,
        name if name == catalogue::UNPACK.name => unpack::measure(sides).await,
        name if name == catalogue::PREPARE_STARTS.name => starts::of_prepare(sides).await,
        name if name == catalogue::REMOVE_STARTS.name => starts::of_remove(sides).await,
        name if name == catalogue::MEMORY.name => memory::measure(sides).await,
        name => Err(format!("nobody measures {name}").into()),
    }
}

/// Tells a condition.
pub(crate) fn meta(what: &Value) {
    println!("@meta {what}");
}
