//! Watchers: all that there is, then each change; and after a break only what has changed since.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::Child,
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
};

use serde_json::Value;

use crate::{
    Test,
    support::{
        Outcome, PATIENCE, check,
        command::{spawn, text},
        cow::{acquire, cowshed, evict, host, image, leases, pull, release_fully, wait_serving},
        same,
    },
};

pub(crate) const TESTS: &[Test] = &[
    ("sees_all_that_there_is_and_then_each_change", sees_all_and_then_each_change),
    ("a_mirror_catches_up_after_a_restart", a_mirror_catches_up_after_a_restart),
    ("sees_images_come_and_go", sees_images_come_and_go),
    ("a_revision_that_never_was_is_refused", a_revision_that_never_was_is_refused),
];

/// `cowshed watch`, read as it comes.
struct Watcher {
    child: Child,
    lines: Receiver<Value>,
    /// Lease id → state, by all that was told.
    leases: BTreeMap<String, String>,
    revision: u64,
}

impl Watcher {
    fn start(after: Option<u64>) -> Outcome<Self> {
        let after = after.map(|revision| revision.to_string());
        let mut arguments = vec!["watch", "-o", "json"];
        if let Some(after) = &after {
            arguments.extend(["--after", after]);
        }
        let mut child = spawn("cowshed", &arguments)?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let sent = serde_json::from_str(&line).map(|event| sender.send(event));
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
            }
        });
        Ok(Self { child, lines, leases: BTreeMap::new(), revision: 0 })
    }

    /// Reads until an event fulfils `is`; keeps the mirror.
    fn until(&mut self, what: &str, is: impl Fn(&Value, &Self) -> bool) -> Outcome<Value> {
        loop {
            let event = self.lines.recv_timeout(PATIENCE).map_err(|error| match error {
                RecvTimeoutError::Timeout => format!("waited in vain for {what}"),
                RecvTimeoutError::Disconnected => format!("the watch ended before {what}"),
            })?;
            let revision = event["revision"].as_u64().unwrap_or_default();
            check!(revision >= self.revision, "revision {revision} after {}", self.revision);
            self.revision = revision;
            let change = &event["event"];
            if let Ok(id) = text(change, "/lease/lease_id") {
                self.leases.insert(id, text(change, "/lease/state")?);
            } else if let Ok(id) = text(change, "/lease_gone/lease_id") {
                self.leases.remove(&id);
            }
            if is(change, self) {
                return Ok(event);
            }
        }
    }

    fn until_synced(&mut self, what: &str) -> Outcome<Value> {
        self.until(&format!("all {what}"), |event, _| event["synced"][what] == true)
    }

    fn expect_mirror(&self) -> Outcome {
        let now: BTreeMap<String, String> = leases()?
            .iter()
            .map(|lease| Ok((text(lease, "/lease_id")?, text(lease, "/state")?)))
            .collect::<Outcome<_>>()?;
        same!(self.leases, now, "the mirror and the list");
        Ok(())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // It may have ended.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn sees_all_and_then_each_change() -> Outcome {
    let tiny = image("tiny:1");
    let first = acquire("watch-first", &tiny)?;
    let mut watcher = Watcher::start(None)?;
    watcher.until_synced("leases")?;
    same!(watcher.leases.get(&first.lease).map(String::as_str), Some("granted"), "the lease that was there");
    watcher.expect_mirror()?;
    let second = acquire("watch-second", &tiny)?;
    let granted = |state: &'static str, id: String| {
        move |_: &Value, watcher: &Watcher| watcher.leases.get(&id).is_some_and(|s| s == state)
    };
    watcher.until("the second lease", granted("granted", second.lease.clone()))?;
    release_fully("watch-first")?;
    watcher.until("the first to go", |event, _| event["lease_gone"]["lease_id"] == first.lease.as_str())?;
    watcher.expect_mirror()?;
    release_fully("watch-second")?;
    watcher.until("the second to go", |_, watcher| watcher.leases.is_empty())?;
    watcher.expect_mirror()
}

fn a_mirror_catches_up_after_a_restart() -> Outcome {
    let tiny = image("tiny:1");
    let (goes, stays) = (acquire("watch-goes", &tiny)?, acquire("watch-stays", &tiny)?);
    let mut watcher = Watcher::start(None)?;
    watcher.until_synced("leases")?;
    let (revision, mirror) = (watcher.revision, watcher.leases.clone());
    drop(watcher);
    release_fully("watch-goes")?;
    let comes = acquire("watch-comes", &tiny)?;
    host("restart", "cowshed")?;
    wait_serving()?;
    let mut watcher = Watcher::start(Some(revision))?;
    watcher.leases = mirror;
    let mut told = Vec::new();
    loop {
        let event = watcher.until("an event", |_, _| true)?["event"].clone();
        if event["synced"]["leases"] == true {
            break;
        }
        told.push(event.to_string());
    }
    check!(told.iter().any(|event| event.contains(&goes.lease)), "what has gone is not told: {told:?}");
    check!(told.iter().any(|event| event.contains(&comes.lease)), "what has come is not told: {told:?}");
    check!(!told.iter().any(|event| event.contains(&stays.lease)), "what has not changed is told: {told:?}");
    watcher.expect_mirror()?;
    release_fully("watch-stays")?;
    release_fully("watch-comes")
}

fn sees_images_come_and_go() -> Outcome {
    let tiny = image("tiny:1");
    evict(&[&tiny])?;
    let mut watcher = Watcher::start(None)?;
    watcher.until_synced("images")?;
    pull(&tiny)?;
    watcher.until("the image", |event, _| {
        event["image"]["name"] == tiny.as_str() && event["image"]["unpacked"] == true
    })?;
    evict(&[&tiny])?;
    watcher.until("the image to go", |event, _| event["image_gone"] == tiny.as_str())?;
    Ok(())
}

fn a_revision_that_never_was_is_refused() -> Outcome {
    cowshed(&["watch", "--after", "9000000000"])?.fails(1, &["[REVISION_COMPACTED]", "after_revision"])
}
