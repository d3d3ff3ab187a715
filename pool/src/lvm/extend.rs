//! Extends a pool from its volume group.
//!
//! ```text
//! look (kernel, LVM2) ─► mend what an earlier one has left ─► room? ─► lvextend in the child ─► look again
//!                                                                      └ failed, killed: what stands still goes on
//! ```
//!
//! LVM2 suspends the pool, and with it all its disks, loads the new table, writes down that it counts, and resumes. Killed in
//! between, it leaves them standing still: they are put to work again with the table that they had, and LVM2 is told
//! to bring them to what it has written down (`lvchange --refresh`), now and before the next extension.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    error::LvmError,
    pool,
    report::{Group, PoolVolume},
    run::Runner,
    sizing::{METADATA_MAX, up},
};
use crate::device::{
    Access,
    stack::{ActivePool, Stack},
};

/// Pause between two looks whether the pool stands still.
const LOOK: Duration = Duration::from_millis(2);
/// Another LVM2 command may have it stand still for so long; then whoever has stopped it is gone.
const OTHERS: Duration = Duration::from_secs(2);

/// What of a pool is extended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Where disks' blocks are.
    Data,
    /// Where it is written which block is whose.
    Metadata,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
        })
    }
}

/// How far a pool can grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Its volume group.
    pub group: Group,
    /// The pool, as LVM2 has it.
    pub pool: PoolVolume,
}

impl Room {
    /// What this part can grow to, in bytes, if the other one stays as it is.
    pub fn most(&self, part: Part) -> u64 {
        let free = self.group.free_bytes / self.group.extent_bytes * self.group.extent_bytes;
        match part {
            Part::Data => self.pool.data_bytes.saturating_add(free),
            // As much is kept in reserve, to repair it into.
            Part::Metadata => self
                .pool
                .metadata_bytes
                .saturating_add(free / 2)
                .min(up(METADATA_MAX, self.group.extent_bytes)),
        }
    }

    fn now(&self, part: Part) -> u64 {
        match part {
            Part::Data => self.pool.data_bytes,
            Part::Metadata => self.pool.metadata_bytes,
        }
    }
}

/// What an extension has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extended {
    /// Of what.
    pub part: Part,
    /// Its size before, in bytes.
    pub from_bytes: u64,
    /// Its size now, in bytes.
    pub to_bytes: u64,
    /// How long the pool, and all its disks, stood still.
    pub stall: Duration,
    /// How long all of it took.
    pub took: Duration,
}

/// How far the pool with this device-mapper name can grow.
///
/// # Errors
/// See [`LvmError`].
pub async fn room(runner: &Runner, name: &str) -> Result<Room, LvmError> {
    let active = look(name).await?;
    let pool = pool(runner, name, active.as_ref().map(|active| active.uuid.as_str())).await?;
    let groups = super::groups(runner).await?;
    let group = groups.into_iter().find(|group| group.uuid_bare() == pool.group_uuid());
    let group = group
        .ok_or_else(|| LvmError::Unfit(format!("LVM2 does not tell of the volume group {}", pool.group)))?;
    Ok(Room { group, pool })
}

/// Extends a part of the active pool with this device-mapper name to this many bytes, rounded up to whole extents; to have
/// that much already is success.
///
/// # Errors
/// See [`LvmError`]. The pool works as before then, or is larger, unless the kernel does not let it go on.
pub async fn extend(runner: &Runner, name: &str, part: Part, to_bytes: u64) -> Result<Extended, LvmError> {
    let begun = Instant::now();
    settle(runner, name).await?;
    let room = room(runner, name).await?;
    let path = room.pool.path();
    let active = look(name).await?;
    let active = active
        .ok_or_else(|| LvmError::Unfit(format!("the thin pool {name} is not active: lvchange -ay {path}")))?;
    if lags(&active, &room.pool) {
        runner.run(&["lvchange", "--refresh", &path]).await?;
    }
    let (from_bytes, to_bytes) = (room.now(part), up(to_bytes, room.group.extent_bytes));
    if to_bytes <= from_bytes {
        return Ok(Extended {
            part,
            from_bytes,
            to_bytes: from_bytes,
            stall: Duration::ZERO,
            took: begun.elapsed(),
        });
    }
    decide(&room, part, to_bytes)?;
    let size = format!("{to_bytes}b");
    let option = match part {
        Part::Data => "--size",
        Part::Metadata => "--poolmetadatasize",
    };
    let watch = Watch::begin(name);
    let ran = runner.run(&["lvextend", option, &size, &path]).await;
    if let Err(error) = ran {
        let mended = mend(runner, name, &path).await;
        // What it was killed in may have been done all the same.
        watch.end().await;
        return Err(match mended {
            Ok(()) => error,
            Err(second) => LvmError::Unfit(format!("{error} (and then: {second})")),
        });
    }
    let stall = watch.end().await;
    Ok(Extended { part, from_bytes, to_bytes, stall, took: begun.elapsed() })
}

