#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, num::NonZeroU64, time::Duration};

use super::{
    fake::{Fake, NOW, at, layer_id, lease_id, manifest},
    *,
};

const EXTENT: u64 = 4;

fn share(percent: u8) -> Share {
    percent.try_into().unwrap()
}

fn room(data: u64, metadata: u64) -> Room {
    Room { data: Bytes(data), metadata: Bytes(metadata) }
}

/// No growth; marks at 70, 80 and 95 %.
fn policy() -> Policy {
    let limits =
        Limits { marks: Marks::new(70, 80, 95).unwrap(), admits_up_to: share(90), growth: Growth::Never };
    Policy {
        data: limits.clone(),
        metadata: limits,
        kept_for_metadata: Bytes(0),
        min_age: Duration::from_secs(60),
        in_emergency: Young::Stay,
        retention: None,
        spares: Floor { kept: 1, yields: Yields::BeforeImages },
    }
}

/// Layers by number of the parent and own data; the pool holds nothing else and has so much in all.
struct World {
    seen: Occupancy,
}

impl World {
    fn new(total: u64, layers: &[(Option<usize>, u64)]) -> Self {
        let layer = |(n, (parent, own)): (usize, &(Option<usize>, u64))| {
            let layer = Layer { parent: parent.map(layer_id), own: room(*own, 0), others: 0 };
            (layer_id(n), layer)
        };
        let pool = Pool { total: room(total, 1000), used: Room::NONE, returning: Room::NONE };
        let group = VolumeGroup { free: Bytes(0), extent: NonZeroU64::new(EXTENT).unwrap() };
        let seen = Occupancy {
            pool,
            group,
            layers: layers.iter().enumerate().map(layer).collect(),
            images: BTreeMap::new(),
            leases: BTreeMap::new(),
            spares: BTreeMap::new(),
        };
        Self { seen }
    }

    /// An image and its manifest are called by the number of its top layer.
    fn image(mut self, name: &str, top: usize, last_use: i64) -> Self {
        let image = Image {
            names: Names::of(Name::plain(name.into())),
            manifests: [(manifest(top), Some(layer_id(top)))].into(),
            since: at(0),
            last_use: Some(at(last_use)),
            spares_kept: None,
        };
        self.seen.images.insert(Target(format!("target-of-{name}")), image);
        self
    }

    fn spare(mut self, n: usize, top: usize, own: u64) -> Self {
        let spare =
            Spare { manifest: manifest(top), top: layer_id(top), own: room(own, 0), state: SpareState::Idle };
        self.seen.spares.insert(lease_id(n), spare);
        self
    }

    fn lease(mut self, n: usize, top: usize, own: u64) -> Self {
        let lease = Lease {
            vm: format!("vm-{n}").parse().unwrap(),
            made_of: MadeOf::Manifest(manifest(top)),
            top: Some(layer_id(top)),
            own: room(own, 0),
            tenure: Tenure::Held,
        };
        self.seen.leases.insert(lease_id(100 + n), lease);
        self
    }

    fn pin(mut self, name: &str) -> Self {
        let image = self.seen.images.get_mut(&Target(format!("target-of-{name}"))).unwrap();
        image.names = Names::of(Name { pin: Some(Pin::ForGood), ..Name::plain(name.into()) });
        self
    }

    fn fake(self) -> Fake {
        Fake::new(self.seen, BTreeMap::new(), Room::NONE, NOW)
    }
}

/// What goes, in order: names of images, numbers of spares, sizes of extensions.
fn told(plan: &Plan) -> Vec<String> {
    let tell = |step: &Step| match &step.action {
        Action::Extend { kind, to, .. } => format!("{kind} {}", to.0),
        Action::DropSpare { id, .. } => format!("spare {}", id.as_str().trim_start_matches('0')),
        Action::RemoveImage { names, .. } => names.iter().map(ImageName::to_string).collect(),
    };
    plan.steps.iter().map(tell).collect()
}

