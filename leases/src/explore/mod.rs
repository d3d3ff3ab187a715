//! The book as its own model: the real one, with the service, containerd, the kernel and launchers played around it, taken
//! through every order in which two clients, two VMs with disks of their own, made ahead of need or not, or with one that they share,
//! the reclaimer, time, crashes and power cuts can come.
//!
//! ```text
//! search ──► world: who can do what ──► play, sharing, spares, reclaiming: what it does ──► desk: asks the book ──► Book
//!    ├─────► invariants: what holds in every state
//!    └─────► rest: what becomes of it when it is left alone
//! ```

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod asks;
mod desk;
mod flaws;
mod invariants;
mod play;
mod reclaiming;
mod rest;
mod search;
mod sharing;
mod spares;
mod view;
mod world;

use std::time::Instant;

use asks::Sharing;
use flaws::{BookFlaw, Flaw};
use search::{Seen, explore};
use world::Bounds;

/// Deeper than any world goes.
const TO_THE_END: usize = 1_000;

const NARROW: Bounds =
    Bounds { leases: 2, boots: 1, up: 1, names: false, sharing: Sharing::Nobody, spares: 0 };

/// A lease of each VM, and one of what they share.
const SHARED: Bounds = Bounds { leases: 3, sharing: Sharing::Both, ..NARROW };

/// One lease, which may be a spare.
const SPARE: Bounds = Bounds { leases: 1, sharing: Sharing::Spares, spares: 1, ..NARROW };

/// How deep a world is explored that is too wide for its end: so deep, and deeper if COWSHED_DEPTH says so.
fn as_deep_as(steps: usize) -> usize {
    std::env::var("COWSHED_DEPTH").map_or(steps, |text| steps.max(text.parse().unwrap()))
}

fn explored(bounds: Bounds, depth: usize) -> Seen {
    let began = Instant::now();
    match explore(bounds, depth, None) {
        Ok(seen) => {
            eprintln!("{bounds:?}: {seen}, {:.1} s", began.elapsed().as_secs_f64());
            seen
        }
        Err(violation) => panic!("{bounds:?}: {violation}"),
    }
}

#[test]
fn every_promise_is_kept_over_time_crashes_and_a_power_cut() {
    let seen = explored(Bounds { boots: 2, up: 3, ..NARROW }, TO_THE_END);
    assert!(seen.all && seen.states > 800_000, "{seen}");
}

#[test]
fn a_request_that_comes_again_is_made_once() {
    let seen = explored(Bounds { names: true, ..NARROW }, TO_THE_END);
    assert!(seen.all && seen.states > 300_000, "{seen}");
}

#[test]
fn a_vm_that_comes_back_while_others_come_and_go_keeps_what_it_has() {
    let seen = explored(Bounds { leases: 3, ..NARROW }, as_deep_as(11));
    assert!(seen.all || seen.states > 100_000, "{seen}");
}

#[test]
fn everything_together_keeps_every_promise() {
    let seen = explored(Bounds { leases: 4, boots: 3, up: 4, names: true, ..NARROW }, as_deep_as(7));
    assert!(seen.states > 50_000, "{seen}");
}

#[test]
fn what_vms_share_is_there_as_long_as_one_of_them_does() {
    let seen = explored(SHARED, TO_THE_END);
    assert!(seen.all && seen.states > 80_000, "{seen}");
}

#[test]
fn what_vms_share_outlives_time_crashes_and_a_power_cut() {
    let seen = explored(Bounds { boots: 2, up: 3, ..SHARED }, as_deep_as(10));
    assert!(seen.all || seen.states > 70_000, "{seen}");
}

#[test]
fn what_was_shared_goes_and_is_shared_anew() {
    let seen = explored(Bounds { leases: 5, ..SHARED }, as_deep_as(8));
    assert!(seen.all || seen.states > 50_000, "{seen}");
}

#[test]
fn what_is_shared_and_what_is_not_do_not_meet() {
    let seen = explored(Bounds { sharing: Sharing::One, ..SHARED }, TO_THE_END);
    assert!(seen.all && seen.states > 200_000, "{seen}");
}

#[test]
fn a_scratch_disk_goes_with_its_vm_and_what_is_shared_stays() {
    let seen = explored(Bounds { sharing: Sharing::AndScratch, ..SHARED }, TO_THE_END);
    assert!(seen.all && seen.states > 100_000, "{seen}");
}

#[test]
fn a_spare_is_handed_out_once_or_dropped() {
    let seen = explored(Bounds { names: true, ..SPARE }, TO_THE_END);
    assert!(seen.all && seen.states > 16_000, "{seen}");
}

#[test]
fn a_spare_outlives_time_crashes_and_a_power_cut() {
    let seen = explored(Bounds { boots: 2, up: 3, ..SPARE }, TO_THE_END);
    assert!(seen.all && seen.states > 36_000, "{seen}");
}

#[test]
fn spares_and_what_is_made_when_it_is_asked_for_do_not_meet() {
    let seen = explored(Bounds { leases: 2, ..SPARE }, as_deep_as(12));
    assert!(seen.all || seen.states > 100_000, "{seen}");
}

#[test]
fn two_spares_are_two() {
    let seen = explored(Bounds { leases: 3, spares: 2, ..SPARE }, as_deep_as(8));
    assert!(seen.states > 100_000, "{seen}");
}

#[test]
fn spares_keep_every_promise_with_everything_together() {
    let bounds = Bounds { leases: 2, boots: 2, up: 3, names: true, ..SPARE };
    let seen = explored(bounds, as_deep_as(7));
    assert!(seen.states > 50_000, "{seen}");
}

