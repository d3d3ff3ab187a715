//! What holds in every state of the world, and what becomes of it when it is left alone.

use std::collections::HashSet;

use super::{
    desk::{Answer, Desk, Op, Wish},
    search::fingerprint,
    view::{LeaseView, Stand},
    world::{Call, Disk, Flaw, Reclaimer, Step, VMS, World},
};

/// No way to rest is longer.
const MOST_STEPS_TO_REST: usize = 100;

/// What does not hold here.
pub(super) fn broken(world: &World, desk: &Desk) -> Result<(), String> {
    let leases = &desk.view(world.book).leases;
    for lease in leases {
        granted_leases_have_their_disks(world, lease)?;
        nobody_else_has_it(lease, leases)?;
    }
    for (device, disk) in world.disks.iter().enumerate() {
        if let Some(disk) = disk {
            disks_have_owners_and_one_writer(world, desk, device as u8, disk)?;
        }
    }
    for lease in (0..world.made).filter(|lease| world.containerd_leases & (1 << lease) != 0) {
        if !is_on_record(desk, world, lease) {
            return Err(format!("containerd's lease {lease} is on no record"));
        }
    }
    launchers_have_what_they_opened(world)?;
    (0..VMS).try_for_each(|vm| promises_are_kept(world, desk, vm))
}

fn disk(world: &World, device: u8) -> Option<Disk> {
    world.disks[usize::from(device)]
}

fn granted_leases_have_their_disks(world: &World, lease: &LeaseView) -> Result<(), String> {
    let Some(granted) = lease.granted().filter(|_| lease.is_granted()) else { return Ok(()) };
    let Some(disk) = disk(world, granted.device).filter(|disk| disk.lease == lease.lease) else {
        return Err(format!("the disk of lease {} is not there", lease.lease));
    };
    if disk.image != granted.image || disk.image != lease.image {
        return Err(format!("the disk of lease {} is of another image", lease.lease));
    }
    Ok(())
}

fn nobody_else_has_it(lease: &LeaseView, leases: &[LeaseView]) -> Result<(), String> {
    for other in leases.iter().filter(|other| other.lease != lease.lease) {
        if lease.is_held() && other.is_held() && lease.vm == other.vm {
            return Err(format!("VM {} holds two leases", lease.vm));
        }
        let device = |lease: &LeaseView| lease.granted().map(|granted| granted.device);
        if device(lease).is_some() && device(lease) == device(other) {
            return Err(format!("leases {} and {} have one device", lease.lease, other.lease));
        }
    }
    Ok(())
}

/// Whether the reclaimer can still find it.
fn is_on_record(desk: &Desk, world: &World, lease: u8) -> bool {
    let lease = desk.view(world.book).get(lease);
    lease.is_some_and(|lease| lease.stand != Stand::Failed { cleared: true })
}

fn disks_have_owners_and_one_writer(
    world: &World,
    desk: &Desk,
    device: u8,
    disk: &Disk,
) -> Result<(), String> {
    let lease = disk.lease;
    if !is_on_record(desk, world, lease) {
        return Err(format!("the snapshot of lease {lease} is on no record"));
    }
    if world.containerd_leases & (1 << lease) == 0 {
        return Err(format!("the snapshot of lease {lease} is without a lease in containerd"));
    }
    let Some(owner) = desk.view(world.book).get(lease).map(|lease| lease.vm) else { return Ok(()) };
    if disk.marks & !(1 << owner) != 0 {
        return Err(format!("somebody else has written on the disk of lease {lease}"));
    }
    // Also one that was given back: its launcher may not know.
    for (vm, launcher) in world.launchers.iter().enumerate() {
        if launcher.given & (1 << device) != 0 && usize::from(owner) != vm {
            return Err(format!("VM {vm} was given the disk of lease {lease}"));
        }
    }
    Ok(())
}