fn run(fake: &mut Fake, plan: &Plan) {
    for step in &plan.steps {
        fake.run(step).unwrap();
    }
}

#[test]
fn nothing_is_done_below_the_high_mark() {
    for (total, begins) in [(1000, false), (126, false), (125, true), (100, true), (50, true)] {
        let fake = World::new(total, &[(None, 100)]).image("a", 0, 0).fake();
        let plan = plan(&fake.seen, &policy(), Trigger::Pressure, NOW);
        assert_eq!(!plan.steps.is_empty(), begins, "{total}: {plan}");
    }
}

#[test]
fn what_is_on_its_way_back_is_not_asked_for_again() {
    for (returning, expected) in [(0, vec!["a", "b"]), (10, vec!["a"]), (11, vec![]), (91, vec![])] {
        let mut fake = World::new(100, &[(None, 11), (None, 10)]).image("a", 0, 0).image("b", 1, 9).fake();
        fake.seen.pool.used = room(90, 0);
        fake.seen.pool.returning = room(returning, 0);
        let plan = plan(&fake.seen, &policy(), Trigger::Pressure, NOW);
        assert_eq!(told(&plan), expected, "{plan}");
    }
}

#[test]
fn what_is_cold_and_large_goes_first_and_no_more_than_is_needed() {
    let table = [
        // Equal sizes: the one that was not used for longest.
        (vec![(40, 500), (40, 100), (40, 300)], 120, vec!["b"]),
        // Equal ages: the smallest that is enough.
        (vec![(90, 100), (40, 100), (60, 100)], 190, vec!["c"]),
        // Not so old, but larger.
        (vec![(60, 400), (20, 0)], 60, vec!["a"]),
        // The older one would not be enough, and is not needed beside the other.
        (vec![(60, 600), (20, 0)], 60, vec!["a"]),
        // One is not enough.
        (vec![(10, 100), (10, 200), (10, 900)], 31, vec!["a"]),
        (vec![(10, 100), (10, 200), (10, 900)], 25, vec!["a", "b"]),
    ];
    for (images, total, expected) in table {
        let layers: Vec<_> = images.iter().map(|(own, _)| (None, *own)).collect();
        let mut world = World::new(total, &layers);
        for (n, (_, last_use)) in images.iter().enumerate() {
            world = world.image(["a", "b", "c"][n], n, *last_use);
        }
        let plan = plan(&world.fake().seen, &policy(), Trigger::Pressure, NOW);
        assert_eq!(told(&plan), expected, "{plan}");
        assert_eq!(plan.outcome, Outcome::Met);
    }
}

#[test]
fn what_images_share_comes_back_with_the_last() {
    // Two names of one chain, and a smaller image alone; the two are younger.
    let fake = World::new(100, &[(None, 20), (Some(0), 50), (None, 20)])
        .image("a", 1, 600)
        .image("b", 1, 500)
        .image("small", 2, 0)
        .fake();
    let plan = plan(&fake.seen, &policy(), Trigger::Pressure, NOW);
    // 20 are lacking.
    assert_eq!(told(&plan), ["small"], "{plan}");
    let plan = super::plan(&fake.seen, &policy(), Trigger::Admission(room(60, 0)), NOW);
    // 60 are, which only the two have.
    assert_eq!(told(&plan), ["b", "a"], "{plan}");
    let gives: Vec<u64> = plan.steps.iter().map(|step| step.gives.data.0).collect();
    assert_eq!(gives, [0, 70]);
    assert!(matches!(plan.steps[0].reason, Reason::Cold { shared_with: 1, .. }));
}

