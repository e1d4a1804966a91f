//! HyperFormer++: adapters of all tasks, layers and positions from one network.
//!
//! I = LN(W₂ relu(W₁ \[z_task ‖ z_layer ‖ z_position\] + b₁) + b₂) and φᵢ = Hᵢ I + hᵢ, where all
//! sites share everything: embeddings, projector and heads. A site is told from another by the
//! embeddings of its layer and of its position in it. Sites of other sizes have other heads.
//!
//! Karimi Mahabadi et al. 2021, *Parameter-efficient Multi-task Fine-tuning for Transformers via
//! Shared Hypernetworks*, arXiv 2106.04489. Survey §3.4. The norm of I (ε = 1e-6) and the widths
//! within the projector are those of the authors' code.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::builder::{Builder, Whose};
use super::{Condition, HyperFormer};
use crate::Nested;

/// Configuration of HyperFormer++.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperFormerPlusPlus {
    /// What is generated; default: [`HyperFormer::adapter`].
    pub config: Nested,
    /// The tasks. There is no default.
    pub tasks: Condition,
    /// The width of the embeddings of a task, a layer and a position; default 64.
    pub task_dim: i64,
    /// The width within the projector; default 128.
    pub hidden_dim: i64,
    /// The width of I; default 64.
    pub projected_dim: i64,
}

impl Default for HyperFormerPlusPlus {
    fn default() -> Self {
        HyperFormerPlusPlus {
            config: Nested::new(HyperFormer::adapter()),
            tasks: Condition::default(),
            task_dim: 64,
            hidden_dim: 128,
            projected_dim: 64,
        }
    }
}

impl ModuleConfig for HyperFormerPlusPlus {
    fn kind(&self) -> &'static str {
        "hyperformer_plus_plus"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        HyperFormer::sites(&self.config)
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.condition("task", &self.tasks, self.task_dim)?;
        g.layer(self.task_dim)?;
        g.position(self.task_dim)?; // z_task ‖ z_layer ‖ z_position
        let mut projector = g.projector(self.hidden_dim, self.projected_dim)?;
        projector.push(g.norm("projector.norm", 1e-6)?); // I
        let heads = g.heads(Whose::All, true)?; // Hᵢ I + hᵢ
        Ok(g.chain(projector, heads))
    }
}
