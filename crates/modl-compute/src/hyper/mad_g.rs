//! MAD-G: language adapters from what is known of a language's typology, also for languages
//! without any text.
//!
//! λ = V t + a from the language's typology vector t, and φᵢ = Hᵢ λ with heads of the site's own.
//!
//! Ansell et al. 2021, *MAD-G: Multilingual Adapter Generation for Efficient Cross-Lingual
//! Transfer*, Findings of EMNLP. Survey §3.4.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::builder::{Builder, Whose};
use super::{Condition, pfeiffer_without_effect};
use crate::Nested;

/// Configuration of MAD-G.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MadG {
    /// What is generated; default: bottleneck adapters after Pfeiffer et al. which change nothing
    /// at the start.
    pub config: Nested,
    /// The languages; default: the feature `typology` with URIEL's 289 columns (103 of syntax, 28
    /// of phonology, 158 of phonetic inventories).
    pub languages: Condition,
    /// The width of the embedding where languages are names; default 32.
    pub language_dim: i64,
    /// The width of λ; default 32.
    pub projected_dim: i64,
}

impl Default for MadG {
    fn default() -> Self {
        MadG {
            config: pfeiffer_without_effect(),
            languages: Condition::feature("typology", 289),
            language_dim: 32,
            projected_dim: 32,
        }
    }
}

impl ModuleConfig for MadG {
    fn kind(&self) -> &'static str {
        "mad_g"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.condition("language", &self.languages, self.language_dim)?; // t
        let projector = vec![g.dense("projector", self.projected_dim, 1.0)?]; // λ
        let heads = g.heads(Whose::Site, false)?; // Hᵢ λ
        Ok(g.chain(projector, heads))
    }
}
