//! Predictions without gradients.

use modl_core::{Context, Error, Modular, Result, no_grad};
use serde::{Deserialize, Serialize};

use crate::{Dataset, Describe, Objective};

/// What a model says of an example, beside what is right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The example's id.
    pub id: String,
    /// Its task.
    pub task: String,
    /// What is right.
    pub target: f64,
    /// What the model says.
    pub prediction: f64,
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
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|i| data.examples().get(*i).map(|e| e.ids.len()));
    let mut said = vec![f64::NAN; data.len()];
    for rows in order.chunks(batch_size) {
        let batch = data.batch(rows, model.device())?;
        let cx = describe(&batch, Context::eval())?;
        let values = no_grad(|| objective.predict(model, &batch, &cx))?.to_vec::<f64>()?;
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
    let with = |(e, prediction): (&crate::Example, f64)| Prediction {
        id: e.id.clone(),
        task: e.task.clone(),
        target: f64::from(e.target),
        prediction,
    };
    Ok(data.examples().iter().zip(said).map(with).collect())
}
