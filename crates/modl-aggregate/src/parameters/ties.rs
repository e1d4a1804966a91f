//! TIES: trim, elect signs, merge those that agree.
//!
//! Of each task vector τᵢ = θᵢ − θ₀ the share `density` of largest magnitude is kept; a sign is elected
//! for each number, that of the sum; θ = θ₀ + λ · mean of those that have it (Yadav et al. 2023,
//! arXiv 2306.01708). A sum of 0 counts as positive.
//!
//! | `convention` | sign of | merged as |
//! |---|---|---|
//! | `mergekit` (default) | Σ wᵢτᵢ | Σ wᵢτᵢ ⁄ Σ wᵢ over those that agree; without `normalize` not divided |
//! | `peft` | Σ τᵢ, or, with `majority_sign_method: frequency`, of Σ sgn τᵢ | Σ wᵢτᵢ ⁄ their number |

use modl_core::Result;

use super::sparsity::trimmed;
use super::task_vectors::{
    CONVENTION, Convention, DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors,
    WEIGHT, convention, normalize, rescale, sparse,
};
use crate::merge::{Base, Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Trim, elect, merge.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ties;

/// The setting that `convention: peft` has for its election.
pub(super) const MAJORITY: Setting =
    Setting::word("majority_sign_method", "total", "peft only: total or frequency");

const SETTINGS: &[Setting] =
    &[WEIGHT, DENSITY, LAMBDA, normalize(true), rescale(false), INT8_MASK, CONVENTION, MAJORITY];

impl MergeMethod for Ties {
    fn spec(&self) -> Spec {
        Spec::new("ties", "Trim, elect signs, merge", "Yadav et al. 2023")
            .settings(SETTINGS)
            .base(Base::Required)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let keep = trimmed(group, &densities)?;
        let kept = sparse(group, keep, Rescale::of(settings)?, &densities)?;
        TaskVectors::of(settings, kept, consensus(settings)?)?.blend(group)
    }
}

/// How signs are elected and what sums are divided by.
pub(super) fn consensus(settings: &Settings) -> Result<(Election, Divisor)> {
    Ok(match convention(settings)? {
        Convention::Mergekit => (Election::Weighted, Divisor::of(settings)?),
        Convention::Peft => {
            let election = match settings.word("majority_sign_method", &["total", "frequency"])? {
                "frequency" => Election::Frequency,
                _ => Election::Total,
            };
            (election, Divisor::Count)
        }
    })
}
