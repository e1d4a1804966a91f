//! The Bayesian mixture of experts for a text whose domain nobody tells.
//!
//! p(xₜ | x₍<t₎) = Σⱼ p(xₜ | x₍<t₎, D = j) · p(D = j | x₍<t₎),   p(D = j | x₍<t₎) ∝ p(x₍<t₎ | D = j) · p(D = j)
//!
//! All in logarithms and f64. The prior p(D) of a text is the same for all experts, is learned from
//! the texts before, π ← (1 − rate) π + rate · posterior at the end of each text, or is what was
//! learned so from a few texts of the domain and kept: the cached prior, which costs no further
//! passes of experts whose prior is small.
//!
//! Gururangan, Lewis, Holtzman, Smith, Zettlemoyer 2022, *DEMix Layers: Disentangling Domains for
//! Modular Language Modeling*, arXiv 2108.05036, §5.1 (the rate 0.3, and 100 texts for the cache);
//! survey §5.2.1.

use modl_core::{Error, Kind, Result, Tensor};
use serde::{Deserialize, Serialize};

/// p(D) at the start of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prior {
    /// 1 ⁄ m.
    Uniform,
    /// Uniform at first, then moved towards the posterior of each text by this rate in (0, 1]; 0.3 in
    /// the paper.
    Updating(f64),
    /// These, which stay.
    Cached(Vec<f64>),
}

/// A mixture of m experts over texts.
#[derive(Debug, Clone)]
pub struct BayesianMixture {
    prior: Vec<f64>,
    rate: Option<f64>,
    /// ln p(x₍<t₎ | D = j) + ln p(D = j).
    joint: Vec<f64>,
}

impl BayesianMixture {
    /// Of `experts` experts, at the start of a first text.
    ///
    /// # Errors
    /// Where there is no expert, the rate is none, or a cached prior is no distribution over them.
    pub fn new(experts: usize, prior: Prior) -> Result<Self> {
        if experts == 0 {
            return Err(Error::invalid("experts", "are 0, wants 1 or more"));
        }
        let uniform = vec![1.0 / experts as f64; experts];
        let (prior, rate) = match prior {
            Prior::Uniform => (uniform, None),
            Prior::Updating(rate) if rate > 0.0 && rate <= 1.0 => (uniform, Some(rate)),
            Prior::Updating(rate) => {
                return Err(Error::invalid("prior.updating", format!("is {rate}, wants (0, 1]")));
            }
            Prior::Cached(p) => {
                let sum: f64 = p.iter().sum();
                if p.len() != experts
                    || p.iter().any(|p| p.is_nan() || *p < 0.0)
                    || (sum - 1.0).abs() > 1e-6
                {
                    let problem = format!("{p:?} is no distribution over {experts} experts");
                    return Err(Error::invalid("prior.cached", problem));
                }
                (p.iter().map(|p| p / sum).collect(), None)
            }
        };
        let joint = prior.iter().map(|p| p.ln()).collect();
        Ok(BayesianMixture { prior, rate, joint })
    }

    /// p(D) of the text that is read.
    pub fn prior(&self) -> &[f64] {
        &self.prior
    }

    /// p(D | x₍<t₎) with all that was observed of this text; sums to 1.
    pub fn posterior(&self) -> Vec<f64> {
        let total = log_sum_exp(&self.joint);
        self.joint.iter().map(|l| (l - total).exp()).collect()
    }

    /// ln p(xₜ | x₍<t₎) of a token, from the experts' `log_likelihoods` ln p(xₜ | x₍<t₎, D = j), of which
    /// −∞ is a likelihood of 0. The posterior knows the token afterwards.
    ///
    /// # Errors
    /// Where there is not one for each expert, one is not a number or +∞, or no expert that the prior
    /// allows can say this token; then nothing has been observed.
    pub fn observe(&mut self, log_likelihoods: &[f64]) -> Result<f64> {
        if log_likelihoods.len() != self.joint.len() {
            let (n, m) = (log_likelihoods.len(), self.joint.len());
            let problem = format!("are {n} for {m} experts");
            return Err(Error::invalid("log_likelihoods", problem));
        }
        if let Some(l) = log_likelihoods.iter().find(|l| l.is_nan() || **l == f64::INFINITY) {
            return Err(Error::invalid("log_likelihoods", format!("one is {l}")));
        }
        let joint: Vec<f64> = self.joint.iter().zip(log_likelihoods).map(|(j, l)| j + l).collect();
        let (before, after) = (log_sum_exp(&self.joint), log_sum_exp(&joint));
        if after == f64::NEG_INFINITY {
            let problem = "no expert with a prior above 0 can say this token";
            return Err(Error::invalid("log_likelihoods", problem));
        }
        self.joint = joint;
        Ok(after - before)
    }

    /// The mixture's logarithms of the probabilities of the next token, `[vocab]`, from those of the
    /// experts `[m, vocab]`, before anybody knows which it will be.
    ///
    /// # Errors
    /// Where there is not one row for each expert.
    pub fn next(&self, log_probabilities: &Tensor) -> Result<Tensor> {
        let m = self.joint.len() as i64;
        if log_probabilities.dim() != 2 || log_probabilities.len_of(0) != m {
            let problem = format!("{log_probabilities:?}, wanted are [{m}, vocab]");
            return Err(Error::invalid("log_probabilities", problem));
        }
        let total = log_sum_exp(&self.joint);
        let weight: Vec<f64> = self.joint.iter().map(|l| l - total).collect();
        let weight = Tensor::from_slice(&weight, &[m, 1], log_probabilities.device())?;
        let kind = log_probabilities.kind();
        log_probabilities.to_kind(Kind::Double)?.add(&weight)?.logsumexp(0)?.to_kind(kind)
    }

    /// Ends a text: an updating prior learns from its posterior, and the next text starts.
    pub fn end_of_text(&mut self) {
        if let Some(rate) = self.rate {
            let posterior = self.posterior();
            for (p, q) in self.prior.iter_mut().zip(posterior) {
                *p += rate * (q - *p);
            }
        }
        self.joint = self.prior.iter().map(|p| p.ln()).collect();
    }

    /// The prior that it has learned, to be kept.
    pub fn cache(&self) -> Prior {
        Prior::Cached(self.prior.clone())
    }
}

/// ln Σ eˡ; −∞ of nothing but −∞.
fn log_sum_exp(all: &[f64]) -> f64 {
    let top = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match top == f64::NEG_INFINITY {
        true => top,
        false => top + all.iter().map(|l| (l - top).exp()).sum::<f64>().ln(),
    }
}
