//! Configurations and sockets that cannot be used, each with an exit status of its own, and a full state directory.

use std::{fs, path::Path};

use crate::{
    Test,
    support::{
        Outcome, check,
        command::sh,
        cow::{SOCKET, acquire, cowshed, image, pull, release, service_pid},
        same,
        second::Plan,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("full_and_free_again", full_and_free_again),
    ("taken_by_another_service", taken_by_another_service),
    ("bad_configuration", bad_configuration),
    ("socket_in_use", socket_in_use),
    ("metrics_address_in_use", metrics_address_in_use),
];

/// A tmpfs, unmounted when dropped.
pub(crate) struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    pub(crate) fn mount(path: &'a Path, options: &str) -> Outcome<Self> {
        fs::create_dir_all(path)?;
        sh(&format!("mount -t tmpfs -o {options} e2e {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // The audit finds a mount that stays.
        let _unmounted = sh(&format!("umount {}", self.0.display()));
    }
}

fn full_and_free_again() -> Outcome {
    let tiny = image("tiny:1");
    pull(&tiny)?;
    let plan = Plan::new("")?;
    let state = plan.state.clone();
    let _tmpfs = Tmpfs::mount(&state, "size=4m")?;
    let second = plan.start()?;
    second.cowshed(&["acquire", "state-0", &tiny])?.ok()?;
    let filler = state.join("filler");
    // The write-ahead log may have room for some more.
    let mut refused = None;
    for n in 1..150 {
        sh(&format!("dd if=/dev/zero bs=1k status=none >> {} 2>/dev/null || true", filler.display()))?;
        let ran = second.cowshed(&["acquire", &format!("state-{n}"), &tiny])?;
        if ran.status != 0 {
            refused = Some(ran);
            break;
        }
    }
    let refused = refused.ok_or("no acquire was refused on a full disk")?;
    refused.fails(7, &["[STATE_DIRECTORY_FULL]", &state.display().to_string()])?;
    let held = second.cowshed(&["leases", "state-0", "-o", "json"])?.json()?;
    same!(held["lease"]["state"], "granted", "the state of the lease from before");
    fs::remove_file(&filler)?;
    second.cowshed(&["acquire", "state-again", &tiny])?.ok()?;
    second.release_all()?;
    same!(second.stop()?, 0, "the exit status");
    Ok(())
}

fn taken_by_another_service() -> Outcome {
    let mut plan = Plan::new("")?;
    plan.state = "/var/lib/cowshed".into();
    let pid = service_pid()?;
    plan.run()?.fails(22, &[&format!("pid {pid}"), "/var/lib/cowshed"])?;
    same!(service_pid()?, pid, "the process in the lock file");
    cowshed(&["status"])?.ok().map(drop)
}

fn bad_configuration() -> Outcome {
    for (extra, word) in [
        ("[pool]\nnmae = \"x\"\n", "nmae"),
        ("[pool]\ndata_headroom_percent = 99\n", "data_headroom_percent"),
        ("[containerd]\naddress = \"relative\"\n", "address"),
        ("[log]\nlevel = \"=,=\"\n", "level"),
        ("[cows]\n", "cows"),
    ] {
        let plan = Plan::new(extra)?;
        let ran = plan.run()?;
        ran.fails(21, &[word])?;
        check!(!plan.state.exists(), "a state directory was made: {ran:?}");
    }
    let absent = crate::support::command::run("cowshed", &["serve", "--config", "/nowhere.toml"])?;
    absent.fails(21, &["/nowhere.toml"])
}

fn socket_in_use() -> Outcome {
    let mut plan = Plan::new("")?;
    plan.socket = SOCKET.into();
    plan.run()?.fails(26, &[SOCKET])?;
    cowshed(&["status"])?.ok()?;
    // What is no socket is not removed either.
    let mut plan = Plan::new("")?;
    plan.socket = plan.directory.path().join("file");
    fs::write(&plan.socket, "precious")?;
    plan.run()?.fails(26, &[&plan.socket.display().to_string()])?;
    same!(fs::read_to_string(&plan.socket)?, "precious", "the file in the socket's place");
    // The socket of a service that is gone is.
    let mut plan = Plan::new("")?;
    plan.socket = plan.directory.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&plan.socket)?);
    same!(plan.start()?.stop()?, 0, "the exit status");
    acquire("state-socket", &image("tiny:1"))?;
    release("state-socket")
}

fn metrics_address_in_use() -> Outcome {
    let plan = Plan::new("")?;
    let config = plan.directory.path().join("own.toml");
    let text = format!(
        "[server]\nsocket = {:?}\n[state]\ndirectory = {:?}\n[metrics]\nlisten = \"127.0.0.1:9850\"\n[snapshotter]\nserve = \"never\"\n",
        plan.socket, plan.state
    );
    fs::write(&config, text)?;
    let ran = crate::support::command::run("cowshed", &["serve", "--config", &config.display().to_string()])?;
    ran.fails(26, &["127.0.0.1:9850"])
}
