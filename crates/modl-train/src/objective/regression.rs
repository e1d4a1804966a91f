//! One number for a text.

use modl_core::{Context, Init, Modular, Result, Seed, Tensor};

use super::{Metric, Objective, apply_head, make_head};
use crate::Batch;

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

impl Regression {
    /// What predictions are measured by.
    pub const METRICS: &'static [Metric] = &[
        Metric { key: "sign_accuracy", title: "accuracy of the sign" },
        Metric { key: "spearman", title: "Spearman" },
        Metric { key: "mae", title: "mean absolute error" },
    ];
}

impl Objective for Regression {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        make_head(model, &self.head, 1, self.dim)
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        apply_head(model, &self.head, batch, cx)?.squeeze(-1)
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        predicted.sub(&batch.targets)?.square()
    }

    fn draw(&self, predicted: &Tensor, seed: Seed) -> Result<Tensor> {
        // (ŷ − y)² = −ln p but for a constant where the variance is ½.
        let noise = Init::Normal(0.5f64.sqrt());
        predicted.add(&noise.tensor(
            &predicted.size(),
            seed,
            predicted.kind(),
            predicted.device(),
        )?)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, _: &Batch) -> Result<Tensor> {
        a.sub(b)?.square()
    }
}
