//! CAGrad (Liu et al. 2021, *Conflict-averse gradient descent for multi-task learning*,
//! arXiv 2110.14048; survey §6.1): near the mean gradient, the direction that serves best the task
//! that it serves least.
//!
//! max_d minᵢ gᵢ·d with ‖d − g₀‖ ≤ c ‖g₀‖, where g₀ = Σ gᵢ ⁄ T and 0 ≤ c < 1. Its dual is over weights w
//! of the simplex: w* = argmin g_w·g₀ + c ‖g₀‖ ‖g_w‖ with g_w = Σ wᵢ gᵢ, and
//! d = g₀ + (c ‖g₀‖ ⁄ ‖g_w*‖) g_w*.
//!
//! The norm is ‖g_w‖ = min_{μ>0} ½ (‖g_w‖² ⁄ μ + μ). For each μ what is left is a quadratic function
//! over the simplex with an exact minimum w(μ), and the best μ is where ‖g_w(μ)‖ = μ, found by halving:
//! ‖g_w(μ)‖ ⁄ μ never rises. So w* is exact up to rounding, for any number of tasks.
//!
//! The authors' toy divides d by 1 + c; Adam does not see the difference.

use modl_core::{Error, Result};
use serde::Deserialize;

use super::balanced::{Balance, Balanced, Seen};
use super::{Gram, Job, Multitask, simplex};
use crate::StepRule;

/// The direction near the mean gradient that serves best the task that it serves least.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaGrad {
    /// c, how far from the mean gradient, from 0 (the mean itself) to below 1. Default: 0.5.
    pub c: f64,
}

impl Default for CaGrad {
    fn default() -> Self {
        CaGrad { c: 0.5 }
    }
}

impl Multitask for CaGrad {
    fn kind(&self) -> &'static str {
        "cagrad"
    }

    fn check(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.c) {
            return Ok(());
        }
        Err(Error::invalid("c", format!("is {}, wants 0 or more and less than 1", self.c)))
    }

    fn rule(&self, _: &Job) -> Result<Box<dyn StepRule>> {
        Ok(Box::new(Balanced(self.clone())))
    }
}

impl Balance for CaGrad {
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        Ok((cagrad(seen.gram, self.c), None))
    }
}

/// The factor of each task's gradient in d. Where the weighted gradients of the optimum cancel, there is
/// no direction to add, and d is g₀.
pub fn cagrad(gram: &Gram, c: f64) -> Vec<f64> {
    let n = gram.tasks();
    let mean = vec![1.0 / n as f64; n];
    let largest = gram.largest();
    if c <= 0.0 || largest <= 0.0 {
        return mean;
    }
    let gram = gram.scaled(1.0 / largest);
    let radius = c * gram.norm(&mean);
    if radius <= 0.0 {
        return mean;
    }
    let along = gram.times(&mean); // gᵢ·g₀
    let weights = |mu: f64| {
        let linear: Vec<f64> = along.iter().map(|v| v * mu / radius).collect();
        simplex::minimise(&gram, &linear)
    };
    // ‖g_w‖ is 1 at most.
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        match gram.norm(&weights(middle)) > middle {
            true => low = middle,
            false => high = middle,
        }
    }
    let weights = weights(high);
    let norm = gram.norm(&weights);
    if norm < 1e-9 {
        return mean;
    }
    mean.iter().zip(weights).map(|(m, w)| m + radius / norm * w).collect()
}
