//! The weighted average: θ = Σ wᵢ θᵢ ⁄ Σ wᵢ.
//!
//! With equal weights a uniform soup (Wortsman et al. 2022, arXiv 2203.05482), with two models linear
//! interpolation and the path of mode connectivity. Without `normalize`, Σ wᵢ θᵢ.

use modl_core::{Error, Result};

use super::combination::combination;
use crate::merge::{Blend, Group, MergeMethod, Setting, Settings, Spec};

/// Σ wᵢ θᵢ ⁄ Σ wᵢ.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linear;

const SETTINGS: &[Setting] = &[
    Setting::each("weight", "share of the model"),
    Setting::flag("normalize", true, "divide by the sum of the weights"),
];

impl MergeMethod for Linear {
    fn spec(&self) -> Spec {
        Spec::new("linear", "Weighted average", "Wortsman et al. 2022").settings(SETTINGS)
    }

    fn prepare<'a>(&self, _: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let weights = settings.each("weight")?;
        let total = if settings.flag("normalize")? { weights.iter().sum() } else { 1.0 };
        if total == 0.0 {
            let problem = "sum to 0; set `normalize: false` for a plain sum";
            return Err(Error::invalid("parameter `weight`", problem));
        }
        Ok(combination(&weights, total))
    }
}
