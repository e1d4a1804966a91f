//! Soft routing: every module with a weight of its own, α = softmax((W x̄ + b) ⁄ τ).
//!
//! Everything is differentiable, and every module is run. Mixtures of experts: Jacobs, Jordan,
//! Nowlan, Hinton 1991, Neural Computation 3(1), "Adaptive mixtures of local experts"; survey
//! §4.2.3. With an aggregator of parameters it is the soft merging of experts of SMEAR (Muqeeth,
//! Liu, Raffel 2023, arXiv 2306.03745), at the cost of one module:
//!
//! ```toml
//! router = { type = "soft" }
//! aggregator = { type = "average" }
//! ```
//!
//! Parameters are merged once for each row, so the input is a `mean` or a feature there. Otherwise
//! it may be `tokens`:
//!
//! ```toml
//! router = { type = "soft", input = "tokens", temperature = 0.5 }
//! ```

use modl_core::{
    Bank, Context, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Scores;
use crate::scores::Scorer;

/// A softmax over all modules.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Soft {
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl RouterConfig for Soft {
    fn kind(&self) -> &'static str {
        "soft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(SoftRouter(self.scores.build("soft", site, bank.len(), scope)?)))
    }
}

#[derive(Debug)]
struct SoftRouter(Scorer);

impl Router for SoftRouter {
    fn kind(&self) -> &'static str {
        "soft"
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let alpha = self.0.scores(x, cx)?.logits.softmax(-1)?; // [batch, (seq,) modules]
        Ok(Routing::new(Weights::Dense(alpha), bank.len()).normalised())
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(SoftRouter(self.0.grown(modules, scope)?)))
    }
}
