//! RELAX: REINFORCE with a learned control variate that knows the choice and is still without bias.
//!
//! With ln π = log softmax(ℓ), z = ln π + G (G Gumbel noise), the choice a = argmax z, z̃ drawn anew
//! given a, and the loss f of the row, the estimate of ∇ E f is
//!
//! g = (f − c(z̃)) ∇ln π(a) + ∇c(z) − ∇c(z̃),
//!
//! whose mean is right for every c. Here c(z) = Σⱼ softmax(z ⁄ τ)ⱼ qⱼ with q = Q x̄ + r, a guess of the
//! loss that each module would give. With a right guess and a small τ the first term vanishes, but the
//! other two vary with 1 ⁄ τ; with τ about 1 all three are small. Q and r (both 0 at first: then g is
//! that of REINFORCE without baseline) are trained to make ‖g‖² small, with g taken with respect to ℓ.
//! Both losses are in `relax`, which counts 1 unless a recipe says otherwise. No module but the chosen one is run. (REBAR asks for f at relaxed
//! choices, that is for all modules; it is not here.)
//!
//! In evaluation α = onehot(argmax ℓ). With `reward` other than the loss, f = −R.
//!
//! Grathwohl et al. 2017, arXiv 1711.00123; the draw of z̃ given a: Tucker et al. 2017 (REBAR),
//! arXiv 1703.07370, appendix B; survey §4.2.2.
//!
//! ```toml
//! router = { type = "relax" }
//! ```

use modl_core::{
    Bank, Context, Init, Outcome, Result, Router, RouterConfig, Routing, Scope, Signal, Site,
    Tensor, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::annealing::check_tau;
use super::draws::uniform;
use super::policy::{Policy, mean_of_rows, per_row};
use super::reward::Reward;
use crate::Scores;

/// Draws from a softmax, learns from rewards with a control variate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relax {
    /// The reward of a row. Default: `neg_loss`.
    pub reward: Reward,
    /// τ > 0 of the control variate. Default: 1.
    pub tau: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for Relax {
    fn default() -> Self {
        Relax { reward: Reward::NegLoss, tau: 1.0, seed: 0, scores: Scores::default() }
    }
}

impl RouterConfig for Relax {
    fn kind(&self) -> &'static str {
        "relax"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        check_tau("relax", self.tau, None)?;
        let policy = Policy::build(&self.scores, self.seed, "relax", site, bank, scope)?;
        let shape = policy.scorer.weight.size();
        let weight = scope.param("critic.weight", &shape, Init::Zeros)?;
        let bias = scope.param("critic.bias", &[bank.len() as i64], Init::Zeros)?;
        Ok(Box::new(RelaxRouter { config: self.clone(), policy, weight, bias }))
    }
}

#[derive(Debug)]
struct RelaxRouter {
    config: Relax,
    policy: Policy,
    /// Q, `[modules, width]`.
    weight: Tensor,
    /// r, `[modules]`.
    bias: Tensor,
}

