//! Makes a pool, or takes over one that is fit: each step is told before it is done, and can be repeated. Interrupted anywhere, the
//! same command goes on.

use std::{
    fs::{self, File},
    io::{Seek as _, SeekFrom},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use cowshed_pool::{
    Bytes,
    device::behaviour,
    lvm::{
        self, Disk, Group, PoolVolume, Runner,
        sizing::{Division, PoolWish, divide, mib, up},
    },
};
use tokio::{process::Command, time::timeout};

use super::{
    Refusal, Result,
    facts::{self, Facts},
    fitness,
};

/// How LVM2 is to check a pool that it activates; see deploy/lvm/thin_check.conf.
pub(super) const CHECKED: &str =
    "global/thin_check_options=[\"-q\",\"--clear-needs-check-flag\",\"--auto-repair\"]";
/// A full pool has its writers wait. (`lvcreate --errorwhenfull` does not know thin pools, whatever its manual says.)
const QUEUES: &str = "activation/error_when_full=0";
/// LVM2's extents, unless the volume group has others.
const EXTENT: u64 = 4 << 20;
/// What LVM2 keeps of a disk for itself.
const DISK_HEADER: u64 = 1 << 20;
/// losetup takes no longer.
const LOSETUP: Duration = Duration::from_secs(30);

/// Where the pool is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In a volume group that is there.
    Group,
    /// On disks, of which a volume group is made.
    Disks(Vec<PathBuf>),
    /// On a file, for trying out. Its size, unless it is there.
    File(PathBuf, Option<Bytes>),
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Name of the volume group.
    pub group: String,
    /// Name of the pool in it.
    pub pool: String,
    /// Where.
    pub source: Source,
    /// How large.
    pub wish: PoolWish,
}

/// Whether steps are done, or only told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They are done.
    Do,
    /// They are told.
    Tell,
}

/// What has become of it.
#[derive(Debug)]
pub struct Created {
    /// The steps, as commands, in order.
    pub steps: Vec<String>,
    /// How the room was divided; `None` for a pool that was there.
    pub division: Option<Division>,
    /// The pool; `None` if steps were only told.
    pub facts: Option<Facts>,
}

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    groups: Vec<Group>,
    pools: Vec<PoolVolume>,
    disks: Vec<Disk>,
}

/// What is to be done first.
#[derive(Clone, Debug, PartialEq, Eq)]
enum First {
    /// A volume group has to be made of these disks.
    MakeGroup(Vec<String>),
    /// It is there, and the pool is not.
    MakePool(Group),
    /// The pool is there.
    Adopt(Group, Box<PoolVolume>),
}

/// Makes the pool that is asked for, or takes it over. `tell` hears of each step before it is done.
///
/// # Errors
/// Says what is in the way, and the way out. What was done before stays, and is found by the next call.
pub async fn create(runner: &Runner, ask: &Ask, mode: Mode, tell: &dyn Fn(&str)) -> Result<Created> {
    check_names(ask)?;
    let mut run = Run { runner, mode, tell, steps: Vec::new() };
    let disks = run.disks(&ask.source).await?;
    let found = Found {
        groups: lvm::groups(runner).await?,
        pools: lvm::pools(runner).await?,
        disks: lvm::disks(runner).await?,
    };
    let paths: Vec<String> = disks.iter().map(|disk| disk.path.clone()).collect();
    let (group, made_free) = match first(ask, &paths, &found)? {
        First::Adopt(group, pool) => return run.adopt(&group, &pool).await,
        First::MakePool(group) => (Some(group.clone()), group.free_bytes),
        First::MakeGroup(paths) => {
            let words: Vec<&str> = ["vgcreate", ask.group.as_str()]
                .into_iter()
                .chain(paths.iter().map(String::as_str))
                .collect();
            run.lvm("", &words).await?;
            let expected =
                disks.iter().map(|disk| disk.bytes.saturating_sub(DISK_HEADER) / EXTENT * EXTENT).sum();
            match mode {
                Mode::Tell => (None, expected),
                Mode::Do => {
                    let made = lvm::groups(runner).await?.into_iter().find(|group| group.name == ask.group);
                    let free = made.as_ref().map_or(expected, |group| group.free_bytes);
                    (made, free)
                }
            }
        }
    };
    let extent = group.map_or(EXTENT, |group| group.extent_bytes);
    let division = divide(&ask.wish, made_free, extent).map_err(|what| Refusal {
        message: format!("the volume group {}: {what}", ask.group),
        status: crate::exit::FULL,
    })?;
    run.pool(ask, &division).await?;
    let facts = run.finish(&ask.group, &ask.pool).await?;
    Ok(Created { steps: run.steps, division: Some(division), facts })
}

