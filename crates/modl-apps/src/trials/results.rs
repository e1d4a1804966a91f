//! Numbers by condition, metric and seed, and statistics of them.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_train::{Bounds, bootstrap};

use super::Run;

/// What all conditions gave for the same seeds.
#[derive(Debug, Default)]
pub(crate) struct Results {
    seeds: Vec<u64>,
    /// By condition and metric, in the order of the seeds.
    numbers: BTreeMap<(String, String), Vec<f64>>,
}

/// The results as a statistic sees them: some of the seeds, each as often as it was drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    results: &'a Results,
    drawn: &'a [usize],
}

impl View<'_> {
    /// The mean of a metric over the seeds; NaN where the condition does not have it.
    pub(crate) fn mean(&self, condition: &str, metric: &str) -> f64 {
        self.mean_of(|seed| seed(condition, metric))
    }

    /// The mean over seeds of what `of` makes of one seed's numbers.
    pub(crate) fn mean_of(&self, of: impl Fn(&dyn Fn(&str, &str) -> f64) -> f64) -> f64 {
        let one = |i: &usize| of(&|condition, metric| self.results.number(condition, metric, *i));
        self.drawn.iter().map(one).sum::<f64>() / self.drawn.len() as f64
    }

    /// The largest value over the seeds; NaN where one is.
    pub(crate) fn largest(&self, condition: &str, metric: &str) -> f64 {
        let values = self.drawn.iter().map(|i| self.results.number(condition, metric, *i));
        // `f64::max` would leave out what was not measured.
        values.fold(f64::NEG_INFINITY, |a, b| if a.is_nan() || a > b { a } else { b })
    }
}

impl Results {
    /// Of runs of the same seeds for each condition.
    pub(crate) fn new<'r>(runs: impl IntoIterator<Item = &'r Run>) -> Self {
        let mut all: BTreeMap<(String, String), BTreeMap<u64, f64>> = BTreeMap::new();
        for run in runs {
            for (metric, value) in &run.metrics {
                let key = (run.condition.clone(), metric.clone());
                all.entry(key).or_default().insert(run.seed, *value);
            }
        }
        let mut seeds: Vec<u64> = all.values().flat_map(|s| s.keys().copied()).collect();
        seeds.sort_unstable();
        seeds.dedup();
        let in_order = |of: &BTreeMap<u64, f64>| {
            seeds.iter().map(|s| of.get(s).copied().unwrap_or(f64::NAN)).collect()
        };
        let numbers = all.iter().map(|(key, of)| (key.clone(), in_order(of))).collect();
        Results { numbers, seeds }
    }

    /// The seeds, sorted.
    pub(crate) fn seeds(&self) -> &[u64] {
        &self.seeds
    }

    /// Whether a condition has a metric.
    pub(crate) fn has(&self, condition: &str, metric: &str) -> bool {
        self.numbers.contains_key(&(condition.to_owned(), metric.to_owned()))
    }

    fn number(&self, condition: &str, metric: &str, seed: usize) -> f64 {
        let of = self.numbers.get(&(condition.to_owned(), metric.to_owned()));
        of.and_then(|of| of.get(seed)).copied().unwrap_or(f64::NAN)
    }

    /// A statistic of all seeds; its bootstrap interval, where there are two seeds at least.
    pub(crate) fn statistic(
        &self,
        statistic: impl Fn(&View) -> f64,
    ) -> Result<(f64, Option<(f64, f64)>)> {
        let of = |drawn: &[usize]| statistic(&View { results: self, drawn });
        let n = self.seeds.len();
        if n < 2 {
            let all: Vec<usize> = (0..n).collect();
            return Ok((of(&all), None));
        }
        let Bounds { value, low, high } = bootstrap(n, of)?;
        Ok((value, Some((low, high))))
    }

    /// The mean of a metric.
    pub(crate) fn mean(&self, condition: &str, metric: &str) -> Result<(f64, Option<(f64, f64)>)> {
        self.statistic(|v| v.mean(condition, metric))
    }

    /// The mean difference of a metric between two conditions, paired by seed.
    pub(crate) fn difference(
        &self,
        condition: &str,
        from: &str,
        metric: &str,
    ) -> Result<(f64, Option<(f64, f64)>)> {
        self.statistic(|v| v.mean_of(|seed| seed(condition, metric) - seed(from, metric)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(condition: &str, seed: u64, value: f64) -> Run {
        Run {
            condition: condition.into(),
            seed,
            config: String::new(),
            metrics: [("m".to_owned(), value)].into(),
            seconds: 0.0,
            peak_rss_mb: None,
            modl: String::new(),
            commit: None,
        }
    }

    #[test]
    fn differences_are_paired_by_seed_whatever_the_order_of_the_runs() {
        let runs = [("a", 1, 5.0), ("b", 0, 2.0), ("b", 1, 4.0), ("a", 0, 3.0)];
        let runs: Vec<Run> = runs.iter().map(|(c, s, v)| run(c, *s, *v)).collect();
        let results = Results::new(&runs);
        assert_eq!(results.seeds(), [0, 1]);
        assert_eq!(results.mean("a", "m").unwrap(), (4.0, Some((3.0, 5.0))));
        // Each seed says 1, so that there is nothing between the ends of the interval.
        assert_eq!(results.difference("a", "b", "m").unwrap(), (1.0, Some((1.0, 1.0))));
        let (largest, _) = results.statistic(|v| v.largest("b", "m")).unwrap();
        assert_eq!(largest, 4.0);
        assert!(results.mean("c", "m").unwrap().0.is_nan() && !results.has("c", "m"));
    }

    #[test]
    fn one_seed_has_no_interval() {
        let runs = [run("a", 7, 2.5)];
        assert_eq!(Results::new(&runs).mean("a", "m").unwrap(), (2.5, None));
    }
}
