//! Objectives: what is predicted from a model's outputs, and what it costs to be wrong.

use std::fmt::Debug;

use modl_core::{Context, Init, Kind, Modular, Result, Tensor, Tensors};

use crate::Batch;

/// A prediction and its loss.
pub trait Objective: Debug {
    /// Makes the parameters of the head, under `heads.NAME.`; called once, before training.
    ///
    /// # Errors
    /// Where the head exists already.
    fn setup(&self, model: &mut Modular) -> Result<()>;

    /// What the model says of each row, `[batch]` f32.
    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor>;

    /// The loss of each row, `[batch]` f32, of what was predicted.
    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor>;

    /// How far two predictions of the same rows are apart, `[batch]` f32: 0 where they are equal.
    fn divergence(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;

    /// The mean loss of the batch, `[]` f32.
    fn loss(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        self.losses(&self.predict(model, batch, cx)?, batch)?.mean()
    }
}

/// The mean of a model's last hidden states over the real tokens of a batch, `[batch, dim]` f32.
/// Where a module has lengthened the sequence, the tokens that it put in are among them.
///
/// # Errors
/// Where `last_hidden_state` is not among the outputs, or does not fit the mask.
pub fn sentence_vectors(outputs: &Tensors, batch: &Batch) -> Result<Tensor> {
    let hidden = outputs.need("last_hidden_state")?.to_kind(Kind::Float)?; // [batch, seq, dim]
    let mask = match outputs.get("attention_mask") {
        Some(longer) => longer,
        None => batch.inputs.need("attention_mask")?,
    };
    hidden.masked_mean(mask)
}

/// One number for a text: ŷ = w·h̄ + b with h̄ the mean of the last hidden states over real tokens,
/// and the squared error (ŷ − y)².
///
/// The head is `heads.NAME.weight` `[1, dim]` (uniform in ±1⁄√dim) and `heads.NAME.bias` `[1]` (0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regression {
    /// The name of the head.
    pub head: String,
    /// The width of the model.
    pub dim: i64,
}

impl Objective for Regression {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        let mut scope = model.scope(&format!("heads.{}", self.head));
        scope.param("weight", &[1, self.dim], Init::Kaiming)?;
        scope.param("bias", &[1], Init::Zeros)?;
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let weight = model.params().get(&format!("heads.{}.weight", self.head))?;
        let bias = model.params().get(&format!("heads.{}.bias", self.head))?;
        let mean = sentence_vectors(&model.forward(&batch.inputs, cx)?, batch)?;
        mean.linear(weight, Some(bias))?.squeeze(-1)
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        predicted.sub(&batch.targets)?.square()
    }

    fn divergence(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.sub(b)?.square()
    }
}
