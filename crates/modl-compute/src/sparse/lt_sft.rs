//! LT-SFT: lottery-ticket sparse fine-tuning, θ' = θ + m ⊙ δ.
//!
//! Phase 1 trains a dense δ. Then m takes the K entries of all sites together whose |δ| is largest,
//! δ goes back to 0, and phase 2 trains those alone. Both phases may add (λ ⁄ N) Σ |δ| to the loss.
//! Differences of a language and of a task add up: θ + φ_language + φ_task.
//!
//! Ansell et al. 2022, *Composable Sparse Fine-Tuning for Cross-Lingual Transfer*, arXiv 2110.07560.
//! Survey §3.1, parameter composition.

use modl_core::{Attachment, Error, Module, ModuleConfig, ParamStore, Result, Scope, Step};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::masked::{DELTA, MASK, Masked, choose, is_open, part};
use super::top_k::{check_share, step_at};

/// Configuration of LT-SFT at sites that have parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LtSft {
    /// K as a share of the parameters of all its sites, in (0, 1]; default 0.01. K is rounded down.
    pub density: f64,
    /// The share of the training steps after which the mask is chosen, in (0, 1]; default 0.5. It
    /// is chosen once: a later training goes on with phase 2. Phase 2 starts with a fresh state of
    /// the optimiser.
    pub choose_at: f64,
    /// λ; default 0, which is no penalty. The authors use 0.1 for languages.
    pub l1: f64,
}

impl Default for LtSft {
    fn default() -> Self {
        LtSft { density: 0.01, choose_at: 0.5, l1: 0.0 }
    }
}

impl ModuleConfig for LtSft {
    fn kind(&self) -> &'static str {
        "lt_sft"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        check_share("lt_sft.density", self.density)?;
        check_share("lt_sft.choose_at", self.choose_at)?;
        if !(self.l1.is_finite() && self.l1 >= 0.0) {
            return Err(Error::invalid("lt_sft.l1", format!("is {}, wants at least 0", self.l1)));
        }
        Ok(Box::new(Masked::new("lt_sft", self.l1, at, scope)?))
    }

    fn after_step(&self, params: &ParamStore, step: &Step) -> Result<()> {
        if step.done != step_at(self.choose_at, step.total) || !is_open(&part(params, MASK))? {
            return Ok(());
        }
        let scores = part(params, DELTA).map(|_, d| d.abs())?;
        choose(params, self.density, &scores)?.into_iter().for_each(|name| step.restart(name));
        Ok(())
    }
}
