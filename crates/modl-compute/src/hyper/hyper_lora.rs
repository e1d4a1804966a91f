//! HyperLoRA: LoRA of all tasks from one network.
//!
//! z' = relu(W z + b) from the task's embedding z, which all sites share; A = H_A z' and B = H_B z'
//! with heads of the site's own and without biases. H_B starts at 0, so that a fresh one changes
//! nothing; s = 1⁄r.
//!
//! The baseline of Ponti et al. 2023, *Combining Parameter-efficient Modules for Task-level
//! Generalisation*, arXiv 2202.13914, after the authors' code. Survey §3.4.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Condition;
use super::builder::{Builder, Whose};
use super::network::Layer;
use crate::{Lora, Nested};

/// Configuration of HyperLoRA.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperLora {
    /// What is generated; default: LoRA of rank 16 with s = 1⁄r.
    pub config: Nested,
    /// The tasks. There is no default.
    pub tasks: Condition,
    /// The width of z and z', the number of skills; default 8.
    pub skills: i64,
}

impl Default for HyperLora {
    fn default() -> Self {
        HyperLora {
            config: Nested::new(Lora { r: 16, alpha: 1.0, ..Lora::default() }),
            tasks: Condition::default(),
            skills: 8,
        }
    }
}

impl ModuleConfig for HyperLora {
    fn kind(&self) -> &'static str {
        "hyper_lora"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.condition("task", &self.tasks, self.skills)?; // z
        let trunk = vec![g.dense("projector", self.skills, 2.0)?, Layer::Relu]; // z'
        let heads = g.heads(Whose::Site, false)?; // H_A z', H_B z'
        Ok(g.chain(trunk, heads))
    }
}
