//! Runs commands, and puts what they said into the failure.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{Outcome, check, same};

/// A command that hangs fails the test after this many seconds.
const LIMIT: &str = "300";

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
    let output = limited(program, arguments).stdin(Stdio::null()).output()?;
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

fn limited(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", LIMIT, program]).args(arguments);
    command
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
