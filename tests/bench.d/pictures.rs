//! Pictures of measurements, as SVG: how samples are distributed, and how a value grows with another. Times are on a scale
//! of tens.

use std::fmt::Write as _;

use serde_json::Value;

use crate::{Outcome, plot::escaped, samples::Samples};

const LEFT: f64 = 210.0;
const WIDTH: f64 = 560.0;
const RIGHT: f64 = 210.0;
const TOP: f64 = 44.0;
const ROW: f64 = 64.0;
const HEIGHT: f64 = 300.0;
const BOTTOM: f64 = 46.0;
/// Of a histogram, for each tenfold.
const BINS: u32 = 20;
const COLOURS: [&str; 8] = ["#2a7", "#c33", "#58a", "#b70", "#85a", "#377", "#963", "#555"];

/// A picture as a benchmark has told it: `{"kind": "histograms", "title", "unit", "rows": {NAME: [sample, …]}}` or
/// `{"kind": "lines", "title", "x", "y", "lines": {NAME: [[x, y], …]}}`.
pub(crate) fn svg(picture: &Value) -> Outcome<String> {
    match picture["kind"].as_str() {
        Some("histograms") => histograms(picture),
        Some("lines") => lines(picture),
        other => Err(format!("a picture of the kind {other:?}").into()),
    }
}

/// A scale of tens, from the ten below the least value to the one above the most.
#[derive(Clone, Copy, Debug)]
struct Scale {
    low: i32,
    high: i32,
    from: f64,
    length: f64,
}

impl Scale {
    /// Of values that are greater than zero; others have no place on it.
    fn new(values: impl Iterator<Item = f64>, from: f64, length: f64) -> Option<Self> {
        let (mut low, mut high) = (i32::MAX, i32::MIN);
        for value in values.filter(|value| *value > 0.0) {
            // sixteen decimal places is more than any clock has
            #[allow(clippy::cast_possible_truncation, reason = "the exponent of a float is small")]
            let (below, above) = (value.log10().floor() as i32, value.log10().ceil() as i32);
            (low, high) = (low.min(below), high.max(above));
        }
        (low <= high).then(|| Self { low, high: high.max(low + 1), from, length })
    }

    fn at(&self, value: f64) -> f64 {
        let tens = f64::from(self.high - self.low);
        let share = (value.max(f64::MIN_POSITIVE).log10() - f64::from(self.low)) / tens;
        self.from + share.clamp(0.0, 1.0) * self.length
    }

    fn tens(&self) -> impl Iterator<Item = f64> {
        (self.low..=self.high).map(|exponent| 10_f64.powi(exponent))
    }
}

struct Canvas(String);

