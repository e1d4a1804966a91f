//! The k largest scores. Which of several modules with the same score is taken is decided by vⱼ·x̄ with fixed
//! random directions vⱼ: the same input goes to the same module, different inputs to different ones.

use modl_core::{Error, Init, Result, Seed, Tensor};

/// Checks that `method` can choose k of so many modules.
///
/// # Errors
/// With the key `method.k`.
pub(crate) fn check_k(method: &str, k: usize, modules: usize) -> Result<()> {
    if k == 0 || k > modules {
        let problem = format!("is {k}, there are {modules} modules to choose from");
        return Err(Error::invalid(format!("{method}.k"), problem));
    }
    Ok(())
}

/// v.
#[derive(Debug)]
pub(crate) struct Ties {
    /// `[modules, width]`.
    directions: Tensor,
}

impl Ties {
    /// For the router at `path` over modules that are scored by W `[modules, width]`.
    pub(crate) fn new(seed: u64, path: &str, weight: &Tensor) -> Result<Ties> {
        let (shape, kind, device) = (weight.size(), weight.kind(), weight.device());
        let directions = Init::Normal(1.0).tensor(&shape, Seed(seed).child(path), kind, device)?;
        Ok(Ties { directions })
    }

    /// The indices of the k largest scores, `[…, modules]` → `[…, k]`, and among equal ones of the
    /// largest v·x̄, with x̄ `[…, width]`.
    pub(crate) fn largest(&self, scores: &Tensor, x: &Tensor, k: usize) -> Result<Tensor> {
        let second = x.detach()?.linear(&self.directions.to_kind(x.kind())?, None)?;
        let (_, order) = second.sort(-1, true)?;
        // A stable sort by the scores leaves equal ones in the order of v·x̄.
        let ranked = scores.detach()?.gather(-1, &order)?.argsort(-1, true)?;
        order.gather(-1, &ranked)?.narrow(-1, 0, k as i64)
    }
}
