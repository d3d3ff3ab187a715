//! Repairs a pool's metadata, with the pool offline and what was there kept.
//!
//! ```text
//! nobody has a disk open ─► disks away, pool inactive ─► metadata alone, read-only ─► BACKUP ─► thin_check
//!     ─► good: active again
//!     ─► not: activated with thin_check --auto-repair, which sets leaked blocks free, and no more
//!         ─► not: lvconvert --repair: thin_repair into LVM2's reserve; the old metadata stay as POOL_meta0
//!             ─► active again
//! ```
//!
//! Each step is told before it is done, and whatever fails leaves the pool as it was, inactive.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cowshed_pool::{
    device::stack::ActiveThin,
    lvm::{self, LvmError, PoolVolume, Runner},
};
use tokio::process::Command;

use super::{
    Refusal, Result,
    create::{CHECKED, Mode},
    facts::on_stack,
};

/// Large metadata take their time.
const PATIENCE: Duration = Duration::from_secs(4 * 3600);
/// Copied at a time, in bytes.
const CHUNK: usize = 1 << 20;

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repaired {
    /// Nothing was wrong.
    Sound,
    /// Blocks that nobody had were set free.
    Freed,
    /// Its metadata were made anew of what could be read.
    Rebuilt,
    /// Steps were only told.
    Told,
}

/// Walks through it. `tell` hears of each step before it is done.
///
/// # Errors
/// Says which step has failed, where the backup is, and what else can be tried.
pub async fn repair(
    runner: &Runner,
    name: &str,
    backup: &Path,
    mode: Mode,
    tell: &dyn Fn(&str),
) -> Result<Repaired> {
    let asked = name.to_owned();
    let (active, thins) = on_stack(move |stack| {
        let active = stack.pool(&asked).ok().flatten();
        Ok((active, stack.thins(&asked)?))
    })
    .await?;
    let pool = lvm::pool(runner, name, active.as_ref().map(|active| active.uuid.as_str())).await?;
    refuse_open(&pool, &thins)?;
    let work =
        Work { runner: runner.clone().with_limit(PATIENCE), pool, backup: backup.to_owned(), mode, tell };
    work.take_offline(name, &thins).await?;
    let damage = work.look_at_metadata().await?;
    if mode == Mode::Tell {
        work.tell_the_rest();
        return Ok(Repaired::Told);
    }
    let repaired = match damage {
        None => {
            tell("thin_check finds nothing wrong");
            work.activate().await?;
            Repaired::Sound
        }
        Some(damage) => {
            tell(&format!("thin_check says: {damage}"));
            work.mend().await?
        }
    };
    Ok(repaired)
}

/// Disks that are open are in use: what is repaired under them is damaged by them.
fn refuse_open(pool: &PoolVolume, thins: &[ActiveThin]) -> Result<()> {
    let open: Vec<&str> = thins.iter().filter(|thin| thin.open > 0).map(|thin| thin.name.as_str()).collect();
    if open.is_empty() {
        return Ok(());
    }
    let shown = open.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    let more = if open.len() > 5 { format!(" and {} more", open.len() - 5) } else { String::new() };
    Err(Refusal::unfit(format!(
        "the pool {} has disks that are open ({shown}{more}): stop their VMs, unmount them; `lsblk` and `fuser -v` show who has them",
        pool.path()
    )))
}

struct Work<'a> {
    runner: Runner,
    pool: PoolVolume,
    backup: PathBuf,
    mode: Mode,
    tell: &'a dyn Fn(&str),
}

