//! A small pool, and real guests that write until it would overflow: it grows, or what is cold goes, or they wait, and no guest
//! sees an error. Each wants a host of its own (`tests/fillup`), with a pool of 1 GiB and 4 MiB of metadata in a group that has
//! more.
//!
//! What happened, and when, is printed as a table; the guests' own consoles are kept ([`LOGS`]).

use std::{
    env,
    fs::OpenOptions,
    io::Write as _,
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};

use cowshed_proto::v1::{self, cowshed_client::CowshedClient};
use tonic::transport::Channel;

use crate::{
    Test,
    gc::{MIB, cold, with_gc, write},
    support::{
        Outcome,
        api::{Refusal, acquire_request, block_on, client, refusal},
        check,
        command::{lines, number, sh},
        containerd,
        cow::{
            Disk, acquire, acquire_reply, cowshed, evict_all, image, lease, pull, release, release_fully,
            wait_gone,
        },
        fake_registry::{FakeRegistry, Hosts},
        guest::{Guest, Habits, LOGS},
        pause, same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("grows", || with_gc(GROWS, "", grows)),
    ("evicts", || with_gc("", "", evicts)),
    ("waits", || with_gc("", "", waits)),
    ("metadata_grows", || with_gc(GROWS, "", metadata_grows)),
    ("metadata_evicts", || with_gc("", "", metadata_evicts)),
];

const GROWS: &str = "grow = true\ndata_step = \"256MiB\"\nmetadata_step = \"4MiB\"\n";
/// As fast as it can.
const EAGER: Habits = Habits { block: MIB, pause: Duration::from_millis(20) };
/// Little, again and again.
const STEADY: Habits = Habits { block: 64 << 10, pause: Duration::from_millis(200) };
/// What a boot writes to its disk, about.
const BOOT: u64 = 40 * MIB;
/// For all that guests write in a test.
const WRITING: Duration = Duration::from_secs(900);
/// A refusal is told within it …
const AT_ONCE: Duration = Duration::from_millis(100);
/// … but the first, for which all is looked through that could go: here the processor is an emulated one.
const FIRST: Duration = Duration::from_secs(1);
/// Between two VMs that come and go.
const BETWEEN: Duration = Duration::from_secs(2);
/// Spares that are kept where metadata are short.
const SPARES: u64 = 20;

/// How the pool is, as the kernel says: blocks in use, and in all.
#[derive(Debug)]
struct Pool {
    metadata: (u64, u64),
    data: (u64, u64),
    mode: String,
}

impl Pool {
    fn now() -> Outcome<Self> {
        let line = sh("dmsetup status --noflush vg-pool")?;
        // <start> <length> thin-pool <transaction id> <metadata> <data> <held root> <mode> …
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let pair = |at: usize| -> Outcome<(u64, u64)> {
            let pair = words.get(at).and_then(|word| word.split_once('/'));
            let (used, total) = pair.ok_or_else(|| format!("the pool's status: {line}"))?;
            Ok((used.parse()?, total.parse()?))
        };
        let mode = (*words.get(7).ok_or("the pool's status has no mode")?).to_owned();
        Ok(Self { metadata: pair(4)?, data: pair(5)?, mode })
    }

    fn used_bytes(&self) -> u64 {
        self.data.0 * (64 << 10)
    }

    fn total_bytes(&self) -> u64 {
        self.data.1 * (64 << 10)
    }
}

/// The test's story.
struct Scene {
    begun: Instant,
    guests: Vec<(String, Guest)>,
    comers: Comers,
    /// The pool's sizes when something was last told.
    sizes: (u64, u64),
}

/// VMs that come and go meanwhile.
struct Comers {
    client: CowshedClient<Channel>,
    image: String,
    count: usize,
    longest: Duration,
    last: Instant,
}

impl Comers {
    fn new(image: &str) -> Outcome<Self> {
        let client = block_on(client())?;
        let (longest, last) = (Duration::ZERO, Instant::now());
        Ok(Self { client, image: image.to_owned(), count: 0, longest, last })
    }

    fn ask(&mut self) -> (String, Duration, Result<tonic::Response<v1::AcquireResponse>, tonic::Status>) {
        self.count += 1;
        self.last = Instant::now();
        let vm = format!("fillup-comer-{}", self.count);
        let reply = block_on(self.client.acquire(acquire_request(&vm, &self.image)));
        (vm, self.last.elapsed(), reply)
    }

    /// One comes, has to get its disk, and goes.
    fn come(&mut self) -> Outcome {
        let (vm, took, reply) = self.ask();
        reply.map_err(|status| format!("{vm} is refused: {}", status.message()))?;
        self.longest = self.longest.max(took);
        let request = v1::ReleaseRequest { vm_id: vm, ..v1::ReleaseRequest::default() };
        block_on(self.client.release(request))?;
        Ok(())
    }

    /// One comes, and has to be refused; how soon.
    fn is_refused(&mut self) -> Outcome<(Refusal, Duration)> {
        let (_, took, reply) = self.ask();
        let refused = refusal(reply)?;
        same!(refused.reason, "POOL_FULL", "{refused:?}");
        Ok((refused, took))
    }

    /// One more, if the last one was a while ago.
    fn come_and_go(&mut self) -> Outcome {
        if self.last.elapsed() >= BETWEEN { self.come() } else { Ok(()) }
    }
}

impl Scene {
    /// So many guests, booted, that write so.
    fn begin(guests: usize, habits: Habits) -> Outcome<Self> {
        let (app, tiny) = (image("app:1"), image("tiny:1"));
        let pool = Pool::now()?;
        let sizes = (pool.metadata.1, pool.data.1);
        let mut scene =
            Self { begun: Instant::now(), guests: Vec::new(), comers: Comers::new(&tiny)?, sizes };
        writeln!(std::io::stdout(), "\n  min:s  written   data            metadata    mode  what happened")?;
        let mut replies = Vec::new();
        for n in 1..=guests {
            let name = format!("guest-{n}");
            let reply = acquire_reply(&name, &app)?;
            scene.guests.push((name.clone(), Guest::boot(&name, &reply, habits)?));
            replies.push(reply);
        }
        for ((name, guest), reply) in scene.guests.iter_mut().zip(&replies) {
            // An emulated kernel now and then dies before its first process.
            if let Err(error) = guest.has_booted() {
                let why = error.message().unwrap_or_default();
                writeln!(std::io::stdout(), "        {name} is booted once more: {why}")?;
                *guest = Guest::boot(name, reply, habits)?;
                guest.has_booted()?;
            }
        }
        scene.tell(&format!("{guests} guests have booted, and write"))?;
        Ok(scene)
    }

    fn tell(&mut self, what: &str) -> Outcome {
        let (seconds, pool) = (self.begun.elapsed().as_secs(), Pool::now()?);
        self.sizes = (pool.metadata.1, pool.data.1);
        let (data, metadata) = (pool.data, pool.metadata);
        let share = |(used, total): (u64, u64)| used * 100 / total.max(1);
        let line = format!(
            "  {:>2}:{:02}  {:>4} MiB  {:>4}/{:<4} MiB {:>2}%  {:>4}/{:<4} {:>2}%  {:<4}  {what}",
            seconds / 60,
            seconds % 60,
            self.blocks() * EAGER.block / MIB,
            data.0 / 16,
            data.1 / 16,
            share(data),
            metadata.0,
            metadata.1,
            share(metadata),
            if pool.mode == "out_of_data_space" { "full" } else { &pool.mode },
        );
        Ok(writeln!(std::io::stdout(), "{line}")?)
    }

    /// Blocks that the guests have written.
    fn blocks(&self) -> u64 {
        self.guests.iter().map(|(_, guest)| guest.count).sum()
    }

    /// Hears the guests, who may have said nothing else, and tells if the pool has grown.
    fn listen(&mut self, after: &str) -> Outcome<Pool> {
        self.guests.iter_mut().try_for_each(|(_, guest)| guest.catch_up(after))?;
        let pool = Pool::now()?;
        if (pool.metadata.1, pool.data.1) != self.sizes {
            self.tell("the pool has grown")?;
        }
        Ok(pool)
    }

    /// Goes on, while VMs come and go, until that is so.
    fn until(&mut self, what: &str, is_so: impl Fn(&Self, &Pool) -> Outcome<bool>) -> Outcome {
        let begun = Instant::now();
        loop {
            let pool = self.listen(&format!("until {what}"))?;
            if is_so(self, &pool)? {
                return self.tell(what);
            }
            check!(begun.elapsed() < WRITING, "waited {WRITING:?} in vain until {what}: {pool:?}");
            self.comers.come_and_go()?;
            pause();
        }
    }

    /// The guests read all again and shut down; their consoles, and the host's kernel, have told of no error.
    fn end(self) -> Outcome {
        let (count, longest) = (self.comers.count, self.comers.longest);
        let mut names = Vec::new();
        let mut told = String::new();
        for (name, guest) in self.guests {
            told += &format!(" {name}: {} blocks, all there;", guest.end()?);
            names.push(name);
        }
        let errors = sh(&format!(
            "grep -H -n -i -E '{ERRORS}' {LOGS}/*.log || true; dmesg | grep -i -E '{ERRORS}' || true"
        ))?;
        check!(errors.is_empty(), "errors: {errors}");
        writeln!(
            std::io::stdout(),
            "        no I/O error in any log;{told} {count} VMs came meanwhile, the slowest disk after {:.2} s",
            longest.as_secs_f32()
        )?;
        names.iter().try_for_each(|name| release_fully(name))
    }
}

/// What a kernel says when a write has failed.
const ERRORS: &str = "I/O error|EXT4-fs error|EXT4-fs warning|lost async|remounting|aborting journal|GUEST-ERROR|blk_update_request";

/// The volume group has nothing left.
fn fill_group() -> Outcome {
    sh("lvcreate --yes -an --zero n --wipesignatures n -l 100%FREE -n rest vg 2>&1").map(drop)
}

fn grows() -> Outcome {
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    pull(&image("app:1"))?;
    pull(&image("tiny:1"))?;
    let names = cold(&registry, 600, 1, 60)?;
    let before = Pool::now()?;
    let mut scene = Scene::begin(2, EAGER)?;
    // More than all that there was.
    let wanted = before.total_bytes() / EAGER.block + 100;
    scene.until("the guests have written more than the pool had in all", |scene, _| {
        Ok(scene.blocks() >= wanted)
    })?;
    let after = Pool::now()?;
    check!(after.data.1 > before.data.1, "the pool has not grown: {after:?}");
    let left = containerd::images()?;
    check!(names.iter().all(|name| left.contains(name)), "an image went: {left:?}");
    let failed = lines(
        "curl -sf http://127.0.0.1:9850/metrics | grep '^cowshed_pool_extensions_total' | grep -v 'result=\"ok\"' || true",
    )?;
    check!(failed.is_empty(), "extensions have failed: {failed:?}");
    scene.end()?;
    evict_all()
}

fn evicts() -> Outcome {
    fill_group()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    pull(&image("app:1"))?;
    pull(&image("tiny:1"))?;
    let first = Pool::now()?;
    let (total, needed) = (first.total_bytes(), first.used_bytes());
    let count = (total / 100 * 70).saturating_sub(needed) / (60 * MIB);
    check!(count >= 4, "there is room for {count} cold images: {first:?}");
    let names = cold(&registry, 700, count, 60)?;
    let filled = Pool::now()?;
    let mut scene = Scene::begin(2, EAGER)?;
    // As much as there is when all that is cold has gone, and far more than is free.
    let room = (total / 100 * 80).saturating_sub(needed + 2 * BOOT);
    let free = total - filled.used_bytes();
    check!(room > free + 60 * MIB, "{room} bytes would be written, {free} are free");
    scene.until("the guests have written more than was free", |scene, _| {
        Ok(scene.blocks() * EAGER.block >= room)
    })?;
    let left = containerd::images()?;
    let gone = names.iter().filter(|name| !left.contains(*name)).count();
    scene.tell(&format!("{gone} of {count} cold images have gone"))?;
    check!(gone > 0, "no image has gone");
    check!(left.contains(&image("app:1")), "an image in use has gone: {left:?}");
    same!(Pool::now()?.data.1, first.data.1, "the pool's size");
    scene.end()?;
    evict_all()
}

/// Seconds that guests wait, by FILLUP_WAIT.
fn patience() -> Duration {
    let seconds = env::var("FILLUP_WAIT").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(20))
}

