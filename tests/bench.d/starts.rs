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

/// What one side's calls started.
#[derive(Default)]
struct Calls {
    prepare: Counted,
    remove: Counted,
}

/// Both figures: a disk that is made is removed.
pub(crate) async fn measure(sides: &Sides) -> Outcome<Vec<Value>> {
    let execs = Execs::begin()?;
    execs.when_quiet().await?;
    execs.reset()?;
    let idle = execs.when_quiet().await?;
    let (mut ours, mut peer) = (Calls::default(), Calls::default());
    for _ in 0..sides.of(8, 3) {
        one(&execs, &sides.ours, &mut ours).await?;
        one(&execs, &sides.peer, &mut peer).await?;
    }
    meta(&json!({ "programs": { "while_idle": idle } }));
    let name = &sides.peer.snapshotter;
    Ok(vec![
        result(&PREPARE_STARTS, &ours.prepare, name, &peer.prepare)?,
        result(&REMOVE_STARTS, &ours.remove, name, &peer.remove)?,
    ])
}

fn result(figure: &Figure, ours: &Counted, name: &str, peer: &Counted) -> Outcome<Value> {
    meta(&json!({ "programs": { figure.name: { "ours": ours.programs, "peer": peer.programs } } }));
    let value = ours.each.mean().ok_or("nothing was counted")?;
    Ok(figure.result(value, &ours.each, Some((name, &peer.each))))
}

async fn one(execs: &Execs, side: &Side, calls: &mut Calls) -> Outcome {
    execs.reset()?;
    let (disk, _) = side.prepare().await?;
    calls.prepare.add(execs.when_quiet().await?);
    execs.reset()?;
    side.clear(&[disk]).await?;
    calls.remove.add(execs.when_quiet().await?);
    Ok(())
}