/// Whether the volume group has what is asked for, and may be changed.
fn decide(room: &Room, part: Part, to_bytes: u64) -> Result<(), LvmError> {
    let Room { group, pool } = room;
    let name = &group.name;
    if group.missing > 0 {
        return Err(LvmError::Unfit(format!(
            "the volume group {name} lacks {} of its {} disks, and LVM2 changes nothing in it: attach what is missing, or (its \
             data is lost) vgreduce --removemissing {name}",
            group.missing, group.disks
        )));
    }
    if group.access == Access::ReadOnly {
        return Err(LvmError::Unfit(format!(
            "the volume group {name} is read-only: vgchange --permission rw {name}"
        )));
    }
    if part == Part::Metadata && to_bytes > up(METADATA_MAX, group.extent_bytes) {
        return Err(LvmError::Unfit(format!(
            "the pool {}'s metadata has {} bytes, and dm-thin uses no more than {METADATA_MAX}: a new pool is needed",
            pool.path(),
            pool.metadata_bytes
        )));
    }
    let needed = to_bytes.saturating_sub(room.now(part));
    if needed > group.free_bytes {
        return Err(LvmError::NoRoom { group: name.clone(), free: group.free_bytes, needed });
    }
    Ok(())
}

/// Whether the kernel's pool is smaller than what LVM2 has written down, as after a crash.
fn lags(active: &ActivePool, written: &PoolVolume) -> bool {
    let chunk = written.chunk_bytes.max(1);
    let usage = &active.usage;
    // A pool that has failed tells no sizes. The kernel does not use all of a large metadata volume.
    usage.data_total > 0
        && (usage.data_total < written.data_bytes / chunk * chunk
            || usage.metadata_total < written.metadata_bytes.min(METADATA_MAX))
}

/// Puts to work what stands still because whoever has stopped it is gone.
///
/// # Errors
/// If the kernel does not let it go on.
pub async fn settle(runner: &Runner, name: &str) -> Result<(), LvmError> {
    let begun = Instant::now();
    loop {
        let pool = name.to_owned();
        if blocking(move || Stack::new()?.still(&pool)).await?.is_empty() {
            return Ok(());
        }
        if begun.elapsed() >= OTHERS {
            break;
        }
        tokio::time::sleep(LOOK * 50).await;
    }
    // Whoever has stopped it may be at work still: then LVM2 is locked.
    let found = pool(runner, name, look(name).await?.as_ref().map(|active| active.uuid.as_str())).await;
    if let Err(locked @ LvmError::Locked { .. }) = found {
        return Err(locked);
    }
    let still = name.to_owned();
    let went_on = blocking(move || Stack::new()?.go_on(&still)).await?;
    tracing::warn!(?went_on, "devices stood still because an LVM2 command has ended in between; they go on");
    runner.run(&["lvchange", "--refresh", &found?.path()]).await.map(drop)
}

/// The same, for what our own child has just left.
async fn mend(runner: &Runner, name: &str, path: &str) -> Result<(), LvmError> {
    let pool = name.to_owned();
    let went_on = blocking(move || Stack::new()?.go_on(&pool)).await?;
    if went_on.is_empty() {
        return Ok(());
    }
    tracing::warn!(?went_on, "an extension has ended in between; what stood still goes on");
    runner.run(&["lvchange", "--refresh", path]).await.map(drop)
}

async fn look(name: &str) -> Result<Option<ActivePool>, LvmError> {
    let name = name.to_owned();
    blocking(move || Stack::new()?.pool(&name)).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, crate::device::DeviceError> + Send + 'static,
) -> Result<T, LvmError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| LvmError::Unfit(format!("looking at the pool: {e}")))?.map_err(LvmError::from)
}

/// Measures how long a pool stands still.
struct Watch {
    over: Arc<AtomicBool>,
    measured: tokio::task::JoinHandle<Duration>,
}

