//! `ctr images pull` of an image of thirty tiny layers.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Outcome,
    catalogue::UNPACK,
    prepare::ratio,
    samples::Samples,
    side::{NAMESPACE, Side},
    snapshots::Sides,
};

const IMAGE: &str = "127.0.0.1:5000/cowshed/layers:30";
const LAYERS: usize = 30;

pub(crate) async fn measure(sides: &Sides) -> Outcome<Value> {
    // the registry has the image in its cache from then on
    pull(&sides.ours).await?;
    let (ours, peer) =
        sides.in_turn(sides.of(6, 1), async |side| Ok(Samples::of_time(pull(side).await?))).await?;
    let value = ratio(&peer, &ours)?;
    Ok(UNPACK.result(value, &ours, Some((&sides.peer.snapshotter, &peer))))
}

/// One pull into a containerd that has nothing of it; it is removed with all its content.
async fn pull(side: &Side) -> Outcome<Duration> {
    let before = side.count().await?;
    nothing_there()?;
    let begun = Instant::now();
    ctr(&[
        "images",
        "pull",
        "--hosts-dir",
        "/etc/containerd/certs.d",
        "--snapshotter",
        &side.snapshotter,
        IMAGE,
    ])?;
    let took = begun.elapsed();
    let unpacked = side.count().await? - before;
    if unpacked != LAYERS {
        return Err(format!("{unpacked} snapshots, not {LAYERS}, were made by the pull").into());
    }
    ctr(&["images", "rm", "--sync", IMAGE])?;
    let begun = Instant::now();
    while side.count().await? != before {
        if begun.elapsed() > Duration::from_secs(60) {
            return Err("the image's snapshots are not collected".into());
        }
        side.collect().await?;
    }
    side.rest().await?;
    eprintln!("  {}: {took:.1?}", side.snapshotter);
    Ok(took)
}

fn nothing_there() -> Outcome {
    let content = ctr(&["content", "ls", "-q"])?;
    if content.trim().is_empty() { Ok(()) } else { Err(format!("content is left: {content}").into()) }
}

fn ctr(arguments: &[&str]) -> Outcome<String> {
    let output = Command::new("ctr").args(["-n", NAMESPACE]).args(arguments).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(format!("ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
