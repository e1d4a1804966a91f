//! MGDA (Désidéri 2012, *Multiple-gradient descent algorithm*; for networks Sener and Koltun 2018,
//! arXiv 1810.04650; survey §6.1): the shortest vector of the gradients' convex hull.
//!
//! w* = argmin ‖Σ wᵢ gᵢ‖² over the simplex, and d = Σ wᵢ* gᵢ. Then gᵢ·d ≥ ‖d‖² for each task: a step along
//! −d lowers all losses, and where d = 0 no step does. The sum of weights is 1, so that tasks with small
//! gradients have large weights.
//!
//! The weights are exact up to rounding (derivatives within 10⁻¹³ of the largest ‖gᵢ‖²), where the papers
//! have Frank–Wolfe steps. Gradients are not normalised.

use modl_core::Result;
use serde::Deserialize;

use super::balanced::{Balance, Balanced, Seen};
use super::{Gram, Job, Multitask, simplex};
use crate::StepRule;

/// The shortest vector of the gradients' convex hull.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mgda {}

impl Multitask for Mgda {
    fn kind(&self) -> &'static str {
        "mgda"
    }

    fn rule(&self, _: &Job) -> Result<Box<dyn StepRule>> {
        Ok(Box::new(Balanced(self.clone())))
    }
}

impl Balance for Mgda {
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        Ok((mgda(seen.gram), None))
    }
}

/// The weight of each task's gradient.
pub fn mgda(gram: &Gram) -> Vec<f64> {
    let largest = gram.largest();
    if largest <= 0.0 {
        return vec![1.0 / gram.tasks() as f64; gram.tasks()];
    }
    simplex::minimise(&gram.scaled(1.0 / largest), &vec![0.0; gram.tasks()])
}
