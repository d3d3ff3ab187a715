//! The load of the power cuts and kills: snapshots are made, written, committed, viewed and removed, all at once, until
//! the lights go out; afterwards what was promised and what was committed is looked at.

mod acks;
mod answers;
#[path = "../support/cowshed.rs"]
mod cowshed;
#[path = "../support/dice.rs"]
mod dice;
#[path = "../support/snapshots.rs"]
mod snapshots;
mod tenants;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs::File,
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use acks::{Acks, GONE};
use answers::Answers;
use clap::Parser;
use containerd_client::services::v1::snapshots::{Info, Kind};
use dice::Dice;
use snapshots::{CONTAINERD, Snapshots};
use tenants::Tenant;
use tonic::{Code, Status};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Churns until it is killed, or audits.
#[derive(Parser)]
struct Arguments {
    /// The snapshotter.
    #[arg(long, default_value = "cowshed")]
    snapshotter: String,
    /// Makes the order of operations another one.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after so many seconds; 0 is never.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Stop when this file is there.
    #[arg(long)]
    until: Option<PathBuf>,
    /// Calls that fail since somebody was killed are made again.
    #[arg(long)]
    tolerant: bool,
    /// Cowshed is there all the time, if containerd is not: of launchers' calls only acquires may fail, and each is answered
    /// within its deadline.
    #[arg(long)]
    cowshed_stays: bool,
    /// Only look at what was committed, through a fresh view each, and compare all with what was promised.
    #[arg(long)]
    audit: bool,
    /// Where to write down what was promised, or, for an audit, where it was.
    #[arg(long)]
    acks: Option<PathBuf>,
}

const NAMESPACE: &str = "churn";
const WORKERS: u64 = 6;
const TENANTS: u64 = 8;
/// Snapshots that a worker keeps before it only removes.
const ENOUGH: usize = 12;
/// Where on the disk the mark is, and how long: beyond what mkfs writes, several blocks of the pool.
const MARK_AT: u64 = 300 << 20;
const MARK_BYTES: usize = 256 << 10;

/// What is written into the snapshot that is committed as `name`.
fn mark(name: &str) -> Vec<u8> {
    name.bytes().chain([b' ']).cycle().take(MARK_BYTES).collect()
}

fn write_mark(path: &str, name: &str) -> Outcome {
    let file = File::options().write(true).open(path)?;
    file.write_all_at(&mark(name), MARK_AT)?;
    file.sync_all()?;
    Ok(())
}

/// A call that failed since its other end was killed.
fn is_broken(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded)
        || status.message().contains("transport")
        || status.message().contains("unavailable")
}

struct Worker {
    side: Snapshots,
    acks: Acks,
    prefix: String,
    dice: Dice,
    /// Part of the names: no other run, of this boot or of one before, has it.
    run: u64,
    count: u64,
    /// Active ones that have their mark.
    marked: HashSet<String>,
}

/// Somebody who does one thing after the other.
trait Busy: Send {
    /// Who it is.
    fn name(&self) -> String;
    /// The next thing.
    fn step(&mut self) -> impl Future<Output = Outcome> + Send;
}

/// When it is enough.
#[derive(Clone)]
struct End {
    at: Option<Instant>,
    file: Option<PathBuf>,
}

impl End {
    fn is_here(&self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at) || self.file.as_ref().is_some_and(|file| file.exists())
    }
}

