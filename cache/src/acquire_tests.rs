//! Acquire, release and reclaim on fakes that can be stopped, or made to fail, at every effect.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicUsize, Ordering},
};

use cowshed_leases::DeviceNumber;
use tonic::Status;

use super::*;
use crate::{
    containerd::CallError,
    image::{Digest, ProcessConfig, RunningPulls},
    kernel::{PoolMode, PoolUsage},
    metrics::Metrics,
    reclaim::{Reclaimer, Waiting},
};

/// containerd and the kernel in one: leases, snapshots, devices; and a count-down to a failure.
#[derive(Default)]
struct World {
    state: Mutex<State_>,
    effects: AtomicUsize,
    fail_at: AtomicUsize,
    fault: Mutex<Fault>,
}

/// What happens at the effect that is counted down to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    /// It is not made, and says so.
    #[default]
    Refused,
    /// It is made, and says that it was not.
    AnswerLost,
    /// It is not made, and the process is gone: it never answers.
    CrashBefore,
    /// It is made, and the process is gone.
    CrashAfter,
}

#[derive(Default)]
struct State_ {
    leases: BTreeSet<String>,
    /// Key → device name.
    snapshots: BTreeMap<String, String>,
    /// Device name → open count.
    devices: BTreeMap<String, u32>,
    next_device: u32,
    parents: BTreeSet<String>,
}

fn image() -> ResolvedImage {
    ResolvedImage {
        name: ImageRef::parse("r.example/app:1").unwrap(),
        target: Digest::of(b"target"),
        manifest: Digest::of(b"manifest"),
        platform: Platform::host(),
        chain_id: Digest::of(b"chain"),
        process: ProcessConfig { cmd: vec!["/bin/app".into()], ..ProcessConfig::default() },
        compressed_bytes: 1,
        layers: 1,
        created_at: None,
    }
}

fn gone() -> CallError {
    CallError::Status { call: "fake", status: Box::new(Status::not_found("not there")) }
}

fn broken() -> CallError {
    CallError::Status { call: "fake", status: Box::new(Status::unavailable("cut off")) }
}

impl World {
    /// An effect, or the fault that it is to have.
    async fn effect<T>(
        &self,
        make: impl FnOnce(&mut State_) -> Result<T, CallError>,
    ) -> Result<T, CallError> {
        let number = self.effects.fetch_add(1, Ordering::SeqCst) + 1;
        let fault = *self.fault.lock().unwrap();
        let fault = (number == self.fail_at.load(Ordering::SeqCst)).then_some(fault);
        let made = match fault {
            Some(Fault::Refused | Fault::CrashBefore) => Err(broken()),
            None | Some(Fault::AnswerLost | Fault::CrashAfter) => make(&mut self.state.lock().unwrap()),
        };
        match fault {
            None => made,
            Some(Fault::Refused | Fault::AnswerLost) => Err(broken()),
            Some(Fault::CrashBefore | Fault::CrashAfter) => std::future::pending().await,
        }
    }

    fn arm(&self, fault: Fault, fail_at: usize) {
        *self.fault.lock().unwrap() = fault;
        self.effects.store(0, Ordering::SeqCst);
        self.fail_at.store(fail_at, Ordering::SeqCst);
    }

    fn has_struck(&self) -> bool {
        let at = self.fail_at.load(Ordering::SeqCst);
        at > 0 && self.effects.load(Ordering::SeqCst) >= at
    }

    fn look<T>(&self, look: impl FnOnce(&State_) -> T) -> T {
        look(&self.state.lock().unwrap())
    }

    fn set_open(&self, device: &str, count: u32) {
        self.state.lock().unwrap().devices.insert(device.to_owned(), count);
    }

    fn is_empty(&self) -> bool {
        self.look(|s| s.leases.is_empty() && s.snapshots.is_empty() && s.devices.is_empty())
    }
}

#[async_trait::async_trait]
impl Snapshots for World {
    async fn create_lease(&self, id: &str, _labels: HashMap<String, String>) -> Result<(), CallError> {
        self.effect(|s| {
            s.leases.insert(id.to_owned());
            Ok(())
        })
        .await
    }