/// Decides what comes first.
fn first(ask: &Ask, disks: &[String], found: &Found) -> Result<First> {
    let Ask { group, pool, .. } = ask;
    let there = found.groups.iter().find(|known| known.name == *group).cloned();
    let group_of = |disk: &String| {
        found.disks.iter().find(|known| known.path == *disk).map(|known| known.group.as_str())
    };
    let Some(there) = there else {
        if disks.is_empty() {
            let known: Vec<&str> = found.groups.iter().map(|group| group.name.as_str()).collect();
            let known = if known.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there is {}", known.join(", "))
            };
            return Err(Refusal::unfit(format!(
                "there is no volume group {group} ({known}): give disks to make it of (--device), or a file to try it out (--loop)"
            )));
        }
        if let Some((disk, other)) =
            disks.iter().find_map(|disk| Some((disk, group_of(disk).filter(|g| !g.is_empty())?)))
        {
            return Err(Refusal::unfit(format!(
                "{disk} is in the volume group {other}: --group {other}, if the pool is to be there"
            )));
        }
        return Ok(First::MakeGroup(disks.to_vec()));
    };
    // An earlier call may have made it, and ended before it had made the pool.
    if let Some(disk) = disks.iter().find(|disk| group_of(disk) != Some(group.as_str())) {
        return Err(Refusal::unfit(format!(
            "the volume group {group} is there already, and {disk} is not in it: vgextend {group} {disk}, and again without it; or \
             another --group"
        )));
    }
    match found.pools.iter().find(|known| known.group == *group && known.name == *pool) {
        Some(pool) => Ok(First::Adopt(there, Box::new(pool.clone()))),
        None => Ok(First::MakePool(there)),
    }
}

/// Names that LVM2 takes, so that it says no for no other reason, and is told nothing but names.
fn check_names(ask: &Ask) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    for (option, name) in [("--group", &ask.group), ("--name", &ask.pool)] {
        if name.is_empty() || name.len() > 60 || name.starts_with(['-', '.']) || !name.chars().all(fits) {
            let message = format!(
                "{option} {name:?}: use 1 to 60 letters, digits and \"+_.-\", no \"-\" or \".\" first"
            );
            return Err(Refusal { message, status: crate::exit::USAGE });
        }
    }
    Ok(())
}

/// A disk that is there, or will be.
struct Sized {
    path: String,
    bytes: u64,
}

struct Run<'a> {
    runner: &'a Runner,
    mode: Mode,
    tell: &'a dyn Fn(&str),
    steps: Vec<String>,
}

