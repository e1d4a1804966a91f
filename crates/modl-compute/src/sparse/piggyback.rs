//! Piggyback: a learned binary mask on a pretrained network, θ' = θ ⊙ 1[s > τ].
//!
//! s starts above τ everywhere, so that a fresh mask changes nothing.
//!
//! Mallya, Davis and Lazebnik 2018, *Piggyback: Adapting a Single Network to Multiple Tasks by
//! Learning to Mask Weights*, arXiv 1801.06519. Survey §3.1, parameter composition.

use modl_core::{Attachment, Error, Init, Module, ModuleConfig, Result, Scope};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::straight_through::{Rule, StraightThrough, Weights};

/// Configuration of Piggyback at sites with a `weight`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Piggyback {
    /// τ; default 0.005.
    pub threshold: f64,
    /// Where s starts; default 0.01. How far it is above τ and the learning rate go together.
    pub start: f64,
}

impl Default for Piggyback {
    fn default() -> Self {
        Piggyback { threshold: 5e-3, start: 1e-2 }
    }
}

impl ModuleConfig for Piggyback {
    fn kind(&self) -> &'static str {
        "piggyback"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if !(self.threshold.is_finite() && self.start.is_finite()) {
            let problem = format!("are {} and {}, want numbers", self.threshold, self.start);
            return Err(Error::invalid("piggyback.threshold and start", problem));
        }
        let (rule, init) = (Rule::Above(self.threshold), Init::Constant(self.start));
        Ok(Box::new(StraightThrough::new("piggyback", rule, Weights::Theta, init, at, scope)?))
    }
}
