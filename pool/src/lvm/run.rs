//! Starts the child, and waits for it no longer than it may take.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{sys::signal, unistd::Pid};
use std::os::unix::process::ExitStatusExt as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    time::timeout,
};

use super::{
    child,
    error::{LvmError, gist, is_locked},
    report::complaints,
};

/// The hidden command of our own binary that the child runs.
pub const CHILD: &str = "lvm-child";

/// A killed child ends within this time, or is stuck in the kernel.
const DEATH: Duration = Duration::from_secs(5);
/// The kernel ends a child that nobody waits for so much later than we would have.
const GRACE: Duration = Duration::from_secs(10);
/// Pause between two tries to get LVM2's lock.
const PAUSE: Duration = Duration::from_millis(200);
/// So much of what it says is kept, in bytes.
const SAID_MAX: u64 = 8 << 20;

/// What LVM2 is told with each command: not to wait for locks (that is done here, for a bounded time), and to leave
/// dmeventd alone, which may hang, and need not be there.
const CONFIGURATION: &str = "global/wait_for_locks=0 activation/monitoring=0";

/// How LVM2 is run. Clones are the same.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Our own binary.
    program: PathBuf,
    /// A command has to end within this time …
    limit: Duration,
    /// … and one that only asks within this.
    answer: Duration,
    /// A lock that another command has is waited for so long.
    patience: Duration,
}

impl Default for Runner {
    fn default() -> Self {
        Self {
            // Also when it was replaced by another version meanwhile.
            program: "/proc/self/exe".into(),
            limit: Duration::from_secs(60),
            answer: Duration::from_secs(60),
            patience: Duration::from_secs(10),
        }
    }
}

impl Runner {
    /// With another binary than our own.
    #[cfg(test)]
    pub(super) fn of(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            limit: Duration::from_millis(500),
            answer: Duration::from_millis(500),
            patience: Duration::from_millis(300),
        }
    }

    /// With another limit for each command.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, answer: limit, ..self }
    }

    /// With another limit for each command that only asks.
    #[must_use]
    pub fn with_answer_within(self, answer: Duration) -> Self {
        Self { answer, ..self }
    }

    /// Runs a command of LVM2's, such as `["vgs", "vg"]`; returns what it has printed.
    ///
    /// # Errors
    /// See [`LvmError`]. The child has ended then, unless it is stuck in the kernel.
    pub async fn run(&self, words: &[&str]) -> Result<String, LvmError> {
        self.run_with("", words).await
    }

    /// The same, of a command that only asks.
    ///
    /// # Errors
    /// See [`Self::run`].
    pub async fn ask(&self, words: &[&str]) -> Result<String, LvmError> {
        self.run_within(self.answer, "", words).await
    }

    /// The same, with more of LVM2's configuration, such as `global/use_lvmpolld=0`.
    ///
    /// # Errors
    /// See [`Self::run`].
    pub async fn run_with(&self, configuration: &str, words: &[&str]) -> Result<String, LvmError> {
        self.run_within(self.limit, configuration, words).await
    }

    async fn run_within(
        &self,
        limit: Duration,
        configuration: &str,
        words: &[&str],
    ) -> Result<String, LvmError> {
        let begun = Instant::now();
        loop {
            let (status, stdout, stderr) = self.once(limit, configuration, words).await?;
            if status.success() {
                return Ok(stdout);
            }
            let command = words.join(" ");
            let stderr = stderr + &complaints(&stdout);
            if let Some(signal) = status.signal() {
                return Err(LvmError::Killed { command, signal });
            }
            if status.code() == Some(child::NO_LVM.into()) {
                return Err(LvmError::NotThere(gist(&stderr, &stdout)));
            }
            if !is_locked(&stderr) {
                return Err(LvmError::Failed { command, said: gist(&stderr, &stdout) });
            }
            if begun.elapsed() >= self.patience {
                return Err(LvmError::Locked { holder: holder(&stderr), after: begun.elapsed() });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn once(
        &self,
        limit: Duration,
        configuration: &str,
        words: &[&str],
    ) -> Result<(ExitStatus, String, String), LvmError> {
        let mut command = Command::new(&self.program);
        let alarm = (limit + GRACE).as_secs().to_string();
        let configuration = format!("{CONFIGURATION} {configuration}");
        let (name, rest) = words.split_first().unwrap_or((&"version", &[]));
        command.args([CHILD, "--limit", &alarm, "--", name, "--config", configuration.trim_end()]);
        command.args(rest).env("LC_ALL", "C").env("LVM_SUPPRESS_FD_WARNINGS", "1");
        // What the terminal sends to us is not for it: half done is worse than done.
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| LvmError::NotThere(e.to_string()))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let talk = async { tokio::join!(text(stdout), text(stderr), child.wait()) };
        match timeout(limit, talk).await {
            Ok((stdout, stderr, Ok(status))) => Ok((status, stdout, stderr)),
            Ok((.., Err(error))) => Err(LvmError::NotThere(error.to_string())),
            Err(_) => {
                let stuck = !end(&mut child).await;
                Err(LvmError::TimedOut { command: words.join(" "), after: limit, stuck })
            }
        }
    }
}

/// Kills it, with what it has started. False: it does not die.
async fn end(child: &mut Child) -> bool {
    if let Some(group) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _gone = signal::killpg(Pid::from_raw(group), signal::Signal::SIGKILL);
    }
    timeout(DEATH, child.wait()).await.is_ok()
}

