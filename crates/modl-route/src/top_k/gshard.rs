//! GShard's routing: the two most probable modules, the second one at random, with capacity.
//!
//! p = softmax(ℓ), g = the two largest p divided by their sum. In training the second module is
//! kept with probability min(1, g₂ ⁄ `threshold`), in evaluation always; its weight is g₂, and that
//! of the first one g₁ whether the second is kept or not. Then modules take what their capacity
//! lets them ([`Capacity`](crate::Capacity)); dropped choices are noted as `overflow`.
//!
//! Loss in training: `balance` = m · Σ f P, with f the share of a module in the first choices before
//! any is dropped. It counts 0.01 unless a recipe says otherwise, as in the paper.
//!
//! Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1, where `threshold` is 0.5; Mesh TensorFlow
//! has 0.2. Survey §4.2.3.

use modl_core::{
    Bank, Context, Error, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::losses::{balance, z};
use crate::scores::Scorer;
use crate::top_k::capacity::Chosen;
use crate::top_k::ties::Ties;
use crate::top_k::{check_k, check_not_negative, uniform_like};
use crate::{Capacity, Scores};

/// Top-2 with a random second choice and capacity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GShard {
    /// From which weight on the second module is always kept; 0: always. Default: 0.2.
    pub threshold: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// How much a module takes. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub capacity: Capacity,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for GShard {
    fn default() -> Self {
        let (capacity, scores) = (Capacity::default(), Scores::default());
        GShard { threshold: 0.2, seed: 0, capacity, scores }
    }
}

impl RouterConfig for GShard {
    fn kind(&self) -> &'static str {
        "gshard"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let router = TopTwo::new(self.kind(), self, false, site, bank, scope)?;
        Ok(Box::new(router))
    }
}

/// Two modules for each unit, also that of ST-MoE.
#[derive(Debug)]
pub(crate) struct TopTwo {
    kind: &'static str,
    config: GShard,
    with_z: bool,
    scorer: Scorer,
    ties: Ties,
    /// Where this router's draws come from.
    path: String,
}

impl TopTwo {
    /// The router `kind`, which emits a z-loss or not.
    pub(crate) fn new(
        kind: &'static str,
        config: &GShard,
        with_z: bool,
        site: &Site,
        bank: &Bank,
        scope: &mut Scope,
    ) -> Result<Self> {
        if bank.len() < 2 {
            let problem = format!("chooses two modules, there are {}; attach another", bank.len());
            return Err(Error::invalid(format!("a `{kind}` router"), problem));
        }
        check_k(kind, 2, bank.len())?;
        check_not_negative(&format!("{kind}.threshold"), config.threshold)?;
        config.capacity.check(kind)?;
        let scorer = config.scores.build(kind, site, bank.len(), scope)?;
        let path = scope.path().to_owned();
        let ties = Ties::new(config.seed, &scorer, &path);
        Ok(TopTwo { kind, config: config.clone(), with_z, scorer, ties, path })
    }

    /// The indices with −1 where the second choice was not kept.
    fn second_at_random(&self, index: Tensor, g: &Tensor, cx: &Context) -> Result<Tensor> {
        if !cx.train || self.config.threshold == 0.0 {
            return Ok(index);
        }
        let second = g.detach()?.narrow(-1, 1, 1)?;
        let bar = uniform_like(&second, cx.draw(&self.path))?.mul_scalar(self.config.threshold)?;
        let kept = second.greater(&bar)?;
        let none = Tensor::full(&second.size(), -1.0, index.kind(), index.device())?;
        let chosen = index.narrow(-1, 1, 1)?.where_else(&kept, &none)?;
        Tensor::cat(&[index.narrow(-1, 0, 1)?, chosen], -1)
    }
}

impl Router for TopTwo {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn looks_ahead(&self) -> bool {
        self.config.capacity.looks_ahead(2)
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        if self.with_z { &[("balance", 0.01), ("z", 0.001)] } else { &[("balance", 0.01)] }
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let mask = scored.mask.as_ref();
        let p = scored.logits.softmax(-1)?; // [batch, (seq,) modules]
        let both = self.ties.largest(&scored, 2)?;
        let g = p.gather(-1, &both)?;
        let g = g.div(&g.sum_dims(&[-1], true)?)?; // [batch, (seq,) 2]
        let index = self.second_at_random(both.clone(), &g, cx)?;
        let weight = g.masked_fill(&index.lt_scalar(0.0)?, 0.0)?;
        let (kept, overflow) = self.config.capacity.limit(
            Chosen { index, weight },
            mask,
            bank.len(),
            cx,
            &self.path,
        )?;
        let alpha = Weights::Sparse { index: kept.index, weight: kept.weight };
        let mut routing = Routing::new(alpha, bank.len()).note("overflow", overflow);
        if cx.train {
            let first = both.narrow(-1, 0, 1)?;
            routing = routing.with_loss("balance", balance(&p, &first, mask)?);
            if self.with_z {
                routing = routing.with_loss("z", z(&scored)?);
            }
        }
        let all_kept =
            !self.config.capacity.limits(cx) && (!cx.train || self.config.threshold == 0.0);
        Ok(if all_kept { routing.normalised() } else { routing })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        let (config, path) = (self.config.clone(), self.path.clone());
        Ok(Box::new(TopTwo { kind: self.kind, with_z: self.with_z, config, scorer, ties, path }))
    }
}