    async fn delete_lease(&self, id: &str, _sync: bool) -> Result<(), CallError> {
        self.effect(|s| {
            s.leases.remove(id);
            // The collection: snapshots without a lease, then devices without a snapshot.
            let leases = s.leases.clone();
            s.snapshots.retain(|key, _| leases.contains(key));
            let kept: BTreeSet<&String> = s.snapshots.values().collect();
            for (device, open) in &s.devices {
                assert!(kept.contains(device) || *open == 0, "{device} was removed while open");
            }
            s.devices.retain(|device, _| kept.contains(device));
            Ok(())
        })
        .await
    }

    async fn our_leases(&self) -> Result<Vec<String>, CallError> {
        Ok(self.look(|s| s.leases.iter().cloned().collect()))
    }

    async fn prepare(&self, lease: &str, key: &str, parent: &str) -> Result<Vec<Mount>, CallError> {
        self.effect(|s| {
            assert!(s.leases.contains(lease), "a snapshot that nothing holds");
            if !s.parents.contains(parent) {
                return Err(gone());
            }
            s.next_device += 1;
            let device = format!("snap-{}", s.next_device);
            s.devices.insert(device.clone(), 0);
            s.snapshots.insert(key.to_owned(), device.clone());
            Ok(vec![mount(&device)])
        })
        .await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, CallError> {
        self.look(|s| s.snapshots.get(key).map(|device| vec![mount(device)]).ok_or_else(gone))
    }

    async fn remove(&self, key: &str) -> Result<(), CallError> {
        self.effect(|s| {
            s.snapshots.remove(key);
            Ok(())
        })
        .await
    }

    async fn keys(&self, prefix: &str) -> Result<Vec<String>, CallError> {
        Ok(self.look(|s| s.snapshots.keys().filter(|key| key.starts_with(prefix)).cloned().collect()))
    }

    fn explain(&self, error: CallError) -> Error {
        Error::new(Reason::ContainerdUnavailable, error.to_string())
    }
}

fn mount(device: &str) -> Mount {
    Mount { r#type: "ext4".into(), source: format!("/dev/mapper/{device}"), ..Mount::default() }
}

impl Kernel for World {
    fn inspect(&self, path: &str) -> Result<DeviceIdentity, KernelError> {
        let name = path.rsplit('/').next().unwrap().to_owned();
        if !self.look(|s| s.devices.contains_key(&name)) {
            return Err(KernelError::Missing(path.to_owned()));
        }
        let thin_id = name.trim_start_matches("snap-").parse().unwrap();
        Ok(DeviceIdentity {
            path: path.to_owned(),
            number: DeviceNumber { major: 253, minor: thin_id },
            dm_name: name,
            dm_uuid: None,
            thin_id,
            pool: DeviceNumber { major: 253, minor: 0 },
            size_bytes: 1 << 30,
        })
    }

    fn open_count(&self, name: &str) -> Result<Option<u32>, KernelError> {
        Ok(self.look(|s| s.devices.get(name).copied()))
    }

    fn pool(&self) -> Result<PoolUsage, KernelError> {
        Ok(PoolUsage {
            name: "pool".into(),
            data_used: 0,
            data_total: 100,
            metadata_used: 0,
            metadata_total: 100,
            mode: PoolMode::ReadWrite,
        })
    }
}

#[async_trait::async_trait]
impl ImageCache for World {
    async fn resolve(&self, _image: &ImageRef, _platform: &Platform) -> Result<Option<ResolvedImage>> {
        Ok(Some(image()))
    }

    async fn ensure(&self, _image: &ImageRef, _platform: &Platform) -> Result<ResolvedImage> {
        self.state.lock().unwrap().parents.insert(image().chain_id.to_string());
        Ok(image())
    }
}

impl RunningPulls for World {
    fn running(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }
}

/// One process: what it has in memory; the world and the directory outlive it.
struct Process_ {
    acquirer: Arc<Acquirer>,
    reclaimer: Reclaimer,
}

fn start(world: &Arc<World>, directory: &std::path::Path) -> Process_ {
    let ledger = Ledger::open(directory).unwrap();
    let wake = Wake::default();
    let acquirer = Acquirer {
        ledger: ledger.clone(),
        images: world.clone(),
        snapshots: world.clone(),
        kernel: world.clone(),
        admission: Admission { data_headroom_percent: 5, metadata_headroom_percent: 5 },
        wake: wake.clone(),
        tasks: Tasks::default(),
        flights: Mutex::default(),
    };
    let reclaimer = Reclaimer {
        ledger,
        snapshots: world.clone(),
        kernel: world.clone(),
        running_pulls: world.clone(),
        wake,
        waiting: Waiting::default(),
        metrics: Metrics::new().unwrap(),
        retry: Duration::from_millis(1),
        interval: Duration::from_millis(1),
        suspects: Mutex::default(),
    };
    Process_ { acquirer: Arc::new(acquirer), reclaimer }
}

fn world() -> Arc<World> {
    let world = World::default();
    world.state.lock().unwrap().parents.insert(image().chain_id.to_string());
    Arc::new(world)
}

fn wish(vm: &str) -> Wish {
    Wish { vm: vm.parse().unwrap(), image: image().name, platform: Platform::host() }
}

impl Process_ {
    /// What the service does between requests, to the end.
    async fn settle(&self) {
        for _ in 0..4 {
            self.reclaimer.pass_over_everything().await;
        }
    }

    /// Invariants 1 and 2: every granted lease has its own device, and there is nothing else.
    fn audit(&self, world: &World, what: &str) {
        let granted: BTreeMap<String, String> = self.acquirer.ledger.read(|book| {
            let of = |lease: &Lease| (lease.id.snapshot_key(), lease.grant().unwrap().device.dm_name.clone());
            book.after(None).map(of).collect()
        });
        world.look(|s| {
            assert_eq!(s.snapshots, granted, "{what}: snapshots");
            assert_eq!(s.leases, granted.keys().cloned().collect(), "{what}: containerd leases");
            assert_eq!(
                s.devices.keys().collect::<BTreeSet<_>>(),
                granted.values().collect::<BTreeSet<_>>(),
                "{what}: devices"
            );
        });
    }
}

#[tokio::test]
async fn equal_wishes_get_one_lease_and_different_vms_different_disks() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let calls = (0..40).map(|n| {
        let acquirer = process.acquirer.clone();
        tokio::spawn(
            async move { acquirer.acquire(wish(&format!("vm-{}", n % 10))).await.unwrap().lease.clone() },
        )
    });
    let mut leases = BTreeMap::new();
    for call in calls.collect::<Vec<_>>() {
        let lease = call.await.unwrap();
        assert_eq!(leases.entry(lease.vm.clone()).or_insert_with(|| lease.clone()).id, lease.id);
    }
    assert_eq!(leases.len(), 10);
    process.audit(&world, "after forty calls");
    let again = process.acquirer.acquire(wish("vm-3")).await.unwrap();
    assert!(again.existing);
    assert_eq!(again.lease, leases[&again.lease.vm]);
}

#[tokio::test]
async fn a_caller_that_goes_away_stops_nothing() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let call = process.acquirer.acquire(wish("vm-1"));
    // Polled once, then dropped.
    assert!(futures_util::FutureExt::now_or_never(call).is_none());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert_eq!(process.acquirer.ledger.read(|b| b.after(None).count()), 1);
    process.audit(&world, "after the caller went away");
    assert_eq!(lease.generation.0, 1);
}

