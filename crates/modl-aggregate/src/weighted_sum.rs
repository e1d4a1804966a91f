//! The weighted sum of module outputs.
//!
//! - `base = "kept"`: y = f_θ(x) + Σ αⱼ (hⱼ − f_θ(x)), where modules are changes to a pretrained
//!   function; a row without any module is left to f_θ;
//! - `base = "replaced"`: y = Σ αⱼ hⱼ, as in a mixture of experts (Shazeer et al. 2017,
//!   arXiv 1701.06538, eq. 1).
//!
//! The two agree where α sums to 1. With α ∈ {0, 1} it is the sum of the chosen modules. Survey
//! §5.2.

use modl_core::{
    Aggregator, AggregatorConfig, Base, Order, Outputs, Result, Routing, Scope, Signal, Site,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Σ αⱼ hⱼ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightedSum {
    /// What α weighs against. Default: `kept`.
    pub base: Base,
}

impl AggregatorConfig for WeightedSum {
    fn kind(&self) -> &'static str {
        "weighted_sum"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("weighted_sum", self)
    }

    fn build(&self, _: &Site, _: &mut Scope) -> Result<Box<dyn Aggregator>> {
        Ok(Box::new(*self))
    }
}

impl Aggregator for WeightedSum {
    fn kind(&self) -> &'static str {
        "weighted_sum"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        h.weighted_sum(self.base)
    }
}
