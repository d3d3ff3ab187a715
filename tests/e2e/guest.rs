//! A guest that goes on writing to its disk, whatever happens to its lease and to those who know of it.
//!
//! It is a real one: QEMU in the test host, with the disk that Cowshed granted as its root. What the test saw, and when, it
//! prints as a table.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    process::Child,
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Test,
    support::{
        Outcome, PATIENCE, check,
        command::{lines, number, sh, spawn, text},
        containerd,
        cow::{Disk, acquire, collect, cowshed, host, image, lease, service_pid, thin_devices, wait_serving},
        same, wait_at_most, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[("writes_on_whatever_happens_to_its_lease", writes_on)];

const VM: &str = "guest-writes";
/// A boot, when the machine has much else to do.
const BOOT: Duration = Duration::from_secs(900);
/// From the guest's end to the disk's.
const BOUND: Duration = Duration::from_secs(60);
/// Instead of the configuration's 300 s.
const GRACE: &str = "5";

/// Appends a block, has it on the disk, reads it from there, counts; until it is told to end. Then it reads all again.
const PROGRAM: &str = r#"
import os, sys, time

SIZE = 65536
journal = os.open("journal", os.O_RDWR | os.O_CREAT | os.O_APPEND)
console = os.open("/dev/hvc0", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)

def block(n):
    return (b"block %d of this guest " % n * SIZE)[:SIZE]

def check(n):
    os.posix_fadvise(journal, n * SIZE, SIZE, os.POSIX_FADV_DONTNEED)
    if os.pread(journal, SIZE, n * SIZE) != block(n):
        sys.exit(f"block {n} has changed")

def told_to_end():
    try:
        return b"end" in os.read(console, 100)
    except BlockingIOError:
        return False

count = 0
while not told_to_end():
    if os.write(journal, block(count)) != SIZE:
        sys.exit(f"block {count} was written in part")
    os.fsync(journal)
    check(count)
    count += 1
    print("count", count, flush=True)
    time.sleep(0.5)
for n in range(count):
    check(n)
print("all", count, "blocks are there", flush=True)
"#;

/// The guest, and what it says.
struct Guest {
    child: Child,
    lines: Receiver<String>,
    /// What is written here, the guest reads.
    console: File,
    count: u64,
    _directory: TempDir,
}

impl Guest {
    /// Boots one from the disk in an acquire's reply.
    fn boot(reply: &Value) -> Outcome<Self> {
        // Where the kernel can, QEMU need not emulate a processor on one that is emulated.
        let accel = sh("modprobe kvm_amd 2> /dev/null || modprobe kvm_intel 2> /dev/null || true
            [ ! -e /dev/kvm ] || echo COWSHED_ACCEL=kvm")?;
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut process = reply["lease"]["process"].clone();
        process["entrypoint"] = json!(["/usr/bin/python3", "-c", PROGRAM]);
        process["cmd"] = json!([]);
        // The console is root's.
        process["user"] = json!("");
        fs::write(at("process"), process.to_string())?;
        sh(&format!("mkfifo {}", at("input")))?;
        let console = File::options().read(true).write(true).open(at("input"))?;
        let script = format!(
            "{} $(dirname $(readlink -f $(command -v cowshed-host)))/boot-guest --disk {} --process {} --input {} --loglevel 4 --timeout 3000 2>&1",
            accel.trim(),
            text(reply, "/lease/device/path")?,
            at("process"),
            at("input"),
        );
        let mut child = spawn("bash", &["-c", &script])?;
        let output = BufReader::new(child.stdout.take().ok_or("no console")?);
        let (sender, lines) = channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Ok(Self { child, lines, console, count: 0, _directory: directory })
    }

    /// Waits until it has written twice more: the second time began after this call.
    fn writes_on(&mut self, after: &str) -> Outcome {
        while let Ok(line) = self.lines.try_recv() {
            self.hear(&line, after)?;
        }
        let until = self.count + 2;
        while self.count < until {
            let line = self.next_line(PATIENCE, after)?;
            self.hear(&line, after)?;
        }
        Ok(())
    }

    fn next_line(&self, patience: Duration, after: &str) -> Outcome<String> {
        let line = self.lines.recv_timeout(patience);
        line.map_err(|e| format!("the guest says nothing more, {after}, after {}: {e}", self.count).into())
    }

    /// While it writes it says one number after the other. Its kernel may complain of a clock or a processor that is slow,
    /// which an emulated one is, and of nothing else.
    fn hear(&mut self, line: &str, after: &str) -> Outcome {
        let of_kernel = line.trim_start().starts_with('[');
        if of_kernel
            && ["clocksource", "rcu", "hrtimer", "lockup", "stall"].iter().any(|slow| line.contains(slow))
        {
            return Ok(());
        }
        let next = format!("count {}", self.count + 1);
        same!(line, next, "what the guest says, {after}");
        self.count += 1;
        Ok(())
    }

    /// Waits for its first block.
    fn has_booted(&mut self) -> Outcome {
        let mut said = String::new();
        loop {
            let line = self.next_line(BOOT, &format!("having said {said:?}"))?;
            if line == "count 1" {
                self.count = 1;
                return Ok(());
            }
            check!(!line.starts_with("GUEST-ERROR"), "the guest does not start: {said}{line}");
            said += &(line + "\n");
        }
    }

    /// Tells it to end, and waits until it has read all again and shut down.
    fn end(mut self) -> Outcome<u64> {
        self.console.write_all(b"end\n")?;
        let mut said = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            match line.strip_prefix("count ") {
                Some(count) => self.count = count.parse()?,
                None if line.is_empty() => {}
                None => said.push(line),
            }
        }
        let all = format!("all {} blocks are there", self.count);
        // The console says first what was typed.
        same!(said, ["end", &all, "GUEST-EXIT 0"], "what the guest says at its end");
        same!(self.child.wait()?.code(), Some(0), "the guest's status");
        Ok(self.count)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // They may have ended. boot-guest waits for its QEMU, whatever it is told.
        let _told = sh(&format!("kill {} 2> /dev/null; pkill -x qemu-system-x86 || true", self.child.id()));
        let _reaped = self.child.wait();
    }
}

/// What is told of the run, for people.
struct Transcript(Instant);

impl Transcript {
    fn begin() -> Outcome<Self> {
        writeln!(std::io::stdout(), "\n  min:s  counter  lease      what happened")?;
        Ok(Self(Instant::now()))
    }

    fn line(&self, count: u64, state: &str, what: &str) -> Outcome {
        let seconds = self.0.elapsed().as_secs();
        let line = format!("  {:>2}:{:02}  {count:>7}  {state:<9}  {what}", seconds / 60, seconds % 60);
        Ok(writeln!(std::io::stdout(), "{line}")?)
    }
}

/// All by which the kernel knows the device.
fn identity(disk: &Disk) -> Outcome<String> {
    sh(&format!(
        "dmsetup info -c --noheadings -o name,uuid,major,minor {0}; dmsetup table {0}; stat -c '%t:%T' -L {1}",
        disk.dm_name, disk.path
    ))
}

/// The thin ids that the pool has.
fn thin_ids() -> Outcome<Vec<String>> {
    lines(
        "dmsetup message vg-pool 0 reserve_metadata_snap; trap 'dmsetup message vg-pool 0 release_metadata_snap' EXIT
        thin_ls -m --no-headers -o DEV /dev/mapper/vg-pool_tmeta | tr -d ' '",
    )
}

/// A guest that writes on a disk, and what has to stay so.
struct Scene {
    transcript: Transcript,
    guest: Guest,
    disk: Disk,
    identity: String,
}

impl Scene {
    /// After something has happened: the guest writes on, on the same device; its lease is in that state, and QEMU is told
    /// to have the device open.
    fn after(&mut self, what: &str, state: &str) -> Outcome {
        self.guest.writes_on(&format!("after: {what}"))?;
        same!(identity(&self.disk)?, self.identity, "the device, after: {what}");
        // A look at who holds it is bounded, and a host that is slow may need another.
        let lease = wait_for("a word of who has it open", || {
            let lease = lease(VM)?;
            check!(!lease["holders"].as_array().is_none_or(Vec::is_empty), "nobody, after: {what}: {lease}");
            Ok(lease)
        })?;
        same!(text(&lease, "/lease_id")?, self.disk.lease, "the lease, after: {what}");
        same!(text(&lease, "/state")?, state, "the state, after: {what}");
        let pid: u64 = sh("pgrep -x qemu-system-x86")?.trim().parse()?;
        let holders = lease["holders"].as_array().cloned().unwrap_or_default();
        same!(holders.len(), 1, "holders, after: {what}: {lease}");
        same!(number(&holders[0], "/pid")?, pid, "who has it open, after: {what}: {lease}");
        check!(text(&holders[0], "/what")?.contains("qemu"), "{lease}");
        self.transcript.line(self.guest.count, state, what)
    }

    /// Waits until the reclaimer has looked at the device and says that it is open.
    fn waits_for_its_device(&self) -> Outcome {
        wait_for("the reclaimer to find the device open", || {
            let lease = lease(VM)?;
            check!(text(&lease, "/waiting_for")?.contains("open"), "{lease}");
            Ok(())
        })
    }

    /// Kills them with SIGKILL and waits until others are there.
    fn kill(&mut self, services: &[&str], state: &str) -> Outcome {
        let pid = |service: &str| match service {
            "cowshed" => service_pid(),
            _ => sh(&format!("pgrep -x -o {service}")),
        };
        let before = services.iter().map(|service| pid(service)).collect::<Outcome<Vec<_>>>()?;
        services.iter().try_for_each(|service| host("kill", service))?;
        for (service, before) in services.iter().zip(before) {
            wait_for("another process", || {
                check!(pid(service)? != before, "{service} is still process {before}");
                Ok(())
            })?;
        }
        wait_for("containerd to answer", containerd::version)?;
        wait_serving()?;
        self.waits_for_its_device()?;
        let back = if services.len() == 1 { "it is" } else { "they are" };
        self.after(&format!("kill -9 of {}; {back} back", services.join(" and ")), state)
    }
}

fn writes_on() -> Outcome {
    let configuration = "/etc/cowshed/cowshed.toml";
    let before = fs::read_to_string(configuration)?;
    sh(&format!("sed -i 's/^expired_grace_seconds = .*/expired_grace_seconds = {GRACE}/' {configuration}"))?;
    host("restart", "cowshed")?;
    wait_serving()?;
    let tested = the_story();
    fs::write(configuration, before)?;
    host("restart", "cowshed")?;
    wait_serving()?;
    tested
}

fn the_story() -> Outcome {
    let app = image("app:1");
    let transcript = Transcript::begin()?;
    let reply = cowshed(&["acquire", VM, &app, "--ttl", "3600", "-o", "json"])?.json()?;
    let disk = Disk::of(&reply["lease"])?;
    transcript.line(0, "granted", &format!("{VM} has {}, thin id {}, of {app}", disk.path, disk.thin_id))?;
    let identity = identity(&disk)?;
    let mut guest = Guest::boot(&reply)?;
    guest.has_booted()?;
    let mut scene = Scene { transcript, guest, disk, identity };
    scene.after("the guest has booted from it, and writes", "granted")?;

    cowshed(&["renew", &scene.disk.lease, "--ttl", "5"])?.ok()?;
    scene.after("the lease is renewed, for 5 s", "granted")?;
    wait_for("the lease to expire", || {
        same!(text(&lease(VM)?, "/state")?, "suspect", "its state");
        Ok(())
    })?;
    scene.after("it has expired", "suspect")?;
    wait_for("the grace to end", || {
        let lease = lease(VM)?;
        same!(text(&lease, "/suspicion/reclaimed_in")?, "0s", "what is left of it");
        Ok(())
    })?;
    scene.waits_for_its_device()?;
    scene.after("its grace is over", "suspect")?;
    scene.kill(&["cowshed"], "suspect")?;

    cowshed(&["release", VM])?.ok()?;
    scene.waits_for_its_device()?;
    scene.after("it is released", "releasing")?;
    collect()?;
    scene.after("containerd collects its garbage", "releasing")?;
    scene.kill(&["cowshed"], "releasing")?;
    scene.kill(&["containerd"], "releasing")?;
    scene.kill(&["cowshed", "containerd"], "releasing")?;
    let other = acquire(VM, &app)?;
    check!(other.thin_id != scene.disk.thin_id && other.path != scene.disk.path, "the same disk: {other:?}");
    cowshed(&["release", VM, "--lease", &other.lease, "--wait", "60"])?.ok()?;
    scene.after("the VM has had another disk meanwhile", "releasing")?;

    let Scene { transcript, guest, disk, .. } = scene;
    let count = guest.end()?;
    transcript.line(
        count,
        "releasing",
        &format!("the guest has read all {count} blocks again and shut down"),
    )?;
    let ended = Instant::now();
    wait_at_most(BOUND, "the disk to go", || {
        cowshed(&["leases", VM])?.fails(3, &["LEASE_NOT_FOUND"])?;
        check!(!thin_devices()?.contains(&disk.dm_name), "{} is still there", disk.path);
        check!(!thin_ids()?.contains(&disk.thin_id.to_string()), "thin id {} is in the pool", disk.thin_id);
        Ok(())
    })?;
    let took = ended.elapsed().as_secs_f32();
    transcript.line(count, "gone", &format!("lease, device and thin id are gone, {took:.1} s later"))
}
