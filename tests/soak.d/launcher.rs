//! A launcher: acquires and releases disks of its VMs in every way there is, and looks at each disk.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, sync::Arc, time::Duration};

use cowshed_proto::v1::{self, LeaseState, cowshed_client::CowshedClient, get_lease_request::By};
use tonic::{Code, Status, transport::Channel};

use crate::{Outcome, cowshed, dice::Dice, tally::Tally};

pub(crate) const IMAGES: [&str; 5] = [
    "127.0.0.1:5000/cowshed/app:1",
    "127.0.0.1:5000/cowshed/app:2",
    "127.0.0.1:5000/cowshed/python:3",
    "127.0.0.1:5000/cowshed/debian:base",
    "127.0.0.1:5000/cowshed/tiny:1",
];
/// Where on the disk a VM writes: beyond what its image has.
const AT: u64 = 700 << 20;
/// VMs whose ids end so share their image's disk and write on scratch disks.
const SHARING: [char; 3] = ['1', '4', '7'];

pub(crate) struct Launcher {
    client: CowshedClient<Channel>,
    vms: Vec<String>,
    dice: Dice,
    /// Not only in the plain way.
    adventurous: bool,
    tally: Arc<Tally>,
    requests: u64,
    seed: u64,
    turn: usize,
}

fn acquire_request(vm: &str, image: &str) -> v1::AcquireRequest {
    let image = v1::DiskSpec { image: image.to_owned(), ..v1::DiskSpec::default() };
    let scratch = Some(v1::ScratchSpec { size_bytes: 1 << 30, raw: true });
    let spec = if vm.ends_with(SHARING) {
        v1::DiskSpec { mode: v1::DiskMode::SharedReadOnly.into(), scratch, ..image }
    } else {
        image
    };
    v1::AcquireRequest { vm_id: vm.to_owned(), spec: Some(spec), ..v1::AcquireRequest::default() }
}

/// The VM's own disk.
fn path_of(lease: &v1::Lease) -> &str {
    lease.scratch.as_ref().or(lease.device.as_ref()).map_or("", |device| &device.path)
}

impl Launcher {
    pub(crate) async fn new(
        vms: Vec<String>,
        seed: u64,
        adventurous: bool,
        tally: Arc<Tally>,
    ) -> Outcome<Self> {
        let client = CowshedClient::new(cowshed::channel(Path::new(cowshed::SOCKET)).await?);
        Ok(Self { client, vms, dice: Dice(seed), adventurous, tally, requests: 0, seed, turn: 0 })
    }

    /// Until there were enough acquires, of all launchers together.
    pub(crate) async fn run(mut self) {
        while !self.tally.is_done() {
            self.turn += 1;
            let one =
                if self.adventurous { self.dice.below(self.vms.len()) } else { self.turn % self.vms.len() };
            let vm = self.vms[one].clone();
            if let Err(status) = self.step(&vm).await {
                self.tally.failed(&vm, &status);
                self.pause(100).await;
            }
        }
    }

    async fn pause(&self, milliseconds: usize) {
        tokio::time::sleep(Duration::from_millis(milliseconds as u64)).await;
    }

    async fn step(&mut self, vm: &str) -> Result<(), Status> {
        let by = Some(By::VmId(vm.to_owned()));
        let lease = match self.client.get_lease(v1::GetLeaseRequest { by }).await {
            Ok(reply) => reply.into_inner().lease,
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(status),
        };
        match lease {
            Some(lease) if matches!(lease.state(), LeaseState::Granted | LeaseState::Suspect) => {
                self.release_somehow(&lease).await
            }
            // A caller has gone while it was made.
            Some(lease) if lease.state() == LeaseState::Preparing => {
                let image = lease.spec.map(|spec| spec.image).unwrap_or_default();
                self.acquire(acquire_request(vm, &image)).await.map(drop)
            }
            _ => self.acquire_somehow(vm).await,
        }
    }

    async fn acquire(&mut self, request: v1::AcquireRequest) -> Result<v1::Lease, Status> {
        let reply = self.client.acquire(request).await?.into_inner();
        if !reply.existing {
            self.tally.acquired();
        }
        reply.lease.ok_or_else(|| Status::data_loss("a reply without a lease"))
    }

    fn request_id(&mut self) -> Option<String> {
        self.requests += 1;
        Some(format!("soak-{}-{}", self.seed, self.requests))
    }

