//! Scripts, as an operator would type them.

use std::process::{Command, Stdio};

use crate::Outcome;

/// Runs a script with bash, for five minutes at the most; it has to succeed.
pub(crate) async fn sh(script: &str) -> Outcome<String> {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "300", "bash", "-euo", "pipefail", "-c", script]).stdin(Stdio::null());
    let ran = tokio::task::spawn_blocking(move || command.output()).await??;
    if ran.status.success() {
        return Ok(String::from_utf8_lossy(&ran.stdout).into_owned());
    }
    let said = [ran.stdout, ran.stderr].concat();
    Err(format!("`{script}` ended with {}: {}", ran.status, String::from_utf8_lossy(&said)).into())
}
