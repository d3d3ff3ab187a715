#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    sync::{
        Arc, Mutex as StdMutex,
        atomic::{AtomicBool, Ordering},
    },
};

use cowshed_leases::{Failure, Grant, LeaseId, Mode};
use tonic_types::StatusExt as _;

use super::*;
use crate::{
    acquire::Wish,
    fakes::{
        self, Process_, World, back,
        book::{self, grant, id},
        start, wish, world,
    },
    ledger::GivenUp,
    prefetch::job::{JobId, Plan, Stage, Wanted},
};

/// containerd's records, and what their targets lead to.
#[derive(Default)]
struct Records {
    all: StdMutex<Vec<ImageRecord>>,
    /// The image that is being pulled.
    pulled: StdMutex<Option<ImageRef>>,
    /// Somebody changes each record in the moment before it is removed.
    changed: AtomicBool,
    /// Names, and whether there was a collection.
    removed: StdMutex<Vec<(String, bool)>>,
    /// The name whose removal fails, and whether when it has gone.
    failing: StdMutex<Option<(String, bool)>>,
    /// Targets of which it was asked what they lead to.
    asked: StdMutex<Vec<String>>,
    /// What happens each time that the records have just been looked at to be listed.
    meanwhile: StdMutex<Option<Box<dyn Fn() + Send>>>,
}

impl Records {
    fn put(&self, name: &str, target: &str) {
        let target = containerd_client::types::Descriptor { digest: target.to_owned(), ..Default::default() };
        self.all.lock().unwrap().push(ImageRecord {
            name: name.to_owned(),
            target,
            ..ImageRecord::default()
        });
    }
}

/// An index leads to the manifest of the fakes' image, and to one of another platform.
const INDEX: &str = "sha256:index";
const FOREIGN: &str = "sha256:foreign";
/// Another index, which leads to the manifest as well.
const ALIAS: &str = "sha256:alias";

fn manifest() -> String {
    fakes::image().manifest.to_string()
}

fn name() -> String {
    fakes::image().name.to_string()
}

#[async_trait::async_trait]
impl Catalogue for Records {
    async fn find(&self, image: &ImageRef, _platform: &Platform) -> Result<Option<ImageInfo>> {
        let name = image.to_string();
        let there = self.all.lock().unwrap().iter().any(|record| record.name == name);
        let info = ImageInfo { name, ..fakes::image().into() };
        Ok(Some(info).filter(|_| there))
    }

    async fn records(&self) -> Result<Vec<ImageRecord>> {
        let all = self.all.lock().unwrap().clone();
        self.meanwhile.lock().unwrap().iter().for_each(|hook| hook());
        Ok(all)
    }

    async fn manifests(&self, target: &str) -> Result<BTreeSet<String>> {
        self.asked.lock().unwrap().push(target.to_owned());
        let leads_to = match target {
            INDEX => vec![manifest(), FOREIGN.to_owned()],
            ALIAS => vec![manifest()],
            _ => Vec::new(),
        };
        Ok(leads_to.into_iter().collect())
    }

    fn is_pulled(&self, image: &ImageRef) -> bool {
        self.pulled.lock().unwrap().as_ref() == Some(image)
    }

    async fn remove(&self, record: &ImageRecord, collect: bool) -> Result<bool> {
        if self.changed.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let broken = || Error::new(Reason::ContainerdTimeout, "no answer");
        let failing = self.failing.lock().unwrap().take_if(|(name, _)| *name == record.name);
        if let Some((_, false)) = failing {
            return Err(broken());
        }
        self.all.lock().unwrap().retain(|other| other.name != record.name);
        if failing.is_some() {
            return Err(broken());
        }
        self.removed.lock().unwrap().push((record.name.clone(), collect));
        Ok(true)
    }
}

/// A process, and who keeps its images.
struct Host {
    world: Arc<World>,
    process: Process_,
    records: Arc<Records>,
    keeper: Arc<Keeper>,
    wall: Arc<StdMutex<i64>>,
}

