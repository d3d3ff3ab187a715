//! Disks made when they are asked for, of an image that is there, one at a time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        Bench,
        disks::Launcher as _,
        distributions, one_by_one,
        service::{Ours, Spares},
    },
    catalogue::BASE,
    prepare::ratio,
    samples::Samples,
    snapshots::meta,
};

pub(crate) async fn measure(bench: &Bench) -> Outcome<Value> {
    let (rounds, each) = bench.of((8, 6), (2, 4));
    meta(&json!({ "conditions": { BASE.name: format!("{rounds} rounds of {each}, spares being off") } }));
    bench.ours.keep_none().await?;
    let ours = Ours::new(&bench.ours, Spares::Off);
    let (mut base, mut stock) = (Samples::default(), Samples::default());
    for round in 0..rounds {
        if round % 2 == 0 {
            base.extend(one_by_one(&ours, each).await?);
        }
        stock.extend(one_by_one(&bench.stock, each).await?);
        if round % 2 == 1 {
            base.extend(one_by_one(&ours, each).await?);
        }
    }
    meta(&distributions(&BTreeMap::from([(ours.name(), &base)])));
    Ok(BASE.result(ratio(&stock, &base)?, &base, Some((bench.stock.name(), &stock))))
}
