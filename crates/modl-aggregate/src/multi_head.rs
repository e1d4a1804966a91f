//! Multi-head averaging of low-rank modules: each part of the module with an α of its own.
//!
//! The columns of A `[rank, in]` and the rows of B `[out, rank]` are cut into h parts of equal
//! width, and with the router's α_q for part q
//!
//! Ā\[:, part q\] = Σⱼ α_qj Aⱼ\[:, part q\],   B̄\[part q, :\] = Σⱼ α_qj Bⱼ\[part q, :\],   ΔW = s · B̄ Ā.
//!
//! Page-Caccia et al. 2023, arXiv 2211.03831; PEFT's `poly` with `n_splits`; survey §5.1. As in
//! [`Average`](crate::Average) the factors are averaged before they are multiplied. Where the router
//! gives no heads, all parts have the same α, and the result is that of `average`.

use modl_core::{
    Active, Aggregator, AggregatorConfig, Context, Error, LowRank, Module, Order, Result, Scope,
    Site, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::unchanged::Unchanged;

/// The average of low-rank modules, part by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MultiHead {}

impl AggregatorConfig for MultiHead {
    fn kind(&self) -> &'static str {
        "multi_head"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("multi_head", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for MultiHead {
    fn kind(&self) -> &'static str {
        "multi_head"
    }

    fn order(&self) -> Order {
        Order::Parameters
    }

    fn parameters(&self, phi: &Active, _: &Tensors) -> Result<Box<dyn Module>> {
        let parts = of_one_form("multi_head", phi)?;
        let Some((_, first)) = parts.first() else { return Ok(Box::new(Unchanged)) };
        let alpha = heads("multi_head", phi, &parts)?; // [heads, k]
        let down =
            Tensor::stack(&parts.iter().map(|p| p.1.down.t()).collect::<Result<Vec<_>>>()?, 0)?;
        let up = Tensor::stack(&parts.iter().map(|p| p.1.up.clone()).collect::<Vec<_>>(), 0)?;
        Ok(Box::new(LowRank {
            down: blend(&alpha, &down, "inputs")?.t()?,
            up: blend(&alpha, &up, "outputs")?,
            scale: first.scale,
        }))
    }
}

/// The active modules with their places in α, all low-rank and of one form.
pub(crate) fn of_one_form(kind: &str, phi: &Active) -> Result<Vec<(i64, LowRank)>> {
    let form = |m: &LowRank| (m.down.size(), m.up.size(), m.scale);
    let mut parts: Vec<(i64, LowRank)> = Vec::with_capacity(phi.len());
    let mut first_name = "";
    for (j, name, module) in phi.modules() {
        let own = module.low_rank(&Context::eval()).ok_or_else(|| {
            Error::unsupported(
                format!("`{kind}` of module `{name}`, a `{}`", module.kind()),
                "choose the aggregator `average`, or low-rank modules such as LoRA",
            )
        })?;
        match parts.first() {
            None => first_name = name,
            Some((_, first)) if form(first) != form(&own) => {
                let (a, b) = (form(first), form(&own));
                return Err(Error::unsupported(
                    format!("averaging `{first_name}`, {a:?}, with `{name}`, {b:?}"),
                    "give all modules one rank and one factor",
                ));
            }
            Some(_) => {}
        }
        parts.push((j as i64, own));
    }
    Ok(parts)
}

/// α of the active modules for each head, each row of sum 1, `[heads, k]`.
pub(crate) fn heads(kind: &str, phi: &Active, parts: &[(i64, LowRank)]) -> Result<Tensor> {
    let alpha = match &phi.routing().heads {
        Some(heads) => {
            let active: Vec<i64> = parts.iter().map(|p| p.0).collect();
            let index = Tensor::from_slice(&active, &[active.len() as i64], heads.device())?;
            heads.index_select(-1, &index)?
        }
        None => phi.alpha()?.unsqueeze(0)?,
    };
    if phi.routing().normalised {
        return Ok(alpha);
    }
    let total = alpha.sum_dims(&[-1], true)?;
    if total.to_vec::<f64>()?.contains(&0.0) {
        return Err(Error::invalid(kind, "the weights of a head sum to 0"));
    }
    alpha.div(&total)
}

/// Σⱼ α_qj Mⱼ\[part q\] of matrices `[k, width, rank]` that are cut along their width, `[width, rank]`.
fn blend(alpha: &Tensor, all: &Tensor, what: &str) -> Result<Tensor> {
    let (heads, width, rank) = (alpha.len_of(0), all.len_of(1), all.len_of(2));
    if width % heads.max(1) != 0 {
        let problem = format!("{width} {what} cannot be cut into {heads} equal parts");
        return Err(Error::invalid("multi_head.heads", problem));
    }
    let alpha = alpha.to_kind(all.kind())?.to_device(all.device())?;
    let cut = all.reshape(&[-1, heads, width / heads, rank])?; // [k, heads, part, rank]
    let weights = alpha.t()?.unsqueeze(-1)?.unsqueeze(-1)?; // [k, heads, 1, 1]
    cut.mul(&weights)?.sum_dims(&[0], false)?.reshape(&[width, rank])
}