#[test]
fn a_layer_that_anybody_needs_is_not_counted() {
    // The base is shared by what goes and what is leased, and another client stands on the middle of it.
    let mut fake = World::new(100, &[(None, 30), (Some(0), 20), (Some(1), 10), (Some(0), 20)])
        .image("goes", 2, 0)
        .image("leased", 3, 0)
        .lease(1, 3, 1)
        .fake();
    let free = |fake: &Fake| plan(&fake.seen, &policy(), Trigger::Pressure, NOW).frees().data.0;
    assert_eq!(free(&fake), 30);
    fake.seen.layers.get_mut(&layer_id(1)).unwrap().others = 1;
    assert_eq!(free(&fake), 10);
    // One of which nobody knows who has it.
    let stranger = Layer { parent: Some(layer_id(2)), own: room(1, 0), others: 0 };
    fake.seen.layers.insert(layer_id(4), stranger);
    assert_eq!(free(&fake), 0);
}

#[test]
fn spares_go_first_or_those_that_are_kept_last() {
    let world = || {
        World::new(100, &[(None, 80), (None, 10)])
            .image("a", 0, 0)
            .image("b", 1, 500)
            .spare(1, 1, 2)
            .spare(2, 1, 1)
            .spare(3, 0, 1)
            // Its image is gone.
            .spare(4, 7, 1)
            .fake()
    };
    let table = [
        (Yields::BeforeImages, vec!["spare 4", "spare 1", "spare 3", "spare 2", "a"]),
        (Yields::AfterImages, vec!["spare 4", "spare 1", "spare 3", "a"]),
    ];
    for (yields, expected) in table {
        let policy = Policy { spares: Floor { kept: 1, yields }, ..policy() };
        let plan = plan(&world().seen, &policy, Trigger::Pressure, NOW);
        assert_eq!(told(&plan), expected, "{plan}");
    }
    // So many of this image are kept.
    let mut fake = world();
    fake.seen.images.get_mut(&Target("target-of-b".into())).unwrap().spares_kept = Some(2);
    let policy = Policy { spares: Floor { kept: 0, yields: Yields::AfterImages }, ..policy() };
    let plan = plan(&fake.seen, &policy, Trigger::Pressure, NOW);
    assert_eq!(told(&plan), ["spare 4", "spare 3", "a"], "{plan}");
}

#[test]
fn the_pool_grows_before_anything_goes() {
    let grows = |step, ceiling| Growth::UpTo { step: Bytes(step), ceiling: Bytes(ceiling) };
    let table = [
        // Free in the group, kept for metadata, growth: 80 of 100 are used, so 115 are needed.
        (100, 0, grows(1, 1000), vec!["data 116"]),
        (100, 0, grows(50, 1000), vec!["data 152"]),
        (100, 0, grows(50, 120), vec!["data 120"]),
        (100, 0, grows(1, 110), vec!["data 108", "a"]),
        (100, 95, grows(1, 1000), vec!["data 104", "a"]),
        (7, 0, grows(50, 1000), vec!["data 104", "a"]),
        (3, 0, grows(50, 1000), vec!["a"]),
        (100, 0, Growth::Never, vec!["a"]),
        (100, 0, grows(1, 50), vec!["a"]),
    ];
    for (free, kept, growth, expected) in table {
        let mut fake = World::new(100, &[(None, 80)]).image("a", 0, 0).fake();
        fake.seen.group.free = Bytes(free);
        let data = Limits { growth, ..policy().data };
        let policy = Policy { data, kept_for_metadata: Bytes(kept), ..policy() };
        let plan = plan(&fake.seen, &policy, Trigger::Pressure, NOW);
        assert_eq!(told(&plan), expected, "{free} {kept} {growth:?}: {plan}");
        assert_eq!(plan.outcome, Outcome::Met);
    }
}

