//! Gradient episodic memory: no step may raise the loss on the memory of any earlier task.
//!
//! With r₁ … r_k the gradients on the memories of the earlier tasks, the step is along the g̃ that is
//! nearest to g with g̃·rᵢ ≥ 0 for all i: g̃ = g + Σ vᵢ rᵢ, where v minimises
//! ½ vᵀRRᵀv + gᵀRᵀv over v ≥ γ (γ = 0 is the projection; above it the step leans towards the memory).
//! Products are over the parameters that have a gradient in g. The program has as many unknowns as
//! there are earlier tasks and is solved in f64 by cyclic coordinate descent, until no v changes by
//! more than 1e-12 of the largest.
//!
//! Lopez-Paz and Ranzato 2017, *Gradient Episodic Memory for Continual Learning*, arXiv 1706.08840.
//! Survey §6.2.

use modl_core::{Error, Result};
use rand::seq::index;
use serde::Deserialize;

use super::{Continual, Learner, TaskContext};
use crate::gradients::{accumulate, dot, where_there};
use crate::{Batch, Dataset, StepContext, StepGradients, StepRule};

/// Settings of GEM.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gem {
    /// Examples that are kept of each task; default 256, the authors'.
    pub memory_per_task: usize,
    /// γ, 0 or more; default 0.5, the authors'.
    pub margin: f64,
}

impl Default for Gem {
    fn default() -> Self {
        Gem { memory_per_task: 256, margin: 0.5 }
    }
}

impl Continual for Gem {
    fn kind(&self) -> &'static str {
        "gem"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if self.memory_per_task == 0 {
            return Err(Error::invalid("memory_per_task", "is to be 1 or more"));
        }
        if !(self.margin >= 0.0 && self.margin.is_finite()) {
            return Err(Error::invalid("margin", "is to be 0 or more"));
        }
        Ok(Box::new(Constrained { config: self.clone(), memories: Vec::new() }))
    }
}

#[derive(Debug)]
struct Constrained {
    config: Gem,
    /// What is kept of each earlier task.
    memories: Vec<Dataset>,
}

impl StepRule for Constrained {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut references = Vec::new();
        for (n, memory) in self.memories.iter().enumerate() {
            let rows: Vec<usize> = (0..memory.len()).collect();
            let rows = memory.batch(&rows, cx.model().device())?;
            references.push(cx.gradients_of(&cx.loss_of_part(&rows, 1 + n as u64)?)?);
        }
        let mut step = cx.gradients(batch)?;
        let references: Vec<_> =
            references.into_iter().map(|r| where_there(r, &step.grads)).collect();
        let along: Vec<f64> =
            references.iter().map(|r| dot(&step.grads, r)).collect::<Result<_>>()?;
        let turned = along.iter().any(|a| *a < 0.0);
        if turned {
            let row = |a| references.iter().map(|b| dot(a, b)).collect::<Result<Vec<f64>>>();
            let gram = references.iter().map(|a| row(a)).collect::<Result<Vec<_>>>()?;
            let v = solve(&gram, &along, self.config.margin);
            for (factor, reference) in v.iter().zip(&references) {
                accumulate(&mut step.grads, *factor, reference)?;
            }
        }
        step.noted.insert("gem".into(), f64::from(turned));
        Ok(step)
    }
}

impl Learner for Constrained {
    /// What is kept of the tasks follows from the seed, so nothing is saved.
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.memories.clear();
        for task in cx.tasks.iter().take(cx.index) {
            let data = cx.job.data.of_task(task)?;
            let count = self.config.memory_per_task.min(data.len());
            let mut rng = cx.job.seed().child("gem").child(task).rng();
            self.memories.push(data.rows(&index::sample(&mut rng, data.len(), count).into_vec())?);
        }
        Ok(())
    }
}

/// The v ≥ `least` that minimises ½ vᵀ `gram` v + `along`ᵀ v.
fn solve(gram: &[Vec<f64>], along: &[f64], least: f64) -> Vec<f64> {
    let mut v = vec![least; along.len()];
    for _ in 0..100_000 {
        let mut moved: f64 = 0.0;
        for (i, (row, a)) in gram.iter().zip(along).enumerate() {
            let (Some(own), Some(old)) = (row.get(i).copied(), v.get(i).copied()) else { continue };
            if own <= 0.0 {
                continue;
            }
            let slope = a + row.iter().zip(&v).map(|(g, v)| g * v).sum::<f64>();
            let new = (old - slope / own).max(least);
            moved = moved.max((new - old).abs());
            if let Some(slot) = v.get_mut(i) {
                *slot = new;
            }
        }
        let largest = v.iter().fold(1e-300, |m: f64, x| m.max(x.abs()));
        if moved <= 1e-12 * largest {
            break;
        }
    }
    v
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn product(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    proptest! {
        /// The conditions of Karush, Kuhn and Tucker, by which the projection is known: no reference is
        /// gone against, only references that are touched push, and towards themselves.
        #[test]
        fn the_step_is_the_nearest_that_no_memory_objects_to(
            g in prop::collection::vec(-1.0f64..1.0, 8),
            r in prop::collection::vec(prop::collection::vec(-1.0f64..1.0, 8), 1..4),
        ) {
            let gram: Vec<Vec<f64>> =
                r.iter().map(|a| r.iter().map(|b| product(a, b)).collect()).collect();
            let along: Vec<f64> = r.iter().map(|r| product(&g, r)).collect();
            let v = solve(&gram, &along, 0.0);
            let step: Vec<f64> =
                (0..8).map(|j| g[j] + v.iter().zip(&r).map(|(v, r)| v * r[j]).sum::<f64>()).collect();
            for (v, r) in v.iter().zip(&r) {
                let touch = product(&step, r);
                prop_assert!(*v >= 0.0 && touch >= -1e-6, "{v} {touch}");
                prop_assert!(*v * touch < 1e-6, "{v} {touch}");
            }
        }
    }

    #[test]
    fn one_memory_is_the_formula_of_a_gem() {
        let (g, r) = ([1.0, -2.0, 0.5], [0.5, 1.0, 0.0]);
        let v = solve(&[vec![product(&r, &r)]], &[product(&g, &r)], 0.0);
        assert!((v[0] + product(&g, &r) / product(&r, &r)).abs() < 1e-12);
        assert_eq!(solve(&[vec![1.0]], &[0.5], 0.0), [0.0]);
        assert_eq!(solve(&[vec![1.0]], &[0.5], 0.3), [0.3]);
    }
}
