//! Ties between equal scores, which are the rule with W = 0, are broken by vⱼ·x̄ with fixed random
//! directions vⱼ: the same input goes to the same module, different inputs to different ones.

use modl_core::{Init, Result, Seed, Tensor};

use crate::scores::Scored;

/// v, `[modules, width]`.
#[derive(Debug)]
pub(crate) struct Ties(Tensor);

impl Ties {
    /// Directions for scores with the weights W `[modules, width]`, drawn from `seed` for the router
    /// at `path`. Those of the first modules do not depend on how many follow.
    pub(crate) fn new(seed: u64, path: &str, w: &Tensor) -> Result<Self> {
        let seed = Seed(seed).child(path);
        Ok(Ties(Init::Normal(1.0).tensor(&w.size(), seed, w.kind(), w.device())?))
    }

    /// The k modules with the largest ℓ, and among equal ones the largest v·x̄, `[batch, (seq,) k]`.
    pub(crate) fn largest(&self, scored: &Scored, k: usize) -> Result<Tensor> {
        let logits = scored.logits.detach()?;
        let second = scored.x.detach()?.linear(&self.0.to_kind(scored.x.kind())?, None)?;
        let (_, order) = second.sort(-1, true)?;
        // A stable sort by ℓ leaves equal ones in the order of v·x̄.
        let ranked = logits.gather(-1, &order)?.argsort(-1, true)?;
        order.gather(-1, &ranked)?.narrow(-1, 0, k as i64)
    }
}
