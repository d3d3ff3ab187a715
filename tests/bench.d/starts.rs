//! Programs that a Prepare and a Remove start on the machine.

use serde_json::{Value, json};

use crate::{
    Outcome,
    catalogue::{Figure, PREPARE_STARTS, REMOVE_STARTS},
    execs::{Execs, Starts},
    samples::Samples,
    side::Side,
    snapshots::{Sides, meta},
};

/// What one side started.
#[derive(Default)]
struct Counted {
    each: Samples,
    programs: Starts,
}

impl Counted {
    fn add(&mut self, starts: Starts) {
        self.each.add(f64::from(u32::try_from(starts.values().sum::<usize>()).unwrap_or(u32::MAX)));
        for (program, count) in starts {
            *self.programs.entry(program).or_default() += count;
        }
    }
}

#[derive(Clone, Copy)]
enum Call {
    Prepare,
    Remove,
}

pub(crate) async fn of_prepare(sides: &Sides) -> Outcome<Value> {
    measure(sides, &PREPARE_STARTS, Call::Prepare).await
}

pub(crate) async fn of_remove(sides: &Sides) -> Outcome<Value> {
    measure(sides, &REMOVE_STARTS, Call::Remove).await
}

async fn measure(sides: &Sides, figure: &Figure, call: Call) -> Outcome<Value> {
    let execs = Execs::begin()?;
    execs.when_quiet().await?;
    execs.reset()?;
    let idle = execs.when_quiet().await?;
    let (mut ours, mut peer) = (Counted::default(), Counted::default());
    for _ in 0..sides.of(8, 4) {
        for (side, counted) in [(&sides.ours, &mut ours), (&sides.peer, &mut peer)] {
            counted.add(one(&execs, side, call).await?);
        }
    }
    meta(&json!({ "programs": { figure.name: {
        "ours": ours.programs, "peer": peer.programs, "while_idle": idle,
    } } }));
    let value = ours.each.mean().ok_or("nothing was counted")?;
    Ok(figure.result(value, &ours.each, Some((&sides.peer.snapshotter, &peer.each))))
}

/// A disk is made and removed; what the call in question started.
async fn one(execs: &Execs, side: &Side, call: Call) -> Outcome<Starts> {
    execs.reset()?;
    let (disk, _) = side.prepare().await?;
    let prepare = execs.when_quiet().await?;
    execs.reset()?;
    side.clear(&[disk]).await?;
    let remove = execs.when_quiet().await?;
    Ok(match call {
        Call::Prepare => prepare,
        Call::Remove => remove,
    })
}
