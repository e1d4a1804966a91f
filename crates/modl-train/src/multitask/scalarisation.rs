//! Scalarisation: the weighted sum of the tasks' losses (survey §6.1), the baseline for all others. With
//! tuned weights it was found to be as good as methods that balance gradients (Kurin et al. 2022,
//! arXiv 2201.04122; Xin et al. 2022, arXiv 2209.11379).
//!
//! L = Σ w_t L_t ⁄ T, with L_t the mean loss of task t's rows and T the number of tasks in the batch.

use std::collections::BTreeMap;

use modl_core::{Error, Result};
use serde::Deserialize;

/// The weighted sum of the tasks' losses.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scalarised {
    /// w by task. Default: 1 each.
    pub weights: BTreeMap<String, f64>,
}

impl Scalarised {
    /// The weights of these tasks, which are all that there are.
    ///
    /// # Errors
    /// Where a weight is of another task, or not a number of 0 or more.
    pub fn of<'t>(&self, tasks: impl Iterator<Item = &'t str> + Clone) -> Result<Vec<f64>> {
        for (name, weight) in &self.weights {
            if !tasks.clone().any(|t| t == name) {
                return Err(Error::unknown("task in `weights`", name, tasks));
            }
            if !(*weight >= 0.0 && weight.is_finite()) {
                let problem = format!("is {weight}, wants a weight of 0 or more");
                return Err(Error::invalid(format!("weights.{name}"), problem));
            }
        }
        Ok(tasks.map(|t| self.weights.get(t).copied().unwrap_or(1.0)).collect())
    }
}