impl Work<'_> {
    async fn lvm(&self, configuration: &str, words: &[&str]) -> Result<(), LvmError> {
        (self.tell)(&format!("lvm {}", words.join(" ")));
        if self.mode == Mode::Tell {
            return Ok(());
        }
        self.runner.run_with(configuration, words).await.map(drop)
    }

    async fn take_offline(&self, name: &str, thins: &[ActiveThin]) -> Result<()> {
        for thin in thins {
            (self.tell)(&format!("dmsetup remove {}", thin.name));
            if self.mode == Mode::Do {
                let thin = thin.name.clone();
                on_stack(move |stack| stack.remove(&thin)).await?;
            }
        }
        let path = self.pool.path();
        self.lvm("", &["lvchange", "--activate", "n", &path]).await?;
        let asked = name.to_owned();
        let is_there =
            self.mode == Mode::Do && on_stack(move |stack| Ok(stack.pools()?.contains(&asked))).await?;
        if is_there {
            return Err(Refusal::unfit(format!(
                "the pool {path} is active still: `dmsetup ls --tree` shows what is on it"
            )));
        }
        Ok(())
    }

    /// Keeps a copy of the metadata, and returns what thin_check has against them.
    async fn look_at_metadata(&self) -> Result<Option<String>> {
        let PoolVolume { group, metadata_volume, .. } = &self.pool;
        let volume = format!("{group}/{metadata_volume}");
        self.lvm("", &["lvchange", "--yes", "--activate", "y", &volume]).await?;
        let looked = self.copy_and_check(&lvm::dm_name(group, metadata_volume)).await;
        let closed = self.lvm("", &["lvchange", "--activate", "n", &volume]).await;
        let damage = looked?;
        closed?;
        Ok(damage)
    }

    async fn copy_and_check(&self, name: &str) -> Result<Option<String>> {
        let path = PathBuf::from(format!("/dev/mapper/{name}"));
        (self.tell)(&format!("cp --sparse=always {} {}", path.display(), self.backup.display()));
        (self.tell)(&format!("thin_check {}", path.display()));
        if self.mode == Mode::Tell {
            return Ok(None);
        }
        let (from, to) = (path.clone(), self.backup.clone());
        let copied = tokio::task::spawn_blocking(move || copy(&from, &to)).await;
        copied.map_err(|e| Refusal::failed(e.to_string()))?.map_err(|e| {
            Refusal::failed(format!(
                "keeping {} in {}: {e}; --backup names another file",
                path.display(),
                self.backup.display()
            ))
        })?;
        thin_check(&path).await
    }

    async fn activate(&self) -> Result<(), LvmError> {
        self.lvm(CHECKED, &["lvchange", "--activate", "y", &self.pool.path()]).await
    }

    /// The least that helps.
    async fn mend(&self) -> Result<Repaired> {
        if self.activate().await.is_ok() {
            return Ok(Repaired::Freed);
        }
        let path = self.pool.path();
        let hopeless = |error: LvmError| Refusal {
            message: format!(
                "{error}. The metadata as they were are in {}; thin_dump --repair and thin_restore (thin-provisioning-tools) may \
                 make something of them",
                self.backup.display()
            ),
            status: crate::exit::POOL_DAMAGED,
        };
        self.lvm("", &["lvconvert", "--yes", "--repair", &path]).await.map_err(hopeless)?;
        self.activate().await.map_err(hopeless)?;
        Ok(Repaired::Rebuilt)
    }

    fn tell_the_rest(&self) {
        let path = self.pool.path();
        (self.tell)("and then, if thin_check finds nothing, or nothing but blocks that nobody has:");
        (self.tell)(&format!("lvm lvchange --activate y {path}"));
        (self.tell)("else:");
        (self.tell)(&format!("lvm lvconvert --yes --repair {path}"));
        (self.tell)(&format!("lvm lvchange --activate y {path}"));
    }
}

async fn thin_check(path: &Path) -> Result<Option<String>> {
    let ran = Command::new("thin_check").arg(path).stdin(Stdio::null()).output().await;
    let ran = ran.map_err(|e| {
        Refusal::failed(format!("thin_check: {e}; it is in the package thin-provisioning-tools"))
    })?;
    if ran.status.success() {
        return Ok(None);
    }
    let said = [ran.stdout, ran.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    // Its progress comes first.
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let lines = &lines[lines.len().saturating_sub(3)..];
    Ok(Some(lines.join("; ")))
}

/// Copies a device to a new file, with holes where there is nothing but zeros, and makes it durable.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut device = File::open(from)?;
    let bytes = device.seek(SeekFrom::End(0))?;
    device.rewind()?;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = device.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        if chunk[..read].iter().all(|byte| *byte == 0) {
            file.seek_relative(i64::try_from(read).unwrap_or_default())?;
        } else {
            file.write_all(&chunk[..read])?;
        }
    }
    file.set_len(bytes)?;
    file.sync_all()?;
    let directory = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::provision::fitness::tests::room;

    #[test]
    fn open_disks_are_named() {
        let pool = room().pool;
        let thin = |name: &str, open| ActiveThin { name: name.to_owned(), open };
        assert_eq!(refuse_open(&pool, &[thin("cowshed-a-1", 0)]), Ok(()));
        let many: Vec<_> = (0..7).map(|n| thin(&format!("cowshed-a-{n}"), 1)).collect();
        let refused = refuse_open(&pool, &many).unwrap_err().message;
        assert!(refused.contains("vg/pool") && refused.contains("cowshed-a-4 and 2 more"), "{refused}");
    }

    #[test]
    fn a_copy_is_whole_and_sparse_and_replaces_nothing() {
        use std::os::unix::fs::MetadataExt as _;
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let mut bytes = vec![0; 3 * CHUNK + 5];
        bytes[7] = 1;
        bytes[3 * CHUNK] = 2;
        std::fs::write(&from, &bytes).unwrap();
        copy(&from, &to).unwrap();
        assert!(std::fs::read(&to).unwrap() == bytes);
        assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 3 << 20);
        assert!(copy(&from, &to).is_err(), "it was there");
    }
}
