//! Hyper-X: adapters for pairs of task and language, also for pairs that were not trained on.
//!
//! s = W₂ relu(W₁ \[z_task ‖ z_language ‖ z_layer\] + b₁) + b₂ and φᵢ = Hᵢ s + hᵢ, where all layers
//! share everything. Tasks and languages meet only in the projector, so that a task seen in one
//! language and a language seen in another task make a module for the pair. Sites at different
//! positions within a layer have heads of their own.
//!
//! Üstün et al. 2022, *Hyper-X: A Unified Hypernetwork for Multi-Task Multilingual Transfer*, arXiv
//! 2205.12148. Survey §3.4. The widths are those of HyperFormer.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::builder::{Builder, Whose};
use super::{Condition, pfeiffer_without_effect};
use crate::Nested;

/// Configuration of Hyper-X. A row's language is its label `language`
/// ([`with_labels`](modl_core::Context::with_labels)), or a feature.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HyperX {
    /// What is generated; default: bottleneck adapters after Pfeiffer et al. which change nothing
    /// at the start.
    pub config: Nested,
    /// The tasks. There is no default.
    pub tasks: Condition,
    /// The languages. There is no default.
    pub languages: Condition,
    /// The width of the embeddings of a task, a language and a layer; default 64.
    pub source_dim: i64,
    /// The width within the projector; default 128.
    pub hidden_dim: i64,
    /// The width of s; default 64.
    pub projected_dim: i64,
}

impl Default for HyperX {
    fn default() -> Self {
        HyperX {
            config: pfeiffer_without_effect(),
            tasks: Condition::default(),
            languages: Condition::default(),
            source_dim: 64,
            hidden_dim: 128,
            projected_dim: 64,
        }
    }
}

impl ModuleConfig for HyperX {
    fn kind(&self) -> &'static str {
        "hyper_x"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.condition("task", &self.tasks, self.source_dim)?;
        g.condition("language", &self.languages, self.source_dim)?;
        g.layer(self.source_dim)?; // z_task ‖ z_language ‖ z_layer
        let projector = g.projector(self.hidden_dim, self.projected_dim)?; // s
        let heads = g.heads(Whose::Position, true)?; // Hᵢ s + hᵢ
        Ok(g.chain(projector, heads))
    }
}
