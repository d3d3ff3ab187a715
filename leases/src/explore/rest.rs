//! What becomes of a world that is left alone.

use std::collections::HashSet;

use super::{
    asks::{Return, Sharing, Which, Wish},
    desk::{Answer, Desk, Op},
    flaws::Flaw,
    invariants::broken,
    search::fingerprint,
    view::{LeaseView, Stand},
    world::{Call, Flight, Reclaimer, Refiller, Step, VMS, World},
};

/// No way to rest is longer.
const MOST_STEPS_TO_REST: usize = 100;

/// Left alone, calls end and the reclaimer does what it can; then there is nothing that nobody wants, and when the
/// launchers have closed their devices, every VM can have a disk, and every spare; and when all is given back, there is nothing. Adds the
/// worlds on the way to `settled`, which are known to come to that.
pub(super) fn settles(
    mut world: World,
    desk: &mut Desk,
    (sharing, flaw): (Sharing, Option<Flaw>),
    settled: &mut HashSet<u128>,
) -> Result<(), String> {
    let mut way = Vec::new();
    for _ in 0..MOST_STEPS_TO_REST {
        let print = fingerprint(&world);
        if !settled.insert(print) {
            return if way.contains(&print) { Err("it goes round in circles".into()) } else { Ok(()) };
        }
        way.push(print);
        broken(&world, desk)?;
        if let Some(next) = left_alone(&world, desk, flaw)? {
            world = next;
            continue;
        }
        nothing_without_owner(&world, desk)?;
        if world.launchers.iter().any(|launcher| launcher.open.is_some()) {
            world.launchers.iter_mut().for_each(|launcher| launcher.open = None);
            continue;
        }
        (0..VMS as u8).try_for_each(|vm| everybody_is_served(&world, desk, vm, sharing))?;
        spares_can_be_had(&world, desk, sharing)?;
        let before = world;
        world = all_given_back(world, desk, flaw)?;
        if world == before {
            return nothing_is_left(&world, desk);
        }
    }
    Err("it does not come to rest".into())
}

/// The next thing that is done if nobody asks for anything; `None` if there is nothing left to do.
fn left_alone(world: &World, desk: &mut Desk, flaw: Option<Flaw>) -> Result<Option<World>, String> {
    let mut steps: Vec<Step> = (0..world.calls.len()).map(Step::Proceed).collect();
    steps.extend((0..world.flights.len()).map(Step::Provide));
    steps.push(Step::Refill);
    steps.extend(world.spares_to_look_at(desk));
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
    let idle = world.refiller == Refiller::Idle
        && world.calls.iter().all(|call| *call == Call::None)
        && world.flights.iter().all(|flight| *flight == Flight::None);
    if !idle || world.reclaimer != Reclaimer::Idle {
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
        let is_shared = held && view.is_some_and(LeaseView::is_of_image);
        if is_shared && desk.view(world.book).sharers(lease).next().is_none() {
            return Err(format!("lease {lease} is there for ever, and nobody shares it"));
        }
        let wanted = held && view.is_some_and(LeaseView::has_own_device) || open;
        if (device.is_some(), world.containerd_leases & (1 << lease) != 0) != (wanted, wanted) {
            return Err(format!("a remainder of lease {lease} stays for ever"));
        }
    }
    Ok(())
}

fn everybody_is_served(world: &World, desk: &mut Desk, vm: u8, sharing: Sharing) -> Result<(), String> {
    let wish = |fresh| Wish { vm, fresh, named: false, sharing };
    // Of the image that its lease is of, if it has one.
    let held = desk.view(world.book).leases.iter().find(|lease| lease.vm == vm && lease.is_held());
    let fresh = held.is_some_and(|held| held.image != wish(false).image());
    match desk.ask(world.book, Op::Acquire(wish(fresh), world.made), world.clock)?.1 {
        Answer::New(_) | Answer::Existing(_) => Ok(()),
        Answer::Done | Answer::Refused => Err(format!("VM {vm} cannot have a disk")),
    }
}

/// By a VM that has nothing.
fn spares_can_be_had(world: &World, desk: &mut Desk, sharing: Sharing) -> Result<(), String> {
    let leases = &desk.view(world.book).leases;
    let Some(vm) = (0..VMS as u8).find(|vm| !desk.view(world.book).holds(*vm)) else { return Ok(()) };
    let spares: Vec<u8> = leases.iter().filter(|lease| lease.is_spare()).map(|lease| lease.lease).collect();
    let wish = Wish { vm, fresh: false, named: false, sharing };
    for lease in spares {
        let device = world.device_of(lease).unwrap_or(lease);
        let hand_out = Op::HandOut { wish, lease, device };
        if desk.ask(world.book, hand_out, world.clock)?.1 != Answer::New(lease) {
            return Err(format!("nobody can have lease {lease}, a spare"));
        }
    }
    Ok(())
}

/// Spares are given up, too.
fn all_given_back(mut world: World, desk: &mut Desk, flaw: Option<Flaw>) -> Result<World, String> {
    for vm in 0..VMS as u8 {
        world = world.after(desk, Step::Release(Return { vm, which: Which::Any, named: false }), flaw)?;
    }
    for lease in 0..world.made {
        world = world.after(desk, Step::DropSpare(lease), flaw)?;
    }
    Ok(world)
}

fn nothing_is_left(world: &World, desk: &Desk) -> Result<(), String> {
    let nothing = desk.view(world.book).leases.is_empty() && world.disks.iter().all(Option::is_none);
    if nothing && world.containerd_leases == 0 {
        return Ok(());
    }
    Err("something stays that all have given back".into())
}
