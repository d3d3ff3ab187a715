//! Memory of `cowshed serve` with many snapshots.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::MEMORY,
    samples::{Samples, rounded},
    side::Side,
    snapshots::{Sides, meta},
};

const SNAPSHOTS: usize = 2_000;
/// After that time the figure is given up: it is not told of fewer.
const LIMIT: Duration = Duration::from_secs(300);

pub(crate) async fn measure(sides: &Sides) -> Outcome<Value> {
    let side = &sides.ours;
    let serve = pid_of("cowshed", Some("serve"))?;
    let empty = megabytes(serve, "VmRSS")?;
    let begun = Instant::now();
    let missing = SNAPSHOTS - side.count().await?;
    stream::iter((0..missing).map(|_| async {
        if begun.elapsed() > LIMIT {
            return Err(format!("{SNAPSHOTS} snapshots take more than {LIMIT:?}").into());
        }
        side.prepare().await.map(drop)
    }))
    .buffer_unordered(8)
    .try_collect::<Vec<()>>()
    .await?;
    let took = begun.elapsed().as_secs();
    let mut samples = Samples::default();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        samples.add(megabytes(serve, "VmRSS")?);
    }
    let peak = megabytes(serve, "VmHWM")?;
    let back = kill_and_prepare(side).await?;
    meta(&json!({ "memory": {
        "snapshots": side.count().await?,
        "serve_before_mb": empty,
        "serve_peak_mb": peak,
        "seconds_from_a_kill_to_the_next_prepare": rounded(back.as_secs_f64()),
        "containerd_mb": megabytes(pid_of("containerd", None)?, "VmRSS")?,
        "seconds_to_make_them": took,
    } }));
    let value = samples.median().ok_or("nothing was measured")?;
    Ok(MEMORY.result(value, &samples, None))
}

/// How long nobody gets a disk when the service is killed and started again with all these snapshots.
async fn kill_and_prepare(side: &Side) -> Outcome<Duration> {
    let begun = Instant::now();
    let killed = Command::new("cowshed-host").args(["kill", "cowshed"]).status()?;
    if !killed.success() {
        return Err(format!("cowshed-host kill cowshed: {killed}").into());
    }
    loop {
        match side.prepare().await {
            Ok(_) => return Ok(begun.elapsed()),
            Err(error) if begun.elapsed() > LIMIT => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A process by its program's name and, if it is given, its first argument.
pub(crate) fn pid_of(program: &str, verb: Option<&str>) -> Outcome<u32> {
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split('\0');
        let is_program = words.next().is_some_and(|path| path.rsplit('/').next() == Some(program));
        if is_program && verb.is_none_or(|verb| words.next() == Some(verb)) {
            return Ok(pid);
        }
    }
    Err(format!("{program} {} does not run", verb.unwrap_or_default()).into())
}

/// A line of the process' status, in 10^6 bytes.
pub(crate) fn megabytes(pid: u32, field: &str) -> Outcome<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kibibytes = line.and_then(|line| line.split_ascii_whitespace().next());
    let kibibytes: f64 = kibibytes.ok_or_else(|| format!("no {field} of process {pid}"))?.parse()?;
    Ok((kibibytes * 1024.0 / 1e5).round() / 10.0)
}
