//! The hard concrete distribution: gates in [0, 1] that are exactly 0 or 1 with positive
//! probability, and differentiable in α where they are neither.
//!
//! u ~ U(0, 1), s = σ((ln u − ln(1 − u) + α) ⁄ β), z = min(1, max(0, s·(r − l) + l));
//! P(z > 0) = σ(α − β ln(−l ⁄ r)). The gate without noise is that of s = σ(α).
//!
//! Louizos, Welling and Kingma 2018, *Learning Sparse Neural Networks through L₀ Regularization*,
//! arXiv 1712.01312. Survey §3.1.

use modl_core::{Error, Init, Result, Seed, Tensor};
use serde::{Deserialize, Serialize};

/// The distribution, without its location α.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardConcrete {
    /// l, below 0.
    pub lower: f64,
    /// r, above 1.
    pub upper: f64,
    /// β, above 0: how far from a step the gates are.
    pub temperature: f64,
}

impl HardConcrete {
    /// Louizos et al.: l = −0.1, r = 1.1, β = 2⁄3.
    pub const LOUIZOS: HardConcrete =
        HardConcrete { lower: -0.1, upper: 1.1, temperature: 2.0 / 3.0 };

    /// The code of diff pruning: l = −1.5, r = 1.5, β = 1.
    pub const DIFF_PRUNING: HardConcrete =
        HardConcrete { lower: -1.5, upper: 1.5, temperature: 1.0 };

    /// # Errors
    /// Where l ≥ 0, r ≤ 1 or β ≤ 0: then gates cannot be exactly 0 and 1.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        let HardConcrete { lower, upper, temperature } = *self;
        let fits = lower < 0.0 && upper > 1.0 && temperature > 0.0;
        if fits && [lower, upper, temperature].iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        let problem = format!("is {self:?}, wants lower < 0, upper > 1 and temperature > 0");
        Err(Error::invalid(what, problem))
    }

    /// A draw of z for each element of α.
    pub fn sample(&self, alpha: &Tensor, seed: Seed) -> Result<Tensor> {
        // As in the paper's code, u keeps away from 0 and 1, whose logarithms are infinite.
        let u = Init::Uniform(0.5).tensor(&alpha.size(), seed, alpha.kind(), alpha.device())?;
        let u = u.add_scalar(0.5)?.clamp(1e-4, 1.0 - 1e-4)?;
        let noise = u.log()?.sub(&u.neg()?.add_scalar(1.0)?.log()?)?;
        self.stretch(&alpha.add(&noise)?.mul_scalar(1.0 / self.temperature)?)
    }

    /// z without noise, as in evaluation.
    pub fn without_noise(&self, alpha: &Tensor) -> Result<Tensor> {
        self.stretch(alpha)
    }

    /// P(z > 0) for each element of α.
    pub fn open(&self, alpha: &Tensor) -> Result<Tensor> {
        let shift = self.temperature * (-self.lower / self.upper).ln();
        alpha.add_scalar(-shift)?.sigmoid()
    }

    fn stretch(&self, logits: &Tensor) -> Result<Tensor> {
        let wide = logits.sigmoid()?.mul_scalar(self.upper - self.lower)?;
        wide.add_scalar(self.lower)?.clamp(0.0, 1.0)
    }
}