fn waits() -> Outcome {
    fill_group()?;
    let tiny = image("tiny:1");
    pull(&image("app:1"))?;
    // It is held: nothing that is cold is left.
    let hog = acquire("fillup-hog", &tiny)?;
    write(&hog, 256 * MIB)?;
    let mut scene = Scene::begin(2, EAGER)?;
    let begun = Instant::now();
    while scene.listen("until the pool is full")?.mode != "out_of_data_space" {
        check!(begun.elapsed() < WRITING, "the pool does not become full");
        pause();
    }
    scene.tell("the pool is out of data space")?;
    // What was on its way to the disk may have been told late.
    let stuck = wait_for("the guests to wait", || {
        let before = scene.blocks();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            scene.listen("with a full pool")?;
            pause();
        }
        same!(scene.blocks(), before, "blocks written");
        Ok(before)
    })?;
    scene.tell("both guests wait for a write")?;
    let (begun, mut took) = (Instant::now(), Vec::new());
    while begun.elapsed() < patience() {
        let (refused, after) = scene.comers.is_refused()?;
        check!(refused.message.contains("lacking: ") || refused.message.contains("full"), "{refused:?}");
        took.push(after);
        let next = Instant::now();
        while next.elapsed() < Duration::from_secs(1) {
            scene.listen("with a full pool")?;
            pause();
        }
    }
    same!(scene.blocks(), stuck, "blocks written in a full pool");
    check!(!took.is_empty(), "no VM was refused in {:?}", patience());
    let first = took.remove(0);
    took.sort();
    let longest = took.last().copied().unwrap_or_default();
    let middle = took.get(took.len() / 2).copied().unwrap_or_default();
    scene.tell(&format!(
        "they have waited {:.0} s; {} new VMs were refused, the first after {first:.0?}, the others after {middle:.0?} \
         (median) and {longest:.0?} at the most",
        begun.elapsed().as_secs_f32(),
        took.len() + 1
    ))?;
    release("fillup-hog")?;
    let released = Instant::now();
    scene.guests.iter_mut().try_for_each(|(_, guest)| guest.writes_on("after the release"))?;
    scene.tell(&format!("{:.1} s after a release both write on", released.elapsed().as_secs_f32()))?;
    wait_for("a VM to be admitted", || scene.comers.come())?;
    scene.tell("a new VM has its disk")?;
    scene.end()?;
    check!(first < FIRST, "the first refusal took {first:?}");
    check!(longest < AT_ONCE, "a refusal took {longest:?}, all of them: {took:?}");
    evict_all()
}

