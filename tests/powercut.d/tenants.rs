//! Launchers of VMs: each acquires, writes, renews, verifies and releases disks of its own VMs, and remembers what it was
//! answered. What was answered is so after any crash, and on a disk is what its VM has written, and nobody else.

use std::{collections::HashMap, fs::File, os::unix::fs::FileExt as _, path::Path};

use cowshed_proto::v1::{self, LeaseState, cowshed_client::CowshedClient, get_lease_request::By};
use tonic::{Code, Status, transport::Channel};

use crate::{
    Busy, MARK_AT, MARK_BYTES, Outcome,
    acks::{self, Acks, GONE},
    answers::{Answers, Kind},
    cowshed,
    dice::Dice,
    mark,
};

/// VMs of one launcher.
const VMS: usize = 2;
const IMAGE: &str = "127.0.0.1:5000/cowshed/tiny:1";
/// Room for the mark.
const SCRATCH_BYTES: u64 = 400 << 20;
/// How their ids begin, in the service and among the promises.
const PREFIX: &str = "tenant-";

pub(crate) struct Tenant {
    client: CowshedClient<Channel>,
    acks: Acks,
    answers: Answers,
    vms: Vec<String>,
    dice: Dice,
    run: u64,
    count: u64,
}

pub(crate) async fn client() -> Outcome<CowshedClient<Channel>> {
    Ok(CowshedClient::new(cowshed::channel(Path::new(cowshed::SOCKET)).await?))
}

