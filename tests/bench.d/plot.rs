//! A benchmark's plot, as SVG: how far each figure is from what it must reach, on a scale of tenths and tens.

use std::fmt::Write as _;

/// One bar: the value in terms of what it must be, so that 1 is just enough and more is better.
pub(crate) struct Bar {
    pub(crate) name: String,
    pub(crate) label: String,
    /// `None` if there is no such number: zero was reached, or zero must be and was not.
    pub(crate) reached: Option<f64>,
    /// The aim in the same terms.
    pub(crate) aim: Option<f64>,
    pub(crate) colour: &'static str,
}

const LEFT: f64 = 300.0;
const WIDTH: f64 = 420.0;
const RIGHT: f64 = 220.0;
const ROW: f64 = 26.0;
const TOP: f64 = 44.0;
/// The scale's ends.
const LOW: f64 = 0.1;
const HIGH: f64 = 10.0;

fn at(value: f64) -> f64 {
    let share = (value.clamp(LOW, HIGH) / LOW).log10() / (HIGH / LOW).log10();
    LEFT + share * WIDTH
}

/// The whole picture.
pub(crate) fn svg(title: &str, bars: &[Bar]) -> String {
    let rows = bars.iter().fold(0.0, |height, _| height + ROW);
    let (width, height) = (LEFT + WIDTH + RIGHT, TOP + rows + 34.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"15\">{}</text>\n",
        escaped(title)
    );
    for (value, label) in [(0.1, "a tenth"), (1.0, "must"), (10.0, "ten times")] {
        let (x, bottom) = (at(value), TOP + rows + 4.0);
        // writing to a String does not fail
        let _written = writeln!(
            svg,
            "<line x1=\"{x:.0}\" y1=\"{TOP}\" x2=\"{x:.0}\" y2=\"{bottom:.0}\" stroke=\"#999\"/>\
             <text x=\"{x:.0}\" y=\"{:.0}\" text-anchor=\"middle\" fill=\"#555\">{label}</text>",
            bottom + 16.0
        );
    }
    let mut y = TOP;
    for bar in bars {
        let _written = svg.write_str(&row(bar, y));
        y += ROW;
    }
    svg + "</svg>\n"
}

fn row(bar: &Bar, y: f64) -> String {
    let middle = y + 16.0;
    let mut row = format!(
        "<text x=\"{:.0}\" y=\"{middle:.0}\" text-anchor=\"end\">{}</text>\n",
        LEFT - 8.0,
        escaped(&bar.name)
    );
    if let Some(reached) = bar.reached {
        let (from, to) = (at(1.0).min(at(reached)), at(1.0).max(at(reached)));
        let _written = writeln!(
            row,
            "<rect x=\"{from:.1}\" y=\"{:.0}\" width=\"{:.1}\" height=\"16\" fill=\"{}\"/>",
            y + 4.0,
            (to - from).max(1.5),
            bar.colour
        );
    }
    if let Some(aim) = bar.aim {
        let _written = writeln!(
            row,
            "<line x1=\"{0:.1}\" y1=\"{1:.0}\" x2=\"{0:.1}\" y2=\"{2:.0}\" stroke=\"black\" stroke-width=\"2\"><title>aim</title></line>",
            at(aim),
            y + 2.0,
            y + 22.0
        );
    }
    let _written = writeln!(
        row,
        "<text x=\"{:.0}\" y=\"{middle:.0}\" fill=\"{}\">{}</text>",
        LEFT + WIDTH + 10.0,
        bar.colour,
        escaped(&bar.label)
    );
    row
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::{HIGH, LEFT, LOW, WIDTH, at};

    #[test]
    fn the_scale_ends_where_it_says() {
        let places = [LOW / 2.0, LOW, 1.0, HIGH, HIGH * 2.0].map(|value| at(value).round());
        assert_eq!(places, [LEFT, LEFT, LEFT + WIDTH / 2.0, LEFT + WIDTH, LEFT + WIDTH]);
    }
}
