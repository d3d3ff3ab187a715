//! A second `cowshed serve` beside the host's, with a configuration, state and socket of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{
    Outcome, check,
    command::{Ran, run},
    cow::snapshotter,
    same, wait_for,
};

/// What a second service is to be.
pub(crate) struct Plan {
    pub(crate) directory: TempDir,
    pub(crate) state: PathBuf,
    pub(crate) socket: PathBuf,
    /// Where its metrics are, or "" for none.
    pub(crate) metrics: &'static str,
    /// More lines of [server].
    pub(crate) server: &'static str,
    /// More TOML: sections besides [server], [state] and [metrics].
    extra: String,
}

impl Plan {
    pub(crate) fn new(extra: &str) -> Outcome<Self> {
        let directory = tempfile::Builder::new().prefix("e2e").tempdir_in("/tmp")?;
        let (state, socket) = (directory.path().join("state"), directory.path().join("socket"));
        Ok(Self { directory, state, socket, metrics: "", server: "", extra: extra.to_owned() })
    }

    /// Its configuration, once it was started.
    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("cowshed.toml")
    }

    fn write(&self) -> Outcome<PathBuf> {
        let path = self.config();
        let mut text = format!(
            "[server]\nsocket = {:?}\n{}\n[state]\ndirectory = {:?}\n[metrics]\nlisten = {:?}\n{}",
            self.socket, self.server, self.state, self.metrics, self.extra
        );
        // The host's own service serves the snapshotter of both.
        for (section, line) in [
            ("[containerd]", format!("snapshotter = {:?}", snapshotter())),
            ("[snapshotter]", "serve = \"never\"".to_owned()),
            // Whoever counts disks counts those of VMs.
            ("[spares]", "enabled = false".to_owned()),
        ] {
            if !self.extra.contains(section) {
                text.push_str(&format!("\n{section}\n{line}\n"));
            }
        }
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Runs it, to fail by itself.
    pub(crate) fn run(&self) -> Outcome<Ran> {
        let config = self.write()?;
        run("cowshed", &["serve", "--config", &config.display().to_string()])
    }

    /// Starts it and waits until it has its leases.
    pub(crate) fn start(self) -> Outcome<Second> {
        let child = self.spawn()?;
        let second = Second { plan: self, child };
        second.wait_serving()?;
        Ok(second)
    }

    /// Starts it and waits until it says that it cannot serve.
    pub(crate) fn start_in_rescue(self) -> Outcome<Second> {
        let child = self.spawn()?;
        let second = Second { plan: self, child };
        second.wait_in_rescue()?;
        Ok(second)
    }

    fn spawn(&self) -> Outcome<Child> {
        let config = self.write()?;
        let log = self.directory.path().join("log");
        let mut serve = Command::new("cowshed");
        serve.arg("serve").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(serve.stderr(fs::File::create(&log)?).spawn()?)
    }
}

/// A second service that runs. Killed when dropped.
pub(crate) struct Second {
    pub(crate) plan: Plan,
    child: Child,
}

impl Second {
    pub(crate) fn socket(&self) -> &Path {
        &self.plan.socket
    }

    /// `cowshed …` against it.
    pub(crate) fn cowshed(&self, arguments: &[&str]) -> Outcome<Ran> {
        let socket = self.plan.socket.display().to_string();
        run("cowshed", &[arguments, &["--socket", &socket]].concat())
    }

    /// `cowshed acquire` against it, to be refused.
    pub(crate) fn refuses(
        &self,
        vm: &str,
        image: &str,
        status: i32,
        reason: &str,
        words: &[&str],
    ) -> Outcome {
        let ran = self.cowshed(&["acquire", vm, image])?;
        ran.fails(status, &[&format!("[{reason}]")])?;
        ran.fails(status, words)
    }

    /// Releases all its leases and waits until the disks are gone.
    pub(crate) fn release_all(&self) -> Outcome {
        let all = self.cowshed(&["leases", "-o", "json"])?.json()?;
        for lease in all["leases"].as_array().into_iter().flatten() {
            self.cowshed(&["release", lease["vm_id"].as_str().unwrap_or_default()])?.ok()?;
        }
        wait_for("its leases to go", || {
            let left = self.cowshed(&["leases", "-o", "json"])?.json()?;
            check!(left["leases"].as_array().is_some_and(Vec::is_empty), "{left}");
            Ok(())
        })
    }

    fn wait_serving(&self) -> Outcome {
        wait_for("the second service", || {
            let answer = self.cowshed(&["leases"])?;
            check!(answer.status == 0, "{answer:?}; its log: {}", self.log());
            Ok(())
        })
    }

    /// Ends it in order and starts it again. Its log begins anew.
    pub(crate) fn restart(mut self) -> Outcome<Self> {
        self.terminate()?;
        same!(self.wait()?, 0, "the exit status");
        self.child = self.plan.spawn()?;
        self.wait_serving()?;
        Ok(self)
    }

    fn wait_in_rescue(&self) -> Outcome {
        wait_for("the second service", || {
            let answer = self.cowshed(&["status"])?;
            check!(answer.status == 8, "{answer:?}; its log: {}", self.log());
            Ok(())
        })
    }

    /// After its end, starts it once more, and waits until it says that it cannot serve.
    pub(crate) fn start_again_in_rescue(&mut self) -> Outcome {
        self.child = self.plan.spawn()?;
        self.wait_in_rescue()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.plan.directory.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn terminate(&self) -> Outcome {
        run("kill", &["-TERM", &self.child.id().to_string()])?.ok().map(drop)
    }

    /// Waits for its end; its exit status.
    pub(crate) fn wait(&mut self) -> Outcome<i32> {
        wait_for("the second service's end", || {
            let ended = self.child.try_wait()?.ok_or("it runs")?;
            Ok(ended.code().unwrap_or(-1))
        })
    }

    /// Stops it in order; its plan can be started again.
    pub(crate) fn stop(mut self) -> Outcome<i32> {
        self.terminate()?;
        self.wait()
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}
