//! AdaMix: one module by lot for each batch, and one average of all once training is done.
//!
//! In training each site draws a module for the batch; in evaluation all m modules have the weight
//! 1⁄m. With the aggregator `average` that is one module with the mean of the parameters, at the cost
//! of one; `merge_low_rank` of modl-aggregate makes it once and for all. Wang et al. 2022,
//! arXiv 2205.12410, add a loss that holds two passes together:
//! `passes = { count = 2, combine = { consistent = 1.0 } }`. Survey §4.2.2, §5.1.
//!
//! The paper draws the projection down and that up independently of one another; here one draw is
//! for a whole module.
//!
//! ```toml
//! router = { type = "adamix" }
//! aggregator = { type = "average" }
//! ```

use modl_core::{Bank, Level, Result, Router, RouterConfig, Scope, Site};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::random::{Evaluation, Random};

/// One module by lot for each batch, all of them in evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdaMix {}

impl RouterConfig for AdaMix {
    fn kind(&self) -> &'static str {
        "adamix"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let (level, evaluation) = (Level::Static, Evaluation::All);
        let random = Random { level, evaluation, ..Random::default() };
        random.router("adamix", site, bank, scope.path())
    }
}