/// The VM's lease, in whatever state.
async fn lease_of(client: &mut CowshedClient<Channel>, vm: &str) -> Result<Option<v1::Lease>, Status> {
    match client.get_lease(v1::GetLeaseRequest { by: Some(By::VmId(vm.to_owned())) }).await {
        Ok(reply) => Ok(reply.into_inner().lease),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

fn is_held(lease: &v1::Lease) -> bool {
    matches!(lease.state(), LeaseState::Granted | LeaseState::Suspect)
}

/// What a VM writes on its disk.
fn marks_of(vm: &str, lease: &str) -> Vec<u8> {
    mark(&format!("{vm}-{lease}"))
}

/// The VM's own disk: beside a shared one its scratch disk.
fn path_of(lease: &v1::Lease) -> Outcome<&str> {
    let own = lease.scratch.as_ref().or(lease.device.as_ref());
    Ok(own.ok_or_else(|| format!("lease {} has no device", lease.lease_id))?.path.as_str())
}

fn read_at_mark(path: &str) -> Outcome<Vec<u8>> {
    let mut found = vec![0; MARK_BYTES];
    File::open(path)?.read_exact_at(&mut found, MARK_AT)?;
    Ok(found)
}

fn read_marks(lease: &v1::Lease) -> Outcome<Vec<u8>> {
    read_at_mark(path_of(lease)?)
}

/// Every other VM shares the image's disk and writes on one of its own beside it.
fn spec_of(vm: &str) -> v1::DiskSpec {
    let spec = v1::DiskSpec { image: IMAGE.to_owned(), ..v1::DiskSpec::default() };
    if !vm.ends_with('1') {
        return spec;
    }
    let scratch = Some(v1::ScratchSpec { size_bytes: SCRATCH_BYTES, raw: true });
    v1::DiskSpec { mode: v1::DiskMode::SharedReadOnly.into(), scratch, ..spec }
}

/// What is shared has nobody's marks, and nobody can make any.
fn shared_is_untouched(lease: &v1::Lease) -> Outcome {
    let Some(shared) = lease.device.as_ref().filter(|_| lease.shares.is_some()) else { return Ok(()) };
    if read_at_mark(&shared.path)?.iter().any(|byte| *byte != 0) {
        return Err(format!("somebody has written on {}, which is shared", shared.path).into());
    }
    if File::options().write(true).open(&shared.path).is_ok_and(|f| f.write_all_at(&[1], MARK_AT).is_ok()) {
        return Err(format!("{}, which is shared, can be written to", shared.path).into());
    }
    Ok(())
}

impl Tenant {
    pub(crate) async fn new(number: u64, seed: u64, acks: Acks, answers: Answers) -> Outcome<Self> {
        let mut tenant = Self {
            client: client().await?,
            acks,
            answers,
            vms: (0..VMS).map(|n| format!("{PREFIX}{number}-{n}")).collect(),
            dice: Dice((seed + 1) * 0x5851_f42d + number),
            run: seed,
            count: 0,
        };
        tenant.say_what_is().await?;
        Ok(tenant)
    }

    /// What holds from before this boot is promised again: its lines are in another file.
    async fn say_what_is(&mut self) -> Outcome {
        for vm in self.vms.clone() {
            match lease_of(&mut self.client, &vm).await? {
                Some(lease) if is_held(&lease) => {
                    let written = read_marks(&lease)? == marks_of(&vm, &lease.lease_id);
                    self.promise(&vm, &lease.lease_id, written)?;
                }
                _ => self.acks.done(&[(&vm, GONE)])?,
            }
        }
        Ok(())
    }

    fn promise(&self, vm: &str, lease: &str, written: bool) -> Outcome {
        let state = format!("{}{lease}", if written { "written:" } else { "granted:" });
        Ok(self.acks.done(&[(vm, &state)])?)
    }

    async fn acquire(&mut self, vm: &str, held: Option<&v1::Lease>) -> Outcome {
        if held.is_none() {
            self.acks.begin(&[vm])?;
        }
        let request = v1::AcquireRequest {
            vm_id: vm.to_owned(),
            spec: Some(spec_of(vm)),
            request_id: Some(format!("{vm}-{}-{}", self.run, self.count)),
            ..v1::AcquireRequest::default()
        };
        let asked = self.client.acquire(self.answers.request(request));
        let lease = self.answers.to(Kind::Acquire, asked).await?.lease.ok_or("a reply without a lease")?;
        if let Some(held) = held {
            if lease.lease_id != held.lease_id {
                return Err(format!("VM {vm} held lease {} and got {}", held.lease_id, lease.lease_id).into());
            }
            return Ok(());
        }
        self.promise(vm, &lease.lease_id, false)?;
        shared_is_untouched(&lease)?;
        let file = File::options().write(true).open(path_of(&lease)?)?;
        file.write_all_at(&marks_of(vm, &lease.lease_id), MARK_AT)?;
        file.sync_all()?;
        self.promise(vm, &lease.lease_id, true)
    }

    async fn release(&mut self, vm: &str, lease: &v1::Lease) -> Outcome {
        self.acks.begin(&[vm])?;
        let request = v1::ReleaseRequest {
            vm_id: vm.to_owned(),
            lease_id: Some(lease.lease_id.clone()),
            ..v1::ReleaseRequest::default()
        };
        let asked = self.client.release(self.answers.request(request));
        self.answers.to(Kind::Release, asked).await?;
        Ok(self.acks.done(&[(vm, GONE)])?)
    }

    async fn renew(&mut self, lease: &v1::Lease) -> Outcome {
        let request = v1::RenewRequest { lease_id: lease.lease_id.clone(), ttl: None };
        let asked = self.client.renew(self.answers.request(request));
        self.answers.to(Kind::Renew, asked).await.map(drop)
    }

    async fn verify(&mut self, lease: &v1::Lease) -> Outcome {
        let device = lease.device.clone().unwrap_or_default();
        // A suspect one may have other numbers than it was granted with.
        self.renew(lease).await?;
        let request = v1::VerifyDeviceRequest {
            lease_id: lease.lease_id.clone(),
            path: Some(device.path),
            dm_uuid: device.dm_uuid,
            thin_id: Some(device.thin_id),
            generation: Some(lease.generation),
            image_digest: lease.image_digest.clone(),
            ..v1::VerifyDeviceRequest::default()
        };
        let asked = self.client.verify_device(self.answers.request(request));
        let mut reply = self.answers.to(Kind::Verify, asked).await?;
        if let (true, Some(scratch)) = (reply.verified, &lease.scratch) {
            let request = v1::VerifyDeviceRequest {
                lease_id: lease.lease_id.clone(),
                path: Some(scratch.path.clone()),
                thin_id: Some(scratch.thin_id),
                scratch: true,
                ..v1::VerifyDeviceRequest::default()
            };
            let asked = self.client.verify_device(self.answers.request(request));
            reply = self.answers.to(Kind::Verify, asked).await?;
        }
        if reply.verified { Ok(()) } else { Err(format!("{:?}", reply.differences).into()) }
    }
}

impl Busy for Tenant {
    fn name(&self) -> String {
        self.vms.join(", ")
    }

    async fn step(&mut self) -> Outcome {
        let vm = self.vms[self.dice.below(VMS)].clone();
        self.count += 1;
        match lease_of(&mut self.client, &vm).await? {
            Some(lease) if is_held(&lease) => match self.dice.below(6) {
                0 | 1 => self.release(&vm, &lease).await,
                2 => self.renew(&lease).await,
                3 => self.verify(&lease).await,
                _ => self.acquire(&vm, Some(&lease)).await,
            },
            _ => self.acquire(&vm, None).await,
        }
    }
}

/// Compares what launchers were answered with what is; says how many promises were kept.
pub(crate) async fn audit(lines: &str) -> Outcome<usize> {
    let mut client = client().await?;
    let promised: HashMap<&str, &str> =
        acks::promised(lines).into_iter().filter(|(key, _)| key.starts_with(PREFIX)).collect();
    for (vm, state) in &promised {
        let lease = lease_of(&mut client, vm).await?.filter(is_held);
        match (state.split_once(':'), lease) {
            (None, None) => {}
            (None, Some(lease)) => {
                return Err(format!("VM {vm} has released, and has lease {}", lease.lease_id).into());
            }
            (Some((what, id)), Some(lease)) if lease.lease_id == id => {
                shared_is_untouched(&lease)?;
                if what == "written" && read_marks(&lease)? != marks_of(vm, id) {
                    return Err(
                        format!("the disk of VM {vm}, lease {id}, has not what it has written").into()
                    );
                }
            }
            (Some((_, id)), other) => {
                let now = other.map_or_else(|| "none".to_owned(), |lease| lease.lease_id);
                return Err(format!("VM {vm} was granted lease {id}, and has {now}").into());
            }
        }
    }
    Ok(promised.len())
}
