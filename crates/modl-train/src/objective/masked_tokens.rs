//! Masked language modelling: some tokens of a text from all others.

use std::collections::BTreeMap;

use modl_core::{Context, Error, Init, Kind, Modular, Result, Seed, Tensor};
use rand::Rng;

use super::output_embedding::OutputEmbedding;
use super::{Metric, Objective, Said, of_text, per_token};
use crate::{Batch, Prediction};

/// Some tokens from all others (Devlin et al. 2019, *BERT*, arXiv 1810.04805, section 3.1): of a row's
/// n tokens that are not special max(1, round(0.15 n)) are chosen by lot, and each of them is shown as
/// the mask with probability 0.8, as any token of the vocabulary with 0.1, and as it is with 0.1. The
/// loss of a row is the mean of −ln p over its chosen tokens, in nats; a row without any has the loss 0.
///
/// p = softmax(E LN(gelu(W h + c)) + b) with h the last hidden state and E the backbone's own input
/// embeddings, so that no matrix of the vocabulary's size is learned. Learned are
/// `heads.NAME.transform.dense.weight` `[dim, dim]` (uniform in ±1⁄√dim) and `.bias` (0),
/// `heads.NAME.transform.LayerNorm.weight` (1) and `.bias` (0), and `heads.NAME.bias` `[vocabulary]` (0).
/// Where an invertible adapter stands at the embeddings, E is compared with what its inverse makes of
/// the transformed state, as in MAD-X (Pfeiffer et al. 2020, arXiv 2005.00052, section 3.2).
///
/// What is shown is drawn from seed, step and the example's task and id in training; in evaluation from
/// the latter alone, so that a text is always measured with the same masks. What is predicted is
/// `[batch, chosen, 3]`: for each chosen token −ln p, whether the right one is the likeliest, and 1, or
/// 0 for filling up.
///
/// Of a [`Prediction`], `prediction` is the row's loss, `weight` its number of chosen tokens and `target`
/// the share of them of which the right one is the likeliest. The metrics are over all tokens of all
/// rows.
#[derive(Debug, Clone, PartialEq)]
pub struct MaskedTokens {
    /// The name of the head.
    pub head: String,
    /// The share of tokens that are chosen, in (0, 1]; BERT's is 0.15.
    pub rate: f64,
    /// The id of the mask.
    pub mask: i64,
    /// The ids of special tokens, which are never chosen.
    pub special: Vec<i64>,
}

/// The special tokens of a vocabulary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The id of the mask, where there is one.
    pub mask: Option<i64>,
    /// The ids of all of them.
    pub all: Vec<i64>,
}

/// A text with masks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The ids that a model is shown.
    pub ids: Vec<i64>,
    /// The places of the chosen tokens, in order.
    pub chosen: Vec<usize>,
}

impl MaskedTokens {
    /// What predictions are measured by.
    pub const METRICS: &'static [Metric] = &[
        Metric { key: "loss", title: "loss per token" },
        Metric { key: "perplexity", title: "perplexity" },
        Metric { key: "accuracy", title: "accuracy of tokens" },
    ];

    /// What is shown of a text over so many words.
    pub fn show(&self, ids: &[i64], vocabulary: i64, seed: Seed) -> Shown {
        let mut rng = seed.rng();
        let own: Vec<usize> = ids
            .iter()
            .enumerate()
            .filter(|(_, id)| !self.special.contains(id))
            .map(|(place, _)| place)
            .collect();
        let wanted = ((self.rate * own.len() as f64).round() as usize).max(1).min(own.len());
        let lots = rand::seq::index::sample(&mut rng, own.len(), wanted);
        let mut chosen: Vec<usize> = lots.iter().filter_map(|i| own.get(i).copied()).collect();
        chosen.sort_unstable();
        let mut ids = ids.to_vec();
        for place in &chosen {
            let lot: f64 = rng.r#gen();
            let other = rng.gen_range(0..vocabulary.max(1));
            if let Some(id) = ids.get_mut(*place) {
                *id = match lot {
                    _ if lot < 0.8 => self.mask,
                    _ if lot < 0.9 => other,
                    _ => *id,
                };
            }
        }
        Shown { ids, chosen }
    }

    /// What is shown of each row of a batch.
    fn shown(&self, batch: &Batch, vocabulary: i64, cx: &Context) -> Result<Vec<Shown>> {
        const DRAW: &str = "masked_tokens";
        let seed = if cx.train { cx.draw(DRAW) } else { Seed(0).child(DRAW) };
        let (ids, mask) = (batch.inputs.need("input_ids")?, batch.inputs.need("attention_mask")?);
        let (ids, seq) = (ids.to_vec::<i64>()?, ids.len_of(1).max(1) as usize);
        let real = mask.to_kind(Kind::Int64)?.sum_dims(&[-1], false)?.to_vec::<i64>()?;
        let rows = ids.chunks(seq).zip(real).zip(batch.tasks.iter().zip(&batch.ids));
        let show = |((row, real), (task, id)): ((&[i64], i64), (&String, &String))| {
            let (text, padding) = row.split_at_checked(real as usize).unwrap_or((row, &[]));
            let mut shown = self.show(text, vocabulary, seed.child(&format!("{task}/{id}")));
            shown.ids.extend(padding);
            shown
        };
        Ok(rows.map(show).collect())
    }

    /// LN(gelu(W h + c)) of states `[n, dim]`.
    fn transform(&self, model: &Modular, states: &Tensor) -> Result<Tensor> {
        let own = |name: &str| model.params().get(&format!("heads.{}.transform.{name}", self.head));
        let dense = states.linear(own("dense.weight")?, Some(own("dense.bias")?))?.gelu()?;
        dense.layer_norm(own("LayerNorm.weight")?, own("LayerNorm.bias")?, 1e-12)
    }

    fn column(said: &Tensor, n: i64) -> Result<Tensor> {
        said.narrow(-1, n, 1)?.squeeze(-1)
    }

    /// The mean of a column over the chosen tokens of each row.
    fn mean(said: &Tensor, n: i64) -> Result<Tensor> {
        let counted = Self::column(said, 2)?;
        let tokens = counted.sum_dims(&[-1], false)?.clamp(1.0, f64::INFINITY)?;
        Self::column(said, n)?.mul(&counted)?.sum_dims(&[-1], false)?.div(&tokens)
    }

    fn distribution(&self, what: &str) -> Error {
        let advice = "a prediction of masked tokens holds no distribution; take another objective";
        Error::unsupported(format!("{what} of `masked_tokens`"), advice)
    }
}