async fn text(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut said = Vec::new();
    if let Some(pipe) = pipe {
        // What was said before an error is all there is.
        let _cut = pipe.take(SAID_MAX).read_to_end(&mut said).await;
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// Who has the lock that LVM2 says it could not get.
fn holder(stderr: &str) -> Option<String> {
    let path =
        stderr.lines().find_map(|line| line.trim().split_once(": flock failed").map(|(path, _)| path))?;
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).ok()?);
    let pid = flock_holder(&fs::read_to_string("/proc/locks").ok()?, inode)?;
    let name = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("comm")).unwrap_or_default();
    Some(format!("process {pid} ({}, {path})", name.trim()))
}

/// The process that has a file locked, from `/proc/locks`: `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`.
fn flock_holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        // A line with "->" is of one who waits.
        if words.get(1) != Some(&"FLOCK") {
            return None;
        }
        let is_it = words.get(5)?.rsplit(':').next()?.parse::<u64>() == Ok(inode);
        if is_it { words.get(4)?.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// One test at a time: a script cannot be run while a child that another test has just started has it open for writing.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    /// A program that does this instead of LVM2.
    fn fake(script: &str) -> (tempfile::TempDir, Runner) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cowshed");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let runner = Runner::of(&path);
        (directory, runner)
    }

    #[tokio::test]
    async fn a_command_is_told_as_it_is_and_its_output_comes_back() {
        let _alone = ALONE.lock().await;
        let (_kept, runner) = fake("printf '%s|' \"$@\"");
        let said = runner.run(&["vgs", "-o", "vg free"]).await.unwrap();
        assert_eq!(said, format!("lvm-child|--limit|10|--|vgs|--config|{CONFIGURATION}|-o|vg free|"));
    }

    #[tokio::test]
    async fn failures_are_told_apart() {
        let _alone = ALONE.lock().await;
        let (_kept, runner) = fake("echo '  Volume group \"vg\" not found' >&2; exit 5");
        let error = runner.run(&["vgs", "vg"]).await.unwrap_err();
        assert_eq!(error.to_string(), "`lvm vgs vg` failed: Volume group \"vg\" not found");
        let (_kept, runner) = fake("echo '  there is none' >&2; exit 127");
        assert!(matches!(runner.run(&["vgs"]).await, Err(LvmError::NotThere(_))));
        let (_kept, runner) = fake("kill -SEGV $$");
        assert!(matches!(runner.run(&["vgs"]).await, Err(LvmError::Killed { signal: 11, .. })));
        let (_kept, runner) = fake("echo \"  Can't get lock for vg.\" >&2; exit 5");
        let error = runner.run(&["vgs"]).await.unwrap_err();
        assert!(
            matches!(&error, LvmError::Locked { holder: None, after } if *after >= runner.patience),
            "{error}"
        );
        assert!(matches!(Runner::of(Path::new("/nowhere")).run(&["vgs"]).await, Err(LvmError::NotThere(_))));
    }

    #[tokio::test]
    async fn what_hangs_is_killed_with_all_that_it_has_started() {
        let _alone = ALONE.lock().await;
        let (kept, runner) = fake("sleep 600 & echo $! > \"$(dirname \"$0\")/pid\"; wait");
        let begun = Instant::now();
        let error = runner.run(&["lvextend", "vg/pool"]).await.unwrap_err();
        assert!(matches!(&error, LvmError::TimedOut { stuck: false, .. }), "{error}");
        assert!(error.to_string().contains("lvextend vg/pool") && begun.elapsed() < DEATH, "{error}");
        let pid = fs::read_to_string(kept.path().join("pid")).unwrap();
        for _ in 0..100 {
            // Gone, or dead and not waited for.
            let state =
                fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_else(|_| ") Z".to_owned());
            if state.contains(") Z") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{pid} lives");
    }

    #[tokio::test]
    async fn what_only_asks_has_a_limit_of_its_own() {
        let _alone = ALONE.lock().await;
        let (_kept, runner) = fake("sleep 0.2; echo told");
        let runner = runner.with_limit(Duration::from_secs(20)).with_answer_within(Duration::from_millis(20));
        let error = runner.ask(&["vgs"]).await.unwrap_err();
        assert!(matches!(&error, LvmError::TimedOut { after, .. } if *after == runner.answer), "{error}");
        assert_eq!(runner.run(&["lvextend"]).await.unwrap(), "told\n");
    }

    #[test]
    fn who_has_a_lock() {
        let locks = "1: POSIX  ADVISORY  WRITE 10 00:16:77 0 EOF\n2: FLOCK  ADVISORY  WRITE 4711 00:16:77 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 12 00:16:78 0 EOF\n";
        assert_eq!(flock_holder(locks, 77), Some(4711));
        assert_eq!(flock_holder(locks, 78), None);
        assert_eq!(flock_holder("", 1), None);
    }
}