/// Writes a little all over a VM's disk, so that it has hardly a block of metadata in common with its image any more.
fn scatter(disk: &Disk, from: u64) -> Outcome {
    let (file, size) = (OpenOptions::new().write(true).open(&disk.path)?, size_of(disk)?);
    // A leaf maps up to 252 blocks of 64 KiB.
    for at in (from..size).step_by(16 << 20) {
        file.write_all_at(&[0x5a; 4096], at)?;
    }
    Ok(file.sync_all()?)
}

fn size_of(disk: &Disk) -> Outcome<u64> {
    let bytes = sh(&format!("blockdev --getsize64 {}", disk.path))?;
    Ok(bytes.trim().parse()?)
}

/// VMs whose disks take metadata.
#[derive(Default)]
struct Takers(Vec<Disk>);

impl Takers {
    /// One more; why not, if it is refused.
    fn more(&mut self) -> Outcome<Option<Refusal>> {
        let (vm, app) = (format!("fillup-taker-{}", self.0.len() + 1), image("app:1"));
        let reply =
            block_on(async { Outcome::Ok(client().await?.acquire(acquire_request(&vm, &app)).await) })?;
        if reply.is_err() {
            let refused = refusal(reply)?;
            same!(refused.reason, "POOL_FULL", "{refused:?}");
            return Ok(Some(refused));
        }
        let disk = Disk::of(&lease(&vm)?)?;
        scatter(&disk, 8 << 20)?;
        self.0.push(disk);
        Ok(None)
    }

