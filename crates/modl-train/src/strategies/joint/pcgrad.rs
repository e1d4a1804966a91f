//! PCGrad (Yu et al. 2020, *Gradient surgery for multi-task learning*, arXiv 2001.06782; survey §6.1):
//! what of a task's gradient would undo another task's is taken away.
//!
//! For each task i, for the other tasks j in random order: where gᵢ′·gⱼ < 0,
//! gᵢ′ ← gᵢ′ − (gᵢ′·gⱼ ⁄ ‖gⱼ‖²) gⱼ with gⱼ as it was at first. The sum of all gᵢ′ is what is followed.
//!
//! All gᵢ′ are combinations of the gradients, so that the T × T products are enough. The authors' code
//! draws an order and then does not use it, and divides by the square of a norm that may be 0; here the
//! order is used, and a gradient of 0 is passed over.

use modl_core::{Result, Seed};
use rand::seq::SliceRandom;
use serde::Deserialize;

use super::balanced::{Balance, Balanced, Seen};
use super::{Gram, Job, Multitask};
use crate::StepRule;

/// Conflicting gradients projected: Σ gᵢ′ ⁄ T, so that a learning rate means what it does in `joint`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PcGrad {}

impl Multitask for PcGrad {
    fn kind(&self) -> &'static str {
        "pcgrad"
    }

    fn rule(&self, _: &Job) -> Result<Box<dyn StepRule>> {
        Ok(Box::new(Balanced(self.clone())))
    }
}

impl Balance for PcGrad {
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
        let share = 1.0 / seen.tasks.len() as f64;
        let factors = pcgrad(seen.gram, seen.seed.child("pcgrad"));
        Ok((factors.into_iter().map(|f| f * share).collect(), None))
    }
}

/// The factor of each task's gradient in Σ gᵢ′; exactly 1 for all where none contradicts another.
/// `seed` gives the order in which a task meets the others.
pub fn pcgrad(gram: &Gram, seed: Seed) -> Vec<f64> {
    let n = gram.tasks();
    let mut sum = vec![0.0; n];
    for i in 0..n {
        let mut others: Vec<usize> = (0..n).filter(|j| *j != i).collect();
        others.shuffle(&mut seed.nth(i as u64).rng());
        // gᵢ′ as a combination of all gradients.
        let mut own = vec![0.0; n];
        own[i] = 1.0;
        for j in others {
            let product: f64 = (0..n).map(|k| own[k] * gram.get(k, j)).sum();
            if product < 0.0 && gram.get(j, j) > 0.0 {
                own[j] -= product / gram.get(j, j);
            }
        }
        sum.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
    }
    sum
}
