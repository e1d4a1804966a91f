//! The average of low-rank modules with an α of its own for each factor.
//!
//! ΔW = s · (Σⱼ α₁ⱼ Bⱼ)(Σⱼ α₀ⱼ Aⱼ): head 0 of the router's α weighs what takes in, A, head 1 what puts
//! out, B. With ones and zeros it joins A of one module with B of another, as AdaMix does in training
//! (Wang et al. 2022, arXiv 2205.12410, §3.1); survey §5.1. Where the router gives no heads, both
//! have the same α, and the result is that of [`Average`](crate::Average). A factor whose weight is a
//! constant 0 has no gradient.

use modl_core::{
    Active, Aggregator, AggregatorConfig, Error, LowRank, Module, Order, Result, Scope, Site,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::multi_head::{heads, of_one_form};
use crate::unchanged::Unchanged;

/// The average of low-rank modules, factor by factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factors {}

impl AggregatorConfig for Factors {
    fn kind(&self) -> &'static str {
        "factors"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("factors", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for Factors {
    fn kind(&self) -> &'static str {
        "factors"
    }

    fn order(&self) -> Order {
        Order::Parameters
    }

    fn parameters(&self, phi: &Active, _: &Tensors) -> Result<Box<dyn Module>> {
        let parts = of_one_form("factors", phi)?;
        let Some((_, first)) = parts.first() else { return Ok(Box::new(Unchanged)) };
        let alpha = heads("factors", phi, &parts)?; // [1 or 2, k]
        let (a, b) = match alpha.len_of(0) {
            1 => (alpha.select(0, 0)?, alpha.select(0, 0)?),
            2 => (alpha.select(0, 0)?, alpha.select(0, 1)?),
            n => {
                let problem = format!("there are {n}; a module has two factors, in and out");
                return Err(Error::invalid("factors.heads", problem));
            }
        };
        Ok(Box::new(LowRank {
            down: sum(&a, parts.iter().map(|(_, p)| &p.down), &first.down)?,
            up: sum(&b, parts.iter().map(|(_, p)| &p.up), &first.up)?,
            scale: first.scale,
        }))
    }
}

/// Σ αⱼ Mⱼ; zeros as `like` where all weights are constant zeros.
fn sum<'a>(alpha: &Tensor, all: impl Iterator<Item = &'a Tensor>, like: &Tensor) -> Result<Tensor> {
    let alpha = alpha.to_kind(like.kind())?.to_device(like.device())?;
    let constant = !alpha.requires_grad();
    let mut sum: Option<Tensor> = None;
    for ((j, value), m) in (0..).zip(alpha.detach()?.to_vec::<f64>()?).zip(all) {
        if constant && value == 0.0 {
            continue;
        }
        let term = m.mul(&alpha.select(0, j)?)?;
        sum = Some(sum.map_or_else(|| Ok(term.clone()), |s| s.add(&term))?);
    }
    sum.map_or_else(|| like.detach()?.zeros_like(), Ok)
}
