//! The scalar mix: one learned score for each module, and one factor.
//!
//! y = γ Σⱼ pⱼ hⱼ with p ∝ α exp(s); s = 0 and γ = 1 at first, so that it starts as the mean that the
//! router weighs. ELMo mixes the layers of its language model in this way ([`scalar_mix`]); here it
//! mixes modules. A row without any module is left to f_θ.
//!
//! Peters et al. 2018, *Deep contextualized word representations*, arXiv 1802.05365, eq. 1; survey
//! §5.2.1.

use modl_core::{
    Aggregator, AggregatorConfig, Bank, Error, Init, Order, Outputs, Result, Routing, Scope,
    Signal, Site, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::changes::{Changes, attend, blend, check_site};
use crate::per_module::PerModule;

/// γ Σ softmax(s)ⱼ hⱼ over modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScalarMix {
    /// Whether there is γ, one number for each site; else it is 1. Default: true.
    pub gamma: bool,
}

impl Default for ScalarMix {
    fn default() -> Self {
        ScalarMix { gamma: true }
    }
}

impl AggregatorConfig for ScalarMix {
    fn kind(&self) -> &'static str {
        "scalar_mix"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("scalar_mix", self)
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        self.build_over(site, &Bank::new(), scope)
    }

    fn build_over(
        &self,
        site: &Site,
        bank: &Bank,
        scope: &mut Scope,
    ) -> Result<Box<dyn Aggregator>> {
        check_site("scalar_mix", site)?;
        let scores = PerModule::build("scalar_mix", "scores", bank, &[1], Init::Zeros, scope)?;
        let gamma = self.gamma.then(|| scope.param("gamma", &[1], Init::Ones)).transpose()?;
        Ok(Box::new(Mixed { scores, gamma }))
    }
}

#[derive(Debug)]
struct Mixed {
    /// s, `[1]` each.
    scores: PerModule,
    /// `[1]`.
    gamma: Option<Tensor>,
}

impl Aggregator for Mixed {
    fn kind(&self) -> &'static str {
        "scalar_mix"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        let changes = Changes::of("scalar_mix", h)?;
        let Some(z) = &changes.z else { return Ok(changes.base) };
        let kind = z.kind();
        let scores = self.scores.active(h)?.squeeze(-1)?.to_kind(kind)?;
        // Each α may be another one: `[…, k]`, or `[k]` where all rows have one.
        let scores = match changes.alpha.dim() {
            1 => scores,
            _ => scores.expand(&changes.alpha.size())?,
        };
        let p = attend(&scores, &changes.alpha)?;
        let sum = changes.y.add(&blend(&changes.to_all(&p)?, z)?)?;
        let y = match &self.gamma {
            None => sum,
            Some(gamma) => {
                // γ − 1 counts where there is a module.
                let some = p.detach()?.sum_dims(&[-1], true)?.gt_scalar(0.5)?.to_kind(kind)?;
                sum.mul(&some.mul(&gamma.to_kind(kind)?.add_scalar(-1.0)?)?.add_scalar(1.0)?)?
            }
        };
        changes.give(&y)
    }
}

/// γ Σⱼ softmax(s)ⱼ hⱼ of the hidden states of several layers, all of one shape; `scores` `[layers]`,
/// `gamma` one number. ELMo's eq. 1.
///
/// # Errors
/// Where there are not as many scores as states, or shapes differ.
pub fn scalar_mix(states: &[Tensor], scores: &Tensor, gamma: &Tensor) -> Result<Tensor> {
    if scores.size() != [states.len() as i64] {
        let problem = format!("{scores:?} for {} states", states.len());
        return Err(Error::invalid("scalar_mix.scores", problem));
    }
    let all = Tensor::stack(states, -1)?; // […, layers]
    let p = scores.softmax(-1)?.to_kind(all.kind())?;
    all.matmul(&p)?.mul(&gamma.to_kind(all.kind())?)
}
