//! Dynamic weight averaging, DWA (Liu, Johns, Davison 2019, *End-to-end multi-task learning with
//! attention*, arXiv 1803.10704, section 3.3; survey §6.1): tasks whose loss falls slowly count more.
//!
//! w_t = T · softmax_t(r_t ⁄ τ) with r_t = L_t(k−1) ⁄ L_t(k−2), where L_t(k) is the mean of the task's loss
//! over epoch k and τ = 2. In the first two epochs, and of a task that was not there in both of the last
//! ones, r_t = 1.

use std::collections::BTreeMap;

use modl_core::{Device, Error, Result, Tensor};
use serde::Deserialize;

use super::weighted::{Weighted, Weights, unknown};
use super::{Job, Multitask};
use crate::{StepContext, StepRule};

/// Tasks whose loss falls slowly count more.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dwa {
    /// τ, above 0: the larger, the more equal the weights. Default: 2.
    pub temperature: f64,
    /// The steps over which losses are averaged. Default: those of an epoch.
    pub steps: Option<u64>,
}

impl Default for Dwa {
    fn default() -> Self {
        Dwa { temperature: 2.0, steps: None }
    }
}

/// w of each task from its mean losses of the last epoch and of the one before.
///
/// ```
/// use modl_train::joint::dwa_weights;
/// // Of two tasks the one whose loss did not fall counts more: e^0.5 : e^0.25.
/// let w = dwa_weights(&[Some((1.0, 1.0)), Some((0.5, 1.0))], 2.0);
/// assert!((w[0] / w[1] - 0.25f64.exp()).abs() < 1e-12);
/// assert!((w[0] + w[1] - 2.0).abs() < 1e-12);
/// ```
pub fn dwa_weights(losses: &[Option<(f64, f64)>], temperature: f64) -> Vec<f64> {
    let rate = |of: &Option<(f64, f64)>| match of {
        Some((last, before)) if *before > 0.0 => last / before,
        _ => 1.0,
    };
    let rates: Vec<f64> = losses.iter().map(rate).collect();
    let highest = rates.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let raised: Vec<f64> = rates.iter().map(|r| ((r - highest) / temperature).exp()).collect();
    let sum: f64 = raised.iter().sum();
    raised.iter().map(|e| losses.len() as f64 * e / sum).collect()
}

impl Multitask for Dwa {
    fn kind(&self) -> &'static str {
        "dwa"
    }

    fn check(&self) -> Result<()> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            let problem = format!("is {}, wants a number above 0", self.temperature);
            return Err(Error::invalid("temperature", problem));
        }
        match self.steps {
            Some(0) => Err(Error::invalid("steps", "is to be 1 or more")),
            _ => Ok(()),
        }
    }

    fn rule(&self, job: &Job) -> Result<Box<dyn StepRule>> {
        let train = &job.phase.train;
        let rows = (train.batch_size * train.accumulate as usize).max(1);
        let epoch = job.data.len().div_ceil(rows) as u64;
        let losses = job.data.tasks().into_keys().map(|t| (t.to_owned(), Course::default()));
        Ok(Box::new(Weighted(Averaged {
            temperature: self.temperature,
            length: self.steps.unwrap_or(epoch).max(1),
            epoch: 0,
            losses: losses.collect(),
            weights: BTreeMap::new(),
        })))
    }
}

/// DWA between steps.
#[derive(Debug)]
struct Averaged {
    temperature: f64,
    /// Steps of an epoch.
    length: u64,
    /// The present one.
    epoch: u64,
    losses: BTreeMap<String, Course>,
    /// What follows from them in this step.
    weights: BTreeMap<String, f64>,
}

/// The losses of a task.
#[derive(Debug, Default)]
struct Course {
    /// In the present epoch.
    sum: f64,
    steps: f64,
    /// The means of the last epoch and of the one before; none where the task had no rows.
    last: Option<f64>,
    before: Option<f64>,
}

impl Course {
    fn turn(&mut self) {
        self.before = self.last;
        self.last = (self.steps > 0.0).then(|| self.sum / self.steps);
        (self.sum, self.steps) = (0.0, 0.0);
    }
}

const EPOCH: &str = "epoch";
const LOSSES: &str = "losses.";

impl Weights for Averaged {
    fn weight(&self, task: &str) -> Result<f64> {
        self.weights
            .get(task)
            .copied()
            .ok_or_else(|| Error::unknown("task", task, self.weights.keys()))
    }

    fn begin(&mut self, cx: &StepContext) {
        let epoch = cx.done() / self.length;
        if epoch != self.epoch {
            self.epoch = epoch;
            self.losses.values_mut().for_each(Course::turn);
        }
        let known: Vec<Option<(f64, f64)>> =
            self.losses.values().map(|c| Some((c.last?, c.before?))).collect();
        let weights = dwa_weights(&known, self.temperature);
        self.weights = self.losses.keys().cloned().zip(weights).collect();
    }

    fn learn(&mut self, _: &StepContext, losses: &BTreeMap<String, f64>) -> Result<()> {
        for (task, loss) in losses {
            let course = self.losses.entry(task.clone()).or_default();
            course.sum += loss;
            course.steps += 1.0;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let row = |(task, c): (&String, &Course)| {
            let or_none = |v: Option<f64>| v.unwrap_or(f64::NAN);
            let row = [c.sum, c.steps, or_none(c.last), or_none(c.before)];
            Ok((format!("{LOSSES}{task}"), Tensor::from_slice(&row, &[4], Device::Cpu)?))
        };
        let epoch = Tensor::from_slice(&[self.epoch as i64], &[1], Device::Cpu)?;
        [Ok((EPOCH.to_owned(), epoch))].into_iter().chain(self.losses.iter().map(row)).collect()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let mut others = Vec::new();
        for (name, t) in state {
            let course = name.strip_prefix(LOSSES).and_then(|task| self.losses.get_mut(task));
            match (course, t.to_vec::<f64>()?.as_slice()) {
                (Some(course), [sum, steps, last, before]) => {
                    let some = |v: &f64| (!v.is_nan()).then_some(*v);
                    let (last, before) = (some(last), some(before));
                    *course = Course { sum: *sum, steps: *steps, last, before };
                }
                (None, [epoch]) if name == EPOCH => self.epoch = *epoch as u64,
                _ => others.push((name, t)),
            }
        }
        unknown(&others)
    }
}
