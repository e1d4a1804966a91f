//! Attention masks: from 1 for real tokens and 0 for padding to what is added to the scores.

use modl_core::{Context, Error, Kind, Result, Signal, Tensor};

/// Checks a mask `[batch, seq]` of ones and zeros and brings it into `kind`; ones where there is
/// none.
///
/// # Errors
/// Where its shape is not that of the ids, or it holds anything but 0 and 1.
pub(crate) fn read_mask(mask: Option<&Tensor>, ids: &Tensor, kind: Kind) -> Result<Tensor> {
    let Some(mask) = mask else { return Tensor::ones(&ids.size(), kind, ids.device()) };
    let refuse = |problem: String| Err(Error::invalid("attention_mask", problem));
    if mask.size() != ids.size() {
        return refuse(format!("has shape {:?}, but input_ids {:?}", mask.size(), ids.size()));
    }
    match mask.to_vec::<f64>()?.iter().find(|m| **m != 0.0 && **m != 1.0) {
        Some(m) => refuse(format!("holds {m}; it is 1 for tokens that count and 0 for padding")),
        None => mask.to_kind(kind)?.to_device(ids.device()),
    }
}

/// What is added to attention scores: 0 where a key may be looked at and the smallest number of the
/// mask's kind where not; `[batch, 1, 1, keys]`. `None` where nothing is masked.
pub(crate) fn additive(mask: &Tensor) -> Result<Option<Tensor>> {
    let hidden = mask.eq_scalar(0.0)?;
    if hidden.sum()?.item()? == 0.0 {
        return Ok(None);
    }
    let zeros = mask.zeros_like()?;
    zeros.masked_fill(&hidden, smallest(mask.kind()))?.unsqueeze(1)?.unsqueeze(1).map(Some)
}

/// What is added to the scores of the last `queries` of a sequence in which nobody looks ahead:
/// `[batch, 1, queries, keys]` for `mask` `[batch, keys]`.
pub(crate) fn causal(mask: &Tensor, queries: i64) -> Result<Tensor> {
    let keys = mask.len_of(1);
    let place = Tensor::arange(keys, mask.device())?;
    let own = place.narrow(0, keys - queries, queries)?.unsqueeze(1)?;
    let ahead = place.unsqueeze(0)?.greater(&own)?; // [queries, keys]
    let padding = mask.eq_scalar(0.0)?.unsqueeze(1)?.unsqueeze(1)?;
    let hidden = padding.logical_or(&ahead)?;
    let zeros = Tensor::zeros(&hidden.size(), mask.kind(), mask.device())?;
    zeros.masked_fill(&hidden, smallest(mask.kind()))
}

/// The context in which layers run, with the mask of the tokens that modules have put in.
pub(crate) fn with_mask(x: &Signal, cx: &Context) -> Result<Context> {
    Ok(cx.clone().with_feature("mask", x.with.need("mask")?.clone()))
}

/// The smallest finite number of a kind. Unlike −∞ it makes no NaN of a row that is all padding.
fn smallest(kind: Kind) -> f64 {
    match kind {
        Kind::Half => -65504.0,
        // Also in range of bf16, whose smallest number is −3.39e38.
        Kind::BFloat16 => -3.3895313892515355e38,
        _ => f64::from(f32::MIN),
    }
}
