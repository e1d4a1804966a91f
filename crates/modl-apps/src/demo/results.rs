//! What was measured.

use std::collections::BTreeMap;

use anyhow::Result;
use modl_train::{Interval, interval};
use serde::{Deserialize, Serialize};

use super::data::DOMAINS;
use super::methods::Method;

/// A method on one domain of one seed's held-out texts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Score {
    /// Of the texts that are not neutral.
    pub(crate) accuracy: f64,
    /// Rank correlation with the intensity, over all texts.
    pub(crate) spearman: f64,
}

/// A method on one seed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// By domain.
    pub(crate) scores: BTreeMap<String, Score>,
    /// The mean α of each module for the texts of each domain: `[domain][module]`.
    pub(crate) routing: Option<Vec<Vec<f64>>>,
    /// Trained parameters, beside the common head's.
    pub(crate) parameters: usize,
    /// Bytes of the files that the method needs beside the backbone and the common head.
    pub(crate) bytes: u64,
    /// Seconds of training that it took, those of the modules that it builds on included.
    pub(crate) seconds: f64,
}

/// One seed.
pub(crate) type Seeds = BTreeMap<Method, Outcome>;

/// All seeds.
#[derive(Debug, Default)]
pub(crate) struct Results(Vec<Seeds>);

impl Results {
    pub(crate) fn add(&mut self, seed: Seeds) {
        self.0.push(seed);
    }

    pub(crate) fn seeds(&self) -> usize {
        self.0.len()
    }

    fn of(&self, method: Method) -> impl Iterator<Item = &Outcome> {
        self.0.iter().filter_map(move |s| s.get(&method))
    }

    /// A number of each seed, as mean and interval; without an interval where there is one seed.
    pub(crate) fn summary(values: &[f64]) -> Result<(f64, Option<f64>)> {
        if let [only] = values {
            return Ok((*only, None));
        }
        let Interval { mean, half } = interval(values)?;
        Ok((mean, Some(half)))
    }

    /// One metric of a method on one domain, or the mean over domains, by seed.
    pub(crate) fn metric(
        &self,
        method: Method,
        domain: Option<&str>,
        metric: fn(&Score) -> f64,
    ) -> Vec<f64> {
        let mean = |o: &Outcome| {
            let scores =
                o.scores.iter().filter(|(d, _)| domain.is_none_or(|only| only == d.as_str()));
            let values: Vec<f64> = scores.map(|(_, s)| metric(s)).collect();
            values.iter().sum::<f64>() / values.len().max(1) as f64
        };
        self.of(method).map(mean).collect()
    }

    /// What a method costs: parameters and bytes, and the mean of the seconds.
    pub(crate) fn cost(&self, method: Method) -> (usize, u64, f64) {
        let all: Vec<&Outcome> = self.of(method).collect();
        let seconds = all.iter().map(|o| o.seconds).sum::<f64>() / all.len().max(1) as f64;
        all.first().map_or((0, 0, 0.0), |o| (o.parameters, o.bytes, seconds))
    }

    /// The mean α over seeds, `[domain][module]`.
    pub(crate) fn routing(&self, method: Method) -> Option<Vec<Vec<f64>>> {
        let maps: Vec<_> = self.of(method).filter_map(|o| o.routing.as_ref()).collect();
        let n = maps.len() as f64;
        let cell =
            |d: usize, m: usize| maps.iter().filter_map(|map| map.get(d)?.get(m)).sum::<f64>() / n;
        let row = |d: usize| (0..DOMAINS.len()).map(|m| cell(d, m)).collect();
        (!maps.is_empty()).then(|| (0..DOMAINS.len()).map(row).collect())
    }
}
