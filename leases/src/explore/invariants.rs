//! What holds in every state of the world.

use super::{
    desk::{Desk, moment},
    view::{IMAGE, LeaseView, Stand},
    world::{Disk, VMS, World},
};

/// What does not hold here.
pub(super) fn broken(world: &World, desk: &Desk) -> Result<(), String> {
    let leases = &desk.view(world.book).leases;
    for lease in leases {
        granted_leases_have_their_disks(world, lease)?;
        what_is_shared_is_there(desk, world, lease)?;
        spares_were_looked_at(world, lease)?;
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
    let root = lease.shares.unwrap_or(lease.lease);
    let Some(disk) = disk(world, granted.device).filter(|disk| disk.lease == root) else {
        return Err(format!("the disk of lease {} is not there", lease.lease));
    };
    if disk.image != granted.image || disk.image != lease.image {
        return Err(format!("the disk of lease {} is of another image", lease.lease));
    }
    if disk.read_only != (lease.shares.is_some() || lease.is_of_image()) {
        return Err(format!(
            "the disk of lease {} can be written by who must not, or by nobody",
            lease.lease
        ));
    }
    let scratch = lease.shares.and(lease.own_device()).map(|scratch| self::disk(world, scratch));
    let is_its_own =
        |disk: Option<Disk>| disk.is_some_and(|disk| disk.lease == lease.lease && !disk.read_only);
    if scratch.is_some_and(|disk| !is_its_own(disk)) {
        return Err(format!("the scratch disk of lease {} is not there", lease.lease));
    }
    Ok(())
}

/// From when a VM has it until the last one has let go of it. What could not be made of it is being released, and its
/// record stays until nobody names it.
fn what_is_shared_is_there(desk: &Desk, world: &World, lease: &LeaseView) -> Result<(), String> {
    if lease.is_of_image() && matches!(lease.stand, Stand::Suspect { .. } | Stand::Failed { .. }) {
        return Err(format!("lease {} is shared, and is doubtful or has failed", lease.lease));
    }
    let Some(id) = lease.shares else { return Ok(()) };
    let Some(shared) = desk.view(world.book).get(id).filter(|shared| shared.is_of_image()) else {
        return Err(format!("lease {id}, which lease {} shares, is not there", lease.lease));
    };
    if shared.granted().is_some() && !shared.is_granted() {
        return Err(format!("lease {id} is released, and lease {} shares it", lease.lease));
    }
    let device = |lease: &LeaseView| lease.granted().map(|granted| granted.device);
    if lease.is_granted() && !shared.is_granted() {
        return Err(format!("lease {} is granted, and lease {id}, which it shares, is not", lease.lease));
    }
    if lease.is_granted() && device(lease) != device(shared) {
        return Err(format!("lease {} has another device than lease {id}, which it shares", lease.lease));
    }
    Ok(())
}

/// In this boot, before anybody can be given them. Nobody has to ask after them, and what could not be made is released.
fn spares_were_looked_at(world: &World, lease: &LeaseView) -> Result<(), String> {
    if !lease.is_spare() {
        return Ok(());
    }
    match &lease.stand {
        Stand::Suspect { .. } | Stand::Failed { .. } => {
            Err(format!("lease {} is a spare, and is doubtful or has failed", lease.lease))
        }
        Stand::Granted(granted)
            if lease.boot == moment(world.clock).boot && granted.numbers != world.clock.boot =>
        {
            Err(format!("lease {} is a spare of this boot, and its device is not known in it", lease.lease))
        }
        _ => Ok(()),
    }
}

fn nobody_else_has_it(lease: &LeaseView, leases: &[LeaseView]) -> Result<(), String> {
    for other in leases.iter().filter(|other| other.lease != lease.lease) {
        if lease.is_held() && other.is_held() && lease.vm == other.vm && !lease.is_spare() {
            return Err(format!("VM {} holds two leases", lease.vm));
        }
        if lease.own_device().is_some() && lease.own_device() == other.own_device() {
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
    if owner == IMAGE {
        let written = format!("somebody has written on the disk of lease {lease}, which is shared");
        return if disk.marks == 0 { Ok(()) } else { Err(written) };
    }
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
    // That what it shares is there, and that nobody writes on it, holds of all leases.
    let Some(own) = lease.own_device() else { return Ok(()) };
    if disk(world, own).map(|disk| disk.marks) != Some(u8::from(promise.written) << vm) {
        return Err(format!("what VM {vm} has written on the disk of lease {} is lost", lease.lease));
    }
    Ok(())
}
