//! The weighted average of module parameters: one module, and one pass, instead of k.
//!
//! φ̄ = Σ αⱼ φⱼ ⁄ Σ αⱼ, tensor by tensor, then y = f'(x; θ, φ̄). Gradients flow to α and to every
//! φⱼ. Model soups (Wortsman et al. 2022, arXiv 2203.05482), AdaMix (Wang et al. 2022,
//! arXiv 2205.12410), SMEAR (Muqeeth, Liu, Raffel 2023, arXiv 2306.03745); survey §5.1.
//!
//! Of low-rank modules A and B are averaged separately, as Polytropon does (Ponti et al. 2023,
//! arXiv 2202.13914): (Σ αᵢBᵢ)(Σ αⱼAⱼ) has the cross terms αᵢαⱼBᵢAⱼ and is *not* Σ αⱼBⱼAⱼ. Use
//! [`Concat`](crate::Concat) for the latter.

use modl_core::{
    Active, Aggregator, AggregatorConfig, Error, Module, Order, Result, Scope, Site, Tensor,
    Tensors,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::unchanged::Unchanged;

/// Σ αⱼ φⱼ ⁄ Σ αⱼ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Average {
    /// Whether the sum is divided by Σ αⱼ, so that equal modules give themselves whatever their
    /// weights. Without it, φ̄ = Σ αⱼ φⱼ. Default: true.
    pub normalise: bool,
}

impl Default for Average {
    fn default() -> Self {
        Average { normalise: true }
    }
}

impl AggregatorConfig for Average {
    fn kind(&self) -> &'static str {
        "average"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("average", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for Average {
    fn kind(&self) -> &'static str {
        "average"
    }

    fn order(&self) -> Order {
        Order::Parameters
    }

    fn parameters(&self, phi: &Active, _: &Tensors) -> Result<Box<dyn Module>> {
        let mut modules = phi.modules().map(|(_, name, module)| (name, module));
        let Some((first_name, first)) = modules.next() else { return Ok(Box::new(Unchanged)) };
        let signature = first.signature();
        let mut all = vec![first.phi()];
        for (name, module) in modules {
            let other = module.signature();
            if other != signature {
                return Err(Error::unsupported(
                    format!("averaging `{first_name}`, {signature}, with `{name}`, {other}"),
                    "low-rank modules of different ranks join with `concat`, any with `weighted_sum`",
                ));
            }
            all.push(module.phi());
        }
        let alpha = self.weights(phi)?; // [k]
        let average = all[0].map(|name, _| weigh(name, &all, &alpha))?;
        first.with_phi(&average)
    }
}

impl Average {
    fn weights(&self, phi: &Active) -> Result<Tensor> {
        let alpha = phi.alpha()?;
        if !self.normalise || phi.routing().normalised {
            return Ok(alpha);
        }
        let total = alpha.sum()?;
        if total.item()? == 0.0 {
            let problem = "the weights sum to 0; set `normalise = false` for a plain sum";
            return Err(Error::invalid("average", problem));
        }
        alpha.div(&total)
    }
}

/// Σ αⱼ φⱼ of one tensor of φ.
fn weigh(name: &str, all: &[Tensors], alpha: &Tensor) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (j, phi) in (0..).zip(all) {
        let t = phi.need(name)?;
        let term = t.mul(&alpha.select(0, j)?.to_kind(t.kind())?.to_device(t.device())?)?;
        sum = Some(sum.map_or_else(|| Ok(term.clone()), |s| s.add(&term))?);
    }
    sum.ok_or_else(|| Error::invalid("average", "there are no modules"))
}
