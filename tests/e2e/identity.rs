//! Whether a device is what a lease says, who has it open, and waiting for its end.

use std::{fs::File, process::Command};

use crate::{
    Test,
    support::{
        Outcome, check,
        command::sh,
        cow::{Disk, acquire, acquire_reply, cowshed, image, lease, release, release_fully, wait_gone},
        same, wait_for,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("a_granted_device_is_verified_by_all_its_marks", a_granted_device_is_verified),
    ("what_differs_is_named", what_differs_is_named),
    ("a_command_is_started_only_on_the_right_device", a_command_is_started_only_on_the_right_device),
    ("who_has_a_disk_open_is_told", who_has_a_disk_open_is_told),
    ("a_release_can_wait_until_the_disk_is_gone", a_release_can_wait),
];

fn a_granted_device_is_verified() -> Outcome {
    let reply = acquire_reply("identity-right", &image("tiny:1"))?;
    let (disk, device) = (Disk::of(&reply["lease"])?, &reply["lease"]["device"]);
    let number = format!("{}:{}", device["major"], device["minor"]);
    let (generation, thin) = (disk.generation.to_string(), disk.thin_id.to_string());
    let digest = reply["lease"]["image_digest"].as_str().unwrap_or_default();
    let mut claims = vec![
        "verify",
        &disk.lease,
        "--path",
        &disk.path,
        "--number",
        &number,
        "--generation",
        &generation,
        "--thin-id",
        &thin,
        "--image-digest",
        digest,
    ];
    if let Some(uuid) = device["dm_uuid"].as_str() {
        claims.extend(["--dm-uuid", uuid]);
    }
    check!(cowshed(&claims)?.ok()?.contains(&disk.path), "the device is not named");
    cowshed(&["verify", &disk.lease])?.ok()?;
    release("identity-right")
}

fn what_differs_is_named() -> Outcome {
    let disk = acquire("identity-wrong", &image("tiny:1"))?;
    let generation = (disk.generation + 1).to_string();
    let table: [(&[&str], &str); 5] = [
        (&["--path", "/dev/mapper/other"], "path"),
        (&["--number", "7:7"], "major:minor"),
        (&["--generation", &generation], "generation"),
        (&["--image-digest", "sha256:00"], "image_digest"),
        (&["--dm-uuid", "NOT-IT"], "dm_uuid"),
    ];
    for (claim, field) in table {
        cowshed(&[&["verify", &disk.lease], claim].concat())?.fails(6, &[field, claim[1]])?;
    }
    let open = File::open(&disk.path)?;
    release("identity-wrong")?;
    cowshed(&["verify", &disk.lease])?.fails(6, &["state", "releasing"])?;
    drop(open);
    wait_gone("identity-wrong")?;
    cowshed(&["verify", &disk.lease])?.fails(3, &["[LEASE_NOT_FOUND]", &disk.lease])
}

fn a_command_is_started_only_on_the_right_device() -> Outcome {
    let disk = acquire("identity-exec", &image("tiny:1"))?;
    let right =
        ["exec-verified", &disk.lease, "--path", &disk.path, "--", "sh", "-c", "echo started; exit 42"];
    let ran = cowshed(&right)?;
    same!((ran.status, ran.stdout.as_str()), (42, "started\n"), "the command's own status and output");
    let wrong = ["exec-verified", &disk.lease, "--path", "/dev/mapper/other", "--", "echo", "started"];
    let ran = cowshed(&wrong)?;
    ran.fails(6, &["path"])?;
    same!(ran.stdout, "", "output of a command on the wrong device");
    cowshed(&["exec-verified", &disk.lease, "--", "/nothere"])?.fails(127, &["/nothere"])?;
    release("identity-exec")
}

fn who_has_a_disk_open_is_told() -> Outcome {
    let disk = acquire("identity-held", &image("tiny:1"))?;
    let mut sleeper = Command::new("sleep").arg("1000").stdin(File::open(&disk.path)?).spawn()?;
    let pid = sleeper.id();
    let told = (|| {
        let holders = lease("identity-held")?["holders"].clone();
        let expected = serde_json::json!([{ "pid": pid, "what": "sleep" }]);
        same!(holders, expected, "who has it open");
        let said = cowshed(&["release", "identity-held", "-o", "json"])?.json()?;
        same!(said["lease"]["holders"], expected, "who has it open, by the release");
        check!(
            cowshed(&["leases", "identity-held"])?.ok()?.contains(&format!("sleep (pid {pid})")),
            "not in words"
        );
        Ok(())
    })();
    sleeper.kill()?;
    sleeper.wait()?;
    told?;
    wait_gone("identity-held")?;

    let disk = acquire("identity-mounted", &image("tiny:1"))?;
    let directory = sh(&format!("d=$(mktemp -d /tmp/e2e-mount.XXXXXX); mount {} $d; echo $d", disk.path))?;
    let holders = lease("identity-mounted").map(|lease| lease["holders"].to_string());
    sh(&format!("umount {0}; rmdir {0}", directory.trim()))?;
    let holders = holders?;
    check!(holders.contains(&format!("mounted on {}", directory.trim())), "{holders}");
    release_fully("identity-mounted")
}

fn a_release_can_wait() -> Outcome {
    let disk = acquire("identity-waits", &image("tiny:1"))?;
    let open = File::open(&disk.path)?;
    let ran = cowshed(&["release", "identity-waits", "--wait", "1"])?;
    ran.fails(9, &["identity-waits", "still there"])?;
    same!(lease("identity-waits")?["state"], "releasing", "the state after the deadline");
    drop(open);
    cowshed(&["release", "identity-waits", "--wait"])?.ok()?;
    cowshed(&["leases", "identity-waits"])?.fails(3, &["[LEASE_NOT_FOUND]"])?;
    check!(!std::path::Path::new(&disk.path).exists(), "{} is there", disk.path);
    // Of a VM that has nothing it returns at once.
    wait_for("nothing", || cowshed(&["release", "identity-waits", "--wait"])?.ok().map(drop))
}