/// Goes on until it is enough, or something fails that is not to; says how much was done.
async fn keep_on(mut busy: impl Busy, end: End, tolerant: bool) -> Outcome<u64> {
    let mut done = 0;
    while !end.is_here() {
        match busy.step().await {
            Ok(()) => done += 1,
            Err(error) => {
                let broken = error.downcast_ref::<Status>().is_some_and(is_broken);
                if !(tolerant && broken) {
                    return Err(format!("{}: {error}", busy.name()).into());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    Ok(done)
}

impl Busy for Worker {
    fn name(&self) -> String {
        self.prefix.clone()
    }

    /// What there is is asked each time: after a broken call nobody knows whether it was made.
    async fn step(&mut self) -> Outcome {
        let all = self.side.list().await?;
        let mine: Vec<&Info> = all.iter().filter(|info| info.name.starts_with(&self.prefix)).collect();
        let parents: BTreeSet<&str> = all.iter().map(|info| info.parent.as_str()).collect();
        let of = |kind: &str| -> Vec<&Info> {
            mine.iter().copied().filter(|info| kind_of(info) == kind).collect()
        };
        let (active, committed, views) = (of("active"), of("committed"), of("view"));
        let leaves: Vec<&Info> =
            mine.iter().copied().filter(|info| !parents.contains(info.name.as_str())).collect();
        let choice = if mine.len() > ENOUGH { 9 } else { self.dice.below(10) };
        self.count += 1;
        let fresh = format!("{}{}-{}", self.prefix, self.run, self.count);
        match choice {
            0..=3 => {
                let parent =
                    committed.get(self.dice.below(committed.len() + 1)).map_or("", |info| &info.name);
                self.acks.begin(&[&fresh])?;
                let path = self.side.prepare(&fresh, parent, &[]).await?.path;
                self.acks.done(&[(&fresh, "active")])?;
                write_mark(&path, &format!("{fresh}-c"))?;
                self.marked.insert(fresh);
            }
            4..=5 if !active.is_empty() => {
                let key = &active[self.dice.below(active.len())].name;
                let name = format!("{key}-c");
                // Of a boot before, whose lights may have gone out between its Prepare and its mark.
                if !self.marked.contains(key) {
                    write_mark(&self.side.mounts(key).await?.path, &name)?;
                }
                self.acks.begin(&[key, &name])?;
                self.side.commit(&name, key, &[]).await?;
                self.acks.done(&[(key, GONE), (&name, "committed")])?;
            }
            6 if !committed.is_empty() => {
                let name = &committed[self.dice.below(committed.len())].name;
                self.acks.begin(&[&fresh])?;
                let path = self.side.view(&fresh, name).await?.path;
                self.acks.done(&[(&fresh, "view")])?;
                check_mark(&path, name)?;
            }
            _ if !views.is_empty() => self.remove(&views[0].name).await?,
            _ if !leaves.is_empty() => {
                let leaf = leaves[self.dice.below(leaves.len())].name.clone();
                self.remove(&leaf).await?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl Worker {
    async fn remove(&self, key: &str) -> Outcome {
        self.acks.begin(&[key])?;
        self.side.remove(key).await?;
        Ok(self.acks.done(&[(key, GONE)])?)
    }
}

/// A committed snapshot was marked before it was committed.
fn check_mark(path: &str, name: &str) -> Outcome {
    let mut found = vec![0; MARK_BYTES];
    File::open(path)?.read_exact_at(&mut found, MARK_AT)?;
    if found == mark(name) {
        Ok(())
    } else {
        Err(format!("{name} at {path} has another content than it was committed with").into())
    }
}

/// Its kind, in a word.
fn kind_of(info: &Info) -> &'static str {
    match Kind::try_from(info.kind) {
        Ok(Kind::Active) => "active",
        Ok(Kind::View) => "view",
        Ok(Kind::Committed) => "committed",
        _ => "of an unknown kind",
    }
}

/// What was answered is so, whatever happened since.
fn compare_with_promises(all: &[Info], lines: &str) -> Outcome<usize> {
    let there: HashMap<&str, &str> = all.iter().map(|info| (info.name.as_str(), kind_of(info))).collect();
    let mut promised = acks::promised(lines);
    // The others are launchers'.
    promised.retain(|key, _| key.starts_with('w'));
    for (key, state) in &promised {
        let is = there.get(key).copied().unwrap_or(GONE);
        if is != *state {
            return Err(format!("{key} was promised to be {state}, and is {is}").into());
        }
    }
    Ok(promised.len())
}

async fn audit(side: &Snapshots) -> Outcome<usize> {
    let all = side.list().await?;
    let mut looked = 0;
    // Only what a worker made has a mark.
    let marked = |info: &&Info| kind_of(info) == "committed" && info.name.starts_with('w');
    for info in all.iter().filter(marked) {
        let key = format!("audit-{looked}");
        // One of an audit before that was cut off.
        if let Err(status) = side.remove(&key).await
            && status.code() != Code::NotFound
        {
            return Err(status.into());
        }
        let path = side.view(&key, &info.name).await?.path;
        check_mark(&path, &info.name)?;
        side.remove(&key).await?;
        looked += 1;
    }
    Ok(looked)
}

/// Disks of VMs and pulls beside the snapshots; what they say is nothing to us here.
async fn bystander(image: &'static str, end: End) {
    let mut n = 0;
    while !end.is_here() {
        n += 1;
        let vm = format!("churn-{}", n % 5);
        let script = format!(
            "cowshed acquire {vm} {image}; cowshed release {vm}; [ $(({n} % 4)) != 0 ] || ctr images rm --sync {image}"
        );
        let _ran =
            tokio::task::spawn_blocking(move || Command::new("sh").args(["-c", &script]).output()).await;
    }
}

async fn run(arguments: Arguments) -> Outcome<String> {
    let side =
        Snapshots::new(containerd_client::connect(CONTAINERD).await?, &arguments.snapshotter, NAMESPACE);
    if arguments.audit {
        let lines = arguments.acks.map(std::fs::read_to_string).transpose()?.unwrap_or_default();
        let kept = compare_with_promises(&side.list().await?, &lines)? + tenants::audit(&lines).await?;
        let looked = audit(&side).await?;
        let open = acks::uncertain(&lines);
        return Ok(format!(
            "{kept} promises kept, {open} open; {looked} committed snapshots have their contents"
        ));
    }
    let acks = Acks::open(arguments.acks.as_deref())?;
    for info in side.list().await?.iter().filter(|info| info.name.starts_with('w')) {
        acks.done(&[(&info.name, kind_of(info))])?;
    }
    let at = (arguments.seconds > 0).then(|| Instant::now() + Duration::from_secs(arguments.seconds));
    let end = End { at, file: arguments.until };
    let workers = (0..WORKERS).map(|n| {
        let worker = Worker {
            side: side.clone(),
            acks: acks.clone(),
            prefix: format!("w{n}-"),
            dice: Dice((arguments.seed + 1) * 0x9e37_79b9 + n),
            run: arguments.seed,
            count: 0,
            marked: HashSet::new(),
        };
        tokio::spawn(keep_on(worker, end.clone(), arguments.tolerant))
    });
    let mut workers: Vec<_> = workers.collect();
    let answers = Answers::new(arguments.cowshed_stays);
    for n in 0..TENANTS {
        let tenant = loop {
            match Tenant::new(n, arguments.seed, acks.clone(), answers.clone()).await {
                // Somebody was killed just then.
                Err(_) if arguments.tolerant => tokio::time::sleep(Duration::from_millis(100)).await,
                tenant => break tenant?,
            }
        };
        workers.push(tokio::spawn(keep_on(tenant, end.clone(), arguments.tolerant)));
    }
    let beside = tokio::spawn(bystander("127.0.0.1:5000/cowshed/tiny:1", end));
    let mut done = 0;
    for worker in workers {
        done += worker.await??;
    }
    beside.await?;
    Ok(format!("{done} operations, {answers}"))
}

#[tokio::main]
async fn main() -> ExitCode {
    let (text, code) = match run(Arguments::parse()).await {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("@failed {error}"), ExitCode::FAILURE),
    };
    let _gone = writeln!(std::io::stdout(), "{text}");
    code
}
