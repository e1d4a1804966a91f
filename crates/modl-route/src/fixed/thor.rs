//! THOR: one expert by lot for each pass, whose passes are to agree.
//!
//! In training a site draws one module for the whole batch, in each pass another one. Two passes of a
//! batch give the pair of Zuo et al. 2022, arXiv 2110.04260, and with them the loss
//!
//! (ℓ₁ + ℓ₂) ⁄ 2 + w · (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) ⁄ 2,
//!
//! which the training configuration asks for: `passes = { count = 2, combine = { consistent = 5.0 } }`.
//! The passes draw from an order of the modules by lot that they have in common: pass n takes the n-th,
//! so that no module comes again before all have come. In evaluation all modules are run and averaged (`all`, the ensemble), or one is drawn (`draw`). Survey §4.2.2.
//!
//! ```toml
//! router = { type = "thor" }
//! ```

use modl_core::{Bank, Level, Result, Router, RouterConfig, Scope, Site};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::random::{Evaluation, Random};

/// One module by lot for each pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thor {
    /// What has a draw of its own: the batch (`static`), a row (`example`) or a `token`. Default:
    /// `static`.
    pub level: Level,
    /// What happens in evaluation. Default: `all`.
    pub evaluation: Evaluation,
}

impl Default for Thor {
    fn default() -> Self {
        Thor { level: Level::Static, evaluation: Evaluation::All }
    }
}

impl RouterConfig for Thor {
    fn kind(&self) -> &'static str {
        "thor"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, site: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        let Thor { level, evaluation } = *self;
        let random = Random { level, evaluation, ..Random::default() };
        random.router("thor", site, bank, scope.path(), true)
    }
}
