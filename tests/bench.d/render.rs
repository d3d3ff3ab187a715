//! BENCHMARKS.md and its plots, out of the results of `tests/bench`. Nothing is in it that the results do not say.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, iter,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    Outcome, catalogue, pictures,
    plot::{self, Bar},
};

/// Writes the page, and a plot for every benchmark that there are results of. What the page says of others stays: each says
/// itself of which commit it is.
pub(crate) fn render(results: &Path, page: &Path, plots: &Path) -> Outcome {
    let mut sections = fs::read_to_string(page).map(|text| sections(&text)).unwrap_or_default();
    let benchmarks = benchmarks(results)?;
    if benchmarks.is_empty() {
        return Err(format!("there are no results in {}", results.display()).into());
    }
    fs::create_dir_all(plots)?;
    for (name, file) in benchmarks {
        let figures: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        let meta = fs::read_to_string(results.join(format!("{name}.meta.json")))?;
        let meta: Value = serde_json::from_str(&meta)?;
        let figures = figures.as_array().ok_or_else(|| format!("{} is no array", file.display()))?;
        let plot = plots.join(format!("{name}.svg"));
        fs::write(&plot, plot::svg(&format!("{name}: measured against what it must be"), &bars(figures)))?;
        let shown = plot.strip_prefix(page.parent().unwrap_or(Path::new(""))).unwrap_or(&plot);
        let pictures = pictures(&meta, &plot, shown)?;
        let mut text = String::new();
        section(&mut text, &name, figures, &meta, &pictures)?;
        sections.insert(name, text);
    }
    let head = "# Benchmarks\n\nMade by `tests/bench --render` from what `tests/bench NAME` measured; not edited by hand.\n\
                *must* and *aim* are what the project wants of each figure; `value` is what was measured.\n";
    Ok(fs::write(page, iter::once(head).chain(sections.values().map(String::as_str)).collect::<String>())?)
}

/// The page's sections, by the benchmark's name.
fn sections(page: &str) -> BTreeMap<String, String> {
    let parts = page.split("\n## ").skip(1);
    let named = parts.filter_map(|part| part.split_once('\n').map(|(name, _)| (name, part)));
    named.map(|(name, part)| (name.to_owned(), format!("\n## {}\n", part.trim_end()))).collect()
}

/// The benchmark's pictures, for the page: its plot, and what it has told others of, which are written beside it.
fn pictures(meta: &Value, plot: &Path, shown: &Path) -> Outcome<String> {
    let benchmark = plot.file_stem().unwrap_or_default().to_string_lossy();
    let mut text = format!("![{benchmark}]({})\n\n", shown.display());
    for (name, picture) in meta["pictures"].as_object().into_iter().flatten() {
        let beside = |plot: &Path| plot.with_file_name(format!("{benchmark}-{name}.svg"));
        fs::write(beside(plot), pictures::svg(picture)?)?;
        write!(text, "![{}]({})\n\n", string(&picture["title"]), beside(shown).display())?;
    }
    Ok(text)
}

/// Names and files of all results, by name.
fn benchmarks(results: &Path) -> Outcome<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(results)? {
        let path = entry?.path();
        let name =
            path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
        if let Some(name) = name.filter(|name| !name.contains('.')) {
            found.push((name.to_owned(), path.clone()));
        }
    }
    found.sort();
    Ok(found)
}

fn section(text: &mut String, name: &str, figures: &[Value], meta: &Value, pictures: &str) -> Outcome {
    let sides = [&meta["sides"]["ours"], &meta["sides"]["peer"]].map(string);
    write!(text, "\n## {name}\n\nOurs: `{}`, peer: `{}`.\n\n", sides[0], sides[1])?;
    text.push_str(pictures);
    text.push_str("| figure | value | must | aim | | ours p50 / p99 (n) | peer p50 / p99 (n) |\n|---|---|---|---|---|---|---|\n");
    for figure in figures {
        let figure_name = string(&figure["figure"]);
        let unit = meta["sample_units"][&figure_name].as_str().unwrap_or_default();
        let peer = match figure["peer"]["name"].as_str() {
            Some(peer) => format!("{peer}: {}", side(&figure["peer"], unit)),
            None => "–".to_owned(),
        };
        let sign = if is_higher_better(figure) { "≥" } else { "≤" };
        writeln!(
            text,
            "| {figure_name} | {} {} | {sign} {} | {sign} {} | {} | {} | {peer} |",
            number(&figure["value"]),
            string(&figure["unit"]),
            number(&figure["must"]),
            number(&figure["aim"]),
            Verdict::of(figure).word(),
            side(&figure["ours"], unit),
        )?;
    }
    for missing in
        catalogue::of(name).iter().filter(|known| figures.iter().all(|f| f["figure"] != known.name))
    {
        writeln!(text, "| {} | not measured | | | **miss** | | |", missing.name)?;
    }
    distributions(text, &meta["distributions_in_ms"])?;
    explain(text, name, figures, meta)
}

/// What was measured of each kind, the quickest first.
fn distributions(text: &mut String, of: &Value) -> Outcome {
    let mut rows: Vec<(&String, &Value)> = of.as_object().into_iter().flatten().collect();
    if rows.is_empty() {
        return Ok(());
    }
    let p50 = |row: &Value| row["p50"].as_f64().unwrap_or(f64::INFINITY);
    rows.sort_by(|one, other| p50(one.1).total_cmp(&p50(other.1)));
    text.push_str("\n| in ms, one at a time | p50 | p90 | p99 | most | n |\n|---|---|---|---|---|---|\n");
    for (name, row) in rows {
        let columns = ["p50", "p90", "p99", "most", "n"].map(|column| number(&row[column]));
        writeln!(text, "| {name} | {} |", columns.join(" | "))?;
    }
    Ok(())
}

