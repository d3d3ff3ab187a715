//! The end-to-end suite. Runs inside the test host, as root, after `cowshed-host up`; what it asks of Cowshed it asks as
//! its users do, and what it believes it has seen in containerd, device-mapper or the registry's log.

mod bad_input;
mod broken_pool;
mod broken_state;
mod fillup;
mod gc;
mod guest;
mod held;
mod identity;
mod images;
mod layers;
mod lifecycle;
mod lvm;
mod odd_registries;
mod pins;
mod prefetch;
mod private_registry;
mod pulls;
mod release;
mod rescue;
mod service;
mod shared;
mod signatures;
mod snapshotter;
mod spares;
mod stampede;
mod support;
mod terms;
mod upkeep;
mod verification;
mod watching;

use std::{
    process::ExitCode,
    sync::Mutex,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};

use support::{Outcome, audit};

type Test = (&'static str, fn() -> Outcome);

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // All tests share one host.
    arguments.test_threads = Some(1);
    // Another snapshotter is not ours to test.
    let is_own = support::cow::snapshotter() == "cowshed";
    let own = |tests| if is_own { tests } else { &[][..] };
    let groups: [(&str, &[Test]); 30] = [
        ("lifecycle", lifecycle::TESTS),
        ("held", held::TESTS),
        ("release", release::TESTS),
        ("terms", terms::TESTS),
        ("guest", guest::TESTS),
        ("identity", identity::TESTS),
        ("shared", shared::TESTS),
        ("watching", watching::TESTS),
        ("upkeep", upkeep::TESTS),
        ("images", images::TESTS),
        ("layers", layers::TESTS),
        ("pulls", pulls::TESTS),
        ("pins", pins::TESTS),
        ("prefetch", prefetch::TESTS),
        ("spares", spares::TESTS),
        ("gc", own(gc::TESTS)),
        ("snapshotter", own(snapshotter::TESTS)),
        ("bad_input", bad_input::TESTS),
        ("odd_registries", odd_registries::TESTS),
        ("private_registry", private_registry::TESTS),
        ("verification", verification::TESTS),
        ("signatures", signatures::TESTS),
        ("broken_pool", broken_pool::TESTS),
        ("broken_state", broken_state::TESTS),
        ("lvm", own(lvm::TESTS)),
        ("rescue", rescue::TESTS),
        ("rescue", own(rescue::OWN)),
        ("service", service::TESTS),
        ("stampede", stampede::TESTS),
        ("growth", own(gc::GROWTH)),
    ];
    let trials = groups.iter().flat_map(|(group, tests)| {
        tests.iter().map(move |(name, test)| {
            let name = format!("{group}::{name}");
            Trial::test(name.clone(), move || timed(name, *test))
        })
    });
    // These want another pool: see `tests/fillup`.
    let small = fillup::TESTS.iter().map(|(name, test)| {
        let name = format!("fillup::{name}");
        Trial::test(name.clone(), move || timed(name, *test)).with_ignored_flag(true)
    });
    let conclusion = libtest_mimic::run(&arguments, trials.chain(small).collect());
    tell_slowest();
    conclusion.exit_code()
}

static DURATIONS: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

fn timed(name: String, test: fn() -> Outcome) -> Outcome {
    let begun = Instant::now();
    let outcome = audit::around(test);
    if let Err(error) = &outcome {
        tell_at_once(&name, error);
    }
    if let Ok(mut durations) = DURATIONS.lock() {
        durations.push((begun.elapsed(), name));
    }
    outcome
}

/// What the runner tells when all is over; what has failed by this failure is easier to read after it.
#[allow(clippy::print_stdout, reason = "like the results")]
fn tell_at_once(name: &str, error: &Failed) {
    println!("\n{name}: {}", error.message().unwrap_or("it has failed"));
}

/// Where the suite's time goes.
#[allow(clippy::print_stdout, reason = "like the results")]
fn tell_slowest() {
    let Ok(mut durations) = DURATIONS.lock() else { return };
    durations.sort();
    let told: Vec<_> = durations.iter().rev().take(20).collect();
    for (duration, name) in told.iter().filter(|(duration, _)| duration.as_secs() > 0) {
        println!("{:4} s  {name}", duration.as_secs());
    }
}
