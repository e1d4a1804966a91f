//! Objectives: what is predicted from a model's outputs, and what it costs to be wrong.

mod classification;
mod masked_tokens;
mod next_token;
mod output_embedding;
mod regression;
mod task_heads;

use std::collections::BTreeMap;
use std::fmt::Debug;

use modl_core::{Context, Error, Init, Kind, Modular, Result, Seed, Tensor, Tensors};

pub use classification::Classification;
pub use masked_tokens::{MaskedTokens, Shown, SpecialTokens};
pub use next_token::NextToken;
pub use regression::Regression;

use crate::{Batch, Prediction};

/// A prediction and its loss.
pub trait Objective: Debug {
    /// Makes the parameters of the head, under `heads.NAME.`; called once, before training.
    ///
    /// # Errors
    /// Where the head exists already.
    fn setup(&self, model: &mut Modular) -> Result<()>;

    /// What the model says of each row, `[batch, …]` f32: a number, or the logits of a choice.
    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor>;

    /// The loss of each row, `[batch]` f32, of what was predicted.
    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor>;

    /// How far two predictions of the same rows are apart, `[batch]` f32: 0 where they are equal.
    fn divergence(&self, a: &Tensor, b: &Tensor, batch: &Batch) -> Result<Tensor>;

    /// How far the prediction of each row is from what another model said of it, `[batch]` f32: the
    /// square of the difference, where nothing else is said. `temperature` is for distributions.
    fn distill(&self, predicted: &Tensor, taught: &Tensor, temperature: f64) -> Result<Tensor> {
        let _ = temperature;
        let rows = predicted.len_of(0);
        predicted.sub(taught)?.square()?.reshape(&[rows, -1])?.sum_dims(&[-1], false)
    }

    /// Targets drawn from what was predicted, taken as a distribution whose −ln p is the loss but for
    /// a constant; `[batch]` f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where it is none.
    fn draw(&self, predicted: &Tensor, seed: Seed) -> Result<Tensor> {
        let _ = (predicted, seed);
        let what = format!("drawing labels from {self:?}");
        Err(Error::unsupported(what, "take the labels of the data"))
    }

    /// Whether a row's loss is −ln p of what is right, as that of a choice is, rather than an error.
    fn is_likelihood(&self) -> bool {
        !self.classes().is_empty()
    }

    /// Whether what is said of a row depends on its task beside the model, as where each task has a head.
    fn asks_task(&self) -> bool {
        false
    }

    /// The mean loss of the batch, `[]` f32.
    fn loss(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        self.losses(&self.predict(model, batch, cx)?, batch)?.mean()
    }

    /// What is kept of each row's prediction for the metrics: the numbers themselves, where nothing
    /// else is said.
    fn said(&self, predicted: &Tensor, batch: &Batch) -> Result<Vec<Said>> {
        let (said, right) = (predicted.to_vec::<f64>()?, batch.targets.to_vec::<f64>()?);
        let all = said.into_iter().zip(right);
        Ok(all.map(|(prediction, target)| Said { target, prediction, weight: 1.0 }).collect())
    }

    /// The metrics, the most important one first; those of [`Regression`] where nothing is said.
    fn metrics(&self) -> &'static [Metric] {
        Regression::METRICS
    }

    /// The [`Objective::metrics`] of some predictions by key, those of them that are defined.
    fn scores(&self, predictions: &[&Prediction]) -> BTreeMap<String, f64> {
        crate::scores(predictions.iter().copied(), 0.0)
    }

    /// The names of what is chosen among, in the order of their indices; none where it is no choice.
    /// A run keeps them.
    fn classes(&self) -> &[String] {
        &[]
    }
}

/// What is kept of the prediction for a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Said {
    /// What is right.
    pub target: f64,
    /// What the model says.
    pub prediction: f64,
    /// What the row counts in means.
    pub weight: f64,
}

/// A metric by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its name in files.
    pub key: &'static str,
    /// Its name in tables and figures.
    pub title: &'static str,
}

