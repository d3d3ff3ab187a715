//! What is so of every plan, on hosts of every kind: seen by the fake pool, which does what plans say.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
    time::Duration,
};

use cowshed_leases::LeaseId;
use proptest::prelude::*;

use super::{
    fake::{Fake, NOW, at, layer_id, lease_id, manifest},
    *,
};

/// What layers may take beyond what the planner knows.
const HIDDEN: Room = Room { data: Bytes(2), metadata: Bytes(1) };
/// Manifests, of which the last lead to nothing.
const MANIFESTS: usize = 8;

fn room(data: u64, metadata: u64) -> impl Strategy<Value = Room> {
    (0..=data, 0..=metadata)
        .prop_map(|(data, metadata)| Room { data: Bytes(data), metadata: Bytes(metadata) })
}

/// Rarely.
fn seldom<T: std::fmt::Debug + Clone>(one: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    prop::option::weighted(0.12, one)
}

fn layers() -> impl Strategy<Value = BTreeMap<ChainId, Layer>> {
    let layer = (any::<prop::sample::Index>(), prop::bool::weighted(0.3), room(12, 3), seldom(1..3_u32));
    prop::collection::vec(layer, 1..14).prop_map(|drawn| {
        let layer =
            |(n, (parent, is_base, own, others)): (usize, (prop::sample::Index, bool, Room, Option<u32>))| {
                let parent = (n > 0 && !is_base).then(|| layer_id(parent.index(n)));
                (layer_id(n), Layer { parent, own, others: others.unwrap_or_default() })
            };
        drawn.into_iter().enumerate().map(layer).collect()
    })
}

fn name() -> impl Strategy<Value = Name> {
    let pin = prop_oneof![Just(Pin::ForGood), (900..1100_i64).prop_map(|until| Pin::Until(at(until)))];
    let fetch = prop_oneof![18 => Just(Fetch::Idle), 1 => Just(Fetch::Pulled), 1 => Just(Fetch::Awaited)];
    (seldom(pin), seldom(900..1100_i64), fetch).prop_map(|(pin, prefetched, fetch)| Name {
        image: "".into(),
        pin,
        prefetched_until: prefetched.map(at),
        fetch,
    })
}

type DrawnImage = (Vec<Name>, BTreeSet<usize>, i64, Option<i64>, Option<u32>);

fn image() -> impl Strategy<Value = DrawnImage> {
    (
        prop::collection::vec(name(), 1..3),
        prop::collection::btree_set(0..MANIFESTS, 1..3),
        0..1010_i64,
        prop::option::of(0..1010_i64),
        seldom(0..4_u32),
    )
}

/// Which manifest has which top layer.
type Tops = BTreeMap<Manifest, Option<ChainId>>;

fn assemble(
    n: usize,
    (names, manifests, since, last_use, spares_kept): DrawnImage,
    tops: &Tops,
) -> (Target, Image) {
    let named = names
        .into_iter()
        .enumerate()
        .map(|(k, name)| Name { image: ImageName(format!("r/{n}:{k}")), ..name });
    let names = named.fold(None, |names: Option<Names>, name| {
        Some(match names {
            Some(names) => names.and(name),
            None => Names::of(name),
        })
    });
    let manifests = manifests.into_iter().map(|m| (manifest(m), tops[&manifest(m)].clone())).collect();
    let image =
        Image { names: names.unwrap(), manifests, since: at(since), last_use: last_use.map(at), spares_kept };
    (Target(format!("target-{n}")), image)
}

type DrawnDisk = (usize, Room, u8);

fn lease(n: usize, (of, own, how): DrawnDisk, tops: &Tops) -> (LeaseId, Lease) {
    let is_named = how % 4 == 0;
    let made_of =
        if is_named { MadeOf::Name(ImageName(format!("r/{of}:0"))) } else { MadeOf::Manifest(manifest(of)) };
    let top = if is_named { None } else { tops[&manifest(of)].clone() };
    let tenure = if how % 3 == 0 { Tenure::Releasing } else { Tenure::Held };
    (lease_id(100 + n), Lease { vm: format!("vm-{n}").parse().unwrap(), made_of, top, own, tenure })
}

fn spare(n: usize, (of, own, how): DrawnDisk, tops: &Tops) -> Option<(LeaseId, Spare)> {
    let state = if how % 8 == 0 { SpareState::Busy } else { SpareState::Idle };
    let top = tops[&manifest(of)].clone()?;
    Some((lease_id(n), Spare { manifest: manifest(of), top, own, state }))
}

