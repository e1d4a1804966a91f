//! Layer-norm tuning: only the gains and offsets of normalisations are trained. φ is a copy of
//! them, which takes their place.
//!
//! Zhao et al. 2024, *Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning*,
//! arXiv 2312.11420. Survey §3.1, parameter composition. Names are PEFT's.

use modl_core::{Attachment, Error, Module, ModuleConfig, Result, Scope, SiteKind, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Change, Form, learned};
use crate::peft::Provenance;

/// Where PEFT keeps the layer that it trains, below the layer that it replaces.
const LAYER: &str = "ln_tuning_layers";

/// Configuration of layer-norm tuning at `norm` sites.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LnTuning {
    /// What a PEFT file said besides, kept for writing one again.
    #[serde(skip_serializing_if = "Provenance::is_empty")]
    pub peft: Provenance,
}

impl ModuleConfig for LnTuning {
    fn kind(&self) -> &'static str {
        "ln_tuning"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.site.kind != SiteKind::Norm {
            return Err(Error::unsupported(
                format!("layer-norm tuning at a site of kind {:?}", at.site.kind),
                "attach it to normalisations, for instance with the targets `all-norm`",
            ));
        }
        let part = learned(at, |_| true)?;
        Ok(Box::new(Change::new("ln_tuning", Form::Copy, &part, &mut scope.sub(LAYER))?))
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-norm")
    }
}
