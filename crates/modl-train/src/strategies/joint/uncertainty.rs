//! Weighting by uncertainty (Kendall, Gal, Cipolla 2018, *Multi-task learning using uncertainty to
//! weigh losses*, arXiv 1705.07115; survey §6.1): a task that cannot be predicted well counts less.
//!
//! Each task has a learned s = ln σ², 0 at first. A squared error L is that of a Gaussian with variance
//! σ²: ½ e^−s L + ½ s. A −log-likelihood L is that of a softmax at temperature σ²: e^−s L + ½ s. With L
//! fixed the best s is ln L, or ln 2L.
//!
//! A loss that goes to 0 would bring the weight to infinity and the sum to −∞: s is kept within
//! ±`limit`.

use std::collections::BTreeMap;

use modl_core::{Error, Result, Tensor};
use serde::Deserialize;

use super::learned::Learned;
use super::weighted::{Weighted, Weights, unknown};
use super::{Job, Multitask};
use crate::{StepContext, StepRule};

/// Losses weighted by learned uncertainty. s is learned by Adam without decay.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Uncertainty {
    /// What the losses are of. Default: `classification` where they are −ln p of classes or
    /// tokens, else `regression`.
    pub form: Option<Form>,
    /// The learning rate of s. Default: the step's own.
    pub lr: Option<f64>,
    /// The largest |s|, above 0. Default: 5, a weight of 148 at most.
    pub limit: f64,
}

impl Default for Uncertainty {
    fn default() -> Self {
        Uncertainty { form: None, lr: None, limit: 5.0 }
    }
}

/// What a loss is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A squared error.
    Regression,
    /// −ln p of what is right.
    Classification,
}

impl Form {
    /// What the loss counts at s: ½ e^−s or e^−s.
    pub fn weight(self, s: f64) -> f64 {
        match self {
            Form::Regression => 0.5 * (-s).exp(),
            Form::Classification => (-s).exp(),
        }
    }

    /// The objective of a loss at s: `weight(s) · loss + ½ s`.
    pub fn objective(self, s: f64, loss: f64) -> f64 {
        self.weight(s) * loss + 0.5 * s
    }

    /// Its derivative by s.
    pub fn slope(self, s: f64, loss: f64) -> f64 {
        0.5 - self.weight(s) * loss
    }
}

impl Multitask for Uncertainty {
    fn kind(&self) -> &'static str {
        "uncertainty"
    }

    fn check(&self) -> Result<()> {
        for (key, value) in [("limit", self.limit), ("lr", self.lr.unwrap_or(1.0))] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::invalid(key, format!("is {value}, wants a number above 0")));
            }
        }
        Ok(())
    }

    fn rule(&self, job: &Job) -> Result<Box<dyn StepRule>> {
        let usual = match job.objective.is_likelihood() {
            true => Form::Classification,
            false => Form::Regression,
        };
        let form = self.form.unwrap_or(usual);
        let s = Learned::new(job.data.tasks().into_keys(), 0.0)?;
        Ok(Box::new(Weighted(Uncertain { config: self.clone(), form, s })))
    }
}

/// s of each task.
#[derive(Debug)]
struct Uncertain {
    config: Uncertainty,
    form: Form,
    s: Learned,
}

impl Weights for Uncertain {
    fn weight(&self, task: &str) -> Result<f64> {
        Ok(self.form.weight(self.s.get(task)?))
    }

    fn learn(&mut self, cx: &StepContext, losses: &BTreeMap<String, f64>) -> Result<()> {
        let lr = self.config.lr.unwrap_or(cx.lr);
        for (task, loss) in losses {
            let slope = self.form.slope(self.s.get(task)?, *loss);
            self.s.step(task, slope, lr)?;
            let within = self.s.get(task)?.clamp(-self.config.limit, self.config.limit);
            self.s.set(task, within);
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.s.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        unknown(&self.s.load_state(state)?)
    }
}
