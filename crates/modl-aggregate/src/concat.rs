//! The exact sum of low-rank changes, as one low-rank change.
//!
//! With ΔWⱼ = sⱼ Bⱼ Aⱼ: ΔW = Σ αⱼ sⱼ Bⱼ Aⱼ = B̄ Ā where Ā = [A₁; …; Aₖ] holds the Aⱼ below one
//! another, `[Σr, in]`, and B̄ = [α₁s₁B₁ … αₖsₖBₖ] the Bⱼ side by side, `[out, Σr]`. The rank is the
//! sum of the ranks, which may differ. Gradients flow to α and to every Aⱼ and Bⱼ.
//!
//! PEFT's `add_weighted_adapter(combination_type="cat")`; survey §5.1. Dropout in front of a module
//! does not act here: with it a module is no change of the weight.

use modl_core::{
    Active, Aggregator, AggregatorConfig, Context, Error, LowRank, Module, Order, Result, Scope,
    Site, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::unchanged::Unchanged;

/// Σ αⱼ ΔWⱼ, exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concat {}

impl AggregatorConfig for Concat {
    fn kind(&self) -> &'static str {
        "concat"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("concat", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for Concat {
    fn kind(&self) -> &'static str {
        "concat"
    }

    fn order(&self) -> Order {
        Order::Parameters
    }

    fn parameters(&self, phi: &Active, _: &Tensors) -> Result<Box<dyn Module>> {
        let mut parts = Vec::with_capacity(phi.len());
        for (_, name, module) in phi.modules() {
            parts.push(module.low_rank(&Context::eval()).ok_or_else(|| {
                Error::unsupported(
                    format!(
                        "`concat` of module `{name}`, a `{}`, which is not low-rank",
                        module.kind()
                    ),
                    "choose the aggregator `weighted_sum`",
                )
            })?);
        }
        let Some(first) = parts.first() else { return Ok(Box::new(Unchanged)) };
        // A factor that all share stays the factor, so that one module gives itself bit for bit.
        let shared = parts.iter().all(|p| p.scale == first.scale);
        let alpha = phi.alpha()?; // [k]
        let mut ups: Vec<Tensor> = Vec::with_capacity(parts.len());
        for (j, p) in (0..).zip(&parts) {
            let scale = if shared { 1.0 } else { p.scale };
            let weight = alpha.select(0, j)?.mul_scalar(scale)?;
            ups.push(p.up.mul(&weight.to_kind(p.up.kind())?.to_device(p.up.device())?)?);
        }
        let downs: Vec<Tensor> = parts.iter().map(|p| p.down.clone()).collect();
        Ok(Box::new(LowRank {
            down: Tensor::cat(&downs, 0)?,
            up: Tensor::cat(&ups, 1)?,
            scale: if shared { first.scale } else { 1.0 },
        }))
    }
}
