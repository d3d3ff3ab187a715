//! The `cowshed` command.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    cowshed::cli::Cli::parse().run()
}
