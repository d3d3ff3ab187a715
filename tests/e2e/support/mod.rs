//! What the tests share: commands and their results, polling, the audit, clients, second services, fake registries.

pub(crate) mod api;
pub(crate) mod audit;
pub(crate) mod command;
pub(crate) mod containerd;
pub(crate) mod cow;
#[path = "../../support/cowshed.rs"]
pub(crate) mod cowshed;
pub(crate) mod fake_image;
pub(crate) mod fake_registry;
pub(crate) mod guest;
pub(crate) mod registry_log;
pub(crate) mod second;
#[path = "../../support/snapshots.rs"]
pub(crate) mod snapshots;
pub(crate) mod stack;
pub(crate) mod thin_metadata;
pub(crate) mod tree;

use std::time::{Duration, Instant};

use libtest_mimic::Failed;

/// What tests and their helpers return.
pub(crate) type Outcome<T = ()> = Result<T, Failed>;

/// Fails the test unless the condition holds.
macro_rules! check {
    ($holds:expr, $($what:tt)+) => {
        let holds: bool = $holds;
        if !holds {
            return Err(libtest_mimic::Failed::from(format!($($what)+)));
        }
    };
}
pub(crate) use check;

/// Fails the test unless both are the same, and shows them.
macro_rules! same {
    ($left:expr, $right:expr, $($what:tt)+) => {
        match (&$left, &$right) {
            (left, right) => {
                if left != right {
                    let what = format!($($what)+);
                    return Err(libtest_mimic::Failed::from(format!("{what}: {left:?} is not {right:?}")));
                }
            }
        }
    };
}
pub(crate) use same;

/// Long enough for an emulated host; what is waited for is a condition.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Asks until there is an answer. The last refusal is the failure's text.
pub(crate) fn wait_for<T>(what: &str, ask: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    wait_at_most(PATIENCE, what, ask)
}

/// The same with another patience.
pub(crate) fn wait_at_most<T>(
    patience: Duration,
    what: &str,
    mut ask: impl FnMut() -> Outcome<T>,
) -> Outcome<T> {
    let deadline = Instant::now() + patience;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(refusal) if Instant::now() > deadline => {
                let refusal = refusal.message().unwrap_or_default();
                return Err(format!("waited {patience:?} in vain for {what}: {refusal}").into());
            }
            Err(_) => pause(),
        }
    }
}

/// The pause between two looks at a condition.
#[allow(clippy::disallowed_methods, reason = "tests block; no runtime's thread is held up")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(50));
}