impl Host {
    fn start(directory: &Path, records: Arc<Records>) -> Self {
        let world = world();
        let process = start(&world, directory);
        let wall = Arc::new(StdMutex::new(1_000));
        let clock = {
            let wall = wall.clone();
            Clock::of(move || Moment { wall: UnixMicros(*wall.lock().unwrap() * 1_000_000), ..book::now() })
        };
        let keeper = Keeper {
            catalogue: records.clone(),
            ledger: process.acquirer.ledger.clone(),
            hindrances: Hindrances::default(),
            clock,
            tasks: Tasks::default(),
            spares: process.acquirer.spares.clone(),
            wishes: process.acquirer.wishes.clone(),
            wake: process.acquirer.wake.clone(),
            turn: Mutex::default(),
        };
        Self { world, process, records, keeper: Arc::new(keeper), wall }
    }

    fn ledger(&self) -> &Ledger {
        &self.keeper.ledger
    }

    async fn remove(&self, name: &str) -> Result<Removed> {
        self.keeper.remove(ImageRef::parse(name).unwrap()).await
    }

    async fn refused(&self, name: &str) -> (Reason, String) {
        let error = self.remove(name).await.unwrap_err();
        (error.reason(), error.to_string())
    }

    async fn pin(&self, name: &str, seconds: Option<u64>) -> Result<ImageInfo> {
        let hold_for = seconds.map(|seconds| Ttl::from_seconds(seconds).unwrap());
        self.keeper.pin(&ImageRef::parse(name).unwrap(), &Platform::host(), hold_for, 0).await
    }

    async fn unpin(&self, name: &str) -> bool {
        self.keeper.unpin(&ImageRef::parse(name).unwrap()).await.unwrap()
    }

    fn kept(&self, name: &str) -> Kept {
        let info = ImageInfo { name: name.to_owned(), ..fakes::image().into() };
        kept(self.ledger(), vec![info], &self.keeper.clock.now()).pop().unwrap().1
    }
}

fn host() -> (Host, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let records = Arc::new(Records::default());
    records.put(&name(), INDEX);
    (Host::start(directory.path(), records), directory)
}

#[tokio::test]
async fn what_is_pinned_stays_until_it_is_unpinned_or_the_time_is_over() {
    let (host, _directory) = host();
    assert_eq!(host.pin(&name(), None).await.unwrap().name, name());
    let (reason, message) = host.refused(&name()).await;
    assert_eq!(reason, Reason::ImagePinned);
    assert!(message.contains(&format!("cowshed unpin {}", name())), "{message}");
    // Pinned again, the new end counts.
    host.pin(&name(), Some(60)).await.unwrap();
    let (reason, message) = host.refused(&name()).await;
    assert_eq!(reason, Reason::ImagePinned);
    assert!(message.contains("until 1970-01-01T00:17:40Z"), "{message}");
    assert_eq!(host.kept(&name()).pin, Some(Pin { until: Some(UnixMicros(1_060_000_000)), spares: 0 }));
    *host.wall.lock().unwrap() = 1_060;
    assert_eq!(host.kept(&name()).pin, None);
    host.pin(&name(), None).await.unwrap();
    assert!(host.unpin(&name()).await);
    assert!(!host.unpin(&name()).await, "there is none any more");
    assert!(!host.unpin("r.example/never:1").await);
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Image);
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Nothing);
    assert_eq!(*host.records.removed.lock().unwrap(), [(name(), true)]);
}

#[tokio::test]
async fn what_is_not_there_is_not_pinned_and_says_what_to_do() {
    let (host, _directory) = host();
    let refused = host.pin("r.example/other:1", None).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ImageNotFound);
    assert!(refused.to_string().contains("cowshed pull r.example/other:1"), "{refused}");
    assert_eq!(host.ledger().read_all(|_, marks| marks.pins()), 0);
}

#[tokio::test]
async fn a_pin_is_of_a_name_and_of_no_other_name_of_the_image() {
    let (host, _directory) = host();
    let other = "r.example/other:1";
    host.records.put(other, INDEX);
    host.pin(&name(), None).await.unwrap();
    assert_eq!(host.remove(other).await.unwrap(), Removed::Name);
    assert_eq!(*host.records.removed.lock().unwrap(), [(other.to_owned(), false)], "nothing to collect");
    // It is refused also where only the name would go.
    host.records.put(other, INDEX);
    assert_eq!(host.refused(&name()).await.0, Reason::ImagePinned);
    // Somebody else has removed it: the pin is there when it is back.
    host.records.all.lock().unwrap().clear();
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Nothing);
    host.records.put(&name(), INDEX);
    assert_eq!(host.refused(&name()).await.0, Reason::ImagePinned);
}

