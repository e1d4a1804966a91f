//! Concrete-Bernoulli routing: each module is on or off by a gate of its own.
//!
//! zⱼ = σ((ℓⱼ + ln Uⱼ − ln(1 − Uⱼ)) ⁄ τ) with ℓ = W x̄ + b and U uniform: zⱼ > ½ with probability
//! σ(ℓⱼ) whatever τ is, and zⱼ goes to 0 or 1 as τ → 0. In training α = z, or where `hard` the gate
//! [z > ½] in the forward pass with the gradient of z (straight through). In evaluation nothing is
//! drawn: αⱼ = [σ(ℓⱼ) > ½] (`evaluation = "threshold"`; the modules that are off are not run, and
//! where all are off f_θ is left), or αⱼ = σ(ℓⱼ) (`"probability"`).
//!
//! α is 0 to m in sum: modules are switched independently of each other, and so may all be. With
//! W = b = 0 each gate is at ½, which is off in evaluation.
//!
//! Binary Concrete: Maddison, Mnih, Teh 2016, arXiv 1611.00712; survey §4.2.2.
//!
//! ```toml
//! router = { type = "concrete_bernoulli", tau = 1.0, evaluation = "probability" }
//! ```

use modl_core::{
    Bank, Context, Error, Kind, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::annealing::{Annealing, check_tau, tau_at};
use super::draws::logistic;
use crate::Scores;
use crate::scores::Scorer;

/// What a gate is in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateAtTest {
    /// 1 where σ(ℓ) > ½, else 0.
    #[default]
    Threshold,
    /// σ(ℓ).
    Probability,
}

/// A relaxed Bernoulli gate for each module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConcreteBernoulli {
    /// Whether gates are exactly 0 or 1 in training, too (straight through). Default: false.
    pub hard: bool,
    /// τ > 0 of the relaxation at step 0; `temperature` is that of the scores. Default: 1.
    pub tau: f64,
    /// How τ changes. Default: it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anneal: Option<Annealing>,
    /// What gates are in evaluation. Default: `threshold`.
    pub evaluation: GateAtTest,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for ConcreteBernoulli {
    fn default() -> Self {
        ConcreteBernoulli {
            hard: false,
            tau: 1.0,
            anneal: None,
            evaluation: GateAtTest::Threshold,
            scores: Scores::default(),
        }
    }
}

impl RouterConfig for ConcreteBernoulli {
    fn kind(&self) -> &'static str {
        "concrete_bernoulli"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_tau("concrete_bernoulli", self.tau, self.anneal.as_ref())?;
        if bank.is_empty() {
            return Err(Error::invalid("concrete_bernoulli", "there is no module to switch"));
        }
        let scorer = self.scores.build("concrete_bernoulli", site, bank.len(), scope)?;
        let path = scope.path().to_owned();
        Ok(Box::new(ConcreteBernoulliRouter { config: self.clone(), scorer, path }))
    }
}

#[derive(Debug)]
struct ConcreteBernoulliRouter {
    config: ConcreteBernoulli,
    scorer: Scorer,
    /// Where the gates are drawn.
    path: String,
}

impl Router for ConcreteBernoulliRouter {
    fn kind(&self) -> &'static str {
        "concrete_bernoulli"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let logits = self.scorer.scores(x, cx)?.logits; // [batch, (seq,) modules]
        let weights = match (cx.train, self.config.evaluation) {
            (true, _) => Weights::Dense(self.drawn(&logits, cx)?),
            (false, GateAtTest::Probability) => Weights::Dense(logits.sigmoid()?),
            (false, GateAtTest::Threshold) => on(&logits)?,
        };
        Ok(Routing::new(weights, bank.len()))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (config, path) = (self.config.clone(), self.path.clone());
        let scorer = self.scorer.grown(modules, scope)?;
        Ok(Box::new(ConcreteBernoulliRouter { config, scorer, path }))
    }
}

impl ConcreteBernoulliRouter {
    fn drawn(&self, logits: &Tensor, cx: &Context) -> Result<Tensor> {
        let tau = tau_at(self.config.tau, self.config.anneal.as_ref(), cx.step);
        let noisy = logits.add(&logistic(logits, cx.draw(&self.path))?)?;
        let soft = noisy.mul_scalar(1.0 / tau)?.sigmoid()?;
        if !self.config.hard {
            return Ok(soft);
        }
        let gate = noisy.detach()?.gt_scalar(0.0)?.to_kind(soft.kind())?;
        gate.add(&soft.sub(&soft.detach()?)?)
    }
}

/// The modules with ℓ > 0, each with weight 1; −1 for the others.
fn on(logits: &Tensor) -> Result<Weights> {
    let all = Tensor::arange(logits.len_of(-1), logits.device())?.expand(&logits.size())?;
    let none = Tensor::full(&logits.size(), -1.0, Kind::Int64, logits.device())?;
    let index = all.where_else(&logits.gt_scalar(0.0)?, &none)?;
    Ok(Weights::Sparse {
        index,
        weight: Tensor::ones(&logits.size(), logits.kind(), logits.device())?,
    })
}
