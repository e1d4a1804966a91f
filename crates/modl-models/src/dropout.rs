//! Dropout (Srivastava et al. 2014): each element is zero with probability p and scaled by
//! 1 ⁄ (1 − p) otherwise.
//!
//! On the CPU the product with a mask of x's own kind is several times faster than `masked_fill`
//! and `where`, forward and backward, even with the conversion of the mask.

use modl_core::{Kind, Result, Seed, Tensor, drop_mask};

/// Dropout with a probability and the seed of its draw; `None` for none.
pub(crate) type Drop = Option<(f64, Seed)>;

/// x after dropout.
pub(crate) fn dropout(x: Tensor, drop: Drop) -> Result<Tensor> {
    let Some((p, seed)) = drop else { return Ok(x) };
    let (dropped, scale) = drop_mask(&x.size(), p, seed, x.device())?;
    // By way of f32: the direct conversion of booleans to bf16 is slow.
    let mut keep = dropped.eq_scalar(0.0)?.to_kind(Kind::Float)?;
    keep.mul_scalar_in_place(scale)?;
    x.mul(&keep.to_kind(x.kind())?)
}
