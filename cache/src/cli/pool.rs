//! The commands for the pool itself, which ask kernel and LVM2, and no service.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf, absolute},
    time::Duration,
};

use clap::{Args, Subcommand};
use cowshed_pool::{
    Bytes,
    device::{DeviceMapper, Pool as _},
    lvm::{
        self, Extended, Part, Room, Runner,
        sizing::{IMAGE, PoolWish, WRITTEN},
    },
};
use serde_json::{Value, json};

use super::{
    Failure, Output, print,
    show::{bytes, line, share},
};
use crate::{
    clock,
    config::Config,
    exit,
    provision::{
        Refusal,
        create::{self, Ask, Created, Mode, Source},
        facts::{self, Facts},
        repair::{self, Repaired},
    },
    serve::lock,
};

#[derive(Debug, Subcommand)]
pub(super) enum PoolCommand {
    /// Make the thin pool on disks, in a volume group that is there, or on a file for trying out; or take over one that is
    /// there and fit. Repeated, it goes on where it was interrupted. The service may run.
    Create(Create),
    /// Give the pool more of its volume group, while it is used. The service may run: what it would do in the pool waits for
    /// the moment that it takes.
    Extend {
        /// The pool, as VG/POOL or by its device-mapper name; [pool] name, or the only one, if absent.
        pool: Option<String>,
        /// Size of its data from now on, such as 200GiB; or by how much more, such as +20GiB.
        #[arg(long, value_name = "[+]SIZE", value_parser = growth, required_unless_present = "metadata")]
        data: Option<Growth>,
        /// The same for its metadata.
        #[arg(long, value_name = "[+]SIZE", value_parser = growth)]
        metadata: Option<Growth>,
        #[command(flatten)]
        common: Common,
    },
    /// Say how full the pool is, how far it can grow, what it does when it is full, and what should be otherwise. Changes
    /// nothing; the service may run.
    Status {
        /// The pool, as VG/POOL or by its device-mapper name; [pool] name, or the only one, if absent.
        pool: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Have thin_check look at the pool's metadata, while it is used, and say whether the pool is fit. Fails with status 27 if
    /// they are damaged, 6 if something else is not as it should be. Changes nothing; the service may run.
    Check {
        /// The pool, as VG/POOL or by its device-mapper name; [pool] name, or the only one, if absent.
        pool: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Walk through the repair of the pool's metadata: offline, with a copy of them kept. Not beside the service, and not
    /// while a disk is open.
    Repair {
        /// The pool, as VG/POOL or by its device-mapper name; [pool] name, or the only one, if absent.
        pool: Option<String>,
        /// Where the metadata are kept as they are now; a new file in the state directory if absent.
        #[arg(long, value_name = "FILE")]
        backup: Option<PathBuf>,
        /// Only tell the steps.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Name of the volume group.
    #[arg(long, default_value = "vg")]
    group: String,
    /// Name of the pool in it.
    #[arg(long, default_value = "pool")]
    name: String,
    /// A disk to make the volume group of; can be repeated. All that is on it is lost; what looks like data is refused.
    #[arg(long, value_name = "DISK", conflicts_with = "loop_file")]
    device: Vec<PathBuf>,
    /// A file to make the volume group on, for trying out. Again after a reboot, it brings the pool back.
    #[arg(long = "loop", value_name = "FILE")]
    loop_file: Option<PathBuf>,
    /// Size of the pool's data, or of the file with --loop; nine tenths of what is free if absent.
    #[arg(long, value_name = "SIZE")]
    size: Option<Bytes>,
    /// Size of the pool's metadata; as the arithmetic says if absent.
    #[arg(long, value_name = "SIZE")]
    metadata: Option<Bytes>,
    /// So many snapshots (disks, and layers of images) there will be at one time; as many as there are data for if absent.
    #[arg(long, value_name = "N")]
    snapshots: Option<u64>,
    /// A disk has so much of its image.
    #[arg(long, value_name = "SIZE", default_value_t = IMAGE)]
    image: Bytes,
    /// A disk writes so much itself.
    #[arg(long, value_name = "SIZE", default_value_t = WRITTEN)]
    written: Bytes,
    /// Size of the pool's blocks.
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    chunk: Bytes,
    /// Only tell the steps, and the arithmetic.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
pub(super) struct Common {
    /// Configuration file, for [pool] name and [state] directory; the default one need not exist.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// LVM2 is given so long for a command, in seconds; then it is killed.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// How to print the result.
    #[arg(long, short, value_enum, default_value = "text")]
    output: Output,
}

impl Common {
    fn config(&self) -> Result<Config, Failure> {
        let config = Config::read(self.config.as_deref());
        config.map_err(|e| Failure { message: e.to_string(), status: exit::CONFIGURATION })
    }

    fn runner(&self) -> Runner {
        Runner::default().with_limit(Duration::from_secs(self.timeout))
    }

    async fn resolve(&self, named: Option<&str>) -> Result<String, Failure> {
        Ok(facts::resolve(&self.runner(), named, &self.config()?.pool.name).await?)
    }

    /// Steps are told as they are done to people; programs get them at the end.
    fn tell(&self) -> impl Fn(&str) + use<> {
        let output = self.output;
        move |step: &str| {
            if output == Output::Text {
                // What cannot be told is done all the same: the status says how it ended.
                let _closed = print(&format!("step        {step}\n"));
            }
        }
    }
}

/// A size, or by how much more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    To(Bytes),
    By(Bytes),
}

impl Growth {
    fn from(self, bytes: u64) -> u64 {
        match self {
            Self::To(size) => size.0,
            Self::By(more) => bytes.saturating_add(more.0),
        }
    }
}

fn growth(text: &str) -> Result<Growth, String> {
    match text.strip_prefix('+') {
        Some(more) => more.parse().map(Growth::By),
        None => text.parse().map(Growth::To),
    }
}

impl From<Refusal> for Failure {
    fn from(Refusal { message, status }: Refusal) -> Self {
        Self { message, status }
    }
}

pub(super) async fn run(command: PoolCommand) -> Result<(), Failure> {
    match command {
        PoolCommand::Create(create) => make(create).await,
        PoolCommand::Extend { pool, data, metadata, common } => extend(pool, data, metadata, common).await,
        PoolCommand::Status { pool, common } => {
            let name = common.resolve(pool.as_deref()).await?;
            let facts = facts::of(&common.runner(), &name).await?;
            print(&status(&facts, common.output))
        }
        PoolCommand::Check { pool, common } => check(pool, common).await,
        PoolCommand::Repair { pool, backup, dry_run, common } => mend(pool, backup, dry_run, common).await,
    }
}

async fn make(create: Create) -> Result<(), Failure> {
    let Create {
        group,
        name,
        device,
        loop_file,
        size,
        metadata,
        snapshots,
        image,
        written,
        chunk,
        dry_run,
        common,
    } = create;
    // With a file, the size is the file's, and the pool takes its part of that.
    let data = size.filter(|_| loop_file.is_none());
    let source = match loop_file {
        Some(file) => Source::File(file, size),
        None if device.is_empty() => Source::Group,
        None => Source::Disks(device),
    };
    let wish = PoolWish { data, metadata, snapshots, image, written, chunk };
    let ask = Ask { group, pool: name, source, wish };
    let created = create::create(&common.runner(), &ask, mode(dry_run), &common.tell()).await?;
    print(&made(&ask, &created, common.output))
}

fn mode(dry_run: bool) -> Mode {
    if dry_run { Mode::Tell } else { Mode::Do }
}

async fn extend(
    pool: Option<String>,
    data: Option<Growth>,
    metadata: Option<Growth>,
    common: Common,
) -> Result<(), Failure> {
    let (runner, name) = (common.runner(), common.resolve(pool.as_deref()).await?);
    let mut done = Vec::new();
    // What is worse to run out of comes first.
    for (part, growth) in [(Part::Metadata, metadata), (Part::Data, data)] {
        let Some(growth) = growth else { continue };
        let Room { pool, .. } = lvm::room(&runner, &name).await.map_err(Refusal::from)?;
        let now = if part == Part::Data { pool.data_bytes } else { pool.metadata_bytes };
        let extended = lvm::extend(&runner, &name, part, growth.from(now)).await.map_err(Refusal::from)?;
        if common.output == Output::Text {
            print(&extended_text(&extended))?;
        }
        done.push(extended);
    }
    if common.output == Output::Json {
        let parts = done.iter().map(|e| {
            json!({ "part": e.part.to_string(), "from_bytes": e.from_bytes, "to_bytes": e.to_bytes,
                    "stall_seconds": e.stall.as_secs_f64(), "took_seconds": e.took.as_secs_f64() })
        });
        return print(&line(&json!({ "pool": name, "extended": parts.collect::<Vec<_>>() })));
    }
    Ok(())
}

fn extended_text(extended: &Extended) -> String {
    let Extended { part, from_bytes, to_bytes, stall, took } = extended;
    if from_bytes == to_bytes {
        return format!("{part:<10}  {} already\n", bytes(*to_bytes));
    }
    format!(
        "{part:<10}  {} → {}; disks stood still for {:.0} ms, all of it took {:.1} s\n",
        bytes(*from_bytes),
        bytes(*to_bytes),
        stall.as_secs_f64() * 1e3,
        took.as_secs_f64()
    )
}

async fn check(pool: Option<String>, common: Common) -> Result<(), Failure> {
    let name = common.resolve(pool.as_deref()).await?;
    let facts = facts::of(&common.runner(), &name).await?;
    if facts.active.is_none() {
        return Err(Refusal::unfit(format!(
            "the thin pool {name} is not active, and is checked while it is: lvchange -ay VG/POOL, or cowshed pool repair"
        ))
        .into());
    }
    let asked = name.clone();
    let damage = tokio::task::spawn_blocking(move || DeviceMapper::new(&asked)?.damage()).await;
    let damage = damage.map_err(|e| Refusal::failed(e.to_string()))?.map_err(Refusal::from)?;
    let warnings = facts.warnings();
    let text = match common.output {
        Output::Json => {
            line(&json!({ "pool": name, "sound": damage.is_none(), "damage": damage, "warnings": warnings }))
        }
        Output::Text => {
            let sound = if damage.is_none() { "sound" } else { "damaged" };
            format!("pool {name}: metadata {sound}\n{}", warned(&warnings))
        }
    };
    print(&text)?;
    if let Some(damage) = damage {
        let message = format!(
            "the metadata of {name} are damaged: thin_check says {damage}. Stop the VMs and the service, then cowshed pool repair"
        );
        return Err(Failure { message, status: exit::POOL_DAMAGED });
    }
    if warnings.is_empty() {
        return Ok(());
    }
    Err(Refusal::unfit(format!("the thin pool {name} is sound, and not all of it is as it should be")).into())
}

async fn mend(
    pool: Option<String>,
    backup: Option<PathBuf>,
    dry_run: bool,
    common: Common,
) -> Result<(), Failure> {
    let config = common.config()?;
    // Beside the service, which would activate disks in it; held to the end.
    let _alone = if dry_run { None } else { Some(lock::take(&config.state.directory).map_err(busy)?) };
    let name = common.resolve(pool.as_deref()).await?;
    let backup = backup.unwrap_or_else(|| backup_in(&config.state.directory, &name));
    let backup = absolute(&backup).map_err(|e| Failure {
        message: format!("--backup {}: {e}", backup.display()),
        status: exit::USAGE,
    })?;
    let repaired = repair::repair(&common.runner(), &name, &backup, mode(dry_run), &common.tell()).await?;
    print(&mended(&name, &backup, repaired, common.output))
}

fn backup_in(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.metadata-{}", clock::wall().0 / 1_000_000))
}

fn busy(error: crate::serve::ServeError) -> Failure {
    let status = error.exit_status();
    let message = format!(
        "{error}. A pool is not repaired beside the service: systemctl stop cowshed.socket cowshed.service"
    );
    Failure { message, status }
}

fn mended(name: &str, backup: &Path, repaired: Repaired, output: Output) -> String {
    let (word, what) = match repaired {
        Repaired::Told => return String::new(),
        Repaired::Sound => ("sound", "nothing was wrong with its metadata"),
        Repaired::Freed => ("freed", "blocks that nobody had were set free; nothing of any disk is lost"),
        Repaired::Rebuilt => (
            "rebuilt",
            "its metadata were made anew of what could be read; disks are as of their last flush, if all goes well. The \
             old ones are beside them as *_meta0, for lvremove",
        ),
    };
    match output {
        Output::Json => line(&json!({ "pool": name, "result": word, "backup": backup })),
        Output::Text => format!(
            "pool        {name} is active: {what}\nkept        {}, its metadata as they were\nnext        start the service \
             (systemctl start cowshed.socket cowshed.service), and compare: cowshed audit\n",
            backup.display()
        ),
    }
}

fn made(ask: &Ask, created: &Created, output: Output) -> String {
    let name = lvm::dm_name(&ask.group, &ask.pool);
    if output == Output::Json {
        let division = created.division.map(|division| {
            json!({ "data_bytes": division.data, "metadata_bytes": division.metadata.bytes, "snapshots": division.expected.snapshots,
                    "free_bytes": division.left })
        });
        let facts = created.facts.as_ref().map(json_of);
        return line(&json!({ "pool": name, "steps": created.steps, "division": division, "status": facts }));
    }
    let mut text =
        created.division.map(|division| create::story(&division, ask.wish.chunk)).unwrap_or_default();
    match (&created.facts, created.division.is_some()) {
        (None, _) => text.push_str("done        nothing: only told\n"),
        (Some(facts), is_new) => {
            let what = if is_new { "was made" } else { "was there, and is fit" };
            let _ = writeln!(text, "pool        {name} {what}");
            text.push_str(&status(facts, Output::Text));
            let _ = writeln!(text, "next        [pool] name = \"{name}\" in /etc/cowshed/cowshed.toml");
        }
    }
    text
}

fn status(facts: &Facts, output: Output) -> String {
    if output == Output::Json {
        return line(&json_of(facts));
    }
    let mut text = String::new();
    let mut row = |name: &str, what: String| {
        let _ = writeln!(text, "{name:<11} {what}");
    };
    match &facts.active {
        Some(active) => {
            let usage = &active.usage;
            let still = if active.suspended { ", standing still" } else { "" };
            row("state", format!("{} ({}{still})", facts.name, usage.mode));
            row("data", share(usage.data_used, usage.data_total));
            row("metadata", share(usage.metadata_used, usage.metadata_total));
            let waits = match facts.timeout {
                Some(0) => "without end".to_owned(),
                Some(seconds) => format!("{seconds} s"),
                None => "for a time that is not known".to_owned(),
            };
            if let Some(behaviour) = active.behaviour {
                let full = match behaviour.when_full {
                    cowshed_pool::device::behaviour::WhenFull::Queue => format!("writes wait {waits}"),
                    cowshed_pool::device::behaviour::WhenFull::Error => "writes fail".to_owned(),
                };
                let zeroes = if usage.zeroing { "zeroed" } else { "not zeroed" };
                row("when full", full);
                row("blocks", format!("{zeroes} when new; discards {}", behaviour.discards));
            }
            row("disks", format!("{} active", facts.thins.len()));
        }
        None => row("state", format!("{} (not active)", facts.name)),
    }
    if let Ok(Room { group, pool }) = &facts.room {
        row(
            "LVM2",
            format!(
                "{}, blocks of {}, transaction id {}",
                pool.path(),
                Bytes(pool.chunk_bytes),
                pool.transaction_id
            ),
        );
        row(
            "group",
            format!("{}: {} free of {}", group.name, bytes(group.free_bytes), bytes(group.size_bytes)),
        );
    }
    text + &warned(&facts.warnings())
}

fn warned(warnings: &[String]) -> String {
    warnings.iter().map(|warning| format!("warning     {warning}\n")).collect()
}

fn json_of(facts: &Facts) -> Value {
    let active = facts.active.as_ref().map(|active| {
        let usage = &active.usage;
        json!({
            "mode": usage.mode.to_string(), "suspended": active.suspended, "dm_uuid": active.uuid, "zeroing": usage.zeroing,
            "data": { "used_bytes": usage.data_used, "size_bytes": usage.data_total },
            "metadata": { "used_bytes": usage.metadata_used, "size_bytes": usage.metadata_total },
            "when_full": active.behaviour.map(|b| b.when_full.to_string()),
            "discards": active.behaviour.map(|b| b.discards.to_string()),
            "active_disks": facts.thins.len(),
        })
    });
    let room = facts.room.as_ref().ok().map(|room| {
        let Room { group, pool } = room;
        json!({
            "group": group.name, "pool": pool.name, "free_bytes": group.free_bytes, "size_bytes": group.size_bytes,
            "extent_bytes": group.extent_bytes, "missing_disks": group.missing, "chunk_bytes": pool.chunk_bytes,
            "data_bytes": pool.data_bytes, "data_max_bytes": room.most(Part::Data),
            "metadata_bytes": pool.metadata_bytes, "metadata_max_bytes": room.most(Part::Metadata),
            "transaction_id": pool.transaction_id, "lvm_volumes": pool.volumes, "monitored": pool.monitored,
        })
    });
    let error = facts.room.as_ref().err().map(ToString::to_string);
    json!({
        "pool": facts.name, "active": active, "lvm": room, "lvm_error": error, "no_space_timeout_seconds": facts.timeout,
        "warnings": facts.warnings(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        kernel::PoolMode,
        provision::fitness::tests::{active, room},
    };

    #[test]
    fn sizes_and_by_how_much_more() {
        assert_eq!(growth("20GiB"), Ok(Growth::To(Bytes(20 << 30))));
        assert_eq!(growth("+1g"), Ok(Growth::By(Bytes(1 << 30))));
        assert!(growth("+").is_err() && growth("++1").is_err() && growth("-1G").is_err());
        assert_eq!((Growth::To(Bytes(5)).from(3), Growth::By(Bytes(5)).from(3)), (5, 8));
    }

    #[test]
    fn a_pool_as_people_and_programs_see_it() {
        let facts = Facts {
            name: "vg-pool".to_owned(),
            active: Some(active(PoolMode::ReadWrite)),
            thins: Vec::new(),
            room: Ok(room()),
            timeout: Some(60),
            threshold: None,
        };
        let text = status(&facts, Output::Text);
        for part in [
            "vg-pool (rw)",
            "writes wait 60 s",
            "discards passed down",
            "5.00 GiB free of 20.00 GiB",
            "warning     writes",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json: Value = serde_json::from_str(&status(&facts, Output::Json)).unwrap();
        assert_eq!(json["lvm"]["data_max_bytes"], json!(15_u64 << 30));
        assert_eq!(json["active"]["when_full"], json!("queue"));
        assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn what_an_extension_has_done() {
        let extended = |from_bytes, to_bytes| Extended {
            part: Part::Metadata,
            from_bytes,
            to_bytes,
            stall: Duration::from_millis(31),
            took: Duration::from_millis(840),
        };
        let text = extended_text(&extended(1 << 30, 2 << 30));
        assert_eq!(
            text,
            "metadata    1.00 GiB → 2.00 GiB; disks stood still for 31 ms, all of it took 0.8 s\n"
        );
        assert_eq!(extended_text(&extended(1 << 30, 1 << 30)), "metadata    1.00 GiB already\n");
    }
}