impl Run<'_> {
    fn step(&mut self, command: String) {
        (self.tell)(&command);
        self.steps.push(command);
    }

    async fn lvm(&mut self, configuration: &str, words: &[&str]) -> Result<()> {
        self.step(words.join(" "));
        if self.mode == Mode::Do {
            self.runner.run_with(configuration, words).await?;
        }
        Ok(())
    }

    async fn disks(&mut self, source: &Source) -> Result<Vec<Sized>> {
        match source {
            Source::Group => Ok(Vec::new()),
            Source::Disks(paths) => paths.iter().map(|path| disk(path)).collect(),
            Source::File(path, size) => Ok(vec![self.file(path, *size).await?]),
        }
    }

    /// The loop device of a file; both are made if they are not there.
    async fn file(&mut self, path: &Path, size: Option<Bytes>) -> Result<Sized> {
        let failed = |e: std::io::Error| Refusal::failed(format!("{}: {e}", path.display()));
        let path = std::path::absolute(path).map_err(failed)?;
        let shown = path.display().to_string();
        let bytes = match (fs::metadata(&path), size) {
            (Ok(there), _) if there.is_file() => there.len(),
            (Ok(_), _) => return Err(Refusal::unfit(format!("--loop {shown}: it is no file"))),
            (Err(_), Some(size)) => {
                let bytes = up(size.0, EXTENT);
                self.step(format!("truncate --size {bytes} {shown}"));
                if self.mode == Mode::Do {
                    let made = File::options()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(&path)
                        .map_err(failed)?;
                    made.set_len(bytes).and_then(|()| made.sync_all()).map_err(failed)?;
                }
                bytes
            }
            (Err(error), None) => {
                return Err(Refusal::unfit(format!("--loop {shown}: {error}; --size SIZE makes it")));
            }
        };
        if path.exists()
            && let Some(device) =
                first_line(&losetup(&["--associated", &shown, "--noheadings", "--output", "NAME"]).await?)
        {
            return Ok(Sized { path: device, bytes });
        }
        self.step(format!("losetup --find --show {shown}"));
        let device = match self.mode {
            Mode::Tell => "/dev/loopN".to_owned(),
            Mode::Do => first_line(&losetup(&["--find", "--show", &shown]).await?)
                .ok_or_else(|| Refusal::failed(format!("losetup has not said which device {shown} has")))?,
        };
        Ok(Sized { path: device, bytes })
    }

    async fn pool(&mut self, ask: &Ask, division: &Division) -> Result<()> {
        let size = |bytes: u64| format!("{bytes}b");
        let (data, metadata, chunk) =
            (size(division.data), size(division.metadata.bytes), size(ask.wish.chunk.0));
        // Zeroing, so that no VM reads what another has left; waiting for room, and no error; and blocks that are given back
        // are given back to the disk. What lies about where the pool will be is nobody's: it was free.
        let words = [
            "lvcreate",
            "--yes",
            "--type",
            "thin-pool",
            "--size",
            &data,
            "--poolmetadatasize",
            &metadata,
            "--chunksize",
            &chunk,
            "--zero",
            "y",
            "--discards",
            "passdown",
            "--poolmetadataspare",
            "y",
            "--name",
            &ask.pool,
            &ask.group,
        ];
        self.lvm(QUEUES, &words).await
    }

    async fn adopt(mut self, group: &Group, pool: &PoolVolume) -> Result<Created> {
        let path = pool.path();
        if !pool.active {
            self.lvm(CHECKED, &["lvchange", "--activate", "y", &path]).await?;
        }
        let name = pool.dm_name();
        let (active, thins) = facts::on_stack(move |stack| {
            let active = stack.pool(&name)?;
            let thins = active.as_ref().map_or(Ok(Vec::new()), |active| stack.thins(&active.usage.name))?;
            Ok((active, thins))
        })
        .await?;
        let unfit = fitness::unfit(group, pool, active.as_ref(), &thins);
        if !unfit.is_empty() {
            return Err(Refusal::unfit(format!(
                "the pool {path} is there, and cannot be taken over: {}",
                unfit.join("; ")
            )));
        }
        let facts = self.finish(&pool.group, &pool.name).await?;
        Ok(Created { steps: self.steps, division: None, facts })
    }

    /// Has full pools wait, and looks at what there is now.
    async fn finish(&mut self, group: &str, pool: &str) -> Result<Option<Facts>> {
        if behaviour::no_space_timeout().is_ok_and(|seconds| seconds > 0) {
            self.step(format!("echo 0 > {}", behaviour::NO_SPACE_TIMEOUT));
            if self.mode == Mode::Do {
                // What could not be told is among the warnings.
                let _told = behaviour::wait_without_end();
            }
        }
        match self.mode {
            Mode::Tell => Ok(None),
            Mode::Do => facts::of(self.runner, &lvm::dm_name(group, pool)).await.map(Some),
        }
    }
}

/// How the room was divided, for people.
pub fn story(division: &Division, chunk: Bytes) -> String {
    let Division { data, metadata, expected, left } = division;
    let arithmetic = metadata.story(*expected, chunk.0).replace('\n', "\n            ");
    format!(
        "data        {}\nmetadata    {arithmetic}\n            and as much in reserve\nfree        {} in the volume group, to grow: by `cowshed pool extend`, or by itself ([gc] grow)\n",
        mib(*data),
        mib(*left)
    )
}

