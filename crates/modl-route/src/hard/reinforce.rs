//! REINFORCE: a policy that draws modules, and is rewarded for what becomes of the row.
//!
//! π = softmax(ℓ) with ℓ = W x̄ + b. In training a module is drawn for each row or token and runs with
//! weight 1; with the reward R of a row ([`Reward`]) and a baseline b the loss `reinforce` is
//!
//! mean over rows of −(R − b) Σ ln π(choice) − `entropy` · H(π) (+ ½ (R − v)² for a learned v)
//!
//! (which counts 1 unless a recipe says otherwise), whose gradient is without bias that of −E R for every b that does not know the choice. The
//! baseline takes variance away: `none`, the running `mean` of past rewards, or a `learned` value
//! v = w·x̄ + c. In evaluation α = onehot(argmax ℓ).
//!
//! A module that is lucky early is drawn and trained more, and the others starve (the survey's
//! module collapse, §4.2.1): `entropy` holds against it.
//!
//! Williams 1992, Machine Learning 8, "Simple statistical gradient-following algorithms for
//! connectionist reinforcement learning"; survey §4.2.2.
//!
//! ```toml
//! router = { type = "reinforce", baseline = "mean", entropy = 0.01 }
//! ```

use modl_core::{
    Bank, Context, Device, Error, Init, Kind, Outcome, Result, Router, RouterConfig, Routing,
    Scope, Signal, Site, Tensor, no_grad,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policy::{Drawn, Policy, mean_of_rows, per_row};
use super::reward::Reward;
use crate::Scores;
use crate::top_k::check_not_negative;

/// What is taken off the reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Nothing.
    None,
    /// The running mean of the rewards of earlier steps.
    #[default]
    Mean,
    /// w·x̄ + c, of the mean x̄ of a row's real tokens where each has a choice, trained with the
    /// squared error.
    Learned,
}

/// Draws from a softmax, learns from rewards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reinforce {
    /// The reward of a row. Default: `neg_loss`.
    pub reward: Reward,
    /// What is taken off the reward. Default: `mean`.
    pub baseline: Baseline,
    /// How much of the running mean is kept in a step, in [0, 1). Default: 0.95.
    pub decay: f64,
    /// What the entropy of π counts, in nats, 0 or above. Default: 0.
    pub entropy: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for Reinforce {
    fn default() -> Self {
        Reinforce {
            reward: Reward::NegLoss,
            baseline: Baseline::Mean,
            decay: 0.95,
            entropy: 0.0,
            seed: 0,
            scores: Scores::default(),
        }
    }
}

impl RouterConfig for Reinforce {
    fn kind(&self) -> &'static str {
        "reinforce"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if !(0.0..1.0).contains(&self.decay) {
            return Err(Error::invalid("reinforce.decay", "is to be 0 or above, and below 1"));
        }
        check_not_negative("reinforce.entropy", self.entropy)?;
        let policy = Policy::build(&self.scores, self.seed, "reinforce", site, bank, scope)?;
        let width = policy.scorer.weight.len_of(-1);
        let base = match self.baseline {
            Baseline::None => Base::None,
            Baseline::Mean => {
                let none = Tensor::zeros(&[2], Kind::Double, Device::Cpu)?;
                Base::Mean(scope.buffer("rewards", &none)?)
            }
            Baseline::Learned => Base::Learned {
                weight: scope.param("value.weight", &[1, width], Init::Zeros)?,
                bias: scope.param("value.bias", &[1], Init::Zeros)?,
            },
        };
        Ok(Box::new(ReinforceRouter { config: self.clone(), policy, base }))
    }
}

#[derive(Debug)]
struct ReinforceRouter {
    config: Reinforce,
    policy: Policy,
    base: Base,
}

/// The baseline with what it has learned.
#[derive(Debug)]
enum Base {
    None,
    /// `[2]`: the sum of past mean rewards, each `decay` as heavy as the one after it, and the sum
    /// of these weights.
    Mean(Tensor),
    Learned {
        weight: Tensor,
        bias: Tensor,
    },
}

