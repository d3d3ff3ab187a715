//! LVM2, which owns the pool's volume group: asked, and told to extend the pool, in a short-lived child of our own binary.
//!
//! `child` is what runs there, `run` starts it, waits for a bounded time and kills it, `error` tells what went wrong, `report`
//! reads what LVM2 prints, `sizing` is arithmetic, `extend` has the order of an extension.
//!
//! A pool is found by its device-mapper uuid, which has those of its group and volume in it, never by its name.

mod child;
mod error;
mod extend;
mod report;
mod run;
pub mod sizing;

pub use child::run as run_child;
pub use error::LvmError;
pub use extend::{Extended, Part, Room, extend, room, settle};
pub use report::{Disk, Group, PoolVolume, dm_name};
pub use run::{CHILD, Runner};

/// The volume groups of the host.
///
/// # Errors
/// See [`LvmError`].
pub async fn groups(runner: &Runner) -> Result<Vec<Group>, LvmError> {
    report::groups(&runner.ask(&asked("vgs", report::GROUP_FIELDS)).await?)
}

/// The thin pools of the host that LVM2 knows.
///
/// # Errors
/// See [`LvmError`].
pub async fn pools(runner: &Runner) -> Result<Vec<PoolVolume>, LvmError> {
    report::pools(&runner.ask(&asked("lvs", report::POOL_FIELDS)).await?)
}

/// The disks of the host that are LVM2's.
///
/// # Errors
/// See [`LvmError`].
pub async fn disks(runner: &Runner) -> Result<Vec<Disk>, LvmError> {
    report::disks(&runner.ask(&asked("pvs", report::DISK_FIELDS)).await?)
}

/// The one of LVM2's pools that device-mapper knows by this uuid; if it is not active and has none, by this name.
///
/// # Errors
/// If it is none of LVM2's, or LVM2 does not answer.
pub async fn pool(runner: &Runner, dm_name: &str, dm_uuid: Option<&str>) -> Result<PoolVolume, LvmError> {
    let pools = pools(runner).await?;
    let is_it = |pool: &&PoolVolume| match dm_uuid {
        Some(uuid) => uuid.starts_with(&pool.dm_uuid),
        None => pool.dm_name() == dm_name,
    };
    let found = pools.iter().find(is_it).cloned();
    found.ok_or_else(|| {
        let known: Vec<String> = pools.iter().map(PoolVolume::path).collect();
        let known = if known.is_empty() { "it has none".to_owned() } else { format!("it has {}", known.join(", ")) };
        LvmError::Unfit(if dm_uuid.is_some_and(|uuid| uuid.starts_with("LVM-")) {
            format!(
                "the thin pool {dm_name} is LVM2's, which does not see it ({known}): it cannot open its disks, for they are filtered, or a \
                 hardened unit forbids it (deploy/README.md: grow.conf)"
            )
        } else {
            format!("the thin pool {dm_name} is none of LVM2's ({known}): who has made it has to extend it")
        })
    })
}

/// A report's command.
fn asked<'a>(command: &'a str, fields: &'a str) -> [&'a str; 8] {
    [command, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields]
}