impl Objective for MaskedTokens {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        let [vocabulary, dim] = OutputEmbedding::of(model)?.size();
        let mut scope = model.scope(&format!("heads.{}", self.head));
        scope.param("transform.dense.weight", &[dim, dim], Init::Kaiming)?;
        scope.param("transform.dense.bias", &[dim], Init::Zeros)?;
        scope.param("transform.LayerNorm.weight", &[dim], Init::Ones)?;
        scope.param("transform.LayerNorm.bias", &[dim], Init::Zeros)?;
        scope.param("bias", &[vocabulary], Init::Zeros)?;
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let embedding = OutputEmbedding::of(model)?;
        let [vocabulary, dim] = embedding.size();
        let right = batch.inputs.need("input_ids")?;
        let (rows, seq) = (right.len_of(0), right.len_of(1));
        let shown = self.shown(batch, vocabulary, cx)?;
        let most = shown.iter().map(|s| s.chosen.len()).max().unwrap_or(0).max(1);
        let (mut ids, mut places, mut counted) = (Vec::new(), Vec::new(), Vec::new());
        for (row, own) in (0..).zip(&shown) {
            ids.extend_from_slice(&own.ids);
            let filled = own.chosen.iter().map(|place| *place as i64);
            places.extend(filled.chain(std::iter::repeat(0)).take(most).map(|p| row * seq + p));
            counted.extend((0..most).map(|n| f32::from(u8::from(n < own.chosen.len()))));
        }
        let device = right.device();
        let mut inputs = batch.inputs.clone();
        inputs.set("input_ids", Tensor::from_slice(&ids, &[rows, seq], device)?);
        let outputs = model.forward(&inputs, cx)?;
        let states = of_text(outputs.need("last_hidden_state")?, &outputs, batch, "masked_tokens")?;
        let places = Tensor::from_slice(&places, &[rows * most as i64], device)?;
        let states = states.reshape(&[rows * seq, dim])?.index_select(0, &places)?;
        let states = self.transform(model, &states)?.reshape(&[rows, most as i64, dim])?;
        let bias = model.params().get(&format!("heads.{}.bias", self.head))?;
        let logits = embedding.logits(model, &states, bias, cx)?; // [batch, chosen, vocabulary]
        let right = right.reshape(&[rows * seq])?.index_select(0, &places)?;
        let right = right.reshape(&[rows, most as i64])?;
        let of_right = logits.gather(-1, &right.unsqueeze(-1)?)?.squeeze(-1)?;
        let costs = logits.logsumexp(-1)?.sub(&of_right)?;
        let (_, likeliest) = logits.detach()?.max_dim(-1)?;
        let hits = likeliest.equal(&right)?.to_kind(costs.kind())?;
        let counted = Tensor::from_slice(&counted, &[rows, most as i64], device)?;
        Tensor::stack(&[costs, hits, counted.to_kind(logits.kind())?], -1)
    }

    fn losses(&self, predicted: &Tensor, _: &Batch) -> Result<Tensor> {
        Self::mean(predicted, 0)
    }

    fn divergence(&self, _: &Tensor, _: &Tensor, _: &Batch) -> Result<Tensor> {
        Err(self.distribution("comparing two predictions"))
    }

    fn distill(&self, _: &Tensor, _: &Tensor, _: f64) -> Result<Tensor> {
        Err(self.distribution("distillation"))
    }

    fn is_likelihood(&self) -> bool {
        true
    }

    fn said(&self, predicted: &Tensor, _: &Batch) -> Result<Vec<Said>> {
        let numbers = |t: Tensor| t.to_vec::<f64>();
        let (losses, hits) =
            (numbers(Self::mean(predicted, 0)?)?, numbers(Self::mean(predicted, 1)?)?);
        let tokens = numbers(Self::column(predicted, 2)?.sum_dims(&[-1], false)?)?;
        let all = losses.into_iter().zip(hits).zip(tokens);
        Ok(all.map(|((prediction, target), weight)| Said { target, prediction, weight }).collect())
    }

    fn metrics(&self) -> &'static [Metric] {
        Self::METRICS
    }

    fn scores(&self, predictions: &[&Prediction]) -> BTreeMap<String, f64> {
        let Some(loss) = per_token(predictions, |p| p.prediction) else { return BTreeMap::new() };
        let accuracy = per_token(predictions, |p| p.target);
        let all = [("loss", Some(loss)), ("perplexity", Some(loss.exp())), ("accuracy", accuracy)];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}
