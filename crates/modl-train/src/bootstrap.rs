//! The percentile bootstrap: how far a statistic of a few seeds may be off.

use modl_core::{Error, Result, Seed};
use rand::Rng;

/// A statistic of all seeds with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// The statistic of all.
    pub value: f64,
    /// The 2.5 % quantile of its resamples.
    pub low: f64,
    /// The 97.5 % quantile of its resamples.
    pub high: f64,
}

/// Resamples that are drawn.
const RESAMPLES: usize = 10_000;

/// `statistic` of seeds 0 … n−1, and the 2.5 % and 97.5 % quantiles of it over 10,000 resamples of
/// n seeds with replacement (Efron 1979, *Bootstrap methods: another look at the jackknife*).
///
/// The statistic is given the numbers of the seeds, so that it can be a difference or a quotient of
/// numbers that belong to the same seed: paired. The resamples are always the same ones.
///
/// ```
/// let accuracy = [0.71, 0.74, 0.72, 0.78, 0.73];
/// let mean = |seeds: &[usize]| {
///     seeds.iter().map(|s| accuracy[*s]).sum::<f64>() / seeds.len() as f64
/// };
/// let b = modl_train::bootstrap(accuracy.len(), mean)?;
/// assert!((b.value - 0.736).abs() < 1e-12 && b.low < b.value && b.value < b.high);
/// # Ok::<(), modl_core::Error>(())
/// ```
///
/// # Errors
/// Where there are fewer than two seeds, from which no spread can be told.
pub fn bootstrap(n: usize, statistic: impl Fn(&[usize]) -> f64) -> Result<Bounds> {
    if n < 2 {
        return Err(Error::invalid("bootstrap", format!("of {n} values; run 2 seeds at least")));
    }
    let all: Vec<usize> = (0..n).collect();
    let mut rng = Seed(0).child("bootstrap").rng();
    let mut resample = vec![0; n];
    let mut found = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        resample.iter_mut().for_each(|s| *s = rng.gen_range(0..n));
        found.push(statistic(&resample));
    }
    found.sort_by(f64::total_cmp);
    let at = |i: usize| found.get(i).copied().unwrap_or(f64::NAN);
    let tail = RESAMPLES / 40;
    Ok(Bounds { value: statistic(&all), low: at(tail), high: at(RESAMPLES - 1 - tail) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The quantiles of the mean over all nⁿ resamples, each as likely as the others.
    fn exact(values: &[f64]) -> (f64, f64) {
        let n = values.len();
        let mut means: Vec<f64> = (0..n.pow(n as u32))
            .map(|code| (0..n).map(|i| values[code / n.pow(i as u32) % n]).sum::<f64>() / n as f64)
            .collect();
        means.sort_by(f64::total_cmp);
        let tail = (means.len() as f64 * 0.025) as usize;
        (means[tail], means[means.len() - 1 - tail])
    }

    #[test]
    fn quantiles_are_those_of_all_resamples() {
        for values in [vec![1.0, 2.0, 4.0, 8.0], vec![0.3, -1.0, 0.8, 2.5, 0.1, 0.4]] {
            let mean = |s: &[usize]| s.iter().map(|i| values[*i]).sum::<f64>() / s.len() as f64;
            let found = bootstrap(values.len(), mean).unwrap();
            let (low, high) = exact(&values);
            // 10,000 draws leave the quantile among neighbours of the exact one.
            let spread = 0.05 * (high - low);
            assert!((found.low - low).abs() < spread, "{found:?}, {low}");
            assert!((found.high - high).abs() < spread, "{found:?}, {high}");
        }
    }

    #[test]
    fn a_paired_difference_is_certain_where_each_seed_says_the_same() {
        let (a, b) = ([1.0, 5.0, 9.0], [0.5, 4.5, 8.5]);
        let difference =
            |s: &[usize]| s.iter().map(|i| a[*i] - b[*i]).sum::<f64>() / s.len() as f64;
        let found = bootstrap(3, difference).unwrap();
        assert_eq!((found.value, found.low, found.high), (0.5, 0.5, 0.5));
        assert!(bootstrap(1, difference).is_err());
    }
}
