//! BitFit: only biases are trained, b' = b + φ with φ = 0 at the start.
//!
//! Ben Zaken, Goldberg and Ravfogel 2022, *BitFit: Simple Parameter-efficient Fine-tuning for
//! Transformer-based Masked Language-models*, arXiv 2106.10199. Survey §3.1, parameter composition.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::full::{Change, Form, learned};

/// Configuration of BitFit: it has no settings. It stands at sites with a bias, normalisations
/// included, and refuses one without: many backbones (LLaMA, T5) have none, and there would be
/// nothing to train.
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

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let bias = learned(at, |name| name == "bias")?;
        Ok(Box::new(Change::new("bitfit", Form::Delta, &bias, scope)?))
    }
}
