//! How far things are: bars on a terminal, a line for each change of stage elsewhere, the whole picture for programs.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, stderr},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{Failure, Output, print, show::line};

const STYLE: &str =
    "{prefix} {bar:30} {binary_bytes:>10}/{binary_total_bytes:10} {binary_bytes_per_sec:>12} {eta:>4} {msg}";

/// One of the things.
pub(super) struct Item {
    /// What stands before its bar.
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) bytes_total: u64,
    pub(super) stage: &'static str,
    /// What there is to say of the stage besides.
    pub(super) note: Option<String>,
    /// What is printed when it comes to this stage, or `turn` is another; nothing for one that is not begun.
    pub(super) line: Option<String>,
    /// How often it has come to this stage, if that is to be told each time.
    pub(super) turn: u32,
}

type Seen = HashMap<usize, (&'static str, u32)>;

pub(super) enum View {
    Bars(MultiProgress, Vec<ProgressBar>),
    /// The last stage and turn of each.
    Lines(Seen),
    Json,
}

impl View {
    pub(super) fn new(output: Output) -> Self {
        match output {
            Output::Json => Self::Json,
            Output::Text if stderr().is_terminal() => Self::Bars(MultiProgress::new(), Vec::new()),
            Output::Text => Self::Lines(HashMap::new()),
        }
    }

    pub(super) fn show(
        &mut self,
        items: impl Iterator<Item = Item>,
        picture: impl FnOnce() -> Value,
    ) -> Result<(), Failure> {
        match self {
            Self::Bars(all, bars) => {
                for (at, item) in items.enumerate() {
                    if at == bars.len() {
                        bars.push(all.add(bar(item.name)));
                    }
                    bars[at].set_length(item.bytes_total);
                    bars[at].set_position(item.bytes);
                    let note = item.note.map(|note| format!(": {note}")).unwrap_or_default();
                    bars[at].set_message(format!("{}{note}", item.stage));
                }
                Ok(())
            }
            Self::Lines(seen) => print(&changes(seen, items)),
            Self::Json => print(&line(&picture())),
        }
    }

    /// Whether what is shown can be shown anew, in its place.
    pub(super) fn is_live(&self) -> bool {
        matches!(self, Self::Bars(..))
    }

    pub(super) fn clear(&self) {
        if let Self::Bars(all, _) = self {
            // A terminal that cannot be cleared is not worth failing for.
            let _ = all.clear();
        }
    }
}

fn bar(name: String) -> ProgressBar {
    let style = ProgressStyle::with_template(STYLE).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style).with_prefix(name)
}

fn changes(seen: &mut Seen, items: impl Iterator<Item = Item>) -> String {
    let mut text = String::new();
    for (at, item) in items.enumerate() {
        let now = (item.stage, item.turn);
        let before = seen.insert(at, now);
        if before != Some(now)
            && let Some(line) = item.line
        {
            text.push_str(&line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_told_once() {
        let item = |stage, line: Option<&str>| Item {
            name: String::new(),
            bytes: 0,
            bytes_total: 0,
            stage,
            note: None,
            line: line.map(str::to_owned),
            turn: 0,
        };
        let mut seen = HashMap::new();
        let mut told = |items: Vec<Item>| changes(&mut seen, items.into_iter());
        assert_eq!(told(vec![item("waiting", None), item("fetching", Some("b fetching"))]), "b fetching\n");
        assert_eq!(told(vec![item("fetching", Some("a")), item("fetching", Some("b fetching"))]), "a\n");
        assert_eq!(told(vec![item("done", Some("a done")), item("waiting", None)]), "a done\n");
        assert_eq!(told(vec![item("done", Some("a done")), item("fetching", Some("b"))]), "b\n", "once more");
        let again = |turn| Item { turn, ..item("retrying", Some("retrying")) };
        assert_eq!(told(vec![again(1), again(1)]), "retrying\nretrying\n");
        assert_eq!(told(vec![again(1), again(2)]), "retrying\n", "another turn of the same stage");
    }
}
