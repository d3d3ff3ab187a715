//! The benchmarks' load generator, run in the test host by `tests/bench`, and what makes BENCHMARKS.md of its results.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program whose output is its purpose")]

mod acquire;
mod catalogue;
mod conditions;
#[path = "../support/cowshed.rs"]
mod cowshed;
mod cycles;
mod devices;
mod execs;
mod gc;
mod images;
mod memory;
mod pictures;
mod plot;
mod prepare;
mod reclaim;
mod render;
mod samples;
mod side;
mod snapshots;
mod starts;
mod unpack;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// What everything here returns.
pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser)]
#[command(name = "cowshed-bench", about = "The benchmarks' load generator")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Two snapshotters of one containerd, side by side.
    Snapshots(snapshots::Options),
    /// Pulls, by Cowshed and by `ctr`.
    Images(images::Options),
    /// Disks for VMs, by Cowshed and by other means.
    Acquire(acquire::Options),
    /// What is released comes back, by Cowshed and by containerd alone.
    Gc(gc::Options),
    /// Writes BENCHMARKS.md and its plots from results.
    Render {
        /// Where the results NAME.json and NAME.meta.json are.
        results: PathBuf,
        /// The file to write.
        #[arg(long)]
        page: PathBuf,
        /// The directory for plots, below the page's.
        #[arg(long)]
        plots: PathBuf,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Snapshots(options) => snapshots::run(options),
        Verb::Images(options) => images::run(options),
        Verb::Acquire(options) => acquire::run(options),
        Verb::Gc(options) => gc::run(options),
        Verb::Render { results, page, plots } => render::render(&results, &page, &plots),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cowshed-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
