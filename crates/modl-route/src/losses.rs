//! Auxiliary losses of learned routers, over all N routed rows or real tokens and m modules:
//!
//! - [`balance`]: m · Σⱼ fⱼ Pⱼ, fⱼ = the share of module j in the choices (without gradient), Pⱼ =
//!   the mean of pⱼ (Switch: Fedus, Zoph, Shazeer 2022, arXiv 2101.03961, eq. 4). It is 1 where f or
//!   P is uniform. It is no distance: where f and P fall apart it may be below 1.
//! - [`z`]: mean of (ln Σⱼ exp ℓⱼ)², which keeps the scores small (ST-MoE: Zoph et al. 2022,
//!   arXiv 2202.08906, eq. 5).
//! - [`cv2`]: variance ⁄ mean² over the modules, the variance over m (not m − 1): of the importance
//!   and of the load (Shazeer et al. 2017, arXiv 1701.06538, eq. 7 and 11). It is 0 only where all
//!   modules have the same.

use modl_core::{Result, Tensor};

use crate::scores::Scored;

/// m · Σ f P over the real units.
pub(crate) fn balance(p: &Tensor, index: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let m = p.len_of(-1);
    let chosen = index.one_hot(m)?.to_kind(p.kind())?.mean_dims(&[-2], false)?;
    let f = mean_of_units(&chosen, mask)?;
    f.mul(&mean_of_units(p, mask)?)?.sum()?.mul_scalar(m as f64)
}

/// Mean of (ln Σ exp ℓ)² over the real units.
pub(crate) fn z(scored: &Scored) -> Result<Tensor> {
    let squares = scored.logits.logsumexp(-1)?.square()?.unsqueeze(-1)?;
    mean_of_units(&squares, scored.mask.as_ref())?.sum()
}

/// Variance ⁄ mean² of numbers that are not negative, `[m]`; 0 where all are 0.
pub(crate) fn cv2(values: &Tensor) -> Result<Tensor> {
    let mean = values.mean()?;
    values.sub(&mean)?.square()?.mean()?.div(&mean.square()?.clamp(1e-30, f64::INFINITY)?)
}

/// The mean of `[…, n]` over all but the last dimension, and there over what the mask calls real;
/// 0 for an empty batch.
pub(crate) fn mean_of_units(t: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let flat = t.reshape(&[t.numel() as i64 / t.len_of(-1).max(1), t.len_of(-1)])?;
    let real = match mask {
        Some(mask) => mask.to_kind(t.kind())?.reshape(&[flat.len_of(0), 1])?,
        None => Tensor::ones(&[flat.len_of(0), 1], t.kind(), t.device())?,
    };
    let count = real.sum()?.clamp(1.0, f64::INFINITY)?;
    flat.mul(&real)?.sum_dims(&[0], false)?.div(&count)
}
