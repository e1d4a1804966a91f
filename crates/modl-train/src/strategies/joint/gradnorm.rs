//! GradNorm (Chen et al. 2018, *GradNorm: gradient normalization for adaptive loss balancing in deep
//! multitask networks*, arXiv 1711.02257; survey §6.1): weights that are learned so that all tasks train
//! at the same rate.
//!
//! With G_t = w_t ‖∇L_t‖ for the shared parameters, the rates r_t = (L_t ⁄ L_t(0)) ⁄ mean of these, and
//! Ḡ = mean of G, the weights go down Σ_t |G_t − Ḡ r_t^α|, where Ḡ r_t^α is taken as constant, and are then
//! scaled so that Σ w_t = T.
//!
//! The paper takes the last shared layer alone, to save time; here all shared parameters are there
//! anyway.

use std::collections::BTreeMap;

use modl_core::{Error, Result, Tensor};
use serde::Deserialize;

use super::balanced::{Balance, Balanced, Seen};
use super::learned::{Learned, number};
use super::weighted::unknown;
use super::{Job, Multitask};
use crate::StepRule;

/// Learned weights with which all tasks train at the same rate. They are learned by Adam without decay.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GradNorm {
    /// α, how strongly slow tasks are favoured, 0 or more; small for similar tasks (0.12 in the paper).
    /// Default: 1.5.
    pub alpha: f64,
    /// The learning rate of the weights. Default: the step's own.
    pub lr: Option<f64>,
}

impl Default for GradNorm {
    fn default() -> Self {
        GradNorm { alpha: 1.5, lr: None }
    }
}

/// d⁄dw_t of Σ |w_t n_t − Ḡ r_t^α|, from the norms n_t = ‖∇L_t‖ and the ratios L_t ⁄ L_t(0).
///
/// ```
/// use modl_train::joint::gradnorm_slopes;
/// // Two tasks with the same rate: the one with the larger gradient is to count less.
/// assert_eq!(gradnorm_slopes(&[1.0, 1.0], &[3.0, 1.0], &[0.5, 0.5], 1.5), [3.0, -1.0]);
/// // With α > 0 one that has fallen less is to count more.
/// assert_eq!(gradnorm_slopes(&[1.0, 1.0], &[2.0, 2.0], &[0.9, 0.1], 1.5), [-2.0, 2.0]);
/// ```
pub fn gradnorm_slopes(weights: &[f64], norms: &[f64], ratios: &[f64], alpha: f64) -> Vec<f64> {
    let n = weights.len().max(1) as f64;
    let weighted: Vec<f64> = weights.iter().zip(norms).map(|(w, n)| w * n).collect();
    let mean_norm = weighted.iter().sum::<f64>() / n;
    let mean_ratio = ratios.iter().sum::<f64>() / n;
    let slope = |((own, norm), ratio): ((&f64, &f64), &f64)| {
        let rate = if mean_ratio > 0.0 { ratio / mean_ratio } else { 1.0 };
        let apart = own - mean_norm * rate.powf(alpha);
        // Equal up to rounding is equal.
        if apart.abs() <= 1e-12 * mean_norm { 0.0 } else { apart.signum() * norm }
    };
    weighted.iter().zip(norms).zip(ratios).map(slope).collect()
}

/// The smallest weight: none becomes negative, and none is lost for good.
const LEAST: f64 = 1e-3;

impl Multitask for GradNorm {
    fn kind(&self) -> &'static str {
        "gradnorm"
    }

    fn check(&self) -> Result<()> {
        if !(self.alpha >= 0.0 && self.alpha.is_finite()) {
            let problem = format!("is {}, wants a number of 0 or more", self.alpha);
            return Err(Error::invalid("alpha", problem));
        }
        match self.lr {
            Some(lr) if !(lr > 0.0 && lr.is_finite()) => {
                Err(Error::invalid("lr", format!("is {lr}, wants a number above 0")))
            }
            _ => Ok(()),
        }
    }

    fn rule(&self, job: &Job) -> Result<Box<dyn StepRule>> {
        let weights = Learned::new(job.data.tasks().into_keys(), 1.0)?;
        let first = BTreeMap::new();
        Ok(Box::new(Balanced(Normed { config: self.clone(), weights, first })))
    }
}

/// GradNorm between steps.
#[derive(Debug)]
struct Normed {
    config: GradNorm,
    weights: Learned,
    /// L(0): each task's loss in the first step that had rows of it.
    first: BTreeMap<String, f64>,
}

const FIRST: &str = "first.";

impl Balance for Normed {
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        let tasks = || seen.tasks.iter();
        let weights: Vec<f64> = tasks().map(|t| self.weights.get(t)).collect::<Result<_>>()?;
        let norms: Vec<f64> = (0..weights.len()).map(|i| seen.gram.get(i, i).sqrt()).collect();
        let ratio = |(task, loss): (&String, &f64)| {
            let first = *self.first.entry(task.clone()).or_insert(*loss);
            if first > 0.0 { loss / first } else { 1.0 }
        };
        let ratios: Vec<f64> = tasks().zip(seen.losses).map(ratio).collect();
        let slopes = gradnorm_slopes(&weights, &norms, &ratios, self.config.alpha);
        let lr = self.config.lr.unwrap_or(seen.lr);
        for (task, slope) in tasks().zip(slopes) {
            self.weights.step(task, slope, lr)?;
            self.weights.set(task, self.weights.get(task)?.max(LEAST));
        }
        // The sum over all tasks stays T, also where not all of them are in the batch.
        let now: f64 = tasks().map(|t| self.weights.get(t)).sum::<Result<f64>>()?;
        let scale = weights.iter().sum::<f64>() / now;
        for task in tasks() {
            self.weights.set(task, self.weights.get(task)? * scale);
        }
        let share = 1.0 / weights.len() as f64;
        let factors: Vec<f64> = weights.iter().map(|w| w * share).collect();
        Ok((factors.clone(), Some(factors)))
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let first = self.first.iter().map(|(t, v)| Ok((format!("{FIRST}{t}"), number(*v)?)));
        let first: Vec<(String, Tensor)> = first.collect::<Result<_>>()?;
        Ok([self.weights.state()?, first].concat())
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        let mut others = Vec::new();
        for (name, t) in self.weights.load_state(state)? {
            match name.strip_prefix(FIRST) {
                Some(task) => drop(self.first.insert(task.to_owned(), t.item()?)),
                None => others.push((name, t)),
            }
        }
        unknown(&others)
    }
}
