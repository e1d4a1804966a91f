//! Nash-MTL (Navon et al. 2022, *Multi-task learning as a bargaining game*, arXiv 2202.01017; survey
//! §6.1): tasks bargain for the direction, whatever the scales of their losses.
//!
//! The bargain over directions of a bounded norm, where a task's gain is gᵢ·d, has the solution
//! d = Σ αᵢ gᵢ with G α = 1⁄α, element by element, where G are the gradients' products.
//!
//! The authors find α by a sequence of convex programs. It is also the one stationary point of the
//! strictly convex ½ αᵀGα − Σ ln αᵢ, which damped Newton steps reach from anywhere in a few steps, up to
//! rounding; with βᵢ = αᵢ ‖gᵢ‖ only cosines enter, so that no scale of a loss is too small or too large.
//!
//! ‖d‖² = αᵀGα = T always. As in the authors' code, where G is divided by its norm, the gradient that is
//! followed gets longer and shorter with the tasks' gradients: it is √‖G‖ ⁄ T · d with the Frobenius norm,
//! the mean gradient where all tasks agree.

use modl_core::Result;
use serde::Deserialize;

use super::balanced::{Balance, Balanced, Seen};
use super::{Gram, Job, Multitask, simplex};
use crate::StepRule;

/// Tasks bargain for the direction.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NashMtl {}

impl Multitask for NashMtl {
    fn kind(&self) -> &'static str {
        "nash_mtl"
    }

    fn rule(&self, _: &Job) -> Result<Box<dyn StepRule>> {
        Ok(Box::new(Balanced(self.clone())))
    }
}

impl Balance for NashMtl {
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        Ok((nash_mtl(seen.gram), None))
    }
}

/// α with G α = 1⁄α. A task with a gradient of 0 takes no part and has 0. `None` where there is no
/// bargain: no task has a gradient, or some of them cancel with positive weights (no direction serves
/// all).
pub fn nash_bargain(gram: &Gram) -> Option<Vec<f64>> {
    let taking: Vec<usize> = (0..gram.tasks()).filter(|i| gram.get(*i, *i) > 0.0).collect();
    let n = taking.len();
    if n == 0 {
        return None;
    }
    let cosine = |a: usize, b: usize| match a == b {
        true => 1.0,
        false => gram.cosine(taking[a], taking[b]).unwrap_or(0.0),
    };
    let mut beta = vec![1.0; n];
    for _ in 0..200 {
        let excess = |a: usize| -> f64 {
            (0..n).map(|b| cosine(a, b) * beta[b]).sum::<f64>() - 1.0 / beta[a]
        };
        let rows = (0..n).map(|a| {
            let curved = |b: usize| cosine(a, b) + if a == b { beta[a].powi(-2) } else { 0.0 };
            (0..n).map(curved).chain([-excess(a)]).collect()
        });
        let step = simplex::solve(rows.collect())?;
        // The decrease that the step promises; below ¼ whole steps converge quadratically.
        let promised = -step.iter().enumerate().map(|(a, s)| s * excess(a)).sum::<f64>();
        let promised = promised.max(0.0).sqrt();
        let length = if promised > 0.25 { 1.0 / (1.0 + promised) } else { 1.0 };
        beta.iter_mut().zip(&step).for_each(|(b, s)| *b += length * s);
        // So far apart weights are of gradients that cancel up to what their products can tell.
        if beta.iter().any(|b| !(0.0..1e3).contains(b)) {
            return None;
        }
        if promised < 1e-10 {
            let mut alpha = vec![0.0; gram.tasks()];
            for (i, b) in taking.iter().zip(&beta) {
                alpha[*i] = b / gram.get(*i, *i).sqrt();
            }
            return Some(alpha);
        }
    }
    None
}

/// The factor of each task's gradient: √‖G‖ ⁄ T · α, or 1⁄T where there is no bargain.
pub fn nash_mtl(gram: &Gram) -> Vec<f64> {
    let n = gram.tasks();
    let Some(alpha) = nash_bargain(gram) else { return vec![1.0 / n as f64; n] };
    let all = (0..n).flat_map(|i| (0..n).map(move |j| gram.get(i, j)));
    let norm = all.map(|v| v * v).sum::<f64>().sqrt();
    alpha.into_iter().map(|a| norm.sqrt() / n as f64 * a).collect()
}
