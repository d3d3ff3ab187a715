//! Many VMs at once.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        Bench,
        disks::Launcher,
        service::{Ours, SHELF, Spares},
    },
    catalogue::{BASES_AT_ONCE, Figure, HITS_AT_ONCE},
    prepare::ratio,
    samples::Samples,
    snapshots::meta,
};

/// How many at once; the last is the figure's.
const SIZES: [usize; 4] = [1, 10, 50, 100];

/// The makespans by the size of the burst.
#[derive(Default)]
struct Curve(BTreeMap<usize, Samples>);

impl Curve {
    fn at(&self, size: usize) -> Outcome<&Samples> {
        self.0.get(&size).ok_or_else(|| format!("no burst of {size} was measured").into())
    }

    async fn add(&mut self, launcher: &impl Launcher, size: usize) -> Outcome {
        let (disks, took) = launcher.launch_at_once(size).await?;
        eprintln!("  {size} at once, {}: {took:.2?}", launcher.name());
        self.0.entry(size).or_default().add_time(took);
        launcher.clear(&disks).await
    }

    fn tell(&self, name: &str) {
        let points: Vec<_> = self.0.iter().map(|(size, samples)| (size, samples.median())).collect();
        meta(&json!({ "pictures": { "makespan": {
            "kind": "lines", "title": "So many disks at once: until the last is there",
            "x": "at once", "y": "ms", "lines": { name: points },
        } } }));
    }
}

/// As many spares as the largest burst has VMs.
pub(crate) async fn of_hits(bench: &Bench) -> Outcome<Value> {
    let rounds = bench.of(2, 1);
    let ours = Ours::new(&bench.ours, Spares::Kept);
    let (mut hits, mut stock) = (Curve::default(), Curve::default());
    let (mut lvm, mut reflink) = (Curve::default(), Curve::default());
    let mut refill = Samples::default();
    for size in sizes(bench) {
        for _ in 0..rounds {
            bench.ours.keep(SHELF).await?;
            bench.ours.full(SHELF).await?;
            let (disks, took) = ours.launch_at_once(size).await?;
            let refilled = bench.ours.full(SHELF).await?;
            eprintln!("  {size} at once, {}: {took:.2?}, full again after {refilled:.1?}", ours.name());
            hits.0.entry(size).or_default().add_time(took);
            if size == largest(bench) {
                refill.add(refilled.as_secs_f64());
            }
            ours.clear(&disks).await?;
            stock.add(&bench.stock, size).await?;
        }
        lvm.add(&bench.lvm, size).await?;
        reflink.add(&bench.reflink, size).await?;
    }
    hits.tell(ours.name());
    stock.tell(bench.stock.name());
    lvm.tell(bench.lvm.name());
    reflink.tell(bench.reflink.name());
    meta(&json!({ "refill_after_a_burst": {
        "spares": largest(bench), "seconds": refill.median(),
        "spares_a_second": refill.median().map(|seconds| largest(bench) as f64 / seconds),
    } }));
    result(&HITS_AT_ONCE, bench, &hits, &stock, rounds)
}

/// Without any spare.
pub(crate) async fn of_misses(bench: &Bench) -> Outcome<Value> {
    let rounds = bench.of(2, 1);
    bench.ours.keep_none().await?;
    let ours = Ours::new(&bench.ours, Spares::Off);
    let (mut bases, mut stock) = (Curve::default(), Curve::default());
    for size in sizes(bench) {
        for _ in 0..rounds {
            bases.add(&ours, size).await?;
        }
    }
    for _ in 0..rounds {
        stock.add(&bench.stock, largest(bench)).await?;
    }
    bases.tell(ours.name());
    result(&BASES_AT_ONCE, bench, &bases, &stock, rounds)
}

fn result(figure: &Figure, bench: &Bench, ours: &Curve, stock: &Curve, rounds: usize) -> Outcome<Value> {
    let size = largest(bench);
    meta(&json!({ "conditions": { figure.name: format!("{rounds} rounds of {size}") } }));
    let (ours, stock) = (ours.at(size)?, stock.at(size)?);
    Ok(figure.result(ratio(stock, ours)?, ours, Some((bench.stock.name(), stock))))
}

fn sizes(bench: &Bench) -> Vec<usize> {
    bench.of(SIZES.to_vec(), vec![1, 10])
}

fn largest(bench: &Bench) -> usize {
    sizes(bench).into_iter().max().unwrap_or(1)
}
