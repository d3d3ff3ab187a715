//! The `cowshed` command.

use std::process::ExitCode;

use clap::Parser as _;

/// Gives back to the host what is not needed any more: glibc's keeps what each thread that has inflated a layer has had.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    cowshed::cli::Cli::parse().run()
}
