//! Noisy top-k routing, with losses for importance and load.
//!
//! In training Hⱼ = ℓⱼ + εⱼ·σⱼ with ε from a standard normal distribution and K = the k modules with
//! the largest H; in evaluation H = ℓ.
//!
//! | `variant` | σ | α for j ∈ K | importance of |
//! |---|---|---|---|
//! | `shazeer` | softplus(W_noise x̄) + `noise_epsilon` | softmax of H over K | α |
//! | `v_moe` | `noise` ⁄ m | softmax of H over all m | softmax of ℓ over all m |
//!
//! Losses in training, over the N routed rows or real tokens, CV² = variance ⁄ mean² over modules
//! with the variance over m (implementations that take m − 1 get m ⁄ (m − 1) times as much):
//!
//! - `importance` = CV² of Σᵤ αᵤⱼ;
//! - `load` = CV² of Loadⱼ = Σᵤ Pᵤⱼ, where P is the probability that j would be chosen if its own
//!   noise were drawn again: Φ((ℓⱼ − the k-th largest H of the *others*) ⁄ σⱼ). `v_moe` takes the
//!   k-th largest H of all, as its authors do, which is no probability of that kind.
//!
//! The loads are noted as `load`, `[m]`. Both losses count 0.1 unless a recipe says otherwise, as in
//! the paper's language models. W and W_noise start at 0, so that at first noise alone decides; ties in evaluation are
//! broken as in `top_k`.
//!
//! Shazeer et al. 2017, arXiv 1701.06538, §2.1, §4 and appendix A (`noise_epsilon` is
//! Tensor2Tensor's); V-MoE: Riquelme et al. 2021, arXiv 2106.05974, §2 and appendix A; survey §4.2.3.

use modl_core::{
    Bank, Context, Error, Init, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Scores;
use crate::losses::{cv2, mean_of_units};
use crate::scores::{Scored, Scorer};
use crate::top_k::ties::{Ties, largest, largest_values};
use crate::top_k::{check_k, check_not_negative};

/// The k largest of noisy scores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NoisyTopK {
    /// How many modules are active. Default: 2.
    pub k: usize,
    /// Whose noise, weights and losses. Default: `shazeer`.
    pub variant: Variant,
    /// What σ is at least, for `shazeer`. Default: 0.01.
    pub noise_epsilon: f64,
    /// m·σ for `v_moe`. Default: 1.
    pub noise: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

/// Whose noisy top-k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// Learned noise, a softmax over what was chosen.
    #[default]
    Shazeer,
    /// Fixed noise, a softmax over all.
    VMoe,
}

impl Default for NoisyTopK {
    fn default() -> Self {
        NoisyTopK {
            k: 2,
            variant: Variant::Shazeer,
            noise_epsilon: 0.01,
            noise: 1.0,
            seed: 0,
            scores: Scores::default(),
        }
    }
}

impl RouterConfig for NoisyTopK {
    fn kind(&self) -> &'static str {
        "noisy_top_k"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_k("noisy_top_k.k", self.k, bank.len())?;
        check_not_negative("noisy_top_k.noise_epsilon", self.noise_epsilon)?;
        if !(self.noise > 0.0 && self.noise.is_finite()) {
            return Err(Error::invalid("noisy_top_k.noise", "is to be above 0"));
        }
        let scorer = self.scores.build("noisy_top_k", site, bank.len(), scope)?;
        let noise = match self.variant {
            Variant::Shazeer => Some(scope.param("noise", &scorer.weight.size(), Init::Zeros)?),
            Variant::VMoe => None,
        };
        let path = scope.path().to_owned();
        let ties = Ties::new(self.seed, &scorer, &path);
        Ok(Box::new(NoisyRouter { config: self.clone(), scorer, noise, ties, path }))
    }
}

#[derive(Debug)]
struct NoisyRouter {
    config: NoisyTopK,
    scorer: Scorer,
    /// W_noise, `[modules, width]`.
    noise: Option<Tensor>,
    ties: Ties,
    /// Where this router's noise is drawn.
    path: String,
}

