//! TIES: trim, elect signs, merge those that agree.
//!
//! Of each task vector τᵢ = θᵢ − θ₀ the share `density` of largest magnitude is kept; a sign is elected
//! for each number, that of the sum; θ = θ₀ + λ · mean of those that have it (Yadav et al. 2023,
//! arXiv 2306.01708). A sum of 0 counts as positive (the paper's code gives it the sign of most sums).
//!
//! | `convention` | sign of | merged as |
//! |---|---|---|
//! | `mergekit` (default) | Σ wᵢτᵢ | Σ wᵢτᵢ ⁄ Σ wᵢ over those that agree; without `normalize` not divided |
//! | `paper` | Σ τᵢ | Σ wᵢτᵢ ⁄ their number; the paper has no weights: 1 |
//! | `peft` | Σ τᵢ, or, with `majority_sign_method: frequency`, of Σ sgn τᵢ | Σ wᵢτᵢ ⁄ their number |
//!
//! The paper keeps the largest numbers of the whole model; mergekit and PEFT those of each tensor.

use modl_core::{Error, Result, ResultExt};

use super::sparsity::{largest_of_model, trimmed, trimmed_over_model};
use super::task_vectors::{
    CONVENTION, Convention, DENSITY, Divisor, Election, INT8_MASK, LAMBDA, Rescale, TaskVectors,
    WEIGHT, convention, normalize, rescale, sparse,
};
use crate::merge::{Base, Blend, Group, Largest, MergeMethod, Setting, Settings, Spec};

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
            .selects()
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let densities = settings.each("density")?;
        let keep = match convention(settings)? {
            Convention::Paper => trimmed_over_model(group, &densities)?,
            _ => trimmed(group, &densities)?,
        };
        let kept = sparse(group, keep, Rescale::of(settings)?, &densities)?;
        TaskVectors::of(settings, kept, consensus(settings)?)?.blend(group)
    }

    fn over_model(&self, tensors: &[(&Group, &Settings)]) -> Result<Option<Vec<Vec<Largest>>>> {
        let Some((_, first)) = tensors.first() else { return Ok(None) };
        let densities = first.each("density")?;
        for (group, settings) in tensors {
            let same = settings.each("density")? == densities
                && convention(settings)? == convention(first)?;
            if convention(settings)? == Convention::Paper && !same {
                let problem = "keeps the largest numbers of a whole model: `density` and \
                               `convention` are to be the same for all tensors";
                return Err(Error::invalid("convention paper", problem)).at(group.name);
            }
        }
        if convention(first)? != Convention::Paper {
            return Ok(None);
        }
        let groups: Vec<&Group> = tensors.iter().map(|(group, _)| *group).collect();
        largest_of_model(&groups, &densities).map(Some)
    }
}

/// How signs are elected and what sums are divided by.
pub(super) fn consensus(settings: &Settings) -> Result<(Election, Divisor)> {
    Ok(match convention(settings)? {
        Convention::Mergekit => (Election::Weighted, Divisor::of(settings)?),
        Convention::Paper => (Election::Total, Divisor::Count),
        Convention::Peft => {
            let election = match settings.word("majority_sign_method", &["total", "frequency"])? {
                "frequency" => Election::Frequency,
                _ => Election::Total,
            };
            (election, Divisor::Count)
        }
    })
}
