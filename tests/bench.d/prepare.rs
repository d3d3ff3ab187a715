//! Prepare from a committed parent: one at a time, and fifty at once.

use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::{AT_ONCE, PREPARE},
    conditions,
    samples::Samples,
    side::Side,
    snapshots::{Sides, meta},
};

/// Rounds of Prepares one after the other; after each, its disks are removed.
pub(crate) async fn one_at_a_time(sides: &Sides) -> Outcome<Value> {
    let (rounds, each) = sides.of((8, 6), (2, 6));
    meta(&json!({ "conditions": { PREPARE.name: format!("{rounds} rounds of {each}") } }));
    let (ours, peer) = sides.in_turn(rounds, async |side| round(side, each).await).await?;
    meta(&with_other_rcu(sides, each).await?);
    let value = ratio(&peer, &ours)?;
    Ok(PREPARE.result(value, &ours, Some((&sides.peer.snapshotter, &peer))))
}

/// Prepares one after the other, and removes them.
pub(crate) async fn round(side: &Side, each: usize) -> Outcome<Samples> {
    let (mut samples, mut disks) = (Samples::default(), Vec::new());
    for _ in 0..each {
        let (disk, took) = side.prepare().await?;
        samples.add_time(took);
        disks.push(disk);
    }
    side.clear(&disks).await?;
    Ok(samples)
}

/// Two rounds with the other setting of RCU: how much of a Prepare is the kernel's waiting.
async fn with_other_rcu(sides: &Sides, each: usize) -> Outcome<Value> {
    let usual = conditions::rcu_expedited()?;
    let other = u8::from(usual == 0);
    conditions::set_rcu_expedited(other)?;
    let (ours, peer) = sides.in_turn(2, async |side| round(side, each).await).await?;
    conditions::set_rcu_expedited(usual)?;
    Ok(json!({ "prepare_with_other_rcu": {
        "rcu_expedited": other, "ours": ours.summary(), "peer": peer.summary(),
    } }))
}

/// Rounds of fifty.
pub(crate) async fn at_once(sides: &Sides) -> Outcome<Value> {
    let rounds = sides.of(2, 1);
    let fifty = async |side: &Side| {
        let (disks, took) = side.prepare_at_once(50).await?;
        side.clear(&disks).await?;
        Ok(Samples::of_time(took))
    };
    let (ours, peer) = sides.in_turn(rounds, fifty).await?;
    let value = ratio(&peer, &ours)?;
    Ok(AT_ONCE.result(value, &ours, Some((&sides.peer.snapshotter, &peer))))
}

/// How many times longer the one takes, by the p50s.
pub(crate) fn ratio(longer: &Samples, shorter: &Samples) -> Outcome<f64> {
    let of =
        |samples: &Samples| samples.median().filter(|median| *median > 0.0).ok_or("nothing was measured");
    Ok(of(longer)? / of(shorter)?)
}
