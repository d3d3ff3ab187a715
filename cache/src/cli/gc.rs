//! Plans that make room, and what became of them, as text and as JSON.

use std::fmt::Write as _;

use cowshed_proto::v1::{self, gc_step::Action};
use serde_json::{Value, json};

use super::{
    Output,
    show::{bytes, line, share},
};

pub(super) fn report(report: &v1::GcReport, output: Output) -> String {
    match output {
        Output::Json => line(&json(report)),
        Output::Text => text(report),
    }
}

fn text(report: &v1::GcReport) -> String {
    let v1::GcReport { total, used, returning, lacking, steps, frees, met, still_lacking, helps } = report;
    let (total, used) = (total.unwrap_or_default(), used.unwrap_or_default());
    let mut text = String::new();
    let _ = writeln!(text, "data      {}", share(used.data_bytes, total.data_bytes));
    let _ = writeln!(text, "metadata  {}", share(used.metadata_bytes, total.metadata_bytes));
    if let Some(returning) = returning.filter(|room| *room != v1::GcRoom::default()) {
        let _ = writeln!(text, "on its way back: {}", room(Some(returning)));
    }
    let _ = writeln!(text, "lacking: {}", room(*lacking));
    for (number, step) in steps.iter().enumerate() {
        let _ = writeln!(text, "{:>3}. {}", number + 1, step_text(step));
    }
    let _ = match (met, steps.is_empty()) {
        (true, true) => writeln!(text, "nothing to do"),
        (true, false) => writeln!(text, "comes back: {}; nothing is lacking then", room(*frees)),
        (false, _) => {
            writeln!(text, "comes back: {}; still lacking: {}", room(*frees), room(*still_lacking))
        }
    };
    for help in helps {
        let _ = writeln!(text, "  would help: {}", help.text);
    }
    text
}

fn step_text(step: &v1::GcStep) -> String {
    let what = match &step.action {
        Some(Action::Extend(v1::GcExtend { part, from_bytes, to_bytes })) => {
            format!("extend {part} from {} to {}", bytes(*from_bytes), bytes(*to_bytes))
        }
        Some(Action::DropSpare(spare)) => {
            format!("drop spare {}, gives {}", spare.lease_id, room(step.gives))
        }
        Some(Action::RemoveImage(image)) => {
            format!("remove image {}, gives {}", image.names.join(", "), room(step.gives))
        }
        None => "something that this version does not know".to_owned(),
    };
    let outcome = match step.outcome() {
        v1::GcOutcome::Unspecified => "",
        v1::GcOutcome::Done => "; done",
        v1::GcOutcome::Skipped => "; SKIPPED",
        v1::GcOutcome::Failed => "; FAILED",
        v1::GcOutcome::NotNeeded => "; not needed any more",
    };
    let why = if step.why.is_empty() { String::new() } else { format!(": {}", step.why) };
    format!("{what} ({}){outcome}{why}", step.reason_text)
}

/// "1.00 GiB data, 4.00 KiB metadata"
fn room(room: Option<v1::GcRoom>) -> String {
    let room = room.unwrap_or_default();
    match (room.data_bytes, room.metadata_bytes) {
        (0, 0) => "nothing".to_owned(),
        (data, 0) => format!("{} data", bytes(data)),
        (0, metadata) => format!("{} metadata", bytes(metadata)),
        (data, metadata) => format!("{} data, {} metadata", bytes(data), bytes(metadata)),
    }
}

fn json(report: &v1::GcReport) -> Value {
    json!({
        "total": room_json(report.total),
        "used": room_json(report.used),
        "returning": room_json(report.returning),
        "lacking": room_json(report.lacking),
        "steps": report.steps.iter().map(step_json).collect::<Vec<_>>(),
        "frees": room_json(report.frees),
        "met": report.met,
        "still_lacking": room_json(report.still_lacking),
        "helps": report
            .helps
            .iter()
            .map(|help| json!({ "text": help.text, "gives": room_json(help.gives) }))
            .collect::<Vec<_>>(),
    })
}

fn step_json(step: &v1::GcStep) -> Value {
    let (name, action) = match &step.action {
        Some(Action::Extend(extend)) => (
            "extend",
            json!({ "part": extend.part, "from_bytes": extend.from_bytes, "to_bytes": extend.to_bytes }),
        ),
        Some(Action::DropSpare(spare)) => {
            ("drop_spare", json!({ "lease_id": spare.lease_id, "manifest_digest": spare.manifest_digest }))
        }
        Some(Action::RemoveImage(image)) => {
            ("remove_image", json!({ "target_digest": image.target_digest, "names": image.names }))
        }
        None => ("unknown", Value::Null),
    };
    let outcome = match step.outcome() {
        v1::GcOutcome::Unspecified => "planned",
        v1::GcOutcome::Done => "done",
        v1::GcOutcome::Skipped => "skipped",
        v1::GcOutcome::Failed => "failed",
        v1::GcOutcome::NotNeeded => "not_needed",
    };
    json!({
        name: action,
        "reason": step.reason,
        "reason_text": step.reason_text,
        "gives": room_json(step.gives),
        "outcome": outcome,
        "why": step.why,
    })
}

fn room_json(room: Option<v1::GcRoom>) -> Value {
    let room = room.unwrap_or_default();
    json!({ "data_bytes": room.data_bytes, "metadata_bytes": room.metadata_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(outcome: v1::GcOutcome, why: &str) -> v1::GcStep {
        let image =
            v1::GcRemoveImage { target_digest: "sha256:1".into(), names: vec!["a:1".into(), "b:1".into()] };
        v1::GcStep {
            action: Some(Action::RemoveImage(image)),
            reason: "COLD".into(),
            reason_text: "not used for 3d".into(),
            gives: Some(v1::GcRoom { data_bytes: 1 << 30, metadata_bytes: 0 }),
            outcome: outcome.into(),
            why: why.into(),
        }
    }

    #[test]
    fn what_is_lacking_and_done_is_said() {
        let mut reported = v1::GcReport {
            steps: vec![step(v1::GcOutcome::Unspecified, "")],
            met: true,
            ..Default::default()
        };
        let planned = report(&reported, Output::Text);
        for words in
            ["  1. remove image a:1, b:1, gives 1.00 GiB data (not used for 3d)\n", "nothing is lacking then"]
        {
            assert!(planned.contains(words), "{planned}");
        }
        reported.steps = vec![step(v1::GcOutcome::Skipped, "a disk was made of it")];
        reported.met = false;
        reported.helps = vec![v1::GcHelp { text: "release VM vm-1".into(), gives: None }];
        let done = report(&reported, Output::Text);
        for words in ["SKIPPED: a disk was made of it", "still lacking", "would help: release VM vm-1"] {
            assert!(done.contains(words), "{done}");
        }
        let text = report(&reported, Output::Json);
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        assert_eq!(value["steps"][0]["remove_image"]["names"][1], "b:1", "{text}");
        assert_eq!(value["steps"][0]["outcome"], "skipped", "{text}");
    }
}
