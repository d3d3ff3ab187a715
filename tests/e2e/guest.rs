//! A guest that goes on writing, whatever happens to its lease and to those who know of it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    sync::mpsc::{Receiver, channel},
    thread,
};

use serde_json::json;

use crate::{
    Test,
    support::{
        Outcome, PATIENCE, check,
        command::{sh, spawn, text},
        cow::{Disk, cowshed, host, image, lease, thin_devices, wait_gone, wait_serving},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[("writes_on_whatever_happens_to_its_lease", writes_on)];

/// Each tick writes a file, has it on the disk, and says so; at the end all are read again.
const SCRIPT: &str = r#"
b=/bin/busybox n=0
block() { $b yes "block $1" | $b head -c 65536; }
while [ $n -lt 100 ]; do
  n=$((n + 1))
  block $n > /data.$n && $b sync || { echo "IO-ERROR at tick $n"; exit 9; }
  echo "tick $n"
  $b sleep 1
done
echo 3 > /proc/sys/vm/drop_caches
while [ $n -gt 0 ]; do
  block $n | $b cmp -s - /data.$n || { echo "CHANGED $n"; exit 8; }
  n=$((n - 1))
done
echo "all there"
"#;

/// What the guest says, line by line.
struct Console {
    lines: Receiver<String>,
    tick: u32,
}

impl Console {
    /// Waits until the guest has written twice more: the second tick began after this call.
    fn expect_ticks(&mut self, after: &str) -> Outcome {
        let until = self.tick + 2;
        while self.tick < until {
            let line = self.next(after)?;
            if let Some(tick) = line.strip_prefix("tick ") {
                self.tick = tick.trim().parse()?;
            }
        }
        Ok(())
    }

    fn next(&self, after: &str) -> Outcome<String> {
        let line =
            self.lines.recv_timeout(PATIENCE).map_err(|e| format!("nothing from the guest {after}: {e}"))?;
        check!(!line.contains("ERROR") && !line.contains("CHANGED"), "the guest says, {after}: {line}");
        Ok(line)
    }
}

fn writes_on() -> Outcome {
    let reply =
        cowshed(&["acquire", "guest-writes", &image("tiny:1"), "--ttl", "1", "-o", "json"])?.json()?;
    let disk = Disk::of(&reply["lease"])?;
    let directory = tempfile::tempdir()?;
    let process = directory.path().join("process.json");
    let shell = json!({ "entrypoint": ["/bin/busybox", "sh", "-c", SCRIPT], "cmd": [], "env": [], "user": "", "working_dir": "/" });
    fs::write(&process, shell.to_string())?;
    let process = process.display().to_string();
    let boot_guest = sh("dirname $(readlink -f $(command -v cowshed-host))")?;
    let boot_guest = format!("{}/boot-guest", boot_guest.trim());
    let mut guest = spawn(&boot_guest, &["--disk", &disk.path, "--process", &process, "--timeout", "280"])?;
    let output = BufReader::new(guest.stdout.take().ok_or("no console")?);
    let (sender, lines) = channel();
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let mut console = Console { lines, tick: 0 };

    console.expect_ticks("at its start")?;
    wait_for("the lease to expire", || {
        same!(text(&lease("guest-writes")?, "/state")?, "suspect", "its state");
        Ok(())
    })?;
    console.expect_ticks("after its lease has expired")?;
    cowshed(&["release", "guest-writes"])?.ok()?;
    console.expect_ticks("after it was released")?;
    for service in ["cowshed", "containerd"] {
        host("kill", service)?;
        wait_serving()?;
        console.expect_ticks(&format!("after {service} was killed"))?;
    }
    for service in ["cowshed", "containerd"] {
        host("restart", service)?;
        wait_serving()?;
        console.expect_ticks(&format!("after {service} was restarted"))?;
    }
    let released = lease("guest-writes")?;
    same!(text(&released, "/state")?, "releasing", "the state of {released}");
    check!(
        released["holders"].to_string().contains("qemu"),
        "the guest is not among {}",
        released["holders"]
    );
    while console.next("at its end")?.trim() != "all there" {}
    same!(guest.wait()?.code(), Some(0), "the guest's status");
    wait_gone("guest-writes")?;
    check!(!thin_devices()?.contains(&disk.dm_name), "{} is still there", disk.path);
    Ok(())
}
