//! `PlanGc` and `RunGc`: plans and what became of them, as messages.

use cowshed_gc::evict::{Action, Bytes, Help, Outcome, Plan, Pool, Room, Step, Trigger};
use cowshed_proto::v1::{self, gc_step};

use crate::evict::{Fate, Report};

/// What asks for it.
pub(super) fn trigger(free_bytes: Option<u64>) -> Trigger {
    let data = |bytes| Room { data: Bytes(bytes), ..Room::NONE };
    free_bytes.map_or(Trigger::Schedule, |bytes| Trigger::Admission(data(bytes)))
}

pub(super) fn planned(plan: &Plan) -> v1::GcReport {
    let steps = plan.steps.iter().map(|step| message(step, None)).collect();
    report(&plan.pool, plan.lacking, steps, plan.frees(), &plan.outcome)
}

pub(super) fn ran(done: &Report) -> v1::GcReport {
    let steps = done.steps.iter().map(|(step, fate)| message(step, Some(fate))).collect();
    report(&done.pool, done.lacking, steps, done.frees(), &done.outcome)
}

fn report(
    pool: &Pool,
    lacking: Room,
    steps: Vec<v1::GcStep>,
    frees: Room,
    outcome: &Outcome,
) -> v1::GcReport {
    let (still, helps) = match outcome {
        Outcome::Met => (Room::NONE, &[][..]),
        Outcome::Short { lacking, helps } => (*lacking, &helps[..]),
    };
    v1::GcReport {
        total: Some(room(pool.total)),
        used: Some(room(pool.used)),
        returning: Some(room(pool.returning)),
        lacking: Some(room(lacking)),
        steps,
        frees: Some(room(frees)),
        met: *outcome == Outcome::Met,
        still_lacking: Some(room(still)),
        helps: helps.iter().map(help).collect(),
    }
}

fn message(step: &Step, fate: Option<&Fate>) -> v1::GcStep {
    let action = match &step.action {
        Action::Extend { kind, from, to } => gc_step::Action::Extend(v1::GcExtend {
            part: kind.to_string(),
            from_bytes: from.0,
            to_bytes: to.0,
        }),
        Action::DropSpare { id, manifest } => gc_step::Action::DropSpare(v1::GcDropSpare {
            lease_id: id.to_string(),
            manifest_digest: manifest.to_string(),
        }),
        Action::RemoveImage { target, names } => gc_step::Action::RemoveImage(v1::GcRemoveImage {
            target_digest: target.to_string(),
            names: names.iter().map(ToString::to_string).collect(),
        }),
    };
    let outcome = match fate {
        None => v1::GcOutcome::Unspecified,
        Some(Fate::Done) => v1::GcOutcome::Done,
        Some(Fate::Skipped(_)) => v1::GcOutcome::Skipped,
        Some(Fate::Failed(_)) => v1::GcOutcome::Failed,
        Some(Fate::NotNeeded) => v1::GcOutcome::NotNeeded,
    };
    v1::GcStep {
        action: Some(action),
        reason: step.reason.code().to_owned(),
        reason_text: step.reason.to_string(),
        gives: Some(room(step.gives)),
        outcome: outcome.into(),
        why: fate.and_then(Fate::why).unwrap_or_default().to_owned(),
    }
}

fn help(help: &Help) -> v1::GcHelp {
    v1::GcHelp { text: help.to_string(), gives: Some(room(help.gives)) }
}

fn room(room: Room) -> v1::GcRoom {
    v1::GcRoom { data_bytes: room.data.0, metadata_bytes: room.metadata.0 }
}
