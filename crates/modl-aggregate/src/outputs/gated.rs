//! Gated fusion: a learned gate over what each module changes.
//!
//! With h = f_θ(x), the changes zⱼ = hⱼ − h and the logit lⱼ = wⱼ·h + uⱼ·zⱼ + bⱼ of each token,
//!
//! - `gate = "softmax"`: y = h + Σⱼ pⱼ zⱼ with p ∝ α exp(l): modules compete;
//! - `gate = "sigmoid"`: y = h + Σⱼ αⱼ σ(lⱼ) zⱼ: each is let through by itself.
//!
//! All are 0 at first: a softmax gate starts as the mean that the router weighs, a sigmoid gate lets
//! half of each change through.
//!
//! Arevalo, Solorio, Montes-y-Gómez, González 2017, *Gated Multimodal Units for Information Fusion*,
//! arXiv 1702.01992; survey §5.2.1.

use modl_core::{
    Aggregator, AggregatorConfig, Bank, Init, Order, Outputs, Result, Routing, Scope, Signal, Site,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::changes::{Changes, attend, blend, check_site};
use crate::per_module::PerModule;

/// What becomes of the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// They sum to 1 over the modules.
    #[default]
    Softmax,
    /// Each is in (0, 1).
    Sigmoid,
}

/// A gate over outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gated {
    /// Default: `softmax`.
    pub gate: Gate,
}

impl AggregatorConfig for Gated {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("gated", self)
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
        check_site("gated", site)?;
        let mut own = |name: &str, shape: &[i64]| {
            PerModule::build("gated", name, bank, shape, Init::Zeros, scope)
        };
        Ok(Box::new(Gates {
            gate: self.gate,
            of_base: own("base", &[site.output])?,
            of_change: own("change", &[site.output])?,
            bias: own("bias", &[1])?,
        }))
    }
}

#[derive(Debug)]
struct Gates {
    gate: Gate,
    /// w and u, `[dim]` each.
    of_base: PerModule,
    of_change: PerModule,
    /// b, `[1]` each.
    bias: PerModule,
}

impl Aggregator for Gates {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        let changes = Changes::of("gated", h)?;
        let Some(z) = &changes.z else { return Ok(changes.base) };
        let own = |p: &PerModule| p.active(h)?.to_kind(z.kind());
        let of_change = z.mul(&own(&self.of_change)?)?.sum_dims(&[-1], false)?; // […, k]
        let bias = own(&self.bias)?.squeeze(-1)?;
        let l = changes.y.linear(&own(&self.of_base)?, Some(&bias))?.add(&of_change)?;
        let p = match self.gate {
            Gate::Softmax => attend(&l, &changes.alpha)?,
            Gate::Sigmoid => {
                l.check_finite("logits")?;
                l.sigmoid()?.mul(&changes.alpha)?
            }
        };
        changes.give(&changes.y.add(&blend(&p, z)?)?)
    }
}