fn is_found(flaw: Flaw, bounds: Bounds, what: &str) {
    match explore(bounds, TO_THE_END, Some(flaw)) {
        Ok(seen) => panic!("{flaw:?} is not found: {seen}"),
        Err(found) => assert!(found.what.ends_with(what), "{flaw:?}: {found}"),
    }
}

#[test]
fn a_flaw_is_found() {
    let timed = Bounds { up: 3, ..NARROW };
    let named = Bounds { names: true, ..NARROW };
    for (flaw, bounds, what) in [
        (Flaw::Book(BookFlaw::GrantsWhatWasReleased), NARROW, "lease 0 is held again"),
        (Flaw::Book(BookFlaw::ForgetsRequests), named, "a release that came again changes something"),
        (Flaw::Book(BookFlaw::ForgetsGenerations), NARROW, "a generation can be given out again"),
        (Flaw::RemovesOpenDevices, NARROW, "the device that VM 0 has open is removed"),
        (Flaw::RemovesWhatIsBeingMade, NARROW, "the snapshot of lease 0 is without a lease in containerd"),
        (Flaw::StrikesOffFirst, NARROW, "the snapshot of lease 0 is on no record"),
        (Flaw::GivesUpOnOpenDevices, timed, "a lease is given up whose device is open"),
        (Flaw::GivesUpEarly, timed, "a lease is given up before its grace is over"),
        (Flaw::PreparesUnleased, NARROW, "the snapshot of lease 0 is without a lease in containerd"),
        (Flaw::AnswersWhatItFound, NARROW, "VM 0 does not have lease 0, as it was told"),
        (Flaw::AnswersBeforeItWrites, NARROW, "VM 0 does not have lease 0, as it was told"),
        (Flaw::LeavesHalfMade, NARROW, "lease 0 is being made for ever"),
        (Flaw::UsesNamesAgain, NARROW, "VM 0 was given the disk of lease 1"),
    ] {
        is_found(flaw, bounds, what);
    }
}

/// Lease 0 is that of what is shared, lease 1 that of whoever was the first to share it.
#[test]
fn a_flaw_of_what_is_shared_is_found() {
    for (flaw, what) in [
        (Flaw::TakesWhatIsSharedForClosed, "the device that VM 0 has open is removed"),
        (Flaw::RemovesOpenDevices, "the device that VM 0 has open is removed"),
        (Flaw::RemovesWhatIsBeingMade, "the snapshot of lease 0 is without a lease in containerd"),
        (Flaw::LeavesSharedHalfMade, "what is to be shared is half made already"),
        (Flaw::SharesWhatCanBeWritten, "the disk of lease 0 can be written by who must not, or by nobody"),
        (
            Flaw::Book(BookFlaw::GrantsWhatIsNotSharedYet),
            "lease 1 is granted, and lease 0, which it shares, is not",
        ),
        (
            Flaw::Book(BookFlaw::RemovesWhatIsShared),
            "a lease shares the device of lease 00000000000000000000000000000000, which is not there",
        ),
        (Flaw::Book(BookFlaw::KeepsWhatNobodyShares), "lease 0 is there for ever, and nobody shares it"),
        (Flaw::Book(BookFlaw::ReleasesWhatOthersShare), "lease 0 is released, and lease 1 shares it"),
    ] {
        is_found(flaw, SHARED, what);
    }
}

/// Lease 0 is a spare, or was made for VM 0 and is chosen as one.
#[test]
fn a_flaw_of_spares_is_found() {
    let booted = Bounds { boots: 2, ..SPARE };
    let unknown = "lease 0 is a spare of this boot, and its device is not known in it";
    let unseen = "a spare is handed out that nobody has looked at in this boot";
    for (flaw, bounds, what) in [
        (Flaw::HandsOutUnasked, SPARE, "a spare is handed out twice"),
        (Flaw::LeavesSparesHalfMade, SPARE, "lease 0 is being made for ever"),
        (Flaw::ForgetsWhoMakesSpares, SPARE, "a spare that is made is refused"),
        (Flaw::RenewsWhatItAdopts, SPARE, "the lease of a VM is renewed by somebody who looks for spares"),
        (Flaw::RemovesOpenDevices, SPARE, "the device that VM 0 has open is removed"),
        (Flaw::StrikesOffFirst, SPARE, "the snapshot of lease 0 is on no record"),
        (Flaw::Book(BookFlaw::HandsOutTwice), SPARE, "lease 0 is given from one to another"),
        (Flaw::Book(BookFlaw::HandsOutWhatWasDropped), SPARE, "lease 0 is held again"),
        (Flaw::Book(BookFlaw::HandsOutOfAnEarlierBoot), booted, unseen),
        (Flaw::Book(BookFlaw::HandsOutAnotherImage), SPARE, "the disk of lease 0 is of another image"),
        (Flaw::Book(BookFlaw::HandsOutAnOldGeneration), SPARE, "generation 1 was given out before"),
        (Flaw::Book(BookFlaw::TakesBackAsSpare), SPARE, "lease 0 is given from one to another"),
        (Flaw::Book(BookFlaw::DropsWhatWasHandedOut), SPARE, "VM 0 does not have lease 0, as it was told"),
        (Flaw::Book(BookFlaw::AdoptsUnseen), booted, unknown),
        (Flaw::Book(BookFlaw::RenewsUnseen), booted, unknown),
        (
            Flaw::Book(BookFlaw::KeepsSparesThatFailed),
            SPARE,
            "lease 0 is a spare, and is doubtful or has failed",
        ),
        (Flaw::Book(BookFlaw::SuspectsSpares), booted, "lease 0 is a spare, and is doubtful or has failed"),
    ] {
        is_found(flaw, bounds, what);
    }
}
