//! Who comes first where scores are equal, which they all are where W starts at 0.
//!
//! Ties are broken by vⱼ·x̄ with fixed random directions vⱼ from a seed and the router's path: the
//! same input goes to the same module, different inputs to different ones.

use modl_core::{Init, Result, Seed, Tensor};

use crate::scores::{Scored, Scorer};

/// v, `[scores, width]`.
#[derive(Debug)]
pub(crate) struct Ties(Tensor);

impl Ties {
    /// Directions for each score of `scorer`.
    pub(crate) fn new(seed: u64, scorer: &Scorer, path: &str) -> Result<Self> {
        let (w, seed) = (&scorer.weight, Seed(seed).child(path));
        Init::Normal(1.0).tensor(&w.size(), seed, w.kind(), w.device()).map(Ties)
    }

    /// v·x̄, `[…, scores]`.
    pub(crate) fn second(&self, x: &Tensor) -> Result<Tensor> {
        x.detach()?.linear(&self.0.to_kind(x.kind())?, None)
    }

    /// The `k` modules with the largest ℓ, `[…, k]`, and among equal ones the largest v·x̄.
    pub(crate) fn largest(&self, scored: &Scored, k: usize) -> Result<Tensor> {
        largest(&scored.logits, &self.second(&scored.x)?, k)
    }
}

/// The indices of the `k` largest `first` along the last dimension, and among equal ones of the
/// largest `second`.
pub(crate) fn largest(first: &Tensor, second: &Tensor, k: usize) -> Result<Tensor> {
    order(first, second, -1)?.narrow(-1, 0, k as i64)
}

/// The indices that put the largest `first` to the front along `dim`, and among equal ones the
/// largest `second`.
pub(crate) fn order(first: &Tensor, second: &Tensor, dim: i64) -> Result<Tensor> {
    let (_, order) = second.sort(dim, true)?;
    // A stable sort by `first` leaves equal ones in the order of `second`.
    let ranked = first.detach()?.gather(dim, &order)?.argsort(dim, true)?;
    order.gather(dim, &ranked)
}