#[tokio::test]
async fn an_image_that_vanished_meanwhile_is_pulled_again() {
    let (world, directory) = (Arc::new(World::default()), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let acquired = process.acquirer.acquire(wish("vm-1")).await.unwrap();
    assert!(acquired.stages.iter().any(|(stage, _)| stage == Stage::Pull));
    process.audit(&world, "after the second pull");
}

#[tokio::test]
async fn a_device_that_is_not_what_was_granted_is_not_handed_out_again() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    world.state.lock().unwrap().devices.clear();
    let error = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DeviceMismatch);
    assert!(error.to_string().contains(lease.id.as_str()), "{error}");
}

/// Acquire fails at each of its effects; what follows leaves nothing, and the next acquire works.
#[tokio::test]
async fn a_refusal_at_any_effect_leaves_nothing_behind() {
    for fault in [Fault::Refused, Fault::AnswerLost] {
        for fail_at in 1..=2 {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let process = start(&world, directory.path());
            let what = format!("{fault:?} at effect {fail_at}");
            world.arm(fault, fail_at);
            let error = process.acquirer.acquire(wish("vm-1")).await.unwrap_err();
            assert_eq!(error.reason(), Reason::ContainerdUnavailable, "{what}");
            process.settle().await;
            assert!(world.is_empty(), "{what}");
            assert_eq!(process.acquirer.ledger.read(|b| b.after(None).count()), 0, "{what}");
            process.acquirer.acquire(wish("vm-1")).await.unwrap();
            process.audit(&world, &what);
        }
    }
}

