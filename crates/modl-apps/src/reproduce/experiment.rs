//! What an experiment is.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_core::{Registry, Seed};
use serde_json::Value;

use crate::trials::{Measure, Results, View};

/// A published claim that is put to the test: what is compared, what is measured, and what is to
/// come out. Thresholds are part of the source and so are declared before any run.
pub(super) trait Experiment: Sync {
    /// Name, claim and data.
    fn about(&self) -> About;

    /// Everything that the numbers follow from, beside the seed. With `quick` small enough for a
    /// test; what comes out then says nothing about the claim.
    fn settings(&self, quick: bool) -> Value;

    /// What is compared, of that for which the registry has the methods.
    fn conditions(&self, registry: &Registry) -> Vec<Condition>;

    /// What is measured.
    fn measures(&self) -> &'static [Measure];

    /// Steps of training of a condition, for the progress bar.
    fn steps(&self, quick: bool) -> u64;

    /// Trains and tests one condition with one seed.
    fn run(&self, condition: &str, lab: &Lab) -> Result<BTreeMap<String, f64>>;

    /// What is to come out.
    fn thresholds(&self) -> Vec<Threshold>;
}

/// Words about an experiment.
#[derive(Debug, Clone, Copy)]
pub(super) struct About {
    /// Its name on the command line.
    pub(super) name: &'static str,
    /// In a few words.
    pub(super) title: &'static str,
    /// The paper.
    pub(super) citation: &'static str,
    /// The section of the survey.
    pub(super) section: &'static str,
    /// What the paper says.
    pub(super) claim: &'static str,
    /// Data and models, for the report.
    pub(super) setup: &'static str,
    /// Seeds where the command line says nothing.
    pub(super) seeds: u64,
}

/// One of the things that are compared.
#[derive(Debug, Clone)]
pub(super) struct Condition {
    /// Its key in the runs: `soft-16`.
    pub(super) key: String,
    /// What it shares with the ones that it is compared to: `16 rules`.
    pub(super) group: String,
    /// What it is within the group: `soft routing`.
    pub(super) series: String,
    /// The condition that differences are to; none for that one itself.
    pub(super) reference: Option<String>,
}

/// Where a run takes place.
pub(super) struct Lab<'a> {
    /// The methods.
    pub(super) registry: &'a Registry,
    /// Where all random numbers come from.
    pub(super) seed: Seed,
    /// Whether this is for a test only.
    pub(super) quick: bool,
    /// To be called after each step.
    pub(super) tick: &'a dyn Fn(),
}

/// A statistic of all seeds, and what it is to be.
pub(super) struct Threshold {
    /// In words.
    pub(super) text: &'static str,
    /// The statistic.
    pub(super) statistic: fn(&View) -> f64,
    /// Its bound.
    pub(super) bound: Bound,
}

/// A bound of a statistic.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bound {
    /// ≤
    AtMost(f64),
    /// ≥
    AtLeast(f64),
    /// >
    Above(f64),
}

/// The largest of some statistics; not a number where one was not measured.
pub(super) fn largest(all: impl IntoIterator<Item = f64>) -> f64 {
    let larger = |a: f64, b: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) };
    all.into_iter().reduce(larger).unwrap_or(f64::NAN)
}

/// What became of a threshold.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    /// The threshold in words.
    pub(super) text: &'static str,
    /// `≤ 0.8`
    pub(super) bound: String,
    /// The statistic, with its interval.
    pub(super) measured: (f64, Option<(f64, f64)>),
    /// Whether it held; none where it was not measured.
    pub(super) held: Option<bool>,
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtMost(c) => value <= c,
            Bound::AtLeast(c) => value >= c,
            Bound::Above(c) => value > c,
        }
    }

    fn words(self) -> String {
        match self {
            Bound::AtMost(c) => format!("≤ {c}"),
            Bound::AtLeast(c) => format!("≥ {c}"),
            Bound::Above(c) => format!("> {c}"),
        }
    }
}

impl Threshold {
    /// Whether it held in these results.
    pub(super) fn judge(&self, results: &Results) -> Result<Verdict> {
        let measured = results.statistic(self.statistic)?;
        let held = (!measured.0.is_nan()).then(|| self.bound.holds(measured.0));
        Ok(Verdict { text: self.text, bound: self.bound.words(), measured, held })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trials::Run;

    #[test]
    fn a_threshold_holds_up_to_its_bound_and_what_was_not_measured_is_not_judged() {
        let run = Run {
            condition: "a".into(),
            seed: 0,
            config: String::new(),
            metrics: [("m".to_owned(), 0.5)].into(),
            seconds: 0.0,
            peak_rss_mb: None,
            modl: String::new(),
            commit: None,
        };
        let results = Results::new([&run]);
        let judge = |statistic: fn(&View) -> f64, bound| {
            Threshold { text: "", statistic, bound }.judge(&results).unwrap().held
        };
        for (bound, held) in [
            (Bound::AtMost(0.5), true),
            (Bound::AtMost(0.4), false),
            (Bound::AtLeast(0.5), true),
            (Bound::AtLeast(0.6), false),
            (Bound::Above(0.5), false),
            (Bound::Above(0.4), true),
        ] {
            assert_eq!(judge(|v| v.mean("a", "m"), bound), Some(held), "{bound:?}");
            assert_eq!(judge(|v| v.mean("b", "m"), bound), None, "{bound:?}");
        }
    }
}
