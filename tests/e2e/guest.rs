//! A guest that goes on writing to its disk, whatever happens to its lease and to those who know of it.
//!
//! It is a real one: QEMU in the test host, with the disk that Cowshed granted as its root. What the test saw, and when, it
//! prints as a table.

use std::{
    fs,
    io::Write as _,
    time::{Duration, Instant},
};

use crate::{
    Test,
    support::{
        Outcome, check,
        command::{lines, number, sh, text},
        containerd,
        cow::{Disk, acquire, collect, cowshed, host, image, lease, service_pid, thin_devices, wait_serving},
        guest::{Guest, Habits},
        same, wait_at_most, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[("writes_on_whatever_happens_to_its_lease", writes_on)];

const VM: &str = "guest-writes";
/// From the guest's end to the disk's.
const BOUND: Duration = Duration::from_secs(60);
/// Instead of the configuration's 300 s.
const GRACE: &str = "5";
const HABITS: Habits = Habits { block: 64 << 10, pause: Duration::from_millis(500) };

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
    let mut guest = Guest::boot(VM, &reply, HABITS)?;
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
