//! Which spares go, and in which order.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use super::{
    Manifest, Reason, Room,
    draft::Draft,
    rank::{Rank, rank},
    tally::At,
};

/// Those that nobody can ask for, and those above the floor, as long as something is lacking.
pub(super) fn drop_surplus(draft: &mut Draft<'_>) {
    drop_orphans(draft);
    let kept = |draft: &Draft<'_>, at| {
        let of = |image| draft.standing(image).and_then(|standing| standing.image.spares_kept);
        let kept = draft.tally.kin(at).map(|image| of(image).unwrap_or(draft.policy.spares.kept));
        kept.max().unwrap_or_default()
    };
    drop_while_lacking(draft, |draft, at, there| {
        let kept = kept(draft, at);
        (there > kept).then_some(Reason::SpareAboveFloor { there, kept })
    });
}

/// The rest of them.
pub(super) fn drop_kept(draft: &mut Draft<'_>) {
    drop_while_lacking(draft, |_, _, _| Some(Reason::SpareUnderPressure));
}

/// Also one that gives nothing by itself: it holds the layers that it stands on.
fn drop_orphans(draft: &mut Draft<'_>) {
    let orphans: Vec<At> = draft.tally.idle_spares().map(|(at, _)| at).collect();
    for at in orphans {
        if !draft.lack().is_none() && draft.tally.kin(at).next().is_none() {
            draft.drop_spare(at, Reason::SpareOfNothing);
        }
    }
}

/// One after the other, the best first, by what gives a reason for one of so many.
fn drop_while_lacking(draft: &mut Draft<'_>, reason: impl Fn(&Draft<'_>, At, u32) -> Option<Reason>) {
    while let Some((at, why)) = best(draft, draft.lack(), &reason) {
        draft.drop_spare(at, why);
    }
}

fn best(
    draft: &Draft<'_>,
    lack: Room,
    reason: impl Fn(&Draft<'_>, At, u32) -> Option<Reason>,
) -> Option<(At, Reason)> {
    let mut there: BTreeMap<&Manifest, u32> = BTreeMap::new();
    draft.tally.idle_spares().for_each(|(_, spare)| *there.entry(&spare.manifest).or_default() += 1);
    let candidates = draft.tally.idle_spares().filter_map(|(at, spare)| {
        let why = reason(draft, at, there.get(&spare.manifest).copied().unwrap_or_default())?;
        Some((rank(draft.tally.gain(&[at]), lack, unused(draft, at), 1)?, Reverse(at), why))
    });
    let best: Option<(Rank, Reverse<At>, Reason)> = candidates.max_by_key(|(rank, at, _)| (*rank, *at));
    best.map(|(_, Reverse(at), why)| (at, why))
}

/// The image that was used last counts.
fn unused(draft: &Draft<'_>, spare: At) -> Duration {
    draft.tally.kin(spare).map(|image| draft.unused(image)).min().unwrap_or(Duration::MAX)
}
