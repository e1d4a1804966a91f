//! Prompts one behind the other: f_θ(\[P₁; …; Pₖ; x\]), in the order in which the router names them.
//!
//! A place in the order has no weight: those of the router are to be 1, or all 1 ⁄ k. Prompts may be
//! of different lengths.
//!
//! Lester, Al-Rfou, Constant 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv
//! 2104.08691; survey §5.2.3.

use modl_core::{
    Aggregator, AggregatorConfig, Order, Outputs, Result, Routing, Scope, Signal, Site, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tokens;
use crate::stack::in_order;

/// Prompts one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptConcat {}

impl AggregatorConfig for PromptConcat {
    fn kind(&self) -> &'static str {
        "prompt_concat"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("prompt_concat", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for PromptConcat {
    fn kind(&self) -> &'static str {
        "prompt_concat"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        h.active().per_alpha(h.input(), h.context(), |active, x, cx| {
            let modules = in_order("prompt_concat", active)?;
            let Some((_, first)) = modules.first() else { return h.host().call(x, cx) };
            let each = modules.iter().map(|(name, m)| tokens("prompt_concat", name, *m, cx));
            let all = Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?;
            first.with_virtual_tokens(all)?.forward(h.host(), x, cx)
        })
    }
}
