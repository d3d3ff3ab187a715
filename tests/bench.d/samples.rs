//! Measurements and what is told of them.

use std::time::Duration;

use serde_json::{Value, json};

/// Measurements of one kind, in one unit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn of(value: f64) -> Self {
        Self(vec![value])
    }

    /// In milliseconds.
    pub(crate) fn of_time(time: Duration) -> Self {
        Self::of(time.as_secs_f64() * 1e3)
    }

    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// In milliseconds.
    pub(crate) fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64() * 1e3);
    }

    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest value that at least `percent` of all do not exceed (nearest rank). `None` without any.
    pub(crate) fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// The middle one, or between the two in the middle: few rounds are not told by their best.
    pub(crate) fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let upper = sorted.get(sorted.len() / 2)?;
        let lower = sorted.get((sorted.len() - 1) / 2)?;
        Some(f64::midpoint(*lower, *upper))
    }

    pub(crate) fn mean(&self) -> Option<f64> {
        let count = u32::try_from(self.0.len()).ok().filter(|count| *count > 0)?;
        Some(self.0.iter().sum::<f64>() / f64::from(count))
    }

    /// All of them, in the order in which they were measured.
    pub(crate) fn values(&self) -> Vec<f64> {
        self.0.iter().copied().map(rounded).collect()
    }

    /// `{p50, p90, p99, most, n}`
    pub(crate) fn distribution(&self) -> Value {
        let percentile = |percent| self.percentile(percent).map(rounded);
        json!({
            "p50": self.median().map(rounded),
            "p90": percentile(90),
            "p99": percentile(99),
            "most": percentile(100),
            "n": self.len(),
        })
    }

    /// `{p50, p99, n}`
    pub(crate) fn summary(&self) -> Value {
        json!({
            "p50": self.median().map(rounded),
            "p99": self.percentile(99).map(rounded),
            "n": self.len(),
        })
    }
}

/// Three digits after the point: no measurement here is better than that.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::Samples;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let hundred = Samples((1..=100).rev().map(f64::from).collect());
        assert_eq!((hundred.percentile(98), hundred.percentile(99)), (Some(98.0), Some(99.0)));
        let few = Samples(vec![3.0, 1.0]);
        assert_eq!((few.percentile(50), few.percentile(99)), (Some(1.0), Some(3.0)));
        assert_eq!(Samples::default().percentile(99), None);
    }

    #[test]
    fn the_middle_of_an_even_number_is_between_two() {
        assert_eq!(Samples(vec![3.0, 1.0]).median(), Some(2.0));
        assert_eq!(Samples(vec![3.0, 1.0, 9.0]).median(), Some(3.0));
        assert_eq!(Samples(vec![7.0]).median(), Some(7.0));
        assert_eq!((Samples::default().median(), Samples::default().mean()), (None, None));
    }
}