    fn release(self) -> Outcome {
        self.0.iter().try_for_each(|disk| release(&disk.vm))?;
        self.0.iter().try_for_each(|disk| wait_gone(&disk.vm))
    }
}

fn metadata_grows() -> Outcome {
    pull(&image("app:1"))?;
    pull(&image("tiny:1"))?;
    let before = Pool::now()?;
    let mut scene = Scene::begin(1, STEADY)?;
    let mut takers = Takers::default();
    // More than there was in all.
    while scene.listen("while metadata are taken")?.metadata.0 <= before.metadata.1 {
        check!(takers.0.len() < 200, "200 disks do not take {} blocks of metadata", before.metadata.1);
        scene.comers.come_and_go()?;
        let refused = takers.more()?;
        check!(refused.is_none(), "{refused:?}");
    }
    let after = Pool::now()?;
    check!(after.metadata.1 > before.metadata.1, "metadata have not grown: {after:?}");
    scene.tell(&format!("{} VMs have taken more metadata than there were", takers.0.len()))?;
    takers.release()?;
    scene.end()?;
    evict_all()
}

/// Spares that are ready, of all images.
fn spares() -> Outcome<u64> {
    // It fails when nothing new is taken on, and says the same.
    let status = cowshed(&["status", "-o", "json"])?;
    number(&serde_json::from_str(&status.stdout)?, "/spares")
}

