//! Causal language modelling: each token from those before it.

use std::collections::BTreeMap;

use modl_core::{Context, Kind, Modular, Result, Tensor};

use super::{Metric, Objective, Said, of_text, per_token, symmetric_kl};
use crate::{Batch, Prediction};

/// Each token from those before it: the loss of a row is the mean of −ln p(xₜ | x₍<ₜ₎) over its tokens
/// t ≥ max(1, s), in nats, with p the softmax of a decoder's `logits` at t − 1. A row's target is s: so
/// many tokens at its start are a prompt that is not counted. Padding is not counted; a row without a
/// token to count has the loss 0.
///
/// There is no head: `logits` `[batch, seq, vocabulary]` are the backbone's, which is to be causal.
/// Tokens that a module puts before the text are context alone. Two predictions are apart by the mean
/// of ½ (KL(p‖q) + KL(q‖p)) over the counted tokens.
///
/// Of a prediction, `prediction` is the row's loss, `weight` its number of tokens and `target` 0. The
/// metrics are `loss`, the mean over all tokens of all rows, and `perplexity` = exp(loss).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NextToken;

impl NextToken {
    /// What predictions are measured by.
    pub const METRICS: &'static [Metric] = &[
        Metric { key: "loss", title: "loss per token" },
        Metric { key: "perplexity", title: "perplexity" },
    ];

    /// 1 for the tokens that are counted and 0 for others, `[batch, seq − 1]`, from the second on.
    fn counted(batch: &Batch, kind: Kind) -> Result<Tensor> {
        let mask = batch.inputs.need("attention_mask")?;
        let places = Tensor::arange(mask.len_of(1), mask.device())?;
        let prompt = batch.targets.to_kind(Kind::Int64)?.unsqueeze(-1)?;
        let text = places.unsqueeze(0)?.sub(&prompt)?.ge_scalar(0.0)?.to_kind(kind)?;
        mask.to_kind(kind)?.mul(&text)?.narrow(1, 1, mask.len_of(1) - 1)
    }

    /// The mean over the counted tokens of each row of `values` `[batch, seq − 1]`.
    fn mean(values: &Tensor, batch: &Batch) -> Result<Tensor> {
        let counted = Self::counted(batch, values.kind())?;
        let tokens = counted.sum_dims(&[-1], false)?.clamp(1.0, f64::INFINITY)?;
        values.mul(&counted)?.sum_dims(&[-1], false)?.div(&tokens)
    }
}

impl Objective for NextToken {
    fn setup(&self, _: &mut Modular) -> Result<()> {
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let outputs = model.forward(&batch.inputs, cx)?;
        of_text(outputs.need("logits")?, &outputs, batch, "next_token")
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        let n = predicted.len_of(1) - 1;
        let logits = predicted.narrow(1, 0, n)?; // [batch, n, vocabulary]
        let next = batch.inputs.need("input_ids")?.narrow(1, 1, n)?.unsqueeze(-1)?;
        // −ln p = ln Σ exp ℓ − ℓ_y: no second tensor as large as the logits is kept.
        let right = logits.gather(-1, &next)?.squeeze(-1)?;
        Self::mean(&logits.logsumexp(-1)?.sub(&right)?, batch)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, batch: &Batch) -> Result<Tensor> {
        let n = a.len_of(1) - 1;
        Self::mean(&symmetric_kl(&a.narrow(1, 0, n)?, &b.narrow(1, 0, n)?)?, batch)
    }

    fn said(&self, predicted: &Tensor, batch: &Batch) -> Result<Vec<Said>> {
        let losses = self.losses(predicted, batch)?.to_vec::<f64>()?;
        let tokens = Self::counted(batch, Kind::Double)?.sum_dims(&[-1], false)?.to_vec::<f64>()?;
        let said = |(prediction, weight)| Said { target: 0.0, prediction, weight };
        Ok(losses.into_iter().zip(tokens).map(said).collect())
    }

    fn is_likelihood(&self) -> bool {
        true
    }

    fn metrics(&self) -> &'static [Metric] {
        Self::METRICS
    }

    fn scores(&self, predictions: &[&Prediction]) -> BTreeMap<String, f64> {
        let Some(loss) = per_token(predictions, |p| p.prediction) else { return BTreeMap::new() };
        [("loss".to_owned(), loss), ("perplexity".to_owned(), loss.exp())].into()
    }
}
