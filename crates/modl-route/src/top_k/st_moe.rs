//! ST-MoE's routing: GShard's two modules with capacity, and a loss that keeps the scores small.
//!
//! Choices, weights and capacity are those of [`GShard`](crate::GShard). Losses in training:
//!
//! - `z` = mean over rows or real tokens of (ln Σⱼ exp ℓⱼ)² (counts 0.001). A softmax is
//!   the same whatever is added to all ℓ; this loss is least where ln Σ exp ℓ = 0, and its gradient
//!   is 2 · (ln Σ exp ℓ) · softmax(ℓ).
//! - `balance` = m · Σ f P (counts 0.01).
//!
//! A recipe may say what else they count; these are the paper's numbers.
//!
//! Zoph et al. 2022, arXiv 2202.08906, eq. 5 and §5; survey §4.2.3.

use modl_core::{Bank, Result, Router, RouterConfig, Scope, Site};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::top_k::gshard::{GShard, TopTwo};
use crate::{Capacity, Scores};

/// Top-2 with capacity and a z-loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StMoe {
    /// From which weight on the second module is always kept; 0: always. Default: 0.2.
    pub threshold: f64,
    /// Where the directions that break ties come from. Default: 0.
    pub seed: u64,
    /// How much a module takes. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub capacity: Capacity,
    /// What is scored, and how. In recipes its keys stand beside `type`.
    #[serde(flatten)]
    pub scores: Scores,
}

impl Default for StMoe {
    fn default() -> Self {
        let GShard { threshold, seed, capacity, scores } = GShard::default();
        StMoe { threshold, seed, capacity, scores }
    }
}

impl RouterConfig for StMoe {
    fn kind(&self) -> &'static str {
        "st_moe"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let StMoe { threshold, seed, capacity, scores } = self.clone();
        let two = GShard { threshold, seed, capacity, scores };
        Ok(Box::new(TopTwo::new(self.kind(), &two, true, site, bank, scope)?))
    }
}
