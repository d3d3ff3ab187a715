//! Which images go, and in which order.

use std::{cmp::Reverse, time::Duration};

use super::{
    Protection, Room, Young,
    draft::{Draft, Standing, Why},
    goal::Goals,
    rank::rank,
    tally::{At, Tally},
};

/// Those that were not used for longer than images are kept, whether or not anything is lacking; the oldest first.
pub(super) fn remove_expired(draft: &mut Draft<'_>) {
    let Some(retention) = draft.policy.retention else { return };
    let is_expired = |standing: &Standing<'_>| standing.because.is_empty() && standing.unused >= retention;
    let expired: Vec<At> =
        draft.images().filter(|(_, standing)| is_expired(standing)).map(|(at, _)| at).collect();
    draft.remove_images(&expired, Why::Expired);
}

/// Those that nothing protects, as long as something is lacking.
pub(super) fn remove_cold(draft: &mut Draft<'_>) {
    let lack = draft.lack();
    remove_for(draft, lack, |standing| standing.because.is_empty(), Why::Cold);
}

/// In an emergency, if the policy says so, also those that nothing protects but their age.
pub(super) fn remove_young(draft: &mut Draft<'_>) {
    if draft.policy.in_emergency == Young::Stay {
        return;
    }
    let lack = Goals::out_of_emergency(draft.policy, &draft.pool).lack(&draft.pool).min(draft.lack());
    let may_go = |standing: &Standing<'_>| matches!(standing.because[..], [] | [Protection::Young(_)]);
    remove_for(draft, lack, may_go, Why::Emergency);
}

fn remove_for(draft: &mut Draft<'_>, lack: Room, may_go: impl Fn(&Standing<'_>) -> bool, why: Why) {
    let chosen = choose(draft, lack, may_go);
    for group in without_excess(draft, chosen, lack) {
        draft.remove_images(&group.images, why);
    }
}

/// Images that go together, and what that gives after those chosen before them.
struct Group {
    images: Vec<At>,
    gives: Room,
}

/// The best one first, until nothing is lacking. What is best changes with each: what was shared may be one's own then.
fn choose(draft: &Draft<'_>, mut lack: Room, may_go: impl Fn(&Standing<'_>) -> bool) -> Vec<Group> {
    let may_go = |at| draft.standing(at).is_some_and(&may_go);
    let mut tally = draft.tally.clone();
    let mut chosen = Vec::new();
    while let Some(group) = best(draft, &tally, lack, may_go) {
        lack = lack.less(group.gives);
        for at in going(&tally, &group.images) {
            tally.remove(at);
        }
        chosen.push(group);
    }
    chosen
}

/// The image, or the images that share what comes back, that are the best to go.
fn best(draft: &Draft<'_>, tally: &Tally<'_>, lack: Room, may_go: impl Fn(At) -> bool) -> Option<Group> {
    if lack.is_none() {
        return None;
    }
    let ranked = tally.groups(may_go).into_iter().filter_map(|images| {
        let spares = tally.gain(&tally.spares_of_all(&images));
        let gives = tally.gain(&going(tally, &images));
        // The spares alone can be had without the images.
        let is_needed = gives.less(spares).helps(lack.less(spares));
        let rank = rank(gives, lack, unused(draft, &images), images.len()).filter(|_| is_needed)?;
        Some((rank, Reverse(images), gives))
    });
    let best = ranked.max_by(|(rank, images, _), (other, others, _)| (rank, images).cmp(&(other, others)));
    best.map(|(_, Reverse(images), gives)| Group { images, gives })
}

/// Leaves out what is not needed after all, since what was chosen later gives enough; what was used last first.
fn without_excess(draft: &Draft<'_>, mut chosen: Vec<Group>, lack: Room) -> Vec<Group> {
    let all = |groups: &[Group], but: Option<&[At]>| {
        let groups = groups.iter().map(|group| &group.images[..]).filter(|images| Some(*images) != but);
        let images = groups.collect::<Vec<_>>().concat();
        draft.tally.gain(&going(&draft.tally, &images))
    };
    let mut by_age: Vec<(Vec<At>, Room)> =
        chosen.iter().map(|group| (group.images.clone(), group.gives)).collect();
    by_age.sort_by_key(|(images, _)| unused(draft, images));
    let mut excess = all(&chosen, None).less(lack);
    for (images, gives) in by_age {
        // That is missing without it, at the least.
        let may_be_left = gives.min(lack).less(excess).is_none();
        if may_be_left && lack.less(all(&chosen, Some(&images))).is_none() {
            chosen.retain(|group| group.images != images);
            excess = all(&chosen, None).less(lack);
        }
    }
    chosen
}

/// The images, and the spares that go with them.
fn going(tally: &Tally<'_>, images: &[At]) -> Vec<At> {
    [images, &tally.spares_of_all(images)].concat()
}

/// The one that was used last counts.
fn unused(draft: &Draft<'_>, images: &[At]) -> Duration {
    images.iter().map(|image| draft.unused(*image)).min().unwrap_or_default()
}
