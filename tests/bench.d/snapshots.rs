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
    samples::Samples,
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
    /// Less of everything, to see that it works. What comes of it is for nobody else's eyes.
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

    /// Rounds of both sides in turn, each first in every other one: ours, peer, peer, ours, …
    pub(crate) async fn in_turn(
        &self,
        rounds: usize,
        round: impl AsyncFn(&Side) -> Outcome<Samples>,
    ) -> Outcome<(Samples, Samples)> {
        let (mut ours, mut peer) = (Samples::default(), Samples::default());
        for number in 0..rounds {
            let mut turns = [(&self.ours, &mut ours), (&self.peer, &mut peer)];
            if number % 2 == 1 {
                turns.reverse();
            }
            for (side, samples) in turns {
                samples.extend(round(side).await?);
            }
        }
        Ok((ours, peer))
    }
}

pub(crate) fn run(options: Options) -> Outcome {
    check_names(&options.only, &catalogue::ALL)?;
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
    for measurement in Measurement::ALL {
        let figures = measurement.figures();
        if !is_wanted(&options.only, figures) {
            continue;
        }
        if matches!(measurement, Measurement::Memory) && options.ours == options.peer {
            eprintln!(
                "{}: not measured, cowshed serve has no part in {}",
                catalogue::MEMORY.name,
                options.ours
            );
            continue;
        }
        let live = devices::names()?.len().saturating_sub(before);
        let begun = Instant::now();
        let results = measurement.run(&sides).await;
        failed += usize::from(!tell(figures, &results, begun));
        for figure in figures {
            meta(&json!({ "live_devices_at_start": { figure.name: live } }));
        }
    }
    if failed > 0 {
        return Err(format!("{failed} of the measurements failed").into());
    }
    Ok(())
}

/// What is measured in one go.
#[derive(Clone, Copy)]
enum Measurement {
    OneAtATime,
    AtOnce,
    Cycles,
    Unpack,
    Starts,
    Reclaim,
    Memory,
}

impl Measurement {
    /// In this order: the last leave most behind, and are the first to be lost if time runs out.
    const ALL: [Self; 7] = [
        Self::OneAtATime,
        Self::AtOnce,
        Self::Cycles,
        Self::Unpack,
        Self::Starts,
        Self::Reclaim,
        Self::Memory,
    ];

    fn figures(self) -> &'static [&'static Figure] {
        match self {
            Self::OneAtATime => &[&catalogue::PREPARE],
            Self::AtOnce => &[&catalogue::AT_ONCE],
            Self::Cycles => &[&catalogue::CYCLES],
            Self::Unpack => &[&catalogue::UNPACK],
            Self::Starts => &[&catalogue::PREPARE_STARTS, &catalogue::REMOVE_STARTS],
            Self::Reclaim => &[&catalogue::RECLAIM],
            Self::Memory => &[&catalogue::MEMORY],
        }
    }

    async fn run(self, sides: &Sides) -> Outcome<Vec<Value>> {
        let result = match self {
            Self::OneAtATime => prepare::one_at_a_time(sides).await,
            Self::AtOnce => prepare::at_once(sides).await,
            Self::Cycles => cycles::measure(sides).await,
            Self::Unpack => unpack::measure(sides).await,
            Self::Starts => return starts::measure(sides).await,
            Self::Reclaim => reclaim::measure(sides).await,
            Self::Memory => memory::measure(sides).await,
        };
        Ok(vec![result?])
    }
}

/// Fails if one of the names is none of these figures'.
pub(crate) fn check_names(only: &[String], all: &[&Figure]) -> Outcome {
    match only.iter().find(|name| !all.iter().any(|figure| figure.name == **name)) {
        Some(name) => Err(format!("there is no figure {name}").into()),
        None => Ok(()),
    }
}

/// Whether one of the figures is asked for: by name, or as all are.
pub(crate) fn is_wanted(only: &[String], figures: &[&Figure]) -> bool {
    only.is_empty() || figures.iter().any(|figure| only.iter().any(|name| name == figure.name))
}

/// Tells what a measurement, begun then, has come to; whether it was made.
pub(crate) fn tell(figures: &[&Figure], results: &Outcome<Vec<Value>>, begun: Instant) -> bool {
    for result in results.iter().flatten() {
        println!("@figure {result}");
    }
    let seconds = begun.elapsed().as_secs();
    let names = figures.iter().map(|figure| figure.name).collect::<Vec<_>>().join(", ");
    match results {
        Ok(_) => eprintln!("{names}: {seconds} s"),
        Err(error) => eprintln!("{names}: {error}"),
    }
    for figure in figures {
        let name = figure.name;
        meta(&json!({ "sample_units": { name: figure.sample_unit }, "seconds": { name: seconds } }));
        if let Err(error) = results {
            meta(&json!({ "failed": { name: error.to_string() } }));
        }
    }
    results.is_ok()
}

/// Tells a condition.
pub(crate) fn meta(what: &Value) {
    println!("@meta {what}");
}