impl Router for ReinforceRouter {
    fn kind(&self) -> &'static str {
        "reinforce"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("reinforce", 1.0)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        if !cx.train {
            return self.policy.mode(x, bank, cx);
        }
        let drawn = self.policy.draw(x, cx)?;
        let mut routing = drawn.routing(bank.len())?;
        if self.config.entropy > 0.0 {
            routing = routing.note("entropy", drawn.entropy()?);
        }
        if let Base::Learned { weight, bias } = &self.base {
            routing = routing.note("value", value(&drawn, weight, bias)?);
        }
        Ok(routing)
    }

    fn credit(&self, routing: &Routing, outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        let log_prob = per_row(routing.noted.need("log_prob")?)?; // [batch]
        let reward = self.config.reward.of(outcome.loss)?.to_kind(log_prob.kind())?;
        let reward = reward.to_device(log_prob.device())?;
        let (advantage, of_value) = match &self.base {
            Base::None => (reward, None),
            Base::Mean(kept) => (reward.add_scalar(-mean(kept)?)?, None),
            Base::Learned { .. } => {
                let error = reward.sub(routing.noted.need("value")?)?;
                (error.detach()?, Some(error.square()?.mul_scalar(0.5)?))
            }
        };
        let mut loss = advantage.mul(&log_prob)?.neg()?;
        if let Some(entropy) = routing.noted.get("entropy") {
            loss = loss.sub(&entropy.mul_scalar(self.config.entropy)?)?;
        }
        if let Some(of_value) = of_value {
            loss = loss.add(&of_value)?;
        }
        Ok(Some(("reinforce".into(), mean_of_rows(&loss, outcome)?)))
    }

    fn learn(&self, _: &Routing, outcome: &Outcome) -> Result<()> {
        let Base::Mean(kept) = &self.base else { return Ok(()) };
        let reward = self.config.reward.of(outcome.loss)?;
        let rows = match outcome.chosen {
            Some(chosen) => chosen.sum()?.item()?,
            None => reward.len_of(0) as f64,
        };
        if rows < 1.0 {
            return Ok(());
        }
        let sum = match outcome.chosen {
            Some(chosen) => reward.mul(&chosen.to_kind(reward.kind())?)?.sum()?.item()?,
            None => reward.sum()?.item()?,
        };
        let (mut kept, new) =
            (kept.clone(), Tensor::from_slice(&[sum / rows, 1.0], &[2], Device::Cpu)?);
        no_grad(|| {
            kept.mul_scalar_in_place(self.config.decay)?;
            kept.add_in_place(&new.to_device(kept.device())?)
        })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let base = match &self.base {
            Base::None => Base::None,
            Base::Mean(kept) => Base::Mean(kept.clone()),
            Base::Learned { weight, bias } => {
                Base::Learned { weight: weight.clone(), bias: bias.clone() }
            }
        };
        let policy = self.policy.grown(modules, scope)?;
        Ok(Box::new(ReinforceRouter { config: self.config.clone(), policy, base }))
    }
}

/// The mean that is kept; 0 before there is one.
fn mean(kept: &Tensor) -> Result<f64> {
    match kept.to_vec::<f64>()?.as_slice() {
        [sum, weight] if *weight > 0.0 => Ok(sum / weight),
        _ => Ok(0.0),
    }
}

/// w·x̄ + c for each row, `[batch]`. Its error does not reach what made x.
fn value(drawn: &Drawn, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let x = drawn.scored.x.detach()?;
    let kind = x.kind();
    let x = match (x.dim(), &drawn.scored.mask) {
        (3, Some(mask)) => x.masked_mean(mask)?,
        (3, None) => x.mean_dims(&[1], false)?,
        _ => x,
    };
    x.linear(&weight.to_kind(kind)?, Some(&bias.to_kind(kind)?))?.squeeze(-1)
}