#[test]
fn metadata_is_judged_by_itself_and_grows_first() {
    let mut fake =
        World::new(1000, &[(None, 90), (None, 1)]).image("data", 0, 0).image("metadata", 1, 900).fake();
    fake.seen.layers.get_mut(&layer_id(1)).unwrap().own = room(1, 20);
    fake.seen.pool = Pool { total: room(1000, 100), used: room(91, 85), returning: Room::NONE };
    let plan = plan(&fake.seen, &policy(), Trigger::Pressure, NOW);
    assert_eq!(told(&plan), ["metadata"], "{plan}");
    assert_eq!(plan.lacking, room(0, 15));

    fake.seen.pool.used = room(900, 85);
    fake.seen.group.free = Bytes(26);
    let growth = Growth::UpTo { step: Bytes(1), ceiling: Bytes(2000) };
    let limits = Limits { growth, ..policy().data };
    let policy = Policy { data: limits.clone(), metadata: limits, ..policy() };
    let plan = super::plan(&fake.seen, &policy, Trigger::Pressure, NOW);
    assert_eq!(told(&plan), ["metadata 124", "data", "metadata"], "{plan}");
}

#[test]
fn what_is_young_stays_but_in_an_emergency_if_the_policy_says_so() {
    // In use of 100, in an emergency, expected.
    let table = [
        (90, Young::Stay, vec!["old"]),
        (90, Young::Go, vec!["old"]),
        (96, Young::Stay, vec!["old"]),
        // Not beyond the high mark: one of the young is enough.
        (96, Young::Go, vec!["old", "young-1"]),
    ];
    for (used, in_emergency, expected) in table {
        let mut fake = World::new(100, &[(None, 1), (None, 16), (None, 16)])
            .image("old", 0, 939)
            .image("young-1", 1, 941)
            .image("young-2", 2, 950)
            .fake();
        fake.seen.pool.used = room(used, 0);
        let policy = Policy { in_emergency, ..policy() };
        let plan = plan(&fake.seen, &policy, Trigger::Pressure, NOW);
        assert_eq!(told(&plan), expected, "{plan}");
    }
    // Nor what is pinned.
    let fake = World::new(100, &[(None, 99)]).image("pinned", 0, 990).pin("pinned").fake();
    let policy = Policy { in_emergency: Young::Go, ..policy() };
    assert_eq!(told(&plan(&fake.seen, &policy, Trigger::Pressure, NOW)), [""; 0]);
}

#[test]
fn what_is_kept_too_long_goes_on_schedule_only() {
    let fake = World::new(1000, &[(None, 10), (Some(0), 5), (None, 10)])
        .image("old", 1, 100)
        .image("older", 0, 0)
        .image("used", 2, 101)
        .spare(1, 1, 1)
        .fake();
    let policy = Policy { retention: Some(Duration::from_secs(900)), ..policy() };
    assert_eq!(told(&plan(&fake.seen, &policy, Trigger::Pressure, NOW)), [""; 0]);
    let plan = plan(&fake.seen, &policy, Trigger::Schedule, NOW);
    assert_eq!(told(&plan), ["older", "spare 1", "old"], "{plan}");
    assert_eq!(plan.frees(), room(16, 0));
    assert_eq!(plan.outcome, Outcome::Met);
}

#[test]
fn an_admission_leaves_the_reserve() {
    // Of 100, 90 can be used by what is admitted.
    for (wanted, expected) in [(0, vec![]), (30, vec![]), (31, vec!["a"]), (80, vec!["a"]), (81, vec!["a"])] {
        let mut fake = World::new(100, &[(None, 50)]).image("a", 0, 0).fake();
        fake.seen.pool.used = room(60, 0);
        let plan = plan(&fake.seen, &policy(), Trigger::Admission(room(wanted, 0)), NOW);
        assert_eq!(told(&plan), expected, "{plan}");
        let short = wanted > 80;
        assert_eq!(matches!(plan.outcome, Outcome::Short { lacking, .. } if lacking == room(1, 0)), short);
    }
}

