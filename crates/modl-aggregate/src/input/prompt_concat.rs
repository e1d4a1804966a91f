//! Prompts one behind the other: f_θ(\[P₁; …; Pₖ; x\]), in the order in which the router names them.
//!
//! Rows may have prompts of their own; where each has as many of the same length, that is one pass.
//!
//! A place in the order has no weight: those of the router are to be 1, or all 1 ⁄ k. Prompts may be
//! of different lengths.
//!
//! Lester, Al-Rfou, Constant 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv
//! 2104.08691; survey §5.2.3.

use modl_core::{
    Aggregator, AggregatorConfig, Order, Outputs, Result, Routing, Scope, Signal, Site, Tensor,
    Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tokens;
use crate::stack::{check_places, in_order};

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
        if let Some(y) = at_once(h)? {
            return Ok(y);
        }
        h.active().per_alpha(h.input(), h.context(), |active, x, cx| {
            let modules = in_order("prompt_concat", active)?;
            let Some((_, first)) = modules.first() else { return h.host().call(x, cx) };
            let each = modules.iter().map(|(name, m)| tokens("prompt_concat", name, *m, cx));
            let all = Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?;
            first.with_virtual_tokens(all)?.forward(h.host(), x, cx)
        })
    }
}

/// All rows in one pass, where each has prompts of its own, as many and as long as the others'.
fn at_once(h: &Outputs) -> Result<Option<Signal>> {
    let (active, cx) = (h.active(), h.context());
    let Weights::Rows(rows) = &active.routing().weights else { return Ok(None) };
    let count = rows.first().map_or(0, Vec::len);
    if count == 0 || rows.iter().any(|row| row.len() != count) {
        return Ok(None);
    }
    let (mut places, mut prompts, mut any) = (Vec::new(), Vec::new(), None);
    for (j, name, module) in active.modules() {
        places.push(j);
        prompts.push(tokens("prompt_concat", name, module, cx)?);
        any = any.or(Some(module));
    }
    let (Some(any), Some(first)) = (any, prompts.first()) else { return Ok(None) };
    let size = first.size();
    if size.len() != 2 || prompts.iter().any(|p| p.size() != size) {
        return Ok(None);
    }
    let mut index = Vec::with_capacity(rows.len() * count);
    for row in rows {
        check_places("prompt_concat", row)?;
        for (j, _) in row {
            match places.iter().position(|place| place == j) {
                Some(at) => index.push(at as i64),
                None => return Ok(None),
            }
        }
    }
    let index = Tensor::from_slice(&index, &[index.len() as i64], first.device())?;
    let own = Tensor::stack(&prompts, 0)?.index_select(0, &index)?;
    let own = own.reshape(&[rows.len() as i64, -1, first.len_of(1)])?;
    Ok(Some(any.with_virtual_tokens(own)?.forward(h.host(), h.input(), cx)?))
}
