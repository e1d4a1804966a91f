//! Multi-head routing: Polytropon with skills of its own for each head.
//!
//! A module is cut into h parts of equal width, and each part has its own ℓ: `[T, h, m]`. Part q of
//! the merged module is Σⱼ α_qj of part q of module j, with α_q as in [`Polytropon`](super::Polytropon). Page-Caccia,
//! Ponti, Su, Pereira, Le Roux, Sordoni 2023, arXiv 2211.03831; PEFT's `poly` with `n_splits`; survey
//! §4.2.3.
//!
//! The aggregator `multi_head` merges part by part. α of a whole module, which all others look at, is
//! the mean over its heads. With one head this is Polytropon.
//!
//! ```toml
//! router = { type = "multi_head", tasks = ["tweets", "news"], heads = 4 }
//! aggregator = { type = "multi_head" }
//! ```

use modl_core::{
    Bank, Context, Error, Result, Router, RouterConfig, Routing, Scope, Signal, Site, Weights,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::labels::TaskLabels;
use super::polytropon::{SkillSettings, Skills};

/// A subset of the modules for each task and head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MultiHead {
    /// h, the number of parts of each module. Default: 4.
    pub heads: i64,
    /// The tasks.
    #[serde(flatten)]
    pub labels: TaskLabels,
    /// How skills are drawn and learned.
    #[serde(flatten)]
    pub skills: SkillSettings,
}

impl Default for MultiHead {
    fn default() -> Self {
        MultiHead { heads: 4, labels: TaskLabels::default(), skills: SkillSettings::default() }
    }
}

impl RouterConfig for MultiHead {
    fn kind(&self) -> &'static str {
        "multi_head"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn build(&self, _: &Site, bank: &Bank, scope: &mut Scope) -> Result<Box<dyn Router>> {
        if self.heads < 1 {
            return Err(Error::invalid("multi_head.heads", "is to be 1 or more"));
        }
        let skills = Skills::build(
            "multi_head",
            &self.labels,
            &self.skills,
            &[self.heads, bank.len() as i64],
            scope,
        )?;
        Ok(Box::new(MultiHeadRouter(skills)))
    }
}

#[derive(Debug)]
struct MultiHeadRouter(Skills);

impl Router for MultiHeadRouter {
    fn kind(&self) -> &'static str {
        "multi_head"
    }

    fn loss_weights(&self) -> &'static [(&'static str, f64)] {
        if self.0.has_prior() { &[("ibp", 1.0)] } else { &[] }
    }

    fn route(&self, x: &Signal, bank: &Bank, cx: &Context) -> Result<Routing> {
        let heads = self.0.alpha(x, cx)?; // [heads, modules] or [batch, heads, modules]
        let alpha = heads.mean_dims(&[-2], false)?;
        let routing = Routing::new(Weights::Dense(alpha), bank.len()).normalised();
        self.0.with_prior(routing.with_heads(heads), cx)
    }

    fn grown(&self, modules: usize, scope: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(MultiHeadRouter(self.0.grown(modules, scope)?)))
    }
}
