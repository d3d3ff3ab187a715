#![allow(clippy::unwrap_used)]

use std::num::NonZeroU32;

use containerd_client::types::Descriptor;
use cowshed_gc::evict::Kind;
use cowshed_leases::Tenant;

use super::*;
use crate::{
    fakes::book::{acquire, grant, id, now},
    image::Class,
    ledger::Ledger,
    prefetch::job::{Plan, Wanted as Errand},
};

const ONE: &str = "r.example/one:1";
const TWO: &str = "r.example/two:1";

fn labels(all: &[(&str, &str)]) -> Labels {
    all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn record(name: &str, target: &str) -> ImageRecord {
    let target = Descriptor { digest: target.to_owned(), ..Descriptor::default() };
    let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
    ImageRecord {
        name: name.to_owned(),
        target,
        created_at: at(3),
        updated_at: at(5),
        ..ImageRecord::default()
    }
}

fn snapshot(name: &str, parent: Option<&str>, committed: bool) -> SnapshotRecord {
    SnapshotRecord {
        name: name.to_owned(),
        parent: parent.map(str::to_owned),
        committed,
        ..SnapshotRecord::default()
    }
}

/// Two images on one layer, each with one of its own.
fn seen() -> Seen {
    let room = |data| Room::only(Kind::Data, Bytes(data));
    let blobs = ["one", "two"].into_iter().flat_map(|image| {
        let (config, top) = (format!("config-{image}"), format!("top-{image}"));
        [
            (format!("sha256:{image}"), labels(&[("containerd.io/gc.ref.content.config", &config)])),
            (config, labels(&[("containerd.io/gc.ref.snapshot.cowshed", &top)])),
        ]
    });
    Seen {
        pool: Pool { total: room(1000), used: room(500), returning: Room::NONE },
        group: super::super::grow::nothing_free(),
        block: NonZeroU64::new(1024).unwrap(),
        snapshotter: "cowshed".to_owned(),
        snapshots: vec![
            snapshot("base", None, true),
            snapshot("top-one", Some("base"), true),
            snapshot("top-two", Some("base"), true),
        ],
        sizes: HashMap::from([("base".to_owned(), 4096), ("top-one".to_owned(), 1)]),
        blobs: blobs.collect(),
        records: vec![record(ONE, "sha256:one"), record(TWO, "sha256:two")],
        held: Vec::new(),
        closed: BTreeSet::new(),
    }
}

fn wanted(ledger: &Ledger) -> Wanted {
    Wanted {
        leases: ledger.gather(|lease| Some(lease.clone())),
        marks: ledger.read_all(|_, marks| marks.clone()),
        jobs: ledger.read_jobs(Clone::clone),
        now: now(),
        in_hand: HashSet::new(),
        spares_kept: HashMap::new(),
        pulled: HashSet::new(),
        prefetched_for: Duration::from_micros(10),
    }
}

fn ledger() -> (Ledger, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (Ledger::open(directory.path()).unwrap(), directory)
}

fn others(occupancy: &Occupancy) -> Vec<(&str, u32)> {
    let held = occupancy.layers.iter().filter(|(_, layer)| layer.others > 0);
    held.map(|(ChainId(name), layer)| (name.as_str(), layer.others)).collect()
}

#[tokio::test]
async fn what_stands_on_what() {
    let (ledger, _directory) = ledger();
    let mut seen = seen();
    // Two names of one image; one that is not unpacked.
    seen.records.push(record("r.example/alias:1", "sha256:one"));
    seen.records.push(record("r.example/absent:1", "sha256:absent"));
    let all = occupancy(&seen, &wanted(&ledger));
    assert_eq!(all.images.len(), 3);
    let one = &all.images[&Target::from("sha256:one")];
    assert_eq!(one.names.iter().count(), 2);
    assert_eq!(one.since, UnixMicros(5_000_000), "when it was last written");
    let top = |target: &str| {
        let manifests = &all.images[&Target::from(target)].manifests;
        manifests[&Manifest::from(target)].clone()
    };
    assert_eq!(top("sha256:one"), Some(ChainId::from("top-one")));
    assert_eq!(top("sha256:absent"), None);
    let layer = |name: &str| all.layers[&ChainId::from(name)].clone();
    assert_eq!(layer("base").own, Room { data: Bytes(4096), metadata: Bytes(4096) });
    assert_eq!(layer("top-two").own, Room::NONE, "it is not known");
    assert_eq!(layer("top-one").parent, Some(ChainId::from("base")));
    assert_eq!(others(&all), []);
}

#[tokio::test]
async fn whatever_others_hold_is_held() {
    type Case = (&'static str, fn(&mut Seen), Vec<(&'static str, u32)>);
    let table: [Case; 9] = [
        ("a container", |s| s.snapshots.push(snapshot("x", Some("top-one"), false)), vec![("top-one", 1)]),
        ("a lease on a layer", |s| s.held.push(Held::Snapshot("base".into())), vec![("base", 1)]),
        ("a lease on an active snapshot", |s| s.held.push(Held::Snapshot("x".into())), vec![]),
        ("a lease on a manifest", |s| s.held.push(Held::Blob("sha256:two".into())), vec![("top-two", 1)]),
        ("a lease on a blob of nothing", |s| s.held.push(Held::Blob("sha256:x".into())), vec![]),
        (
            "a layer that is never collected",
            |s| s.snapshots[1].labels = labels(&[(ROOT_LABEL, "now")]),
            vec![("top-one", 1)],
        ),
        (
            "a blob that is never collected",
            |s| drop(s.blobs.get_mut("config-one").unwrap().insert(ROOT_LABEL.into(), "now".into())),
            vec![("top-one", 1)],
        ),
        ("a label of another client", |s| s.records[0].labels = labels(&[("a", "b")]), vec![("top-one", 1)]),
        ("a name that is none of ours", |s| s.records[0].name = "one".into(), vec![("top-one", 1)]),
    ];
    for (what, change, expected) in table {
        let (ledger, _directory) = ledger();
        let mut seen = seen();
        change(&mut seen);
        let all = occupancy(&seen, &wanted(&ledger));
        assert_eq!(others(&all), expected, "{what}");
        let is_foreign = ["a label of another client", "a name that is none of ours"].contains(&what);
        assert_eq!(all.images.contains_key(&Target::from("sha256:one")), !is_foreign, "{what}");
    }
}

