//! The sum of task vectors of which only the largest numbers are kept (PEFT's `magnitude_prune`).

use modl_core::Result;

use super::sparsity::trimmed;
use super::task_vectors::{
    DENSITY, Divisor, Election, LAMBDA, Rescale, TaskVectors, WEIGHT, normalize, sparse,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// θ₀ + λ Σ wᵢ trim(τᵢ).
#[derive(Debug, Clone, Copy, Default)]
pub struct MagnitudePrune;

const SETTINGS: &[Setting] = &[WEIGHT, DENSITY, LAMBDA, normalize(false)];

impl MergeMethod for MagnitudePrune {
    fn spec(&self) -> Spec {
        Spec::new("magnitude_prune", "Sum of trimmed task vectors", "PEFT")
            .settings(SETTINGS)
            .base(Base::Required)
            .selects()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let kept = sparse(group, trimmed(group, &densities)?, Rescale::No, &densities)?;
        TaskVectors::of(settings, kept, (Election::None, Divisor::of(settings)?))?.blend(group)
    }
}