#[tokio::test]
async fn what_disks_are_made_of_stays_until_they_are_gone_unless_it_has_another_name() {
    for mode in [Mode::CopyOnWrite, Mode::SharedReadOnly] {
        let (host, _directory) = host();
        let acquired = host.process.acquirer.acquire(Wish { mode, ..wish("vm-1") }).await.unwrap();
        assert_eq!(host.kept(&name()).leases, 1, "{mode:?}");
        let (reason, message) = host.refused(&name()).await;
        assert_eq!(reason, Reason::ImageInUse, "{mode:?}");
        assert!(message.contains("(VMs vm-1)"), "{message}");
        let other = "r.example/other:1";
        host.records.put(other, INDEX);
        assert_eq!(host.remove(other).await.unwrap(), Removed::Name, "{mode:?}");

        let device = acquired.lease.grant().unwrap().device.dm_name.clone();
        host.world.set_open(&device, 1);
        host.process.acquirer.release(back("vm-1")).await.unwrap();
        host.process.settle().await;
        assert_eq!(host.kept(&name()).leases, 0, "{mode:?}");
        let (reason, message) = host.refused(&name()).await;
        assert_eq!(reason, Reason::ImageInUse, "{mode:?}: its disk is there: {message}");
        host.world.set_open(&device, 0);
        host.process.settle().await;
        assert!(host.world.is_empty(), "{mode:?}");
        assert_eq!(host.remove(&name()).await.unwrap(), Removed::Image, "{mode:?}");
        assert_eq!(host.records.removed.lock().unwrap().last(), Some(&(name(), true)));
    }
}

/// A disk of the image with this manifest, granted at this second.
fn grant_of(n: u32, image_digest: &str, at: i64) -> Grant {
    Grant { image_digest: image_digest.to_owned(), at: UnixMicros(at * 1_000_000), ..grant(n) }
}

/// What is done with a lease of the image `spec`, and whether the image then is in use.
#[tokio::test]
async fn a_lease_counts_by_what_its_disk_is_made_of_and_before_that_by_its_name() {
    let (granted, other): (&str, &str) = ("granted", "r.example/other:1");
    let table: [(&str, &str, &str, bool); 8] = [
        (&name(), granted, &manifest(), true),
        // By another name, or for another platform.
        (other, granted, &manifest(), true),
        (&name(), granted, FOREIGN, true),
        // The name has become another image since.
        (&name(), granted, "sha256:before", false),
        (&name(), "preparing", "", true),
        (other, "preparing", "", false),
        (&name(), "released unfinished", "", true),
        (&name(), "failed", "", false),
    ];
    for (spec, becomes, digest, in_use) in table {
        let (host, _directory) = host();
        let ask = cowshed_leases::Ask {
            spec: cowshed_leases::Spec { image: spec.to_owned(), ..book::spec() },
            ..book::ask(1)
        };
        let ledger = host.ledger();
        ledger.acquire(ask, id(1), book::now(), GivenUp::default()).await.unwrap();
        match becomes {
            "granted" => drop(ledger.grant(id(1), grant_of(1, digest, 0), book::now()).await.unwrap()),
            "released unfinished" => drop(ledger.release(book::back(1), book::now()).await.unwrap()),
            "failed" => {
                let failure = Failure { reason: "X".into(), message: "x".into() };
                ledger.fail(id(1), failure, book::now()).await.unwrap();
            }
            _ => {}
        }
        let removed = host.remove(&name()).await.map_err(|error| error.reason());
        let expected = if in_use { Err(Reason::ImageInUse) } else { Ok(Removed::Image) };
        assert_eq!(removed, expected, "{spec} {becomes} {digest}");
    }
}

#[tokio::test]
async fn of_many_vms_ten_are_named() {
    let (host, _directory) = host();
    for n in 1..=12 {
        book::acquire(host.ledger(), n).await;
        host.ledger().grant(id(n), grant_of(n, &manifest(), 0), book::now()).await.unwrap();
    }
    let error = host.remove(&name()).await.unwrap_err();
    let message = error.to_string();
    assert!(message.contains("made of it: 12 (VMs vm-1, vm-10, vm-11, vm-12, vm-2, "), "{message}");
    assert!(message.contains(", …)") && !message.contains("vm-9"), "{message}");
    let details = error.to_status().get_error_details();
    let named = details.error_info().unwrap().metadata["vm_ids"].split(", ").count();
    assert_eq!(named, NAMED);
}

