//! Runs commands, and puts what they said into the failure.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use super::{Outcome, check, same};

/// A command that hangs is killed after this time, and fails the test.
const LIMIT: Duration = Duration::from_secs(300);

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) command: String,
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    fn story(&self) -> String {
        format!("`{}` ended with {}\n{}{}", self.command, self.status, self.stdout, self.stderr)
    }

    /// Its output; anything but success fails the test.
    pub(crate) fn ok(self) -> Outcome<String> {
        check!(self.status == 0, "{}", self.story());
        Ok(self.stdout)
    }

    /// Its output as JSON.
    pub(crate) fn json(self) -> Outcome<Value> {
        let story = self.story();
        serde_json::from_str(&self.ok()?).map_err(|e| format!("{story}: no JSON: {e}").into())
    }

    /// Fails the test unless it ended so, naming all of `words`.
    pub(crate) fn fails(&self, status: i32, words: &[&str]) -> Outcome {
        same!(self.status, status, "the exit status of {}", self.story());
        for word in words {
            check!(self.stderr.contains(word), "{word:?} is not said: {}", self.story());
        }
        Ok(())
    }
}

/// Runs a command to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Outcome<Ran> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.process_group(0).spawn()?;
    let group = Pid::from_child(&child);
    // timeout(1) would be one more process to start.
    let (over, limit) = channel::<()>();
    thread::spawn(move || {
        if limit.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
            let _gone = kill_process_group(group, Signal::KILL);
        }
    });
    let output = child.wait_with_output()?;
    drop(over);
    Ok(Ran {
        command: format!("{program} {}", arguments.join(" ")),
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Starts a command and reads its output while it runs.
pub(crate) fn spawn(program: &str, arguments: &[&str]) -> Outcome<Child> {
    let mut command = Command::new(program);
    let piped = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(piped.spawn()?)
}

/// Runs a script with bash; it has to succeed.
pub(crate) fn sh(script: &str) -> Outcome<String> {
    run("bash", &["-euo", "pipefail", "-c", script])?.ok()
}

/// Lines of a script's output, without empty ones.
pub(crate) fn lines(script: &str) -> Outcome<Vec<String>> {
    Ok(sh(script)?.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

/// The text at a JSON pointer.
pub(crate) fn text(value: &Value, pointer: &str) -> Outcome<String> {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.map(str::to_owned).ok_or_else(|| format!("no text at {pointer} of {value}").into())
}

/// The number at a JSON pointer.
pub(crate) fn number(value: &Value, pointer: &str) -> Outcome<u64> {
    let found = value.pointer(pointer).and_then(Value::as_u64);
    found.ok_or_else(|| format!("no number at {pointer} of {value}").into())
}
