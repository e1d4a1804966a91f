//! From a router's logits to the experts of each token and their gates.

use modl_core::{Init, Kind, Result, Tensor};

use super::{MixtureConfig, RouterScores};
use crate::place::{Pass, Place};

/// The indices `[…, k]` and gates `[…, k]` by `logits` `[…, experts]` in f32 at least; `bias`
/// `[experts]` counts for the choice alone.
pub(super) fn choose(
    logits: &Tensor,
    bias: Option<&Tensor>,
    settings: &MixtureConfig,
) -> Result<(Tensor, Tensor)> {
    let k = settings.top_k;
    let (gates, index) = match settings.scores {
        RouterScores::Softmax => logits.softmax(-1)?.topk(k, -1)?,
        RouterScores::Sigmoid { groups, kept } => {
            let scores = logits.sigmoid()?;
            let choice =
                bias.map_or(Ok(scores.clone()), |b| scores.add(&b.to_kind(scores.kind())?))?;
            let (_, index) = in_best_groups(&choice, groups, kept)?.topk(k, -1)?;
            (scores.gather(-1, &index)?, index)
        }
    };
    let gates = match settings.normalised {
        true => gates.div(&gates.sum_dims(&[-1], true)?.add_scalar(SMALLEST)?)?,
        false => gates,
    };
    let gates = if settings.scale == 1.0 { gates } else { gates.mul_scalar(settings.scale)? };
    Ok((index, gates))
}

/// Keeps a sum of gates from being 0; it is lost in any other.
const SMALLEST: f64 = 1e-20;

/// Scores `[…, experts]` with −∞ for all that are not in the `kept` groups whose two best sum to
/// most.
fn in_best_groups(scores: &Tensor, groups: i64, kept: i64) -> Result<Tensor> {
    let size = scores.size();
    let grouped = scores.reshape(&[-1, groups, scores.len_of(-1) / groups.max(1)])?;
    let (best, _) = grouped.topk(2, -1)?;
    let (_, index) = best.sum_dims(&[-1], false)?.topk(kept, -1)?;
    let out = Tensor::ones(&[grouped.len_of(0), groups], scores.kind(), scores.device())?;
    let taken = index.ones_like()?.neg()?.to_kind(scores.kind())?;
    let out = out.scatter_add(-1, &index, &taken)?.to_kind(Kind::Bool)?;
    grouped.masked_fill(&out.unsqueeze(-1)?, f64::NEG_INFINITY)?.reshape(&size)
}

/// x times numbers from [1 − by, 1 + by] in training, drawn for the `router`.
pub(crate) fn jitter(x: &Tensor, by: f64, router: &Place, pass: Pass) -> Result<Tensor> {
    if !pass.cx.train || by == 0.0 {
        return Ok(x.clone());
    }
    let seed = pass.cx.draw(&router.site.path);
    let noise = Init::Uniform(by).tensor(&x.size(), seed, x.kind(), x.device())?;
    x.mul(&noise.add_scalar(1.0)?)
}