#[tokio::test]
async fn what_is_being_pulled_or_has_just_changed_is_left() {
    let (host, _directory) = host();
    *host.records.pulled.lock().unwrap() = Some(fakes::image().name);
    let (reason, message) = host.refused(&name()).await;
    assert_eq!(reason, Reason::ImageInUse);
    assert!(message.contains("being pulled"), "{message}");
    *host.records.pulled.lock().unwrap() = None;
    host.records.changed.store(true, Ordering::SeqCst);
    assert_eq!(host.refused(&name()).await.0, Reason::NotReady);
    host.records.changed.store(false, Ordering::SeqCst);
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Image);
}

#[tokio::test]
async fn nothing_is_removed_while_its_layers_could_not_go() {
    let (host, _directory) = host();
    host.keeper.hindrances.set_hung(Some(&Error::new(Reason::ContainerdTimeout, "no answer")));
    assert_eq!(host.refused(&name()).await.0, Reason::ContainerdUnavailable);
    host.keeper.hindrances.set_hung(None);
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Image);
}

#[tokio::test]
async fn no_image_goes_that_is_pinned_while_it_is_removed() {
    let (host, _directory) = host();
    let turn = host.keeper.turn.lock().await;
    let name = name();
    let (pin, remove) = (host.pin(&name, None), host.remove(&name));
    let (pinned, removed, ()) = tokio::join!(pin, remove, async { drop(turn) });
    match (pinned.map_err(|e| e.reason()), removed.map_err(|e| e.reason())) {
        (Ok(_), Err(Reason::ImagePinned)) | (Err(Reason::ImageNotFound), Ok(Removed::Image)) => {}
        other => unreachable!("{other:?}"),
    }
}