/// How full the pool is, of each kind, in percent.
fn fullness() -> impl Strategy<Value = u64> {
    prop_oneof![20..70_u64, 70..101_u64]
}

/// With layers that take so much more than the planner knows, at the most.
fn host(more: Room) -> impl Strategy<Value = Fake> {
    let disk = || (0..MANIFESTS, room(6, 2), any::<u8>());
    let tops = prop::collection::vec((any::<prop::sample::Index>(), prop::bool::weighted(0.9)), MANIFESTS);
    let rest = room(30, 10).prop_flat_map(|rest| (Just(rest), room(rest.data.0 / 4, rest.metadata.0 / 4)));
    let pool = (rest, fullness(), fullness(), 0..60_u64, 1..5_u64);
    let hidden = prop::collection::vec(room(more.data.0, more.metadata.0), 14);
    (
        layers(),
        tops,
        prop::collection::vec(image(), 0..8),
        prop::collection::vec(disk(), 0..3),
        prop::collection::vec(disk(), 0..6),
        (pool, hidden),
    )
        .prop_map(
            |(
                layers,
                tops,
                images,
                leases,
                spares,
                (((rest, returning), data, metadata, free, extent), hidden),
            )| {
                let top = |(n, (index, is_unpacked)): (usize, &(prop::sample::Index, bool))| {
                    (manifest(n), is_unpacked.then(|| layer_id(index.index(layers.len()))))
                };
                let tops: Tops = tops.iter().enumerate().map(top).collect();
                let hidden = layers.keys().cloned().zip(hidden).collect();
                let seen = Occupancy {
                    pool: Pool { total: Room::NONE, used: Room::NONE, returning },
                    group: VolumeGroup { free: Bytes(free), extent: NonZeroU64::new(extent).unwrap() },
                    images: images
                        .into_iter()
                        .enumerate()
                        .map(|(n, image)| assemble(n, image, &tops))
                        .collect(),
                    leases: leases.into_iter().enumerate().map(|(n, drawn)| lease(n, drawn, &tops)).collect(),
                    spares: spares
                        .into_iter()
                        .enumerate()
                        .filter_map(|(n, drawn)| spare(n, drawn, &tops))
                        .collect(),
                    layers,
                };
                let mut fake = Fake::new(seen, hidden, rest, NOW);
                let used = fake.seen.pool.used;
                let total = |used: Bytes, percent: u64| Bytes(used.0 * 100 / percent);
                fake.seen.pool.total =
                    Room { data: total(used.data, data), metadata: total(used.metadata, metadata) };
                fake
            },
        )
}