fn launchers_have_what_they_opened(world: &World) -> Result<(), String> {
    for (vm, device) in world.launchers.iter().enumerate().filter_map(|(vm, l)| Some((vm, l.open?))) {
        let Some(disk) = disk(world, device) else {
            return Err(format!("the device that VM {vm} has open is removed"));
        };
        if disk.marks & !(1 << vm) != 0 {
            return Err(format!("VM {vm} sees what another has written"));
        }
    }
    Ok(())
}

fn promises_are_kept(world: &World, desk: &Desk, vm: usize) -> Result<(), String> {
    let Some(promise) = world.promises[vm] else { return Ok(()) };
    let lease = desk.view(world.book).get(promise.lease);
    let Some(lease) = lease.filter(|lease| lease.is_granted() && usize::from(lease.vm) == vm) else {
        return Err(format!("VM {vm} does not have lease {}, as it was told", promise.lease));
    };
    let disk = lease.granted().and_then(|granted| disk(world, granted.device));
    if disk.map(|disk| disk.marks) != Some(u8::from(promise.written) << vm) {
        return Err(format!("what VM {vm} has written on the disk of lease {} is lost", lease.lease));
    }
    Ok(())
}

/// Left alone, calls end and the reclaimer does what it can; then there is nothing that nobody wants, and when the
/// launchers have closed their devices, every VM can have a disk. Adds the worlds on the way to `settled`, which are known
/// to come to that.
pub(super) fn settles(
    mut world: World,
    desk: &mut Desk,
    flaw: Option<Flaw>,
    settled: &mut HashSet<u128>,
) -> Result<(), String> {
    for _ in 0..MOST_STEPS_TO_REST {
        if !settled.insert(fingerprint(&world)) {
            return Ok(());
        }
        broken(&world, desk)?;
        if let Some(next) = left_alone(&world, desk, flaw)? {
            world = next;
            continue;
        }
        nothing_without_owner(&world, desk)?;
        if world.launchers.iter().all(|launcher| launcher.open.is_none()) {
            return (0..VMS as u8).try_for_each(|vm| everybody_is_served(&world, desk, vm));
        }
        world.launchers.iter_mut().for_each(|launcher| launcher.open = None);
    }
    Err("it does not come to rest".into())
}

/// The next thing that is done if nobody asks for anything; `None` if there is nothing left to do.
fn left_alone(world: &World, desk: &mut Desk, flaw: Option<Flaw>) -> Result<Option<World>, String> {
    let mut steps: Vec<Step> = (0..world.calls.len()).map(Step::Proceed).collect();
    world.reclaimers_steps(desk, &mut steps);
    for step in steps {
        let next = world.after(desk, step, flaw)?;
        if next != *world {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

fn nothing_without_owner(world: &World, desk: &Desk) -> Result<(), String> {
    let idle = world.calls.iter().all(|call| *call == Call::None) && world.reclaimer == Reclaimer::Idle;
    if !idle {
        return Err("something is still under way".into());
    }
    for lease in 0..world.made {
        let device = world.device_of(lease);
        let open = device.is_some() && world.launchers.iter().any(|launcher| launcher.open == device);
        let view = desk.view(world.book).get(lease);
        let held = view.is_some_and(LeaseView::is_granted);
        if view.is_some_and(|view| view.stand == Stand::Preparing) {
            return Err(format!("lease {lease} is being made for ever"));
        }
        if (device.is_some(), world.containerd_leases & (1 << lease) != 0) != (held || open, held || open) {
            return Err(format!("a remainder of lease {lease} stays for ever"));
        }
    }
    Ok(())
}

fn everybody_is_served(world: &World, desk: &mut Desk, vm: u8) -> Result<(), String> {
    // Of the image that its lease is of, if it has one.
    let held = desk.view(world.book).leases.iter().find(|lease| lease.vm == vm && lease.is_held());
    let fresh = held.is_some_and(|held| held.image != Wish { vm, fresh: false, named: false }.image());
    let wish = Wish { vm, fresh, named: false };
    match desk.ask(world.book, Op::Acquire(wish, world.made), world.clock)?.1 {
        Answer::New(_) | Answer::Existing(_) => Ok(()),
        Answer::Done | Answer::Refused => Err(format!("VM {vm} cannot have a disk")),
    }
}