/// The mean of a model's last hidden states over the real tokens of a batch, `[batch, dim]` f32: over
/// all where neither the batch nor the model has an `attention_mask`, as with images. Where a module
/// has lengthened the sequence, the tokens that it put in are among them.
///
/// # Errors
/// Where `last_hidden_state` is not among the outputs, or does not fit the mask.
pub fn sentence_vectors(outputs: &Tensors, batch: &Batch) -> Result<Tensor> {
    let hidden = outputs.need("last_hidden_state")?.to_kind(Kind::Float)?; // [batch, seq, dim]
    let longer = outputs.get("attention_mask");
    match longer.or_else(|| batch.inputs.get("attention_mask")) {
        Some(mask) => hidden.masked_mean(mask),
        None if hidden.len_of(1) == 1 => hidden.squeeze(1),
        None => hidden.mean_dims(&[1], false),
    }
}

/// Makes `heads.NAME.weight` `[outputs, dim]` (uniform in ±1⁄√dim) and `heads.NAME.bias` `[outputs]`
/// (0).
fn make_head(model: &mut Modular, name: &str, outputs: i64, dim: i64) -> Result<()> {
    let mut scope = model.scope(&format!("heads.{name}"));
    scope.param("weight", &[outputs, dim], Init::Kaiming)?;
    scope.param("bias", &[outputs], Init::Zeros)?;
    Ok(())
}

/// What the head says of the rows' sentence vectors, `[batch, outputs]` f32.
fn apply_head(model: &Modular, name: &str, batch: &Batch, cx: &Context) -> Result<Tensor> {
    let weight = model.params().get(&format!("heads.{name}.weight"))?;
    let bias = model.params().get(&format!("heads.{name}.bias"))?;
    let mean = sentence_vectors(&model.forward(&batch.inputs, cx)?, batch)?;
    mean.linear(weight, Some(bias))
}

/// ½ (KL(p‖q) + KL(q‖p)) = ½ Σ (p − q)(ln p − ln q) of the distributions with logits `a` and `b`,
/// over the last dimension.
fn symmetric_kl(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.log_softmax(-1)?, b.log_softmax(-1)?);
    let apart = a.exp()?.sub(&b.exp()?)?.mul(&a.sub(&b)?)?;
    apart.sum_dims(&[-1], false)?.mul_scalar(0.5)
}

/// The part of a backbone's `states` `[batch, own, …]` that is of the batch's own tokens, in f32 or f64.
/// What modules put in is to stand before the text.
///
/// # Errors
/// Where there are fewer states than tokens, or modules have put tokens after the text or between.
fn of_text(states: &Tensor, outputs: &Tensors, batch: &Batch, who: &str) -> Result<Tensor> {
    let mask = batch.inputs.need("attention_mask")?;
    let (own, seq) = (states.len_of(1), mask.len_of(1));
    if states.dim() != 3 || own < seq {
        let problem = format!("are {:?} for {seq} tokens; take another backbone", states.size());
        return Err(Error::invalid(format!("{who}: states"), problem));
    }
    if let (true, Some(longer)) = (own > seq, outputs.get("attention_mask")) {
        let text = longer.narrow(1, own - seq, seq)?.to_kind(Kind::Int64)?;
        if !text.bit_equal(&mask.to_kind(Kind::Int64)?)? {
            return Err(Error::unsupported(
                who,
                "a module puts tokens after the text or between; choose one that puts them first",
            ));
        }
    }
    let wide = if states.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    states.narrow(1, own - seq, seq)?.to_kind(wide)
}

/// The mean of a number of each row over tokens, of which a row has as many as its weight; `None` without
/// any.
fn per_token(predictions: &[&Prediction], of: impl Fn(&Prediction) -> f64) -> Option<f64> {
    let tokens: f64 = predictions.iter().map(|p| p.weight).sum();
    let sum: f64 = predictions.iter().map(|p| p.weight * of(p)).sum();
    (tokens > 0.0).then(|| sum / tokens)
}