/// Spares take their time to go.
#[tokio::test]
async fn what_somebody_has_come_for_while_its_spares_went_stays() {
    for is_evicted in [false, true] {
        let (host, _directory) = host();
        let ledger = host.ledger();
        ledger.intend_spare(id(9), book::spec(), book::now()).await.unwrap();
        ledger.grant(id(9), grant_of(9, &manifest(), 0), book::now()).await.unwrap();
        let going = Going {
            target: INDEX.to_owned(),
            names: [name()].into(),
            own: [manifest()].into(),
            last_use: UnixMicros(i64::MAX),
            prefetched_for: Duration::from_secs(1),
        };
        let name = name();
        let going = async {
            if is_evicted {
                host.keeper.evict(&going).await.map(drop)
            } else {
                host.remove(&name).await.map(drop)
            }
        };
        let coming = async {
            while ledger.read(|book| book.get(&id(9)).is_some_and(Lease::is_spare)) {
                tokio::task::yield_now().await;
            }
            book::acquire(ledger, 1).await;
            ledger.grant(id(1), grant_of(1, &manifest(), 0), book::now()).await.unwrap();
            ledger.remove_all(vec![id(9)], book::now()).await.unwrap();
        };
        let (gone, ()) = tokio::join!(going, coming);
        assert_eq!(gone.map_err(|error| error.reason()), Err(Reason::ImageInUse), "evicted: {is_evicted}");
        assert!(host.records.removed.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn the_last_use_is_that_of_the_last_grant_and_outlives_lease_and_restart() {
    let (host, directory) = host();
    assert_eq!(host.kept(&name()), Kept::default());
    let used = |kept: Kept| kept.last_use.map(|at| at.0 / 1_000_000);
    let make = async |n: u32, at: i64| {
        book::acquire(host.ledger(), n).await;
        host.ledger().grant(id(n), grant_of(n, &manifest(), at), book::now()).await.unwrap();
    };
    make(1, 100).await;
    make(2, 130).await;
    assert_eq!(host.kept(&name()).leases, 2);
    assert_eq!(used(host.kept(&name())), Some(130), "as its lease has it");
    host.pin(&name(), Some(3600)).await.unwrap();
    let gone: Vec<LeaseId> = [1, 2].map(id).to_vec();
    for n in [1, 2] {
        host.ledger().release(book::back(n), book::now()).await.unwrap();
    }
    host.ledger().remove_all(gone, book::now()).await.unwrap();
    let before = host.kept(&name());
    assert_eq!((used(before), before.leases), (Some(100), 0), "to the minute");

    host.ledger().close().await;
    let after = Host::start(directory.path(), host.records.clone());
    assert_eq!(after.kept(&name()), before);
    assert_eq!(after.refused(&name()).await.0, Reason::ImagePinned);
}

/// A job that has fetched this for later, at this second, and a disk that was made of its manifest and is gone.
async fn fetch_and_use(ledger: &Ledger, image: &str, at: i64) {
    let plan = Plan {
        images: vec![Wanted { image: image.to_owned(), platform: "linux/amd64".to_owned() }],
        class: crate::image::Class::Normal,
        bytes_per_second: None,
        concurrency: std::num::NonZeroU32::MIN,
        deadline: None,
        pin_for: None,
        spares: 0,
        tenant: cowshed_leases::Tenant::default(),
        has_credentials: false,
    };
    let job: JobId = "j".parse().unwrap();
    ledger.create_job(job.clone(), plan, UnixMicros(0)).await.unwrap();
    let here = Stage::Here {
        manifest: manifest(),
        bytes: 1,
        was_there: false,
        not_refreshed: None,
        removed: false,
        at: UnixMicros(at * 1_000_000),
    };
    ledger.settle_job(job, 0, here, book::now()).await.unwrap();
    book::acquire(ledger, 1).await;
    ledger.grant(id(1), grant_of(1, &manifest(), 100), book::now()).await.unwrap();
    ledger.release(book::back(1), book::now()).await.unwrap();
    ledger.remove_all(vec![id(1)], book::now()).await.unwrap();
}

#[tokio::test]
async fn what_was_removed_is_a_stranger_when_it_comes_back() {
    // Another image's name, what that leads to, whether it is evicted, and whether the last use is known then.
    let table = [
        (None, false, false),
        (None, true, false),
        (Some(("r.example/other:1", INDEX)), false, true),
        (Some(("r.example/other:1", ALIAS)), false, true),
        (Some(("r.example/other:1", "sha256:else")), false, false),
    ];
    for (other, is_evicted, is_known) in table {
        let (host, _directory) = host();
        other.into_iter().for_each(|(name, target)| host.records.put(name, target));
        fetch_and_use(host.ledger(), &name(), 1).await;
        let fetched = || host.ledger().read_jobs(|jobs| jobs.fetched(Duration::ZERO).count());
        assert_eq!((fetched(), host.kept(&name()).last_use), (1, Some(UnixMicros(100_000_000))));
        if is_evicted {
            let going = Going {
                target: INDEX.to_owned(),
                names: [name()].into(),
                own: [manifest(), FOREIGN.to_owned()].into(),
                last_use: UnixMicros(i64::MAX),
                prefetched_for: Duration::ZERO,
            };
            assert!(host.keeper.evict(&going).await.unwrap());
        } else {
            host.remove(&name()).await.unwrap();
        }
        assert_eq!(fetched(), 0, "{other:?}");
        assert_eq!(host.kept(&name()).last_use.is_some(), is_known, "{other:?}");
        assert_eq!(host.remove(&name()).await.unwrap(), Removed::Nothing);
    }
}

/// As if the process had been killed when the record had gone.
#[tokio::test]
async fn what_is_not_there_is_not_kept_for_later_either() {
    let (host, _directory) = host();
    fetch_and_use(host.ledger(), &name(), 1).await;
    host.records.all.lock().unwrap().clear();
    assert_eq!(host.remove(&name()).await.unwrap(), Removed::Nothing);
    assert_eq!(host.ledger().read_jobs(|jobs| jobs.fetched(Duration::ZERO).count()), 0);
}

#[tokio::test]
async fn what_was_fetched_while_it_was_looked_whether_it_is_there_is_kept_for_later() {
    for (at, is_kept) in [(1_500, false), (2_500, true)] {
        let (host, _directory) = host();
        host.records.all.lock().unwrap().clear();
        fetch_and_use(host.ledger(), &name(), at).await;
        // Before the turn, and within it.
        let wall = host.wall.clone();
        *host.records.meanwhile.lock().unwrap() = Some(Box::new(move || *wall.lock().unwrap() += 1_000));
        assert_eq!(host.remove(&name()).await.unwrap(), Removed::Nothing);
        assert_eq!(*host.wall.lock().unwrap(), 3_000);
        let fetched = host.ledger().read_jobs(|jobs| jobs.fetched(Duration::ZERO).count());
        assert_eq!(fetched, usize::from(is_kept), "{at}");
    }
}

/// Whose removal fails, whether it has gone then, whether the image is evicted with another name, what is left of its records,
/// and whether what was fetched by the first name is for later, and the last use known.
type FailedRemoval<'a> = (&'a str, bool, bool, &'a [&'a str], bool, bool);

#[tokio::test]
async fn what_has_gone_is_forgotten_also_if_its_removal_fails() {
    const OTHER: &str = "r.example/other:1";
    let first = name();
    let table: [FailedRemoval<'_>; 6] = [
        (&first, true, false, &[], false, false),
        (&first, false, false, &[&first], true, true),
        (&first, true, true, &[OTHER], false, true),
        (&first, false, true, &[&first, OTHER], true, true),
        (OTHER, true, true, &[], false, false),
        (OTHER, false, true, &[OTHER], false, true),
    ];
    for (failing, has_gone, is_evicted, left, is_fetched, is_used) in table {
        let case = format!("{failing} gone: {has_gone}, evicted: {is_evicted}");
        let (host, _directory) = host();
        fetch_and_use(host.ledger(), &first, 1).await;
        *host.records.failing.lock().unwrap() = Some((failing.to_owned(), has_gone));
        let failed = if is_evicted {
            host.records.put(OTHER, INDEX);
            let going = Going {
                target: INDEX.to_owned(),
                names: [first.clone(), OTHER.to_owned()].into(),
                own: [manifest(), FOREIGN.to_owned()].into(),
                last_use: UnixMicros(i64::MAX),
                prefetched_for: Duration::ZERO,
            };
            host.keeper.evict(&going).await.map(drop)
        } else {
            host.remove(&first).await.map(drop)
        };
        assert_eq!(failed.unwrap_err().reason(), Reason::ContainerdTimeout, "{case}");
        let there: Vec<String> =
            host.records.all.lock().unwrap().iter().map(|record| record.name.clone()).collect();
        assert_eq!(there, left, "{case}");
        let fetched = host.ledger().read_jobs(|jobs| jobs.fetched(Duration::ZERO).count());
        assert_eq!(fetched, usize::from(is_fetched), "{case}");
        assert_eq!(host.kept(&first).last_use.is_some(), is_used, "{case}");
    }
}

#[tokio::test]
async fn what_others_lead_to_is_read_before_the_turn_and_once_for_all_names() {
    let (host, _directory) = host();
    fetch_and_use(host.ledger(), &name(), 1).await;
    let others = [("a", ALIAS), ("b", ALIAS), ("c", "sha256:else"), ("d", ALIAS)];
    others.iter().for_each(|(tag, target)| host.records.put(&format!("r.example/other:{tag}"), target));
    let asked = || host.records.asked.lock().unwrap().clone();
    let ahead = [INDEX, ALIAS, "sha256:else"];
    let turn = host.keeper.turn.lock().await;
    let name = name();
    let read = async {
        while asked() != ahead {
            tokio::task::yield_now().await;
        }
        drop(turn);
    };
    let (removed, ()) = tokio::join!(host.remove(&name), read);
    assert_eq!(removed.unwrap(), Removed::Image);
    assert_eq!(asked(), [&ahead[..], &[INDEX]].concat(), "another one leads to the only one that was used");
    assert!(host.kept(&name).last_use.is_some());
}

#[tokio::test]
async fn what_leads_there_since_it_was_read_before_the_turn_counts() {
    let (host, _directory) = host();
    fetch_and_use(host.ledger(), &name(), 1).await;
    let turn = host.keeper.turn.lock().await;
    let name = name();
    let read = async {
        while host.records.asked.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        host.records.put("r.example/new:1", ALIAS);
        drop(turn);
    };
    let (removed, ()) = tokio::join!(host.remove(&name), read);
    assert_eq!(removed.unwrap(), Removed::Image);
    assert!(host.kept(&name).last_use.is_some());
}
