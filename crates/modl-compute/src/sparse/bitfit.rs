//! BitFit: only biases are trained, b' = b + φ with φ = 0 at the start.
//!
//! Ben Zaken, Goldberg and Ravfogel 2022, *BitFit: Simple Parameter-efficient Fine-tuning for
//! Transformer-based Masked Language-models*, arXiv 2106.10199. Survey §3.1, parameter composition.

use modl_core::{Attachment, Error, Module, ModuleConfig, ParamStore, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Change, Form, learned};
use crate::absent::Absent;

/// Configuration of BitFit: it has no settings. It trains the biases of its sites, normalisations
/// included, and leaves sites without one as they are; where none has any, as in LLaMA and T5, there
/// is nothing to train, and it is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BitFit {}

impl ModuleConfig for BitFit {
    fn kind(&self) -> &'static str {
        "bitfit"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        Targets::pattern("all-linear|all-norm")
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        if at.theta.get("bias").is_none() {
            return Ok(Box::new(Absent));
        }
        let bias = learned(at, |name| name == "bias")?;
        Ok(Box::new(Change::new("bitfit", Form::Delta, &bias, scope)?))
    }

    fn check_built(&self, params: &ParamStore) -> Result<()> {
        if params.iter().next().is_some() {
            return Ok(());
        }
        Err(Error::unsupported(
            "BitFit where none of the sites has a bias",
            "choose targets with biases, or layer-norm tuning or LoRA for such a network",
        ))
    }
}