impl Watch {
    fn begin(name: &str) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (ends, name) = (over.clone(), name.to_owned());
        let measured = tokio::task::spawn_blocking(move || {
            let Ok(stack) = Stack::new() else { return Duration::ZERO };
            let mut stall = Duration::ZERO;
            let mut before = Instant::now();
            while !ends.load(Ordering::Relaxed) {
                let now = Instant::now();
                if stack.stands_still(&name).unwrap_or(false) {
                    stall += now.duration_since(before);
                }
                before = now;
                pause();
            }
            stall
        });
        Self { over, measured }
    }

    async fn end(self) -> Duration {
        self.over.store(true, Ordering::Relaxed);
        self.measured.await.unwrap_or_default()
    }
}

#[allow(clippy::disallowed_methods, reason = "in a thread of its own")]
fn pause() {
    std::thread::sleep(LOOK);
}

impl Group {
    fn uuid_bare(&self) -> String {
        self.uuid.replace('-', "")
    }
}

impl PoolVolume {
    /// That of its volume group, which its own begins with.
    fn group_uuid(&self) -> String {
        self.dm_uuid.trim_start_matches("LVM-").chars().take(32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{PoolMode, PoolUsage};

    const GIB: u64 = 1 << 30;
    const EXTENT: u64 = 4 << 20;

    fn room_of(free_bytes: u64) -> Room {
        let group = Group {
            name: "vg".to_owned(),
            uuid: "u".to_owned(),
            size_bytes: 20 * GIB,
            free_bytes,
            extent_bytes: EXTENT,
            missing: 0,
            access: Access::ReadWrite,
            disks: 2,
            volumes: 1,
        };
        let pool = PoolVolume {
            group: "vg".to_owned(),
            name: "pool".to_owned(),
            dm_uuid: format!("LVM-{}{}", "g".repeat(32), "v".repeat(32)),
            data_bytes: 10 * GIB,
            metadata_bytes: GIB / 8,
            chunk_bytes: 65_536,
            zeroing: true,
            discards: "passdown".to_owned(),
            transaction_id: 0,
            when_full: "queue".to_owned(),
            volumes: 0,
            monitored: false,
            active: true,
            health: String::new(),
            metadata_volume: "pool_tmeta".to_owned(),
        };
        Room { group, pool }
    }

    #[test]
    fn a_part_grows_as_far_as_the_group_has_room() {
        let room = room_of(4 * GIB + 1);
        assert_eq!(room.most(Part::Data), 14 * GIB);
        assert_eq!(room.most(Part::Metadata), GIB / 8 + 2 * GIB);
        assert_eq!(room_of(100 * GIB).most(Part::Metadata), METADATA_MAX);
        assert_eq!(room.pool.group_uuid(), "g".repeat(32));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_way_out() {
        let refused =
            |room: &Room, part, to| decide(room, part, to).err().map(|e| e.to_string()).unwrap_or_default();
        let room = room_of(2 * GIB);
        assert_eq!(refused(&room, Part::Data, 12 * GIB), "");
        assert!(refused(&room, Part::Data, 12 * GIB + EXTENT).contains("vgextend vg"));
        let mut missing = room.clone();
        missing.group.missing = 1;
        assert!(refused(&missing, Part::Data, 11 * GIB).contains("lacks 1 of its 2 disks"));
        let mut read_only = room.clone();
        read_only.group.access = Access::ReadOnly;
        assert!(refused(&read_only, Part::Data, 11 * GIB).contains("--permission rw vg"));
        assert!(refused(&room_of(100 * GIB), Part::Metadata, 16 * GIB).contains("a new pool"));
    }

    #[test]
    fn a_kernel_that_lags_behind_is_seen() {
        let room = room_of(0);
        let with = |data_total, metadata_total| ActivePool {
            uuid: String::new(),
            usage: PoolUsage {
                block_bytes: 64 << 10,
                name: "vg-pool".to_owned(),
                data_used: 0,
                data_total,
                metadata_used: 0,
                metadata_total,
                mode: PoolMode::ReadWrite,
                zeroing: true,
            },
            behaviour: None,
            suspended: false,
        };
        for (data, metadata, expected) in
            [(10 * GIB, GIB / 8, false), (9 * GIB, GIB / 8, true), (10 * GIB, GIB / 16, true), (0, 0, false)]
        {
            assert_eq!(lags(&with(data, metadata), &room.pool), expected, "{data} {metadata}");
        }
    }
}
