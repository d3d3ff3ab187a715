//! What would help where a plan does not.

use std::cmp::Reverse;

use super::{
    Help, Kind, Room, Source, Tenure,
    draft::{Draft, Standing},
    grow,
    tally::{At, What},
};

/// So many are named.
const NAMED: usize = 10;

/// What holds most of what is lacking, and the pool's own growth.
pub(super) fn helps(draft: &Draft<'_>, lack: Room) -> Vec<Help> {
    let leases = draft.tally.there().filter_map(|(at, what)| of_lease(draft, at, what));
    let images = draft.images().filter_map(|(at, standing)| of_image(draft, at, standing));
    let mut helps: Vec<Help> = leases.chain(images).filter(|help| help.gives.helps(lack)).collect();
    // Stable: of equal ones, the order is that of the inventory.
    helps.sort_by_key(|help| Reverse(help.gives.measured_by(lack)));
    helps.truncate(NAMED);
    helps.extend(Kind::ALL.into_iter().filter_map(|kind| of_pool(draft, kind)));
    helps
}

fn of_lease(draft: &Draft<'_>, at: At, what: What<'_>) -> Option<Help> {
    let What::Lease(id, lease) = what else { return None };
    let (id, vm) = (id.clone(), lease.vm.clone());
    let from = match lease.tenure {
        Tenure::Held => Source::Held { id, vm },
        Tenure::Releasing => Source::Releasing { id, vm },
    };
    Some(Help { from, gives: draft.tally.gain(&[at]) })
}

/// With all disks that are of no other image.
fn of_image(draft: &Draft<'_>, at: At, standing: &Standing<'_>) -> Option<Help> {
    let only_its = |disk: &At| draft.tally.kin(*disk).all(|image| image == at);
    let going: Vec<At> = draft.tally.kin(at).filter(only_its).chain([at]).collect();
    let name = standing.image.names.iter().map(|name| &name.image).min()?.clone();
    let from = Source::Image { name, because: standing.because.clone() };
    Some(Help { from, gives: draft.tally.gain(&going) })
}

fn of_pool(draft: &Draft<'_>, kind: Kind) -> Option<Help> {
    let missing = draft.goals.total(kind, &draft.pool).less(draft.pool.total.of(kind));
    let from = Source::Pool { kind, bound: grow::bound(draft, kind) };
    (missing.0 > 0).then(|| Help { from, gives: Room::only(kind, missing) })
}
