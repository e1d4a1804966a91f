//! Weighting by uncertainty (Kendall, Gal, Cipolla 2018, *Multi-task learning using uncertainty to
//! weigh losses*, arXiv 1705.07115; survey §6.1): a task that cannot be predicted well counts less.
//!
//! Each task has a learned s = ln σ², 0 at first. A squared error L is that of a Gaussian with variance
//! σ²: ½ e^−s L + ½ s. A −log-likelihood L is that of a softmax at temperature σ²: e^−s L + ½ s. With L
//! fixed the best s is ln L, or ln 2L.
//!
//! A loss that goes to 0 would bring the weight to infinity and the sum to −∞: s is kept within
//! ±`limit`.

use serde::Deserialize;

/// What a loss is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A squared error.
    Regression,
    /// −ln p of what is right.
    Classification,
}

impl Form {
    /// What the loss counts at s: ½ e^−s or e^−s.
    pub fn weight(self, s: f64) -> f64 {
        match self {
            Form::Regression => 0.5 * (-s).exp(),
            Form::Classification => (-s).exp(),
        }
    }

    /// The objective of a loss at s: `weight(s) · loss + ½ s`.
    pub fn objective(self, s: f64, loss: f64) -> f64 {
        self.weight(s) * loss + 0.5 * s
    }

    /// Its derivative by s.
    pub fn slope(self, s: f64, loss: f64) -> f64 {
        0.5 - self.weight(s) * loss
    }
}