fn limits() -> impl Strategy<Value = Limits> {
    let growth = prop_oneof![
        2 => Just(Growth::Never),
        1 => (0..30_u64, 0..300_u64)
            .prop_map(|(step, ceiling)| Growth::UpTo { step: Bytes(step), ceiling: Bytes(ceiling) })
    ];
    (20..70_u8, 70..90_u8, 90..101_u8, 50..101_u8, growth).prop_map(
        |(low, high, emergency, admits, growth)| {
            let marks = Marks::new(low, high, emergency).unwrap();
            Limits { marks, admits_up_to: admits.try_into().unwrap(), growth }
        },
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    let floor = (0..3_u32, prop_oneof![Just(Yields::BeforeImages), Just(Yields::AfterImages)]);
    (
        limits(),
        limits(),
        0..20_u64,
        0..300_u64,
        prop_oneof![Just(Young::Stay), Just(Young::Go)],
        prop::option::of(0..1000_u64),
        floor,
    )
        .prop_map(|(data, metadata, kept, min_age, in_emergency, retention, (spares, yields))| Policy {
            data,
            metadata,
            kept_for_metadata: Bytes(kept),
            min_age: Duration::from_secs(min_age),
            in_emergency,
            retention: retention.map(Duration::from_secs),
            spares: Floor { kept: spares, yields },
        })
}

fn trigger() -> impl Strategy<Value = Trigger> {
    prop_oneof![Just(Trigger::Pressure), room(40, 10).prop_map(Trigger::Admission), Just(Trigger::Schedule)]
}

fn is_growth(step: &Step) -> bool {
    matches!(step.action, Action::Extend { .. })
}

/// For how long the image was not used, by the same words as the policy's.
fn unused(image: &Image) -> Duration {
    let last = image.last_use.unwrap_or(image.since).max(image.since);
    Duration::from_micros(u64::try_from(NOW.0 - last.0).unwrap_or_default())
}

fn is_emergency(pool: &Pool, policy: &Policy) -> bool {
    Kind::ALL.iter().any(|kind| {
        policy.limits(*kind).marks.emergency().is_reached(pool.used.of(*kind), pool.total.of(*kind))
    })
}

/// What is lacking of what the trigger asks for, reckoned anew; for pressure only what was high at first.
fn lack(fake: &Fake, policy: &Policy, trigger: Trigger, first: &Pool) -> Room {
    Room::each(|kind| {
        let (limits, pool) = (policy.limits(kind), fake.seen.pool.settled());
        let (used, total) = (pool.used.of(kind).0, pool.total.of(kind).0);
        let was_high = limits.marks.high().is_reached(first.used.of(kind), first.total.of(kind));
        let (wanted, share) = match trigger {
            Trigger::Admission(room) => (room.of(kind).0, limits.admits_up_to),
            _ if was_high => (0, limits.marks.low()),
            _ => return Bytes(0),
        };
        Bytes((used + wanted).saturating_sub(share.of(Bytes(total)).0))
    })
}

fn rank_of_phase(step: &Step) -> u8 {
    match step.reason {
        Reason::Growth => 0,
        Reason::SpareOfNothing => 1,
        Reason::SpareAboveFloor { .. } => 2,
        _ => 3,
    }
}

fn hosts() -> u32 {
    std::env::var("COWSHED_HOSTS").map_or(2000, |text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: hosts(), failure_persistence: None, ..ProptestConfig::default() })]

    /// The fake refuses what must not go. Each step frees what it promises, or more, leaves nothing inconsistent, and done again it
    /// frees nothing.
    #[test]
    fn what_is_promised_comes_back_and_nothing_else_goes(
        mut fake in host(HIDDEN), policy in policy(), trigger in trigger()
    ) {
        let plan = plan(&fake.seen, &policy, trigger, NOW);
        let before = fake.clone();
        for step in &plan.steps {
            let free = fake.run(step);
            prop_assert!(free.is_ok(), "{free:?}\n{plan}\n{before:?}");
            let missing = step.gives.less(free.unwrap());
            prop_assert!(missing.is_none(), "{step}: {missing} is missing");
            prop_assert_eq!(fake.audit(&before), Vec::<String>::new(), "{}\n{}", step, plan);
        }
        let after = fake.clone();
        for step in &plan.steps {
            prop_assert_eq!(fake.run(step), Ok(Room::NONE));
        }
        prop_assert_eq!(&fake, &after, "twice is not once");
        prop_assert_eq!(before.seen.leases, fake.seen.leases);
        let kept = before.seen.group.free.min(policy.kept_for_metadata);
        let taken = |kind| fake.seen.pool.total.of(kind).less(before.seen.pool.total.of(kind));
        prop_assert!(taken(Kind::Data).plus(kept) <= before.seen.group.free, "of what is kept for metadata");
        for kind in Kind::ALL {
            if taken(kind).0 > 0 {
                let total = fake.seen.pool.total.of(kind);
                let growth = policy.limits(kind).growth;
                prop_assert!(matches!(growth, Growth::UpTo { ceiling, .. } if total <= ceiling), "{total}");
            }
        }
    }

    /// A plan that says that its goal is met meets it, one that does not says what is missing; and then there is nothing left
    /// to plan.
    #[test]
    fn a_plan_keeps_its_word_and_leaves_nothing_to_plan(
        mut fake in host(HIDDEN), policy in policy(), trigger in trigger()
    ) {
        let first = fake.seen.pool.settled();
        let plan = plan(&fake.seen, &policy, trigger, NOW);
        prop_assert_eq!(plan.lacking, lack(&fake, &policy, trigger, &first));
        prop_assert_eq!(&plan, &super::plan(&fake.seen.clone(), &policy, trigger, NOW));
        for step in &plan.steps {
            fake.run(step).unwrap();
        }
        let left = lack(&fake, &policy, trigger, &first);
        match &plan.outcome {
            Outcome::Met => prop_assert!(left.is_none(), "{left}\n{plan}"),
            Outcome::Short { lacking, helps } => {
                prop_assert!(left.less(*lacking).is_none() && !lacking.is_none(), "{left}\n{plan}");
                prop_assert!(helps.iter().all(|help| help.gives.helps(*lacking)), "{plan}");
                let is_idle = |help: &Help| matches!(&help.from, Source::Image { because, .. } if because.is_empty());
                prop_assert!(!helps.iter().any(is_idle), "{plan}");
            }
        }
        let again = super::plan(&fake.seen, &policy, trigger, NOW);
        prop_assert_eq!(&again.steps, &[], "\n{}\n{}", plan, again);
    }

    /// Under pressure nothing goes that is not needed, and what is young only in an emergency.
    #[test]
    fn no_more_goes_than_has_to(mut fake in host(HIDDEN), policy in policy()) {
        let first = fake.seen.pool.settled();
        let plan = plan(&fake.seen, &policy, Trigger::Pressure, NOW);
        prop_assert!(plan.steps.is_sorted_by_key(rank_of_phase), "{plan}");
        let is_high = |kind: &Kind| {
            let (used, total) = (first.used.of(*kind), first.total.of(*kind));
            policy.limits(*kind).marks.high().is_reached(used, total)
        };
        prop_assert!(plan.steps.is_empty() || Kind::ALL.iter().any(is_high), "{plan}");
        for step in plan.steps.iter().filter(|step| !is_growth(step)) {
            if let Action::RemoveImage { target, .. } = &step.action {
                let age = unused(&fake.seen.images[target]);
                let may_go = policy.in_emergency == Young::Go && is_emergency(&first, &policy);
                prop_assert!(age >= policy.min_age || may_go, "{step}");
            }
            fake.run(step).unwrap();
        }
        let is_asked_for = |of: &Manifest| fake.seen.images.values().any(|image| image.manifests.contains_key(of));
        for step in plan.steps.iter().filter(|step| step.reason == Reason::SpareOfRemoved) {
            let Action::DropSpare { manifest, .. } = &step.action else { continue };
            prop_assert!(!is_asked_for(manifest), "{step}\n{plan}");
        }
        // Without the last step something is lacking, by what the plan knows. An image and its spares go as one.
        if let (Some(last), Outcome::Met) = (plan.steps.last(), &plan.outcome)
            && !is_growth(last)
        {
            let spares = plan.steps.iter().rev().skip(1).take_while(|step| step.reason == Reason::SpareOfRemoved);
            let last: Room = spares.chain([last]).map(|step| step.gives).sum();
            let grown: Room = plan.steps.iter().filter(|step| is_growth(step)).map(|step| step.gives).sum();
            let pool = Pool {
                total: first.total.plus(grown),
                used: first.used.less(plan.frees()).plus(last),
                returning: Room::NONE,
            };
            let lacks = |kind: &Kind| {
                pool.used.of(*kind) > policy.limits(*kind).marks.low().of(pool.total.of(*kind)) && is_high(kind)
            };
            prop_assert!(Kind::ALL.iter().any(lacks), "{plan}");
        }
    }

    /// A plan that falls short has overlooked nothing: if all went that may go, it would not be enough either.
    #[test]
    fn a_plan_falls_short_only_if_nothing_is_left(
        mut fake in host(Room::NONE), policy in policy(), trigger in trigger()
    ) {
        let plan = plan(&fake.seen, &policy, trigger, NOW);
        if let Outcome::Short { lacking, .. } = plan.outcome {
            for step in &plan.steps {
                fake.run(step).unwrap();
            }
            let (before, first) = (fake.free(), fake.clone());
            let spares: Vec<_> = fake.seen.spares.iter().map(|(id, spare)| (id.clone(), spare.clone())).collect();
            for (id, Spare { manifest, .. }) in spares {
                let action = Action::DropSpare { id, manifest };
                // Those that are at work are refused.
                let _refused = fake.run(&Step { action, reason: Reason::SpareUnderPressure, gives: Room::NONE });
            }
            let images: Vec<_> = fake.seen.images.iter().map(|(id, image)| (id.clone(), image.clone())).collect();
            for (target, image) in images.into_iter().filter(|(_, image)| unused(image) >= policy.min_age) {
                let names = image.names.iter().map(|name| name.image.clone()).collect();
                let action = Action::RemoveImage { target, names };
                let reason = Reason::Expired { unused: Duration::ZERO };
                let _refused = fake.run(&Step { action, reason, gives: Room::NONE });
            }
            prop_assert_eq!(fake.audit(&first), Vec::<String>::new(), "\n{}", plan);
            let more = fake.free().less(before);
            prop_assert!(!more.helps(lacking), "{more} more\n{plan}");
        }
    }
}