/// A disk, by the path that LVM2 knows it by.
fn disk(path: &Path) -> Result<Sized> {
    let failed = |e: std::io::Error| Refusal::failed(format!("--device {}: {e}", path.display()));
    let path = fs::canonicalize(path).map_err(failed)?;
    let found = fs::metadata(&path).map_err(failed)?;
    if !found.file_type().is_block_device() {
        return Err(Refusal::unfit(format!(
            "--device {}: it is no block device; --loop is for files",
            path.display()
        )));
    }
    let mut device = File::open(&path).map_err(failed)?;
    let bytes = device.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok(Sized { path: known_as(&path, found.rdev()), bytes })
}

/// Device-mapper's devices LVM2 knows by their names.
fn known_as(path: &Path, number: u64) -> String {
    let is_it = |entry: &fs::DirEntry| fs::metadata(entry.path()).is_ok_and(|found| found.rdev() == number);
    let named = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("dm-"));
    let found = named.then(|| fs::read_dir("/dev/mapper").ok()?.flatten().find(is_it)).flatten();
    found.map_or_else(|| path.to_path_buf(), |entry| entry.path()).display().to_string()
}

async fn losetup(words: &[&str]) -> Result<String> {
    let failed =
        |what: &dyn std::fmt::Display| Refusal::failed(format!("losetup {}: {what}", words.join(" ")));
    let ran = Command::new("losetup").args(words).stdin(Stdio::null()).kill_on_drop(true).output();
    let ran = timeout(LOSETUP, ran).await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    if !ran.status.success() {
        return Err(failed(&String::from_utf8_lossy(&ran.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

fn first_line(text: &str) -> Option<String> {
    text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use cowshed_pool::lvm::sizing::{IMAGE, WRITTEN};

    use super::*;
    use crate::provision::fitness::tests::room;

    fn ask() -> Ask {
        let chunk = Bytes(65_536);
        let wish =
            PoolWish { data: None, metadata: None, snapshots: None, image: IMAGE, written: WRITTEN, chunk };
        Ask { group: "vg".to_owned(), pool: "pool".to_owned(), source: Source::Group, wish }
    }

    #[test]
    fn what_is_there_decides_what_comes_first() {
        let room = room();
        let disk = |path: &str, group: &str| Disk { path: path.to_owned(), group: group.to_owned() };
        let empty = Found::default();
        let with_group =
            Found { groups: vec![room.group.clone()], disks: vec![disk("/dev/b", "vg")], pools: Vec::new() };
        let with_pool = Found { pools: vec![room.pool.clone()], ..with_group.clone() };
        let elsewhere = Found { disks: vec![disk("/dev/b", "other")], ..Found::default() };
        let b = ["/dev/b".to_owned()];
        assert_eq!(first(&ask(), &b, &empty), Ok(First::MakeGroup(b.to_vec())));
        assert_eq!(first(&ask(), &[], &with_group), Ok(First::MakePool(room.group.clone())));
        assert_eq!(first(&ask(), &b, &with_group), Ok(First::MakePool(room.group.clone())), "begun before");
        let adopt = First::Adopt(room.group.clone(), Box::new(room.pool.clone()));
        assert_eq!(first(&ask(), &[], &with_pool), Ok(adopt));
        let other = Ask { pool: "pool2".to_owned(), ..ask() };
        assert_eq!(first(&other, &[], &with_pool), Ok(First::MakePool(room.group.clone())));
        for (disks, found, word) in [
            (&[][..], &empty, "--device"),
            (&b[..], &elsewhere, "--group other"),
            (&["/dev/c".to_owned()][..], &with_group, "vgextend vg /dev/c"),
        ] {
            let refused = first(&ask(), disks, found).unwrap_err();
            assert!(refused.message.contains(word) && refused.status == crate::exit::UNFIT, "{refused}");
        }
    }

    #[test]
    fn names_are_names() {
        for (group, pool, good) in [
            ("vg", "pool", true),
            ("my-vg", "a.b_c+", true),
            ("", "p", false),
            ("-v", "p", false),
            ("v", "p q", false),
            ("v", "p'", false),
        ] {
            let ask = Ask { group: group.to_owned(), pool: pool.to_owned(), ..ask() };
            assert_eq!(check_names(&ask).is_ok(), good, "{group:?} {pool:?}");
        }
    }

    #[test]
    fn the_division_is_told() {
        let division = divide(&ask().wish, 100 << 30, EXTENT).unwrap();
        let story = story(&division, Bytes(65_536));
        assert!(
            story.contains("× 33 bytes") && story.contains("in reserve") && story.contains("to grow"),
            "{story}"
        );
    }
}