    /// A VM that has no lease gets one.
    async fn acquire_somehow(&mut self, vm: &str) -> Result<(), Status> {
        let image = IMAGES[self.dice.below(IMAGES.len())];
        let plain = acquire_request(vm, image);
        match if self.adventurous { self.dice.below(10) } else { 0 } {
            0..=3 => {
                let lease = self.acquire(plain).await?;
                self.look_and_write(&lease);
            }
            4 => {
                self.tally.count("repeated");
                let named = v1::AcquireRequest { request_id: self.request_id(), ..plain };
                let first = self.acquire(named.clone()).await?;
                let second = self.acquire(named).await?;
                self.expect(first.lease_id == second.lease_id, || format!("{first:?} became {second:?}"));
                self.look_and_write(&second);
            }
            5 => {
                self.tally.count("gone in mid-call");
                self.leave_in_the_middle(plain.clone()).await;
                let lease = self.acquire(plain).await?;
                self.look_and_write(&lease);
            }
            6 | 7 => self.let_expire(plain).await?,
            8 => {
                let lease = self.acquire(v1::AcquireRequest { fresh: true, ..plain }).await?;
                self.look_and_write(&lease);
            }
            _ => {
                let lease = self.acquire(plain).await?;
                self.look_and_write(&lease);
                self.other_image_is_refused(vm, image).await?;
            }
        }
        Ok(())
    }

    /// The call is dropped after a moment, wherever it is.
    async fn leave_in_the_middle(&mut self, request: v1::AcquireRequest) {
        let mut client = self.client.clone();
        let moment = Duration::from_millis(self.dice.below(400) as u64);
        if let Ok(Ok(reply)) = tokio::time::timeout(moment, client.acquire(request)).await
            && !reply.into_inner().existing
        {
            self.tally.acquired();
        }
    }

    async fn let_expire(&mut self, plain: v1::AcquireRequest) -> Result<(), Status> {
        self.tally.count("expired");
        let a_second = prost_types::Duration { seconds: 1, nanos: 0 };
        self.acquire(v1::AcquireRequest { ttl: Some(a_second), ..plain.clone() }).await?;
        self.pause(1300).await;
        match self.dice.below(3) {
            0 => self.acquire(plain).await.map(drop),
            1 => self.acquire(v1::AcquireRequest { fresh: true, ..plain }).await.map(drop),
            // It is reclaimed when its grace is over.
            _ => Ok(()),
        }
    }

    async fn other_image_is_refused(&mut self, vm: &str, image: &str) -> Result<(), Status> {
        let other = IMAGES[usize::from(image == IMAGES[0])];
        match self.client.acquire(acquire_request(vm, other)).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(status),
            Ok(reply) => {
                self.tally.find(format!("{vm} has {image}, and got {other}: {:?}", reply.into_inner()));
                Ok(())
            }
        }
    }

    fn expect(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.tally.find(what());
        }
    }

    /// What is on the disk where VMs write: nothing, or what this lease's VM has written; then it writes.
    fn look_and_write(&mut self, lease: &v1::Lease) {
        let mut mark = lease.lease_id.clone().into_bytes();
        mark.resize(4096, b'.');
        let durable = self.dice.below(4) == 0;
        let looked = (|| {
            let disk = File::options().read(true).write(true).open(path_of(lease))?;
            let mut found = vec![0; mark.len()];
            disk.read_exact_at(&mut found, AT)?;
            let clean = found == mark || found.iter().all(|byte| *byte == 0);
            disk.write_all_at(&mark, AT)?;
            if durable {
                disk.sync_all()?;
            }
            Ok::<_, std::io::Error>(clean)
        })();
        match looked {
            Ok(clean) => self.expect(clean, || format!("somebody else has written on the disk of {lease:?}")),
            Err(error) => self.tally.find(format!("the disk of {lease:?}: {error}")),
        }
    }

    async fn release_somehow(&mut self, lease: &v1::Lease) -> Result<(), Status> {
        let plain = v1::ReleaseRequest {
            vm_id: lease.vm_id.clone(),
            lease_id: Some(lease.lease_id.clone()),
            ..v1::ReleaseRequest::default()
        };
        match if self.adventurous { self.dice.below(10) } else { 0 } {
            0..=4 => self.client.release(plain).await.map(drop),
            5 | 6 => self.release_while_open(lease, plain).await,
            7 | 8 => {
                let named = v1::ReleaseRequest { request_id: self.request_id(), ..plain };
                self.client.release(named.clone()).await?;
                self.client.release(named).await.map(drop)
            }
            _ => {
                let mut client = self.client.clone();
                let moment = Duration::from_millis(self.dice.below(20) as u64);
                let _left = tokio::time::timeout(moment, client.release(plain)).await;
                Ok(())
            }
        }
    }

    async fn release_while_open(
        &mut self,
        lease: &v1::Lease,
        plain: v1::ReleaseRequest,
    ) -> Result<(), Status> {
        // A suspect one may go at any time before it is open.
        let Ok(disk) = File::options().read(true).write(true).open(path_of(lease)) else { return Ok(()) };
        self.tally.count("released while open");
        self.client.release(plain).await?;
        let moment = self.dice.below(1500);
        self.pause(moment).await;
        let mut found = [0; 4096];
        let written = disk
            .write_all_at(&[b'+'; 4096], AT)
            .and_then(|()| disk.sync_all())
            .and_then(|()| disk.read_exact_at(&mut found, AT));
        self.expect(written.is_ok(), || format!("the open disk of {lease:?}: {written:?}"));
        self.expect(Path::new(path_of(lease)).exists(), || format!("the open device of {lease:?} is gone"));
        Ok(())
    }
}
