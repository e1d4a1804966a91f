//! Task arithmetic: θ = θ₀ + λ Σ wᵢ(θᵢ − θ₀).
//!
//! Adding tasks, taking one away with a negative weight, or an analogy (τ_c + τ_b − τ_a) (Ilharco et
//! al. 2023, arXiv 2212.04089). The paper's λ is 0.3 to 0.4 for sums of many tasks.

use modl_core::Result;

use super::sparsity::{Keep, Sparse};
use super::task_vectors::{
    DENSITY, Divisor, Election, INT8_MASK, LAMBDA, TaskVectors, WEIGHT, normalize, rescale,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// θ₀ + λ Σ wᵢτᵢ.
#[derive(Debug, Clone, Copy, Default)]
pub struct TaskArithmetic;

// mergekit takes `density` and `rescale` here, too, and does nothing with them.
const SETTINGS: &[Setting] =
    &[WEIGHT, DENSITY, LAMBDA, normalize(false), rescale(false), INT8_MASK];

impl MergeMethod for TaskArithmetic {
    fn spec(&self) -> Spec {
        Spec::new("task_arithmetic", "Sum of task vectors", "Ilharco et al. 2023")
            .settings(SETTINGS)
            .base(Base::Required)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let all = group.others().iter().map(|_| Sparse { keep: Keep::All, scale: 1.0 }).collect();
        TaskVectors::of(settings, all, (Election::None, Divisor::of(settings)?))?.blend(group)
    }
}
