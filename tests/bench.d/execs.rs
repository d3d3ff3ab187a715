//! Counts the programs that are started on the whole machine, by the kernel's tracepoint sched_process_exec.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::Outcome;

const TRACEFS: &str = "/sys/kernel/tracing";
const INSTANCE: &str = "/sys/kernel/tracing/instances/cowshed-bench";

/// How often each program was started.
pub(crate) type Starts = BTreeMap<String, usize>;

/// A running count. Ends when dropped.
pub(crate) struct Execs;

impl Execs {
    pub(crate) fn begin() -> Outcome<Self> {
        if !Path::new(TRACEFS).join("events").exists() {
            let mounted = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACEFS]).status()?;
            if !mounted.success() {
                return Err("tracefs cannot be mounted".into());
            }
        }
        fs::create_dir_all(INSTANCE)?;
        write("events/sched/sched_process_exec/enable", "1")?;
        let execs = Self;
        execs.check()?;
        Ok(execs)
    }

    /// A count that does not see what is started here would make a false zero.
    fn check(&self) -> Outcome {
        self.reset()?;
        Command::new("true").status()?;
        match self.seen()?.get("true") {
            Some(1) => Ok(()),
            other => Err(format!("the tracepoint saw {other:?} starts of `true`, not 1").into()),
        }
    }

    pub(crate) fn reset(&self) -> Outcome {
        write("trace", "")
    }

    /// What was started since the reset.
    pub(crate) fn seen(&self) -> Outcome<Starts> {
        let mut starts = Starts::new();
        for line in fs::read_to_string(Path::new(INSTANCE).join("trace"))?.lines() {
            // … sched_process_exec: filename=/usr/sbin/dmsetup pid=734 old_pid=734
            let file = line
                .split_once("sched_process_exec: filename=")
                .and_then(|(_, rest)| rest.split_once(" pid="));
            if let Some((file, _)) = file {
                let name = Path::new(file).file_name().unwrap_or_default().to_string_lossy().into_owned();
                *starts.entry(name).or_default() += 1;
            }
        }
        Ok(starts)
    }

    /// Waits until udev has nothing to do and nothing has been started for a while; what was started since the reset.
    pub(crate) async fn when_quiet(&self) -> Outcome<Starts> {
        let begun = Instant::now();
        let (mut last, mut since) = (self.seen()?, Instant::now());
        while since.elapsed() < Duration::from_millis(400) {
            if begun.elapsed() > Duration::from_secs(60) {
                return Err(format!("it does not become quiet: {last:?}").into());
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
            let now = self.seen()?;
            // udevd removes the file when its queue is empty
            if now != last || Path::new("/run/udev/queue").exists() {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(last)
    }
}

impl Drop for Execs {
    fn drop(&mut self) {
        // the host is thrown away
        let _disabled = write("events/sched/sched_process_exec/enable", "0");
        let _removed = fs::remove_dir(INSTANCE);
    }
}

fn write(file: &str, text: &str) -> Outcome {
    Ok(fs::write(Path::new(INSTANCE).join(file), text)?)
}
