//! One vector for a sentence: the mean of its tokens (Reimers and Gurevych 2019, Sentence-BERT,
//! arXiv 1908.10084), h̄ = Σₜ mₜ hₜ ⁄ Σₜ mₜ.

use modl_core::{Error, Result, Tensor};

/// The mean over the tokens that count: `last_hidden_state` `[batch, seq, dim]` and
/// `attention_mask` `[batch, seq]` → `[batch, dim]`; zeros for a row without any token.
///
/// # Errors
/// Where the shapes do not agree: a module that lengthens the sequence makes the forward pass
/// return the longer `attention_mask`, which is the one to give here.
pub fn mean_pool(last_hidden_state: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
    let (h, mask) = (last_hidden_state, attention_mask);
    if h.dim() != 3 || h.size().get(..2) != Some(mask.size().as_slice()) {
        return Err(Error::invalid(
            "mean_pool",
            format!(
                "hidden states {:?} do not go with a mask {:?}; where modules have lengthened the \
                 sequence, use the `attention_mask` among the outputs",
                h.size(),
                mask.size()
            ),
        ));
    }
    h.masked_mean(mask)
}
