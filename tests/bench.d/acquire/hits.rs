//! Spares handed out one at a time, the shelf being full and the host at rest, against the other ways to a disk.

use std::{collections::BTreeMap, time::Instant};

use cowshed_proto::v1::{AcquireResponse, Warmth};
use serde_json::{Value, json};

use crate::{
    Outcome,
    acquire::{
        Bench,
        disks::Launcher as _,
        distributions, floor, one_by_one,
        service::{Ours, Service, Spares},
    },
    catalogue::{HIT, HIT_P99, HIT_TO_REFLINK, OFFER},
    prepare::ratio,
    samples::Samples,
    snapshots::meta,
};

/// Spares on the shelf. The one that is taken is made again before the next is.
const SHELF: u32 = 20;
/// Of hits one after the other, faster than they are made again.
const BACK_TO_BACK: u32 = 50;

#[derive(Default)]
struct Measured {
    /// One after the other, as the other sides are measured.
    hits: Samples,
    stages: Stages,
    /// Each with a rest before it: neither the service nor the kernel has anything of the last one in its caches.
    after_a_rest: Samples,
    /// From such a hit until another spare is there for it.
    refill: Samples,
    offers: Samples,
    writes: Samples,
    trips: Samples,
    stock: Samples,
    lvm: Samples,
    reflink: Samples,
    clone_by_call: Samples,
}

pub(crate) async fn measure(bench: &Bench) -> Outcome<Vec<Value>> {
    let (rounds, each, others) = bench.of((10, 20, 6), (2, 8, 3));
    let how = format!(
        "{rounds} rounds of {each} one after the other, the shelf having {SHELF} spares and the host being at rest before a \
         round; {others} of each other side in a round, in the same way"
    );
    meta(&json!({ "conditions": {
        HIT.name: how, HIT_P99.name: how, HIT_TO_REFLINK.name: how,
        OFFER.name: format!("{rounds} rounds of {}", bench.of(200, 50)),
    } }));
    bench.ours.keep(SHELF).await?;
    let ours = Ours::new(&bench.ours, Spares::Kept);
    let by_call = bench.reflink.by_call();
    let mut measured = Measured::default();
    for round in 0..rounds {
        if round % 2 == 0 {
            hits(&ours, each, &mut measured).await?;
        }
        measured.stock.extend(one_by_one(&bench.stock, others).await?);
        measured.lvm.extend(one_by_one(&bench.lvm, others).await?);
        measured.reflink.extend(one_by_one(&bench.reflink, others).await?);
        measured.clone_by_call.extend(one_by_one(&by_call, others).await?);
        if round % 2 == 1 {
            hits(&ours, each, &mut measured).await?;
        }
        offers(&bench.ours, bench.of(200, 50), &mut measured.offers).await?;
        measured.writes.extend(floor::durable_writes(50).await?);
        measured.trips.extend(floor::round_trips(bench.ours.channel(), 50).await?);
    }
    tell_of_the_sides(bench, &measured, ours.name());
    meta(&where_time_goes(&measured, &ours.checks()));
    meta(&back_to_back(&bench.ours).await?);
    results(bench, &measured)
}

fn results(bench: &Bench, measured: &Measured) -> Outcome<Vec<Value>> {
    let p99 = |samples: &Samples| samples.percentile(99).ok_or("nothing was measured");
    let Measured { hits, stock, reflink, offers, .. } = measured;
    let peer = Some((bench.stock.name(), stock));
    let offered = p99(offers)? / hits.median().ok_or("nothing was measured")?;
    Ok(vec![
        HIT.result(ratio(stock, hits)?, hits, peer),
        HIT_P99.result(p99(stock)? / p99(hits)?, hits, peer),
        HIT_TO_REFLINK.result(ratio(reflink, hits)?, hits, Some((bench.reflink.name(), reflink))),
        OFFER.result(offered, offers, Some(("Acquire, a spare", hits))),
    ])
}

