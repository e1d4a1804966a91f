//! Temperature sampling (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2; survey §6.1): how often each
//! task is seen when tasks have very different numbers of examples.
//!
//! p_t ∝ n_t^(1⁄τ): with τ = 1 in proportion to the examples, with τ = ∞ all tasks equally often.

use modl_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// How often each task is seen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// By n_t^(1⁄τ) with this τ of 1 or more.
    Temperature(f64),
    /// All equally often: τ = ∞.
    Uniform,
}

impl Sampling {
    /// p of tasks with these numbers of examples.
    ///
    /// ```
    /// use modl_train::Sampling;
    /// assert_eq!(Sampling::Temperature(2.0).probabilities(&[100, 400]), [1.0 / 3.0, 2.0 / 3.0]);
    /// ```
    pub fn probabilities(self, counts: &[usize]) -> Vec<f64> {
        let raised = |n: &usize| match (self, *n) {
            (_, 0) => 0.0,
            (Sampling::Uniform, _) => 1.0,
            // Exact: a power of 1.0 may round.
            (Sampling::Temperature(1.0), n) => n as f64,
            (Sampling::Temperature(t), n) => (n as f64).powf(1.0 / t),
        };
        let raised: Vec<f64> = counts.iter().map(raised).collect();
        let sum: f64 = raised.iter().sum();
        raised.iter().map(|p| p / sum).collect()
    }

    /// Checks the number.
    ///
    /// # Errors
    /// By its key.
    pub fn check(self) -> Result<()> {
        match self {
            Sampling::Temperature(t) if !(t >= 1.0 && t.is_finite()) => {
                let problem =
                    format!("is {t}, wants 1 or more; `sampling = \"uniform\"` is infinity");
                Err(Error::invalid("sampling.temperature", problem))
            }
            _ => Ok(()),
        }
    }
}