const ROOT_LABEL: &str = "containerd.io/gc.root";

#[tokio::test]
async fn disks_are_of_manifests_or_of_names_and_stand_on_layers() {
    let (ledger, _directory) = ledger();
    for n in 1..=3 {
        acquire(&ledger, n).await;
    }
    ledger.grant(id(1), grant(1), now()).await.unwrap();
    ledger.grant(id(2), grant(2), now()).await.unwrap();
    ledger.release(crate::fakes::book::back(2), now()).await.unwrap();
    ledger.intend_spare(id(4), crate::fakes::book::spec(), now()).await.unwrap();
    ledger.grant(id(4), grant(4), now()).await.unwrap();
    ledger.intend_spare(id(5), crate::fakes::book::spec(), now()).await.unwrap();
    let mut seen = seen();
    for n in [1, 2, 4] {
        seen.snapshots.push(snapshot(&id(n).snapshot_key(), Some("top-one"), false));
    }
    seen.sizes.insert(id(1).snapshot_key(), 2048);
    let all = occupancy(&seen, &wanted(&ledger));
    assert_eq!(others(&all), [], "they are known");
    let disk = |n| all.leases[&id(n)].clone();
    let made_of = MadeOf::Manifest(Manifest::from("sha256:0"));
    assert_eq!((disk(1).made_of, disk(1).top), (made_of.clone(), Some(ChainId::from("top-one"))));
    assert_eq!((disk(1).tenure, disk(2).tenure), (Tenure::Held, Tenure::Releasing));
    assert_eq!(disk(1).own.data, Bytes(2048));
    let by_name = MadeOf::Name(ImageName::from("registry.example/app:1"));
    assert_eq!((disk(3).made_of, disk(3).top), (by_name.clone(), None));
    assert_eq!(disk(5).made_of, by_name, "a spare that is being made is somebody's");
    assert_eq!(all.spares.len(), 1);
    assert_eq!(all.spares[&id(4)].state, SpareState::Busy, "nobody has seen it closed");
    seen.closed = [id(4)].into();
    let wanted = wanted(&ledger);
    assert_eq!(occupancy(&seen, &wanted).spares[&id(4)].state, SpareState::Idle);
    let in_hand = Wanted { in_hand: [id(4)].into(), ..wanted };
    assert_eq!(occupancy(&seen, &in_hand).spares[&id(4)].state, SpareState::Busy);
}

#[tokio::test]
async fn pins_pulls_and_jobs_are_of_names() {
    let (ledger, _directory) = ledger();
    ledger.pin(ONE.to_owned(), None, 0, now()).await.unwrap();
    let errand = |image: &str| Errand { image: image.to_owned(), platform: "linux/amd64".to_owned() };
    let plan = Plan {
        images: vec![errand(ONE), errand(TWO), errand("r.example/three:1")],
        class: Class::Background,
        bytes_per_second: None,
        concurrency: NonZeroU32::MIN,
        deadline: None,
        pin_for: None,
        spares: 0,
        tenant: Tenant::default(),
        has_credentials: false,
    };
    let job: crate::prefetch::job::JobId = "j".parse().unwrap();
    ledger.create_job(job.clone(), plan, UnixMicros(0)).await.unwrap();
    for (at, manifest) in [(0, "sha256:one"), (1, "sha256:before")] {
        let stage = crate::prefetch::job::Stage::Here {
            manifest: manifest.to_owned(),
            bytes: 1,
            was_there: false,
            not_refreshed: None,
            removed: false,
            at: UnixMicros(7),
        };
        ledger.settle_job(job.clone(), at, stage, now()).await.unwrap();
    }
    let first = |all: &Occupancy, target: &str| {
        all.images[&Target::from(target)].names.iter().next().unwrap().clone()
    };
    let wanted = wanted(&ledger);
    let all = occupancy(&seen(), &wanted);
    let one = first(&all, "sha256:one");
    assert_eq!(
        (one.pin, one.fetch, one.prefetched_until),
        (Some(Pin::ForGood), Fetch::Idle, Some(UnixMicros(17)))
    );
    let two = first(&all, "sha256:two");
    assert_eq!((two.pin, two.fetch, two.prefetched_until), (None, Fetch::Idle, None), "it was another one");
    let pulled = Wanted { pulled: [TWO.to_owned()].into(), ..wanted };
    assert_eq!(first(&occupancy(&seen(), &pulled), "sha256:two").fetch, Fetch::Pulled);
}
