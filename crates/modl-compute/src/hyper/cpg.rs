//! The contextual parameter generator (CPG): the parameters of a network as a linear function of
//! the language.
//!
//! θ' = W l from the language's embedding l, of width M; with controlled sharing θ'ⱼ = Wⱼ Pⱼ l for
//! each group of parameters j, where Pⱼ `[M', M]` says how much of a language a group is told. The
//! groups are the parameters of each site, and each has a W and a P of its own.
//!
//! By default θ' takes the place of the site's own parameters, from their mean square; with
//! `Full { form: Form::Delta }` it is added to them, from 0.
//!
//! Platanios et al. 2018, *Contextual Parameter Generation for Universal Neural Machine
//! Translation*, arXiv 1808.08493. Survey §3.4.

use modl_core::{Attachment, Module, ModuleConfig, Result, Scope, Targets};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Condition;
use super::builder::{Builder, Whose};
use crate::{Form, Full, Nested};

/// Configuration of the contextual parameter generator.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cpg {
    /// What is generated; default: the site's own parameters.
    pub config: Nested,
    /// The languages. There is no default.
    pub languages: Condition,
    /// M, the width of a language's embedding; default 8.
    pub language_dim: i64,
    /// M', for controlled sharing; none by default.
    pub group_dim: Option<i64>,
}

impl Default for Cpg {
    fn default() -> Self {
        Cpg {
            config: Nested::new(Full { form: Form::Copy }),
            languages: Condition::default(),
            language_dim: 8,
            group_dim: None,
        }
    }
}

impl ModuleConfig for Cpg {
    fn kind(&self) -> &'static str {
        "cpg"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json(self.kind(), self)
    }

    fn usual_targets(&self) -> Targets {
        self.config.usual_targets()
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let mut g = Builder::new(self.kind(), &self.config, at, scope)?;
        g.condition("language", &self.languages, self.language_dim)?; // l
        let Some(narrow) = self.group_dim else {
            let heads = g.heads(Whose::Site, false)?; // W l
            return Ok(g.chain(Vec::new(), heads));
        };
        g.positive("group_dim", narrow)?;
        let m = g.width();
        let unit = |inputs: i64| (inputs as f64).sqrt().recip();
        let heads = g.heads_of(
            |g, name, part| {
                let p = g.linear(Whose::Site, &format!("{name}.P"), (narrow, m), unit(m), false)?;
                let (shape, std) = ((part.numel(), narrow), part.spread * unit(narrow));
                Ok(vec![p, g.linear(Whose::Site, &format!("{name}.W"), shape, std, false)?])
            },
            Whose::Site,
        )?; // Wⱼ Pⱼ l
        Ok(g.chain(Vec::new(), heads))
    }
}