impl Router for NoisyRouter {
    fn kind(&self) -> &'static str {
        "noisy_top_k"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("importance", 0.1), ("load", 0.1)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let scored = self.scorer.scores(x, cx)?;
        let clean = &scored.logits;
        let sigma = if cx.train { Some(self.sigma(&scored)?) } else { None };
        let noisy = match &sigma {
            None => clean.clone(),
            Some(sigma) => {
                let seed = cx.draw(&self.path);
                let unit = Init::Normal(1.0);
                let drawn = unit.tensor(&clean.size(), seed, clean.kind(), clean.device())?;
                clean.add(&drawn.mul(sigma)?)?
            }
        };
        let index = largest(&noisy, || self.ties.second(&scored.x), self.config.k)?;
        let by_kept = self.config.variant == Variant::Shazeer;
        let weight = match by_kept {
            true => noisy.gather(-1, &index)?.softmax(-1)?,
            false => noisy.softmax(-1)?.gather(-1, &index)?,
        };
        let alpha = Weights::Sparse { index: index.clone(), weight: weight.clone() };
        let mut routing = Routing::new(alpha, bank.len());
        if by_kept {
            routing = routing.normalised();
        }
        let Some(sigma) = sigma else { return Ok(routing) };
        let mask = scored.mask.as_ref();
        let soft = match by_kept {
            true => clean.zeros_like()?.scatter_add(-1, &index, &weight)?,
            false => clean.softmax(-1)?,
        };
        let chance = self.chance(clean, &noisy, &sigma)?;
        let units = match mask {
            Some(mask) => mask.to_kind(clean.kind())?.sum()?.item()?,
            None => (clean.numel() / bank.len().max(1)) as f64,
        };
        let load = mean_of_units(&chance, mask)?.mul_scalar(units)?;
        Ok(routing
            .with_loss("importance", cv2(&mean_of_units(&soft, mask)?)?)
            .with_loss("load", cv2(&load)?)
            .note("load", load.detach()?))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let scorer = self.scorer.grown(modules, scope)?;
        let ties = Ties::new(self.config.seed, &scorer, scope.path());
        let more = |noise: &Tensor| -> Result<Tensor> {
            let mut shape = noise.size();
            shape.iter_mut().take(1).for_each(|m| *m = modules as i64 - *m);
            let rows = Tensor::zeros(&shape, noise.kind(), noise.device())?;
            scope.replace("noise", &Tensor::cat(&[noise.detach()?, rows], 0)?)
        };
        let noise = self.noise.as_ref().map(more).transpose()?;
        let (config, path) = (self.config.clone(), self.path.clone());
        Ok(Box::new(NoisyRouter { noise, config, scorer, ties, path }))
    }
}

impl NoisyRouter {
    /// σ, in the shape of ℓ or `[]`.
    fn sigma(&self, scored: &Scored) -> Result<Tensor> {
        let l = &scored.logits;
        match &self.noise {
            Some(w) => scored
                .x
                .linear(&w.to_kind(scored.x.kind())?, None)?
                .softplus()?
                .add_scalar(self.config.noise_epsilon),
            None => {
                let sigma = self.config.noise / l.len_of(-1).max(1) as f64;
                Tensor::full(&[], sigma, l.kind(), l.device())
            }
        }
    }

    /// How likely each module would be chosen once more if its noise were drawn again.
    fn chance(&self, clean: &Tensor, noisy: &Tensor, sigma: &Tensor) -> Result<Tensor> {
        let (k, m) = (self.config.k as i64, clean.len_of(-1));
        if k == m {
            return clean.ones_like(); // nothing to win against
        }
        let top = largest_values(noisy, self.config.k + 1)?;
        let kth = top.narrow(-1, k - 1, 1)?;
        let to_beat = if self.config.variant == Variant::Shazeer {
            // For a module among the k largest the k-th largest of the others is the next one.
            let next = top.narrow(-1, k, 1)?;
            let among = noisy.greater(&next)?;
            next.expand(&noisy.size())?.where_else(&among, &kth.expand(&noisy.size())?)?
        } else {
            kth
        };
        let z = clean.sub(&to_beat)?.div(sigma)?;
        let erf = Tensor::op("erf", &[&z.mul_scalar(0.5f64.sqrt())?], |t| t[0].f_erf())?;
        erf.add_scalar(1.0)?.mul_scalar(0.5)
    }
}
