//! Scalarisation: the weighted sum of the tasks' losses (survey §6.1), the baseline for all others. With
//! tuned weights it was found to be as good as methods that balance gradients (Kurin et al. 2022,
//! arXiv 2201.04122; Xin et al. 2022, arXiv 2209.11379).
//!
//! L = Σ w_t L_t ⁄ T, with L_t the mean loss of task t's rows and T the number of tasks in the batch.

use std::collections::BTreeMap;

use modl_core::{Error, Result};
use serde::Deserialize;

use super::weighted::{Weighted, Weights};
use super::{Job, Multitask};
use crate::StepRule;

/// The weighted sum of the tasks' losses.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scalarised {
    /// w by task. Default: 1 each.
    pub weights: BTreeMap<String, f64>,
}

impl Multitask for Scalarised {
    fn kind(&self) -> &'static str {
        "scalarised"
    }

    fn check(&self) -> Result<()> {
        let wrong = self.weights.iter().find(|(_, w)| !(**w >= 0.0 && w.is_finite()));
        let Some((name, weight)) = wrong else { return Ok(()) };
        let problem = format!("is {weight}, wants a weight of 0 or more");
        Err(Error::invalid(format!("weights.{name}"), problem))
    }

    fn rule(&self, job: &Job) -> Result<Box<dyn StepRule>> {
        let tasks = job.data.tasks();
        match self.weights.keys().find(|name| !tasks.contains_key(name.as_str())) {
            Some(name) => Err(Error::unknown("task in `weights`", name, tasks.keys())),
            None => Ok(Box::new(Weighted(self.clone()))),
        }
    }
}

impl Weights for Scalarised {
    fn weight(&self, task: &str) -> Result<f64> {
        Ok(self.weights.get(task).copied().unwrap_or(1.0))
    }
}
