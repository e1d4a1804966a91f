//! Top-k routing: a softmax of which only the k largest are kept.
//!
//! p = softmax(ℓ) with ℓ = (W x̄ + b) ⁄ τ, K = the k modules with the largest ℓ, and for j ∈ K
//!
//! - αⱼ = pⱼ ⁄ Σ_K p where `renormalise` (Mixtral: Jiang et al. 2024, arXiv 2401.04088);
//! - αⱼ = pⱼ where not (Switch: Fedus, Zoph, Shazeer 2022, arXiv 2101.03961). For k = 1 this is the
//!   default, since pⱼ ⁄ pⱼ = 1 lets no gradient through to W;
//! - αⱼ = 1⁄k + pⱼ − sg(pⱼ) where `straight_through`, with sg the value without its gradient
//!   (Bengio, Léonard, Courville 2013, arXiv 1308.3432): modules that were trained on their own keep
//!   their full strength, and W still learns.
//!
//! Sparsely gated mixtures: Shazeer et al. 2017, arXiv 1701.06538; survey §4.2.2, §4.2.3.
//!
//! In training there are two auxiliary losses, over all N routed rows or real tokens and m modules,
//! which count 0.01 and 0.001 unless a recipe says otherwise, as in the papers:
//!
//! - `balance` = m · Σⱼ fⱼ Pⱼ, fⱼ = the share of module j in the N·k choices (without gradient),
//!   Pⱼ = the mean of pⱼ (Switch, eq. 4). It is 1 where f or P is uniform. It is no distance: where
//!   f and P fall apart it may be below 1.
//! - `z` = mean of (ln Σⱼ exp ℓⱼ)², which keeps the scores small (ST-MoE: Zoph et al. 2022,
//!   arXiv 2202.08906, eq. 5).
//!
//! Ties, which are the rule with W = 0, are broken by vⱼ·x̄ with fixed random directions vⱼ: the
//! same input goes to the same module, different inputs to different ones.

use modl_core::{
    Bank, Context, Error, Init, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Scores;
use crate::losses::{balance, z};
use crate::scores::Scorer;
use crate::top_k::ties::Ties;
use crate::top_k::{check_k, check_not_negative};

/// The k most probable modules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopK {
    /// How many modules are active. Default: 1.
    pub k: usize,
    /// Whether the weights of the active modules are made to sum to 1. Default: where k > 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub renormalise: Option<bool>,
    /// Whether the active modules weigh 1⁄k each and the gradient is that of p. Default: false.
    pub straight_through: bool,
    /// Standard deviation of the normal noise that is added to ℓ in training, so that other modules
    /// are tried, too; V-MoE (Riquelme et al. 2021, arXiv 2106.05974) has 1⁄m. Default: 0.
    pub noise: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for TopK {
    fn default() -> Self {
        TopK {
            k: 1,
            renormalise: None,
            straight_through: false,
            noise: 0.0,
            seed: 0,
            scores: Scores::default(),
        }
    }
}

impl RouterConfig for TopK {
    fn kind(&self) -> &'static str {
        "top_k"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_k("top_k.k", self.k, bank.len())?;
        if self.straight_through && self.renormalise == Some(true) {
            let problem = "fixes the weights itself; leave out `renormalise`";
            return Err(Error::invalid("top_k.straight_through", problem));
        }
        check_not_negative("top_k.noise", self.noise)?;
        let scorer = self.scores.build("top_k", site, bank.len(), scope)?;
        let path = scope.path().to_owned();
        let ties = Ties::new(self.seed, &scorer, &path);
        Ok(Box::new(TopKRouter { config: self.clone(), scorer, ties, path }))
    }
}

#[derive(Debug)]
struct TopKRouter {
    config: TopK,
    scorer: Scorer,
    ties: Ties,
    /// Where this router's noise is drawn.
    path: String,
}

impl Router for TopKRouter {
    fn kind(&self) -> &'static str {
        "top_k"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("balance", 0.01), ("z", 0.001)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let mut scored = self.scorer.scores(x, cx)?;
        if cx.train && self.config.noise > 0.0 {
            let l = &scored.logits;
            let noise = Init::Normal(self.config.noise);
            let noise = noise.tensor(&l.size(), cx.draw(&self.path), l.kind(), l.device())?;
            scored.logits = l.add(&noise)?;
        }
        let p = scored.logits.softmax(-1)?; // [batch, (seq,) modules]
        let index = self.ties.largest(&scored, self.config.k)?; // [batch, (seq,) k]
        let kept = p.gather(-1, &index)?;
        let k = self.config.k as f64;
        let (weight, normalised) = if self.config.straight_through {
            (kept.sub(&kept.detach()?)?.add_scalar(1.0 / k)?, true)
        } else if self.config.renormalise.unwrap_or(self.config.k > 1) {
            (kept.div(&kept.sum_dims(&[-1], true)?)?, true)
        } else {
            (kept, false)
        };
        let mut routing =
            Routing::new(Weights::Sparse { index: index.clone(), weight }, bank.len());
        if cx.train {
            routing = routing
                .with_loss("balance", balance(&p, &index, scored.mask.as_ref())?)
                .with_loss("z", z(&scored)?);
        }
        Ok(if normalised { routing.normalised() } else { routing })
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        let (config, path) = (self.config.clone(), self.path.clone());
        Ok(Box::new(TopKRouter { config, scorer, ties, path }))
    }
}
