//! Guests that go on writing to their disks: real ones, QEMU in the test host, each with the disk that Cowshed granted as its
//! root. What they say on their consoles is kept.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::Child,
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    Outcome, PATIENCE, check,
    command::{sh, spawn, text},
    same,
};

/// A boot, when the machine has much else to do.
const BOOT: Duration = Duration::from_secs(900);
/// Where their consoles are kept, each with the seconds since its boot.
pub(crate) const LOGS: &str = "/tmp/guests";

/// Appends a block, has it on the disk, reads it from there, counts; until it is told to end. Then it reads all again.
const PROGRAM: &str = r#"
import os, sys, time

SIZE, PAUSE = int(sys.argv[1]), float(sys.argv[2])
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
    time.sleep(PAUSE)
for n in range(count):
    check(n)
print("all", count, "blocks are there", flush=True)
"#;

/// How a guest writes.
#[derive(Clone, Copy)]
pub(crate) struct Habits {
    /// Bytes of a block.
    pub(crate) block: u64,
    /// Between two blocks.
    pub(crate) pause: Duration,
}

/// The guest, and what it says.
pub(crate) struct Guest {
    name: String,
    child: Child,
    lines: Receiver<String>,
    /// What is written here, the guest reads.
    console: File,
    /// Blocks that it has written.
    pub(crate) count: u64,
    _directory: TempDir,
}

/// What a guest has said in one line.
enum Said<'a> {
    /// So many blocks are written.
    Count(u64),
    /// Its kernel complains of a clock or a processor that is slow, which an emulated one is, or of a task that waits.
    Patience,
    Other(&'a str),
}

fn said(line: &str) -> Said<'_> {
    const SLOW: [&str; 5] = ["clocksource", "rcu", "hrtimer", "lockup", "stall"];
    const WAITS: [&str; 4] = ["blocked for more than", "ainted", "hung_task_timeout", "hung task reports"];
    if let Some(count) = line.strip_prefix("count ").and_then(|count| count.parse().ok()) {
        return Said::Count(count);
    }
    let of_kernel = line.trim_start().starts_with('[');
    let is_patience = of_kernel && SLOW.iter().chain(&WAITS).any(|word| line.contains(word));
    if is_patience || line.is_empty() { Said::Patience } else { Said::Other(line) }
}

impl Guest {
    /// Boots one from the disk in an acquire's reply; its console is kept under its name.
    pub(crate) fn boot(name: &str, reply: &Value, habits: Habits) -> Outcome<Self> {
        // Where the kernel can, QEMU need not emulate a processor on one that is emulated.
        let accel = sh("modprobe kvm_amd 2> /dev/null || modprobe kvm_intel 2> /dev/null || true
            [ ! -e /dev/kvm ] || echo COWSHED_ACCEL=kvm")?;
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name).display().to_string();
        let mut process = reply["lease"]["process"].clone();
        let (block, pause) = (habits.block.to_string(), habits.pause.as_secs_f64().to_string());
        process["entrypoint"] = json!(["/usr/bin/python3", "-c", PROGRAM, block, pause]);
        process["cmd"] = json!([]);
        // The console is root's.
        process["user"] = json!("");
        fs::write(at("process"), process.to_string())?;
        sh(&format!("mkfifo {}", at("input")))?;
        let console = File::options().read(true).write(true).open(at("input"))?;
        // It is this process: who kills it kills QEMU.
        let script = format!(
            "exec env {} $(dirname $(readlink -f $(command -v cowshed-host)))/boot-guest --disk {} --process {} --input {} --loglevel 4 --timeout 3000 2>&1",
            accel.trim(),
            text(reply, "/lease/device/path")?,
            at("process"),
            at("input"),
        );
        let mut child = spawn("bash", &["-c", &script])?;
        let output = BufReader::new(child.stdout.take().ok_or("no console")?);
        fs::create_dir_all(LOGS)?;
        let mut log = File::create(Path::new(LOGS).join(format!("{name}.log")))?;
        let (sender, lines) = channel();
        let booted = Instant::now();
        thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| {
                let kept = writeln!(log, "{:8.2}  {line}", booted.elapsed().as_secs_f64()).is_ok();
                (kept && sender.send(line).is_ok()).then_some(())
            })
        });
        Ok(Self { name: name.to_owned(), child, lines, console, count: 0, _directory: directory })
    }

    /// What it has said by now.
    pub(crate) fn catch_up(&mut self, after: &str) -> Outcome {
        while let Ok(line) = self.lines.try_recv() {
            self.hear(&line, after)?;
        }
        Ok(())
    }

    /// Waits until it has written twice more: the second time began after this call.
    pub(crate) fn writes_on(&mut self, after: &str) -> Outcome {
        self.catch_up(after)?;
        let until = self.count + 2;
        while self.count < until {
            let line = self.next_line(PATIENCE, after)?;
            self.hear(&line, after)?;
        }
        Ok(())
    }

    fn next_line(&self, patience: Duration, after: &str) -> Outcome<String> {
        let line = self.lines.recv_timeout(patience);
        let (name, count) = (&self.name, self.count);
        line.map_err(|e| format!("guest {name} says nothing more, {after}, after {count}: {e}").into())
    }

    /// While it writes it says one number after the other, and nothing else.
    fn hear(&mut self, line: &str, after: &str) -> Outcome {
        match said(line) {
            Said::Patience => {}
            Said::Count(count) if count == self.count + 1 => self.count = count,
            Said::Count(_) | Said::Other(_) => {
                let (name, next) = (&self.name, self.count + 1);
                return Err(format!("guest {name} says {line:?} {after}, and not count {next}").into());
            }
        }
        Ok(())
    }

    /// Waits for its first block.
    pub(crate) fn has_booted(&mut self) -> Outcome {
        let mut heard = String::new();
        loop {
            let line = self.next_line(BOOT, &format!("having said {heard:?}"))?;
            if let Said::Count(1) = said(&line) {
                self.count = 1;
                return Ok(());
            }
            check!(!line.starts_with("GUEST-ERROR"), "guest {} does not start: {heard}{line}", self.name);
            heard += &(line + "\n");
        }
    }

    /// Tells it to end, and waits until it has read all again and shut down; the blocks that it has written.
    pub(crate) fn end(mut self) -> Outcome<u64> {
        self.console.write_all(b"end\n")?;
        let mut others = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            match said(&line) {
                Said::Count(count) => self.count = count,
                Said::Patience => {}
                Said::Other(line) => others.push(line.to_owned()),
            }
        }
        let all = format!("all {} blocks are there", self.count);
        // The console says first what was typed.
        same!(others, ["end", &all, "GUEST-EXIT 0"], "what guest {} says at its end", self.name);
        same!(self.child.wait()?.code(), Some(0), "the guest's status");
        Ok(self.count)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
