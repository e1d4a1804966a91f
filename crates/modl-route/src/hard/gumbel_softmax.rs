//! Gumbel-softmax routing: a choice that is relaxed, so that gradients flow through it.
//!
//! y = softmax((ℓ + G) ⁄ τ) with ℓ = W x̄ + b and Gⱼ = −ln(−ln Uⱼ), U uniform: argmax y is a draw from
//! softmax(ℓ) whatever τ is, and y goes to that draw's one-hot vector as τ → 0. In training α = y, or
//! where `hard` the one-hot vector in the forward pass with the gradient of y (straight through),
//! α = onehot(argmax y) + y − sg(y), with sg the value without its gradient. That gradient is biased,
//! and takes the outputs of all modules; α = y takes them as well. In evaluation α = onehot(argmax ℓ):
//! nothing is drawn and one module is run.
//!
//! A network that was trained with mixtures (large τ) is evaluated without them; `anneal` lets τ
//! fall, so that the two come closer. With a small τ from the start the first draws decide.
//!
//! Jang, Gu, Poole 2016, arXiv 1611.01144; Maddison, Mnih, Teh 2016, arXiv 1611.00712; survey §4.2.2.
//!
//! ```toml
//! router = { type = "gumbel_softmax", tau = 1.0, anneal = { to = 0.5, steps = 1000 } }
//! router = { type = "gumbel_softmax", hard = true, input = "tokens" }
//! ```

use modl_core::{
    Bank, Context, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::annealing::{Annealing, check_tau, tau_at};
use super::draws::gumbel;
use super::policy::Policy;
use crate::Scores;

/// A relaxed draw in training, the most probable module in evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GumbelSoftmax {
    /// Whether α is exactly one-hot in training, too (straight through). Default: false.
    pub hard: bool,
    /// τ > 0 of the relaxation at step 0; `temperature` is that of the scores. Default: 1.
    pub tau: f64,
    /// How τ changes. Default: it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anneal: Option<Annealing>,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for GumbelSoftmax {
    fn default() -> Self {
        let scores = Scores::default();
        GumbelSoftmax { hard: false, tau: 1.0, anneal: None, seed: 0, scores }
    }
}

impl RouterConfig for GumbelSoftmax {
    fn kind(&self) -> &'static str {
        "gumbel_softmax"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_tau("gumbel_softmax", self.tau, self.anneal.as_ref())?;
        let policy = Policy::build(&self.scores, self.seed, "gumbel_softmax", site, bank, scope)?;
        Ok(Box::new(GumbelSoftmaxRouter { config: self.clone(), policy }))
    }
}

#[derive(Debug)]
struct GumbelSoftmaxRouter {
    config: GumbelSoftmax,
    policy: Policy,
}

impl Router for GumbelSoftmaxRouter {
    fn kind(&self) -> &'static str {
        "gumbel_softmax"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.policy.scorer.scores(x, cx)?;
        if !cx.train {
            return self.policy.mode_of(&scored, bank.len());
        }
        let tau = tau_at(self.config.tau, self.config.anneal.as_ref(), cx.step);
        let noise = gumbel(&scored.logits, cx.draw(self.policy.path()))?;
        let noisy = scored.logits.add(&noise)?;
        let soft = noisy.mul_scalar(1.0 / tau)?.softmax(-1)?; // [batch, (seq,) modules]
        let alpha = if self.config.hard {
            let one = noisy.detach()?.argmax(-1)?.one_hot(bank.len() as i64)?;
            one.to_kind(soft.kind())?.add(&soft.sub(&soft.detach()?)?)?
        } else {
            soft
        };
        Ok(Routing::new(Weights::Dense(alpha), bank.len()).normalised())
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let policy = self.policy.grown(modules, scope)?;
        Ok(Box::new(GumbelSoftmaxRouter { config: self.config.clone(), policy }))
    }
}