#[test]
fn a_plan_that_falls_short_says_what_would_help() {
    let mut fake = World::new(100, &[(None, 5), (Some(0), 30), (Some(0), 20), (None, 10), (None, 1)])
        .image("pinned", 1, 0)
        .pin("pinned")
        .image("leased", 2, 0)
        .lease(1, 2, 25)
        .image("young", 3, 999)
        .image("cold", 4, 0)
        .fake();
    fake.seen.group.free = Bytes(3);
    let growth = Growth::UpTo { step: Bytes(4), ceiling: Bytes(400) };
    let policy = Policy { data: Limits { growth, ..policy().data }, ..policy() };
    let plan = plan(&fake.seen, &policy, Trigger::Pressure, NOW);
    let expected = "\
data 91 B of 100 B (91.0 %), metadata 0 B of 1000 B (0.0 %); lacking: 21 B data
  1. remove image cold (target-of-cold): gives 1 B data; not used for 16m
comes back: 1 B data; still lacking: 20 B data
  would help: 45 B data: image leased with its disks: a disk is made of it
  would help: 30 B data: image pinned with its disks: pinned
  would help: 25 B data: lease 00000000000000000000000000000065: release VM vm-1
  would help: 10 B data: image young with its disks: used a short time ago, kept for 59s
  would help: 29 B data: the pool's data: add a physical volume: the volume group has no more for it";
    assert_eq!(plan.to_string(), expected);
    run(&mut fake, &plan);
    assert_eq!(super::plan(&fake.seen, &policy, Trigger::Pressure, NOW).steps, []);
}

/// Data of the layers that only the image and its disks stand on, of all its layers, and its disks.
#[test]
fn what_an_image_takes_is_told_without_its_disks_own() {
    let mut world = World::new(1000, &[(None, 100), (Some(0), 30), (Some(0), 5), (None, 7)])
        .image("app", 1, 0)
        .image("other", 2, 0)
        .image("lone", 3, 0)
        .lease(1, 1, 50)
        .spare(2, 1, 2)
        .lease(3, 3, 9);
    let told = |world: &World| -> Vec<(String, u64, u64, usize)> {
        let all = takes(&world.seen).into_iter();
        all.map(|(target, takes)| (target.0, takes.alone.data.0, takes.layers.data.0, takes.disks)).collect()
    };
    let of = |name: &str, alone, layers, disks| (format!("target-of-{name}"), alone, layers, disks);
    assert_eq!(told(&world), [of("app", 30, 130, 2), of("lone", 7, 7, 1), of("other", 5, 105, 0)]);
    // Somebody else stands on one of them.
    world.seen.layers.get_mut(&layer_id(3)).unwrap().others = 1;
    assert_eq!(told(&world)[1], of("lone", 0, 7, 1));
}

/// What properties rely on.
#[test]
fn the_fake_tells_what_is_not_consistent() {
    type Breach = fn(&mut Occupancy);
    let table: [(Breach, &str); 8] = [
        (|_| (), ""),
        (|seen| seen.images.clear(), "has lost its image"),
        (|seen| drop(seen.images.remove(&Target("target-of-b".to_owned()))), "is a spare of what is gone"),
        (|seen| seen.leases.clear(), "is not what it was"),
        (|seen| drop(seen.layers.remove(&layer_id(0))), "stands on layer-00, which is gone"),
        (|seen| drop(seen.layers.remove(&layer_id(3))), "layer-03 is gone, which others hold"),
        (|seen| seen.pool.used = room(1, 0), "are in use"),
        (|seen| seen.pool.total = room(1001, 1000), "what the volume group gave"),
    ];
    for (breach, words) in table {
        let layers = [(None, 10), (Some(0), 5), (None, 5), (None, 5)];
        let world = World::new(1000, &layers).image("a", 1, 0).image("b", 2, 0);
        let before = world.lease(1, 1, 2).spare(1, 2, 2).fake();
        let mut after = before.clone();
        breach(&mut after.seen);
        let found = after.audit(&before).join("; ");
        assert!(found.contains(words) && found.is_empty() == words.is_empty(), "{words}: {found}");
    }
    // With the last that stands on it a layer goes; this one does not.
    let before = World::new(1000, &[(None, 10)]).image("a", 0, 0).fake();
    let mut after = before.clone();
    after.seen.images.clear();
    assert_eq!(after.audit(&before), ["layer-00 is left, and nothing stands on it"]);
}
