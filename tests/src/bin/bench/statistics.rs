//! Medians of repeated measurements, and their confidence.

/// The summary of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    /// Where the true median is with 95 % confidence, whatever the distribution: between two order statistics, by the
    /// normal approximation of how many of the values fall below it.
    pub(crate) interval: (f64, f64),
    pub(crate) quartiles: (f64, f64),
}

impl Summary {
    /// `None` of no values.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let last = values.len().checked_sub(1)?;
        let middle = values.len() as f64 / 2.0;
        let reach = 0.98 * (values.len() as f64).sqrt();
        let low = (middle - reach).floor().max(0.0) as usize;
        let high = last - low;
        Some(Self {
            median: quantile(&values, 0.5),
            interval: (values[low], values[high]),
            quartiles: (quantile(&values, 0.25), quantile(&values, 0.75)),
        })
    }
}

/// The value below which a part of sorted values lies, between two of them by proportion.
pub(crate) fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = (sorted.len() - 1) as f64 * part;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quartiles() {
        let of = |values: &[f64]| Summary::of(values.iter().copied()).unwrap();
        assert_eq!(of(&[3.0]).median, 3.0);
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]).median, 2.5);
        let hundred: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(of(&hundred), Summary { median: 50.0, interval: (40.0, 60.0), quartiles: (25.0, 75.0) });
        assert_eq!(Summary::of([]), None);
    }

    #[test]
    fn an_interval_holds_the_true_median_as_often_as_it_says() {
        let mut random = fastrand::Rng::with_seed(7);
        let held = (0..2_000).filter(|_| {
            let (low, high) = Summary::of((0..51).map(|_| random.f64().powi(3))).unwrap().interval;
            (low..=high).contains(&0.125)
        });
        let held = held.count() as f64 / 2_000.0;
        assert!((0.94..0.99).contains(&held), "{held}");
    }
}
