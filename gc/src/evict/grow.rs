//! By how much the pool grows.

use std::num::NonZeroU64;

use super::{Bound, Bytes, Growth, Kind, draft::Draft};

/// As far as something is lacking, and the volume group has it; metadata first.
pub(super) fn grow(draft: &mut Draft<'_>) {
    for kind in Kind::ALL {
        let by = growth(draft, kind);
        if by.0 > 0 {
            draft.extend(kind, by);
        }
    }
}

fn growth(draft: &Draft<'_>, kind: Kind) -> Bytes {
    let missing = draft.goals.total(kind, &draft.pool).less(draft.pool.total.of(kind));
    let Growth::UpTo { step, ceiling } = draft.policy.limits(kind).growth else { return Bytes(0) };
    if missing.0 == 0 {
        return Bytes(0);
    }
    let extent = draft.group.extent;
    let step = NonZeroU64::new(step.rounded_up(extent).0).unwrap_or(extent);
    let room = ceiling.less(draft.pool.total.of(kind)).min(available(draft, kind)).rounded_down(extent);
    missing.rounded_up(step).min(room)
}

/// What the volume group has for it.
fn available(draft: &Draft<'_>, kind: Kind) -> Bytes {
    match kind {
        Kind::Data => draft.group.free.less(draft.policy.kept_for_metadata),
        Kind::Metadata => draft.group.free,
    }
}

/// What keeps it from growing more.
pub(super) fn bound(draft: &Draft<'_>, kind: Kind) -> Bound {
    match draft.policy.limits(kind).growth {
        Growth::Never => Bound::Policy,
        Growth::UpTo { .. } if available(draft, kind).rounded_down(draft.group.extent).0 == 0 => {
            Bound::VolumeGroup
        }
        Growth::UpTo { .. } => Bound::Ceiling,
    }
}
