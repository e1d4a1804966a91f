//! Model breadcrumbs: without the largest and without the smallest numbers of the task vectors.
//!
//! Of each tensor of τᵢ the share `gamma` of largest magnitude is dropped, and then the smallest, so
//! that the share `density` is left; θ = θ₀ + λ Σ wᵢτ̃ᵢ (Davari, Belilovsky 2024, arXiv 2312.06795).
//! `breadcrumbs_ties` elects signs as TIES does.

use modl_core::Result;

use super::sparsity::without_outliers;
use super::task_vectors::{
    DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors, WEIGHT, normalize,
    rescale, sparse,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Neither the largest nor the smallest.
#[derive(Debug, Clone, Copy)]
pub struct Breadcrumbs {
    /// Whether signs are elected.
    pub ties: bool,
}

const SETTINGS: &[Setting] = &[
    WEIGHT,
    DENSITY,
    Setting::each_or("gamma", 0.01, "share of the largest numbers that is dropped"),
    LAMBDA,
    normalize(false),
    rescale(false),
    INT8_MASK,
];

impl MergeMethod for Breadcrumbs {
    fn spec(&self) -> Spec {
        let (name, title) = match self.ties {
            true => ("breadcrumbs_ties", "Without outliers, then elect signs"),
            false => ("breadcrumbs", "Without outliers and small changes"),
        };
        Spec::new(name, title, "Davari & Belilovsky 2024")
            .settings(SETTINGS)
            .base(Base::Required)
            .selects()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let keep = without_outliers(group, &densities, &settings.each("gamma")?)?;
        let kept = sparse(group, keep, Rescale::of(settings)?, &densities)?;
        let election = if self.ties { Election::Weighted } else { Election::None };
        TaskVectors::of(settings, kept, (election, Divisor::of(settings)?))?.blend(group)
    }
}