/// Hits one after the other; then some with a rest before each.
async fn hits(ours: &Ours<'_>, count: usize, measured: &mut Measured) -> Outcome {
    let mut disks = Vec::new();
    ours.service.full(SHELF).await?;
    for _ in 0..count {
        let acquired = ours.acquire().await?;
        measured.hits.add_time(acquired.took);
        measured.stages.add(&acquired.reply);
        disks.push(acquired.disk);
    }
    ours.service.full(SHELF).await?;
    for _ in 0..count / 4 {
        let acquired = ours.acquire().await?;
        let refilled = ours.service.full(SHELF).await?;
        measured.after_a_rest.add_time(acquired.took);
        measured.refill.add_time(refilled);
        disks.push(acquired.disk);
    }
    ours.clear(&disks).await?;
    ours.service.full(SHELF).await.map(drop)
}

async fn offers(service: &Service, count: usize, samples: &mut Samples) -> Outcome {
    for _ in 0..count {
        let begun = Instant::now();
        let offer = service.offer().await?;
        samples.add_time(begun.elapsed());
        if !offer.accepted || offer.warmth() != Warmth::Spare {
            return Err(format!("an offer that is not of a spare: {offer:?}").into());
        }
    }
    Ok(())
}

/// Where the service says that the time went, in microseconds.
#[derive(Default)]
struct Stages {
    each: BTreeMap<String, Samples>,
    total: Samples,
}

impl Stages {
    fn add(&mut self, reply: &AcquireResponse) {
        for stage in &reply.stages {
            self.each.entry(stage.stage.clone()).or_default().add(stage.micros as f64);
        }
        self.total.add(reply.total_micros as f64);
    }
}

/// Of a hit, and what the floor is: p50s, in microseconds.
fn where_time_goes(measured: &Measured, checks: &Samples) -> Value {
    let micros = |samples: &Samples| samples.median().map(|millis| (millis * 1e3).round());
    let server = measured.stages.total.median();
    let stages: BTreeMap<_, _> =
        measured.stages.each.iter().map(|(name, samples)| (name, samples.median())).collect();
    let accounted: f64 = stages.values().flatten().sum();
    json!({
        "where_the_time_of_a_hit_goes_in_us": {
            "caller": micros(&measured.hits),
            "service": server,
            "stages": stages,
            "service_outside_of_stages": server.map(|server| server - accounted),
            "between_caller_and_service": micros(&measured.hits).zip(server).map(|(all, server)| all - server),
            "callers_look_at_the_device_after_it": micros(checks),
        },
        "floor_of_a_hit_in_us": {
            "fdatasync_of_4_kib_p50": micros(&measured.writes),
            "fdatasync_of_4_kib_p99": measured.writes.percentile(99).map(|millis| (millis * 1e3).round()),
            "round_trip_on_the_socket_p50": micros(&measured.trips),
            "round_trip_on_the_socket_p99": measured.trips.percentile(99).map(|millis| (millis * 1e3).round()),
        },
    })
}

fn tell_of_the_sides(bench: &Bench, measured: &Measured, ours: &'static str) {
    let Measured { hits, after_a_rest, refill, offers, stock, lvm, reflink, clone_by_call, .. } = measured;
    let all = [
        (ours, hits),
        ("Acquire, a spare, after a rest", after_a_rest),
        ("a spare is there again", refill),
        ("Offer", offers),
        (bench.stock.name(), stock),
        (bench.lvm.name(), lvm),
        (bench.reflink.name(), reflink),
        (bench.reflink.by_call().name(), clone_by_call),
    ];
    meta(&distributions(&all.into()));
    meta(&json!({ "where_the_time_of_a_clone_goes_in_ms": bench.reflink.story() }));
}

/// Hits one after the other, while what they take is being made again; how long until the shelf is full.
async fn back_to_back(service: &Service) -> Outcome<Value> {
    service.keep(BACK_TO_BACK).await?;
    let (mut samples, mut disks) = (Samples::default(), Vec::new());
    for _ in 0..BACK_TO_BACK {
        let acquired = service.hit().await?;
        samples.add_time(acquired.took);
        disks.push(acquired.disk);
    }
    let refilled = service.full(BACK_TO_BACK).await?;
    service.clear(&disks).await?;
    Ok(json!({ "hits_back_to_back": {
        "in_ms": samples.distribution(),
        "seconds_until_the_shelf_was_full_again": (refilled.as_secs_f64() * 10.0).round() / 10.0,
    } }))
}
