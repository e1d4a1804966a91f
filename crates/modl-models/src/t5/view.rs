//! What the attention of a stack may look at, and from where.

use modl_core::{Result, Tensor, Tensors};

use super::bias::Buckets;
use crate::mask::{additive, causal};
use crate::moe::RouterLogits;

/// How a stack sees positions.
#[derive(Debug)]
pub(super) struct Bias {
    /// `[buckets, heads]`, block 0's and shared by all others.
    pub(super) table: Tensor,
    pub(super) buckets: Buckets,
    /// Whether nobody looks ahead.
    pub(super) causal: bool,
}

/// The companions of a stack's hidden states, and what follows from them for the scores.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) bias: &'a Bias,
    /// `mask` `[batch, seq]` and `positions` `[batch or 1, seq]`; in the decoder also
    /// `encoder_hidden_states` `[batch, keys, d_model]` and `encoder_attention_mask`
    /// `[batch, keys]`.
    pub(super) with: Tensors,
    /// Added to the scores of self-attention, `[batch or 1, heads, seq, seq]`.
    pub(super) own: Tensor,
    /// Added to the scores of cross-attention, `[batch, 1, 1, keys]`.
    pub(super) across: Option<Tensor>,
    /// Where routers leave their logits.
    pub(super) router_logits: RouterLogits,
}

impl Bias {
    /// Added to the scores over `count` keys right before the first of `positions` `[batch, seq]`:
    /// `[batch, heads, seq, count]`.
    pub(super) fn before(&self, positions: &Tensor, count: i64) -> Result<Tensor> {
        let place = Tensor::arange(count, positions.device())?.shift(-count)?.unsqueeze(0)?;
        let keys = positions.narrow(1, 0, 1)?.add(&place)?;
        self.buckets.bias(&self.table, positions, &keys)
    }
}

impl<'a> View<'a> {
    pub(super) fn new(bias: &'a Bias, with: Tensors) -> Result<Self> {
        let mask = with.need("mask")?;
        let positions = with.need("positions")?;
        let near = bias.buckets.bias(&bias.table, positions, positions)?;
        let hidden = match bias.causal {
            true => Some(causal(mask, mask.len_of(1))?),
            false => additive(mask)?,
        };
        let own = match hidden {
            // Not the sum, which in f16 could be −∞, and NaN in a row that is all padding.
            Some(hidden) => near.where_else(&hidden.eq_scalar(0.0)?, &hidden)?,
            None => near,
        };
        let across = with.get("encoder_attention_mask").map(additive).transpose()?.flatten();
        Ok(View { bias, with, own, across, router_logits: RouterLogits::default() })
    }

    /// The companions with a row of positions for each row of the batch.
    pub(super) fn companions(&self) -> Result<Tensors> {
        let (mask, positions) = (self.with.need("mask")?, self.with.need("positions")?);
        Ok(self.with.clone().with("positions", positions.expand(&mask.size())?))
    }
}
