//! Predictions without gradients.

use modl_core::{Context, Device, Error, Modular, Result, Tensor, no_grad};
use serde::{Deserialize, Serialize};

use crate::{Dataset, Describe, Objective, Said, sentence_vectors};

/// What a model says of an example, beside what is right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The example's id.
    pub id: String,
    /// Its task.
    pub task: String,
    /// What is right; a class by its index.
    pub target: f64,
    /// What the model says: a number, the index of a class, or a loss ([`crate::NextToken`]).
    pub prediction: f64,
    /// What it counts in means; 1 where nothing is said.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

fn is_one(weight: &f64) -> bool {
    *weight == 1.0
}

/// Predictions for all examples, in their order. Batches of `batch_size` are made of examples of
/// like length; which rows share a batch has no influence beyond rounding.
///
/// # Errors
/// Where `batch_size` is 0 or a forward pass fails.
pub fn evaluate(
    model: &Modular,
    objective: &dyn Objective,
    data: &Dataset,
    batch_size: usize,
    describe: &Describe,
) -> Result<Vec<Prediction>> {
    if batch_size == 0 {
        return Err(Error::invalid("batch_size", "is to be 1 at least"));
    }
    let order = by_length(data);
    let nothing = Said { target: f64::NAN, prediction: f64::NAN, weight: 0.0 };
    let mut said = vec![nothing; data.len()];
    for rows in order.chunks(batch_size) {
        let batch = data.batch(rows, model.device())?;
        let cx = describe(&batch, Context::eval())?;
        let values = no_grad(|| objective.said(&objective.predict(model, &batch, &cx)?, &batch))?;
        if values.len() != rows.len() {
            let problem = format!("{} predictions for {} rows", values.len(), rows.len());
            return Err(Error::invalid("objective", problem));
        }
        for (row, value) in rows.iter().zip(values) {
            if let Some(slot) = said.get_mut(*row) {
                *slot = value;
            }
        }
    }
    let with = |(e, said): (&crate::Example, Said)| Prediction {
        id: e.id.clone(),
        task: e.task.clone(),
        target: said.target,
        prediction: said.prediction,
        weight: said.weight,
    };
    Ok(data.examples().iter().zip(said).map(with).collect())
}

fn by_length(data: &Dataset) -> Vec<usize> {
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|i| data.examples().get(*i).map(|e| e.ids.len()));
    order
}

/// What the backbone says of each example without any module: the mean of its last hidden states over
/// real tokens, `[examples, dim]` f32 ([`sentence_vectors`]).
///
/// # Errors
/// Where `batch_size` is 0 or a forward pass fails.
pub fn base_vectors(model: &Modular, data: &Dataset, batch_size: usize) -> Result<Tensor> {
    if batch_size == 0 {
        return Err(Error::invalid("batch_size", "is to be 1 at least"));
    }
    let order = by_length(data);
    let mut vectors = Vec::new();
    for rows in order.chunks(batch_size) {
        let batch = data.batch(rows, model.device())?;
        let cx = batch.describe(Context::eval())?;
        let outputs = no_grad(|| model.forward_base(&batch.inputs, &cx))?;
        vectors.push(sentence_vectors(&outputs, &batch)?.to_device(Device::Cpu)?);
    }
    // Where each example's vector now stands.
    let mut places: Vec<i64> = vec![0; order.len()];
    for (place, example) in order.iter().enumerate() {
        if let Some(slot) = places.get_mut(*example) {
            *slot = place as i64;
        }
    }
    let places = Tensor::from_slice(&places, &[places.len() as i64], Device::Cpu)?;
    Tensor::cat(&vectors, 0)?.index_select(0, &places)
}
