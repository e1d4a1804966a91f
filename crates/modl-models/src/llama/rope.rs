//! Rotary positions: pairs of a head's numbers are rotated by angles that grow with the position.
//!
//! The pair (j, j + d⁄2) of a head of width d at position p is rotated by p · base^(−2j⁄d).
//!
//! Su et al. 2021, *RoFormer: Enhanced Transformer with Rotary Position Embedding*, arXiv
//! 2104.09864, in the order of the halves that transformers uses.

use modl_core::{Device, Kind, Result, Tensor};

/// Cosines and sines of all angles of a batch, `[batch, 1, seq, head_dim]` each.
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

/// The angle by which each pair turns from one position to the next, `[head_dim ⁄ 2]` f32.
pub(super) fn frequencies(base: f64, width: i64, device: Device) -> Result<Tensor> {
    let half = width / 2;
    // As transformers: the exponent in f32.
    let all = (0..half).map(|j| (base as f32).powf((2 * j) as f32 / width as f32).recip());
    Tensor::from_slice(&all.collect::<Vec<f32>>(), &[half], device)
}

impl Rotation {
    /// For tokens at `positions` `[batch, seq]`, in `kind`.
    pub(super) fn new(frequencies: &Tensor, positions: &Tensor, kind: Kind) -> Result<Self> {
        let angles = positions.to_kind(Kind::Float)?.unsqueeze(-1)?.mul(frequencies)?;
        let angles = Tensor::cat(&[angles.clone(), angles], -1)?.unsqueeze(1)?;
        Ok(Rotation { cos: angles.cos()?.to_kind(kind)?, sin: angles.sin()?.to_kind(kind)? })
    }

    /// x `[batch, heads, seq, head_dim]`, rotated.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.len_of(-1) / 2;
        let turned = Tensor::cat(&[x.narrow(-1, half, half)?.neg()?, x.narrow(-1, 0, half)?], -1)?;
        x.mul(&self.cos)?.addcmul(&turned, &self.sin)
    }
}