/// What was measured, what was not, and where.
fn explain(text: &mut String, benchmark: &str, figures: &[Value], meta: &Value) -> Outcome {
    text.push_str("\nWhat they are:\n\n");
    for figure in figures {
        let name = string(&figure["figure"]);
        let what =
            catalogue::of(benchmark).iter().find(|known| known.name == name).map_or("", |known| known.what);
        let how = meta["conditions"][&name].as_str().map(|how| format!(" ({how})")).unwrap_or_default();
        writeln!(text, "- `{name}`: {what}{how}")?;
    }
    for (name, why) in meta["failed"].as_object().into_iter().flatten() {
        writeln!(text, "- **`{name}` could not be measured**: {}", string(why))?;
    }
    text.push_str("\nConditions:\n\n");
    for (name, value) in meta.as_object().into_iter().flatten() {
        if !["sample_units", "conditions", "failed", "pictures", "distributions_in_ms"]
            .contains(&name.as_str())
        {
            writeln!(text, "- {}: {}", name.replace('_', " "), plain(value))?;
        }
    }
    Ok(())
}

/// A condition in words.
fn plain(value: &Value) -> String {
    match value {
        Value::Object(parts) if parts.is_empty() => "none".to_owned(),
        Value::Object(parts) => {
            let parts = parts.iter().map(|(name, part)| match part {
                Value::Object(inner) if !inner.is_empty() => format!("{name} ({})", plain(part)),
                _ => format!("{name} {}", plain(part)),
            });
            parts.collect::<Vec<_>>().join(", ")
        }
        Value::Array(parts) => parts.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        other => number(other),
    }
}

/// What a value came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Aim,
    Must,
    Miss,
}

impl Verdict {
    fn of(figure: &Value) -> Self {
        // without a number nothing was reached
        let reaches = |goal: &Value| match (figure["value"].as_f64(), goal.as_f64()) {
            (Some(value), Some(goal)) if is_higher_better(figure) => value >= goal,
            (Some(value), Some(goal)) => value <= goal,
            _ => false,
        };
        match (reaches(&figure["must"]), reaches(&figure["aim"])) {
            (true, true) => Self::Aim,
            (true, false) => Self::Must,
            (false, _) => Self::Miss,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Aim => "pass, aim reached",
            Self::Must => "pass",
            Self::Miss => "**miss**",
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Self::Aim => "#2a7",
            Self::Must => "#58a",
            Self::Miss => "#c33",
        }
    }
}

fn is_higher_better(figure: &Value) -> bool {
    figure["better"] == "higher"
}

fn bars(figures: &[Value]) -> Vec<Bar> {
    let bar = |figure: &Value| {
        let must = figure["must"].as_f64();
        let relative = |value: &Value| {
            let (value, must) = (value.as_f64()?, must?);
            let relative = if is_higher_better(figure) { value / must } else { must / value };
            (relative.is_finite() && relative > 0.0).then_some(relative)
        };
        let verdict = Verdict::of(figure);
        let word = verdict.word().replace('*', "");
        Bar {
            name: string(&figure["figure"]),
            label: format!("{} {} – {word}", number(&figure["value"]), string(&figure["unit"])),
            reached: relative(&figure["value"]),
            aim: relative(&figure["aim"]),
            colour: verdict.colour(),
        }
    };
    figures.iter().map(bar).collect()
}

/// `P50 / P99 UNIT (N)`
fn side(side: &Value, unit: &str) -> String {
    let parts = [number(&side["p50"]), "/".to_owned(), number(&side["p99"]), unit.to_owned()];
    let shown = parts.iter().filter(|part| !part.is_empty()).map(String::as_str);
    shown.chain(iter::once(format!("({})", number(&side["n"])).as_str())).collect::<Vec<_>>().join(" ")
}

/// With as many digits as mean something.
fn number(value: &Value) -> String {
    match value.as_f64() {
        Some(value) if value.fract() == 0.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
        None => string(value),
    }
}

fn string(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Verdict, sections};

    #[test]
    fn what_the_page_says_of_others_stays() {
        let page = "# Benchmarks\n\nMade by.\n\n## acquire\n\nOurs: `a`.\n\n| ## b |\n\n## snapshots\n\nOurs: `b`.\n";
        let sections = sections(page);
        assert_eq!(sections.keys().map(String::as_str).collect::<Vec<_>>(), ["acquire", "snapshots"]);
        assert_eq!(sections["acquire"], "\n## acquire\n\nOurs: `a`.\n\n| ## b |\n");
        assert_eq!(sections["snapshots"], "\n## snapshots\n\nOurs: `b`.\n");
    }

    #[test]
    fn a_verdict_is_of_the_right_side_of_the_goal() {
        let verdict = |better: &str, value, must: f64, aim: f64| {
            Verdict::of(&json!({ "better": better, "value": value, "must": must, "aim": aim }))
        };
        assert_eq!(verdict("higher", json!(8.0), 4.0, 8.0), Verdict::Aim);
        assert_eq!(verdict("higher", json!(7.9), 4.0, 8.0), Verdict::Must);
        assert_eq!(verdict("higher", json!(3.9), 4.0, 8.0), Verdict::Miss);
        assert_eq!(verdict("lower", json!(0), 0.0, 0.0), Verdict::Aim);
        assert_eq!(verdict("lower", json!(0.1), 0.0, 0.0), Verdict::Miss);
        assert_eq!(verdict("lower", json!(2.0), 2.0, 1.2), Verdict::Must);
        assert_eq!(verdict("higher", json!(null), 0.0, 0.0), Verdict::Miss);
    }
}
