//! Ensembles: one prediction of several whole passes, each with its own module.
//!
//! Of logits, l = Σⱼ wⱼ lⱼ, whose softmax is the geometric mean of the members' probabilities; or of
//! probabilities, p = Σⱼ wⱼ softmax(lⱼ), their arithmetic mean. Weights are divided by their sum.
//!
//! Survey §5.2.1; compared with mixtures and merges by Li et al. 2022, *Branch-Train-Merge*, arXiv
//! 2208.03306.

use modl_core::{Error, Kind, Result, Tensor};
use serde::{Deserialize, Serialize};

/// What is averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnsembleOf {
    /// Logits: the geometric mean.
    Logits,
    /// Probabilities: the arithmetic mean.
    #[default]
    Probabilities,
}

/// The members of an ensemble, with their weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ensemble {
    /// What is averaged. Default: `probabilities`.
    #[serde(default)]
    pub of: EnsembleOf,
    /// Modules and weights, 0 or above, of which one is not 0.
    pub members: Vec<(String, f64)>,
}

impl Ensemble {
    /// With the same weight for all.
    pub fn uniform<S: Into<String>>(of: EnsembleOf, members: impl IntoIterator<Item = S>) -> Self {
        Ensemble { of, members: members.into_iter().map(|m| (m.into(), 1.0)).collect() }
    }

    /// The ensemble's logarithms of probabilities, `[…, classes]`. `pass` gives the logits
    /// `[…, classes]` of one whole pass with the named module; it is asked once for each member
    /// whose weight is not 0, in their order.
    ///
    /// # Errors
    /// Where there is no member with a weight, a weight is below 0, logits are not of one shape or no
    /// numbers, and what `pass` gives.
    pub fn log_probabilities(
        &self,
        mut pass: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let total: f64 = self.members.iter().map(|(_, w)| w).sum();
        let wrong = |(_, w): &&(String, f64)| !(w.is_finite() && *w >= 0.0);
        if let Some((name, w)) = self.members.iter().find(wrong) {
            let problem = format!("`{name}` has weight {w}, wants 0 or above");
            return Err(Error::invalid("ensemble.members", problem));
        }
        if total == 0.0 {
            return Err(Error::invalid("ensemble.members", "none has a weight above 0"));
        }
        let mut all: Vec<Tensor> = Vec::new();
        for (name, w) in self.members.iter().filter(|(_, w)| *w > 0.0) {
            let logits = pass(name)?;
            let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let logits = logits.to_kind(wide)?;
            logits.check_finite(name)?;
            if let Some(first) = all.first()
                && first.size() != logits.size()
            {
                let (a, b) = (first.size(), logits.size());
                let problem = format!("logits are {b:?} with `{name}`, and {a:?} before");
                return Err(Error::invalid("ensemble", problem));
            }
            let w = w / total;
            all.push(match self.of {
                EnsembleOf::Logits => logits.mul_scalar(w)?,
                EnsembleOf::Probabilities => logits.log_softmax(-1)?.add_scalar(w.ln())?,
            });
        }
        let all = Tensor::stack(&all, 0)?;
        match self.of {
            EnsembleOf::Logits => all.sum_dims(&[0], false)?.log_softmax(-1),
            EnsembleOf::Probabilities => all.logsumexp(0),
        }
    }
}
