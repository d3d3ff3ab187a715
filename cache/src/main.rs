//! The `cowshed` command.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    give_memory_back();
    cowshed::cli::Cli::parse().run()
}

/// Has glibc give back to the host what is not needed any more. By itself it keeps what each of many threads has had while it
/// inflated a layer, for good: buffers of some megabytes, in an arena for each thread. (78 MiB after the first hundred disks of
/// five images became 33 MiB.)
#[cfg(target_env = "gnu")]
fn give_memory_back() {
    // Larger ones are mapped, each by itself, and unmapped.
    const MAPPED_BYTES: i32 = 256 << 10;
    const ARENAS: i32 = 2;
    #[expect(unsafe_code, reason = "glibc has no other way to be told, but the environment")]
    // SAFETY: called before there are threads; each call sets a number, or refuses it.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

#[cfg(not(target_env = "gnu"))]
fn give_memory_back() {}