/// The process dies at each effect of acquire, release and reclaim; the next one finds its way from what is on disk.
#[tokio::test]
async fn a_crash_at_any_effect_is_recovered_from() {
    let mut struck = 0;
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        for fail_at in 1.. {
            let (world, directory) = (world(), tempfile::tempdir().unwrap());
            let what = format!("{fault:?} at effect {fail_at}");
            let dead = start(&world, directory.path());
            let kept = dead.acquirer.acquire(wish("kept")).await.unwrap().lease.clone();
            world.arm(fault, fail_at);
            story(&dead, &world).await;
            if !world.has_struck() {
                break;
            }
            struck += 1;
            world.arm(fault, 0);
            let process = start(&world, directory.path());
            process.reclaimer.recover().await.unwrap();
            process.settle().await;
            process.audit(&world, &what);
            let again = process.acquirer.acquire(wish("kept")).await.unwrap();
            assert_eq!(again.lease, kept, "{what}: a granted lease survives");
            process.acquirer.acquire(wish("other")).await.unwrap();
            process.audit(&world, &what);
        }
    }
    // Two of the acquire and three of the reclaimer, each before and after.
    assert!(struck >= 10, "only {struck} crash points were reached");
}

/// Acquire, release, reclaim, as far as it gets.
async fn story(process: &Process_, world: &World) {
    let struck = async {
        while !world.has_struck() {
            tokio::task::yield_now().await;
        }
    };
    let all = async {
        let acquired = process.acquirer.acquire(wish("other")).await.unwrap();
        process.acquirer.ledger.release(acquired.lease.id.clone(), clock::now()).await.unwrap();
        process.settle().await;
    };
    tokio::select! {
        () = all => {}
        () = struck => {}
    }
}

#[tokio::test]
async fn an_open_device_is_waited_for_and_says_so() {
    let (world, directory) = (world(), tempfile::tempdir().unwrap());
    let process = start(&world, directory.path());
    let lease = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    let device = lease.grant().unwrap().device.dm_name.clone();
    world.set_open(&device, 1);
    process.acquirer.ledger.release(lease.id.clone(), clock::now()).await.unwrap();
    process.settle().await;
    process.audit(&world, "while it is open");
    assert_eq!(process.reclaimer.waiting.read().unwrap()[&lease.id], "the device is open");
    // The VM gets a new disk meanwhile.
    let second = process.acquirer.acquire(wish("vm-1")).await.unwrap().lease.clone();
    assert!(second.generation > lease.generation);
    assert_ne!(second.grant().unwrap().device.dm_name, device);

    world.set_open(&device, 0);
    process.settle().await;
    process.audit(&world, "after it was closed");
    assert!(process.acquirer.ledger.read(|b| b.get(&lease.id).is_none()));
    assert!(process.reclaimer.waiting.read().unwrap().is_empty());
}
