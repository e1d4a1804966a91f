//! Edge-popup: the subnetwork of random weights with the best scores, θ' = θ ⊙ m where m takes the
//! share k of a site's weights whose |s| is largest.
//!
//! Ramanujan et al. 2020, *What's Hidden in a Randomly Weighted Neural Network?*, arXiv 1911.13299.
//! Survey §3.1, parameter composition.

use modl_core::{Attachment, Init, Module, ModuleConfig, Result, Scope};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::straight_through::{Rule, StraightThrough, Weights};
use super::top_k::check_share;

/// Configuration of edge-popup at sites with a `weight`. Scores start uniform in ±1⁄√fan_in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgePopup {
    /// k, in (0, 1]; default 0.5.
    pub density: f64,
    /// What is masked.
    pub weights: Weights,
}

impl Default for EdgePopup {
    fn default() -> Self {
        EdgePopup { density: 0.5, weights: Weights::Theta }
    }
}

impl ModuleConfig for EdgePopup {
    fn kind(&self) -> &'static str {
        "edge_popup"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check_share("edge_popup.density", self.density)?;
        let (rule, weights) = (Rule::Top(self.density), self.weights);
        Ok(Box::new(StraightThrough::new("edge_popup", rule, weights, Init::Kaiming, at, scope)?))
    }
}
