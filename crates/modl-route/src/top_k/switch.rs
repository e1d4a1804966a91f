//! Switch routing: the most probable module, with capacity.
//!
//! p = softmax(ℓ), j* = the largest, and αⱼ* = pⱼ*: the weight is not made to be 1, so that gradients
//! reach W. In training each element of x̄ is multiplied by a number from U[1 − `jitter`,
//! 1 + `jitter`] before it is scored. Modules take what their capacity lets them
//! ([`Capacity`](crate::Capacity)); dropped tokens are noted as `overflow`.
//!
//! Loss in training: `balance` = m · Σ f P (counts 0.01 unless a recipe says otherwise, as in the
//! paper), f = the share of a module in
//! the choices before any is dropped, P = the mean of p. It is 1 where f or P is uniform, and where
//! f = P it is 1 or more; where they fall apart it may be below 1, even with a module that nobody
//! chooses.
//!
//! W starts with normal numbers of variance `init_scale` ⁄ width, a tenth of what is usual (the
//! paper truncates them at two standard deviations); `init_std` says otherwise.
//!
//! Fedus, Zoph, Shazeer 2022, arXiv 2101.03961, §2.2 and §2.4; survey §4.2.3.

use modl_core::{
    Bank, Context, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::losses::balance;
use crate::scores::Scorer;
use crate::top_k::capacity::Chosen;
use crate::top_k::ties::Ties;
use crate::top_k::{check_k, check_not_negative, uniform_like};
use crate::{Capacity, Scores};

/// Top-1 with capacity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Switch {
    /// How far x̄ is shaken in training. Default: 0.01.
    pub jitter: f64,
    /// width · the variance of W at the start, where `init_std` is 0. Default: 0.1.
    pub init_scale: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// How much a module takes. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub capacity: Capacity,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for Switch {
    fn default() -> Self {
        let (capacity, scores) = (Capacity::default(), Scores::default());
        Switch { jitter: 0.01, init_scale: 0.1, seed: 0, capacity, scores }
    }
}

impl RouterConfig for Switch {
    fn kind(&self) -> &'static str {
        "switch"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_k("switch", 1, bank.len())?;
        check_not_negative("switch.jitter", self.jitter)?;
        check_not_negative("switch.init_scale", self.init_scale)?;
        self.capacity.check("switch")?;
        let scorer =
            self.scores.starting(self.init_scale, site).build("switch", site, bank.len(), scope)?;
        let path = scope.path().to_owned();
        let ties = Ties::new(self.seed, &scorer, &path);
        Ok(Box::new(SwitchRouter { config: self.clone(), scorer, ties, path }))
    }
}

#[derive(Debug)]
struct SwitchRouter {
    config: Switch,
    scorer: Scorer,
    ties: Ties,
    /// Where this router's draws come from.
    path: String,
}

impl SwitchRouter {
    fn shaken(&self, x: Tensor, cx: &Context) -> Result<Tensor> {
        if !cx.train || self.config.jitter == 0.0 {
            return Ok(x);
        }
        let by = uniform_like(&x, cx.draw(&self.path))?.mul_scalar(2.0 * self.config.jitter)?;
        x.mul(&by.add_scalar(1.0 - self.config.jitter)?)
    }
}

impl Router for SwitchRouter {
    fn kind(&self) -> &'static str {
        "switch"
    }

    fn looks_ahead(&self) -> bool {
        self.config.capacity.looks_ahead(1)
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("balance", 0.01)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let (x, mask) = self.scorer.seen(x, cx)?;
        let scored = self.scorer.score(self.shaken(x, cx)?, mask)?;
        let mask = scored.mask.as_ref();
        let p = scored.logits.softmax(-1)?; // [batch, (seq,) modules]
        let index = self.ties.largest(&scored, 1)?;
        let chosen = Chosen { index: index.clone(), weight: p.gather(-1, &index)? };
        let (kept, overflow) =
            self.config.capacity.limit(chosen, mask, bank.len(), cx, &self.path)?;
        let alpha = Weights::Sparse { index: kept.index, weight: kept.weight };
        let routing = Routing::new(alpha, bank.len()).note("overflow", overflow);
        if !cx.train {
            return Ok(routing);
        }
        Ok(routing.with_loss("balance", balance(&p, &index, mask)?))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        let (config, path) = (self.config.clone(), self.path.clone());
        Ok(Box::new(SwitchRouter { config, scorer, ties, path }))
    }
}