impl Canvas {
    fn new(title: &str, height: f64) -> Self {
        let width = LEFT + WIDTH + RIGHT;
        Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
             <text x=\"12\" y=\"22\" font-size=\"15\">{}</text>\n",
            escaped(title)
        ))
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.add(&format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>"));
    }

    fn text(&mut self, (x, y): (f64, f64), style: &str, text: &str) {
        self.add(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{}</text>", escaped(text)));
    }

    fn add(&mut self, element: &str) {
        // writing to a String does not fail
        let _written = writeln!(self.0, "{element}");
    }

    fn end(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}

/// One row for each kind of sample, the quickest first.
fn histograms(picture: &Value) -> Outcome<String> {
    let mut rows = Vec::new();
    for (name, values) in picture["rows"].as_object().ok_or("a picture without rows")? {
        let mut samples = Samples::default();
        values
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .for_each(|value| samples.add(value));
        if let (Some(p50), Some(p99)) = (samples.median(), samples.percentile(99)) {
            rows.push((name, samples.values(), p50, p99));
        }
    }
    rows.sort_by(|one, other| one.2.total_cmp(&other.2));
    let all = rows.iter().flat_map(|row| row.1.iter().copied());
    let scale = Scale::new(all, LEFT, WIDTH).ok_or("a picture without samples")?;
    let height = rows.iter().fold(0.0, |height, _| height + ROW);
    let unit = picture["unit"].as_str().unwrap_or_default();
    let mut canvas = Canvas::new(picture["title"].as_str().unwrap_or_default(), TOP + height + BOTTOM);
    for ten in scale.tens() {
        let x = scale.at(ten);
        canvas.line((x, TOP), (x, TOP + height), "stroke=\"#ddd\"");
        canvas.text(
            (x, TOP + height + 18.0),
            "text-anchor=\"middle\" fill=\"#555\"",
            &format!("{ten} {unit}"),
        );
    }
    let mut bottom = TOP;
    for ((name, values, p50, p99), colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        bottom += ROW;
        histogram(&mut canvas, &scale, values, bottom, colour);
        for (value, style) in [(p50, "stroke=\"black\""), (p99, "stroke=\"black\" stroke-dasharray=\"3 3\"")]
        {
            canvas.line((scale.at(*value), bottom), (scale.at(*value), bottom - ROW + 12.0), style);
        }
        canvas.text((LEFT - 8.0, bottom - 16.0), "text-anchor=\"end\"", name);
        let told = format!("p50 {}, p99 {} ({})", short(*p50), short(*p99), values.len());
        canvas.text((LEFT + WIDTH + 10.0, bottom - 16.0), &format!("fill=\"{colour}\""), &told);
    }
    Ok(canvas.end())
}

/// Bars of equal width on the scale; the tallest fills the row.
fn histogram(canvas: &mut Canvas, scale: &Scale, values: &[f64], bottom: f64, colour: &str) {
    let first = 10_f64.powi(scale.low);
    let edge = |bin: u32| first * 10_f64.powf(f64::from(bin) / f64::from(BINS));
    let bins = BINS * scale.high.abs_diff(scale.low);
    let counts: Vec<usize> = (0..bins)
        .map(|bin| {
            // what is at the very end belongs to the last
            let end = if bin + 1 == bins { f64::INFINITY } else { edge(bin + 1) };
            values.iter().filter(|value| **value >= edge(bin) && **value < end).count()
        })
        .collect();
    let most = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    for (bin, count) in (0..bins).zip(&counts).filter(|(_, count)| **count > 0) {
        let (from, to) = (scale.at(edge(bin)), scale.at(edge(bin + 1)));
        let height = (*count as f64 / most * (ROW - 16.0)).max(1.5);
        canvas.add(&format!(
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{colour}\"><title>{count}</title></rect>",
            bottom - height,
            to - from - 0.5
        ));
    }
    canvas.line((LEFT, bottom), (LEFT + WIDTH, bottom), "stroke=\"#999\"");
}

/// One line for each kind of measurement, both scales being of tens.
fn lines(picture: &Value) -> Outcome<String> {
    let mut lines = Vec::new();
    for (name, points) in picture["lines"].as_object().ok_or("a picture without lines")? {
        let points: Vec<(f64, f64)> = points
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|point| Some((point[0].as_f64()?, point[1].as_f64()?)))
            .collect();
        if let Some(last) = points.last().copied() {
            lines.push((name, points, last));
        }
    }
    lines.sort_by(|one, other| other.2.1.total_cmp(&one.2.1));
    let points = || lines.iter().flat_map(|line| line.1.iter());
    let across = Scale::new(points().map(|point| point.0), LEFT, WIDTH).ok_or("a picture without points")?;
    let up =
        Scale::new(points().map(|point| point.1), TOP + HEIGHT, -HEIGHT).ok_or("a picture without points")?;
    let mut canvas = Canvas::new(picture["title"].as_str().unwrap_or_default(), TOP + HEIGHT + BOTTOM);
    axes(&mut canvas, picture, &across, &up);
    let mut free_below = TOP;
    for ((name, points, last), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let shown: Vec<String> =
            points.iter().map(|(x, y)| format!("{:.1},{:.1}", across.at(*x), up.at(*y))).collect();
        canvas.add(&format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            shown.join(" ")
        ));
        for (x, y) in points {
            canvas.add(&format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"><title>{x}: {}</title></circle>",
                across.at(*x),
                up.at(*y),
                short(*y)
            ));
        }
        // names that would lie on each other are moved apart
        let y = (up.at(last.1) + 4.0).max(free_below);
        free_below = y + 15.0;
        canvas.text(
            (LEFT + WIDTH + 10.0, y),
            &format!("fill=\"{colour}\""),
            &format!("{name}: {}", short(last.1)),
        );
    }
    Ok(canvas.end())
}

fn axes(canvas: &mut Canvas, picture: &Value, across: &Scale, up: &Scale) {
    let named = |axis: &str| picture[axis].as_str().unwrap_or_default().to_owned();
    for ten in across.tens() {
        let x = across.at(ten);
        canvas.line((x, TOP), (x, TOP + HEIGHT), "stroke=\"#ddd\"");
        canvas.text((x, TOP + HEIGHT + 18.0), "text-anchor=\"middle\" fill=\"#555\"", &ten.to_string());
    }
    for ten in up.tens() {
        let y = up.at(ten);
        canvas.line((LEFT, y), (LEFT + WIDTH, y), "stroke=\"#ddd\"");
        canvas.text(
            (LEFT - 8.0, y + 4.0),
            "text-anchor=\"end\" fill=\"#555\"",
            &format!("{ten} {}", named("y")),
        );
    }
    canvas.text(
        (LEFT + WIDTH / 2.0, TOP + HEIGHT + 36.0),
        "text-anchor=\"middle\" fill=\"#555\"",
        &named("x"),
    );
}

/// With as many digits as mean something.
fn short(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Scale, svg};

    #[test]
    fn a_scale_has_all_values_on_it() {
        let values = [0.4, 20.0, 100.0];
        let scale = Scale::new(values.into_iter(), 0.0, 300.0);
        let places =
            scale.map(|scale| (scale.low, scale.high, scale.at(0.1), scale.at(10.0), scale.at(100.0)));
        assert_eq!(places, Some((-1, 2, 0.0, 200.0, 300.0)));
        assert!(Scale::new([0.0].into_iter(), 0.0, 1.0).is_none());
    }

    #[test]
    fn a_picture_of_nothing_is_refused() {
        assert!(svg(&json!({ "kind": "histograms", "rows": { "one": [] } })).is_err());
        assert!(svg(&json!({ "kind": "lines", "lines": {} })).is_err());
        assert!(svg(&json!({ "kind": "pie" })).is_err());
    }

    #[test]
    fn every_row_and_line_is_shown() -> crate::Outcome {
        let rows =
            json!({ "kind": "histograms", "title": "t", "rows": { "slow": [50.0, 60.0], "quick": [0.5] } });
        let rows = svg(&rows)?;
        assert!(rows.find("quick") < rows.find("slow"), "the quickest is first");
        let lines = json!({ "kind": "lines", "title": "t", "lines": { "one": [[1, 2.0], [100, 30.0]] } });
        assert_eq!(svg(&lines)?.matches("<circle").count(), 2);
        Ok(())
    }
}