/// Spares and images go before anybody is refused; then what is kept back is for those who are there.
fn metadata_evicts() -> Outcome {
    fill_group()?;
    let registry = FakeRegistry::start(Hosts::PlainHttp)?;
    let app = image("app:1");
    pull(&app)?;
    pull(&image("tiny:1"))?;
    let names = cold(&registry, 800, 6, 20)?;
    cowshed(&["pin", &app, "--spares", &SPARES.to_string()])?.ok()?;
    wait_for("the spares", || {
        check!(spares()? >= SPARES, "{} spares", spares()?);
        Ok(())
    })?;
    let mut scene = Scene::begin(1, STEADY)?;
    let mut takers = Takers::default();
    // Whoever is refused has had everything else go.
    let refused = loop {
        check!(takers.0.len() < 200, "200 disks do not fill the metadata");
        scene.listen("while metadata are taken")?;
        if let Some(refused) = takers.more()? {
            break refused;
        }
        if takers.0.len() % 10 == 0 {
            let (left, spares) = (containerd::images()?, spares()?);
            let cold = names.iter().filter(|name| left.contains(*name)).count();
            let (taken, of) = (takers.0.len(), names.len());
            scene.tell(&format!(
                "{taken} VMs have taken metadata; {cold} of {of} cold images, {spares} spares"
            ))?;
        }
    };
    check!(refused.message.contains("metadata_headroom_percent"), "{}", refused.message);
    let left = containerd::images()?;
    check!(!names.iter().any(|name| left.contains(name)), "cold images are left: {left:?}");
    scene.tell(&format!("all cold images have gone; a new VM is refused: {}", refused.message))?;
    the_reserve_holds(&mut scene, &takers)?;
    takers.release()?;
    wait_for("a VM to be admitted", || scene.comers.come())?;
    scene.tell("after the releases a new VM has its disk")?;
    cowshed(&["unpin", &app])?.ok()?;
    scene.end()?;
    // The crowd of a moment ago is remembered for a while, and spares are kept for the next one.
    let _more_than_there_is = cowshed(&["gc", "--free", "20GiB"])?;
    evict_all()
}

/// New VMs and spares get nothing of it; the VMs that are there do.
fn the_reserve_holds(scene: &mut Scene, takers: &Takers) -> Outcome {
    wait_for("the spares to go", || {
        same!(spares()?, 0, "spares");
        Ok(())
    })?;
    // Those who are there have it: of each disk that is written to all over again a little.
    let is_in_it = |pool: &Pool| pool.metadata.0 * 1000 >= pool.metadata.1 * 925;
    for disk in &takers.0 {
        if is_in_it(&Pool::now()?) {
            break;
        }
        // Leaves that are full give to their neighbours first: more than those have room for.
        [0, 4 << 20, 12 << 20].into_iter().try_for_each(|from| scatter(disk, from))?;
    }
    let before = scene.listen("while the reserve is used")?;
    check!(before.mode == "rw" && is_in_it(&before), "the reserve is not used: {before:?}");
    scene.guests.iter_mut().try_for_each(|(_, guest)| guest.writes_on("out of the reserve"))?;
    scene.tell("those who are there write on, out of what is kept back")?;
    let (begun, blocks) = (Instant::now(), scene.blocks());
    let mut longest = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(15) {
        longest = longest.max(scene.comers.is_refused()?.1);
        scene.listen("while new VMs are refused")?;
        same!(spares()?, 0, "spares, which have no part in the reserve");
        pause();
    }
    let after = Pool::now()?;
    check!(scene.blocks() > blocks, "the guest does not write on");
    // The guest's own blocks take some.
    check!(after.metadata.0 <= before.metadata.0 + 8, "{before:?} has become {after:?}");
    scene.tell(&format!(
        "for 15 s none was admitted, and no spare made; the slowest refusal took {longest:.0?}"
    ))
}