impl Router for RelaxRouter {
    fn kind(&self) -> &'static str {
        "relax"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        &[("relax", 1.0)]
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        if !cx.train {
            return self.policy.mode(x, bank, cx);
        }
        let drawn = self.policy.draw(x, cx)?;
        let second = uniform(&drawn.log_p.size(), cx.draw(self.policy.path()).child("given"))?;
        let mut routing = drawn
            .routing(bank.len())?
            .note("logits", drawn.scored.logits.clone())
            .note("gumbel", drawn.noise.clone())
            .note("given", second.to_device(drawn.log_p.device())?)
            .note("x", drawn.scored.x.detach()?);
        if let Some(mask) = &drawn.scored.mask {
            routing = routing.note("real", mask.clone());
        }
        Ok(routing)
    }

    fn credit(&self, routing: &Routing, outcome: &Outcome) -> Result<Option<(String, Tensor)>> {
        let Weights::Sparse { index, .. } = &routing.weights else { return Ok(None) };
        let logits = routing.noted.need("logits")?;
        let kind = logits.kind();
        let mut f = self.config.reward.of(outcome.loss)?.neg()?.to_kind(kind)?;
        if logits.dim() == 3 {
            f = f.unsqueeze(-1)?; // the loss of a row is that of each of its choices
        }
        let x = routing.noted.need("x")?;
        let q = x.linear(&self.weight.to_kind(kind)?, Some(&self.bias.to_kind(kind)?))?;
        let noise = (routing.noted.need("gumbel")?, routing.noted.need("given")?);

        // For ρ: the surrogate whose gradient is g, with Q and r as they are.
        let own = self.variates(logits, &q.detach()?, noise, index)?;
        let chosen = own.log_p.gather(-1, index)?.squeeze(-1)?;
        let first = f.sub(&own.given.detach()?)?.mul(&chosen)?;
        let surrogate = first.add(&own.free)?.sub(&own.given)?;

        // For Q and r: ‖g‖² with respect to ℓ, with ρ as it is.
        let leaf = logits.detach()?.copy()?;
        leaf.set_requires_grad(true)?;
        let of_leaf = self.variates(&leaf, &q, noise, index)?;
        let apart = of_leaf.free.sub(&of_leaf.given)?.sum()?;
        let p = of_leaf.log_p.detach()?.exp()?;
        let of_choice = index.squeeze(-1)?.one_hot(logits.len_of(-1))?.to_kind(kind)?.sub(&p)?;
        let mut g = f.sub(&of_leaf.given)?.unsqueeze(-1)?.mul(&of_choice)?;
        if let Some(Some(own)) = apart.gradients(&[&leaf], true)?.into_iter().next() {
            g = g.add(&own)?;
        }
        let spread = g.square()?.sum_dims(&[-1], false)?;

        let mut loss = surrogate.add(&spread)?;
        if let Some(real) = routing.noted.get("real") {
            loss = loss.mul(&real.to_kind(kind)?)?;
        }
        Ok(Some(("relax".into(), mean_of_rows(&per_row(&loss)?, outcome)?)))
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let policy = self.policy.grown(modules, scope)?;
        let more = |t: &Tensor| {
            let mut shape = t.size();
            if let Some(first) = shape.first_mut() {
                *first = modules as i64 - *first;
            }
            let new = Tensor::zeros(&shape, t.kind(), t.device())?;
            Tensor::cat(&[t.detach()?, new], 0)
        };
        let weight = scope.replace("critic.weight", &more(&self.weight)?)?;
        let bias = scope.replace("critic.bias", &more(&self.bias)?)?;
        Ok(Box::new(RelaxRouter { config: self.config.clone(), policy, weight, bias }))
    }
}

/// The control variate of what was drawn.
struct Variates {
    /// `[batch, (seq,) modules]`.
    log_p: Tensor,
    /// c(z), `[batch, (seq)]`.
    free: Tensor,
    /// c(z̃).
    given: Tensor,
}

impl RelaxRouter {
    fn variates(
        &self,
        logits: &Tensor,
        q: &Tensor,
        (gumbel, given): (&Tensor, &Tensor),
        index: &Tensor,
    ) -> Result<Variates> {
        let log_p = logits.log_softmax(-1)?;
        let free = self.variate(&log_p.add(gumbel)?, q)?;
        let given = self.variate(&conditional(&log_p, given, index)?, q)?;
        Ok(Variates { log_p, free, given })
    }

    /// c(z) = Σ softmax(z ⁄ τ) q.
    fn variate(&self, z: &Tensor, q: &Tensor) -> Result<Tensor> {
        let soft = z.mul_scalar(1.0 / self.config.tau)?.softmax(-1)?;
        soft.mul(q)?.sum_dims(&[-1], false)
    }
}

/// z̃ given that a is its argmax: z̃ₐ = −ln(−ln vₐ), z̃ⱼ = −ln(−ln vⱼ ⁄ πⱼ − ln vₐ), v uniform.
fn conditional(log_p: &Tensor, v: &Tensor, index: &Tensor) -> Result<Tensor> {
    let e = v.log()?.neg()?.to_kind(log_p.kind())?; // −ln v: exponential
    let of_chosen = e.gather(-1, index)?;
    let others = e.mul(&log_p.neg()?.exp()?)?.add(&of_chosen)?.log()?.neg()?;
    let top = of_chosen.log()?.neg()?.expand(&others.size())?;
    let chosen = index.squeeze(-1)?.one_hot(log_p.len_of(-1))?.gt_scalar(0.0)?;
    top.where_else(&chosen, &others)
}
