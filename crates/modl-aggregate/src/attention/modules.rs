//! Attention over modules by learned keys: which module a row wants, from the mean of its tokens.
//!
//! q = W x̄,   sⱼ = q·kⱼ ⁄ (T √rank),   p ∝ α exp(s),   y = h + Σⱼ pⱼ (hⱼ − h)
//!
//! with x̄ the mean of x over a row's real tokens (the feature `mask` of the context), or each token by
//! itself. A module has a key instead of being asked what it gives, as in [`Fusion`](crate::Fusion),
//! so p is known before any module is computed. It looks at later tokens unless it takes each by
//! itself.
//!
//! As CODA-Prompt weighs the components of a prompt (Smith et al. 2023, arXiv 2211.13218); survey
//! §5.2.2.

use modl_core::{
    Aggregator, AggregatorConfig, Bank, Error, Init, Order, Outputs, Result, Routing, Scope,
    Signal, Site, SiteKind, Tensor,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::temperature::{Cooling, Temperature};
use crate::changes::{Changes, attend, blend, check_site};
use crate::per_module::PerModule;

/// What asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asks {
    /// The mean of a row's tokens: one p for each row.
    #[default]
    Row,
    /// Each token by itself.
    Token,
}

/// Attention over modules by keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModuleAttention {
    /// What asks. Default: `row`.
    pub asks: Asks,
    /// The width of queries and keys, at least 1. Default: 64.
    pub rank: i64,
    /// T. Default: 1.
    pub temperature: Temperature,
}

impl Default for ModuleAttention {
    fn default() -> Self {
        ModuleAttention { asks: Asks::default(), rank: 64, temperature: Temperature::default() }
    }
}

impl AggregatorConfig for ModuleAttention {
    fn kind(&self) -> &'static str {
        "module_attention"
    }

    fn to_json(&self) -> Result<Value> {
        modl_core::to_json("module_attention", self)
    }

    fn build(&self, site: &Site, scope: &mut Scope) -> Result<Box<dyn Aggregator>> {
        self.build_over(site, &Bank::new(), scope)
    }

    fn build_over(
        &self,
        site: &Site,
        bank: &Bank,
        scope: &mut Scope,
    ) -> Result<Box<dyn Aggregator>> {
        check_site("module_attention", site)?;
        if site.kind == SiteKind::Embedding {
            return Err(Error::unsupported(
                "`module_attention` at a table of embeddings, where x are ids",
                "choose `fusion`, or attach the modules to other sites",
            ));
        }
        if self.rank < 1 {
            let problem = format!("is {}, wants 1 or more", self.rank);
            return Err(Error::invalid("module_attention.rank", problem));
        }
        let spread = Init::Normal((site.input as f64).sqrt().recip());
        Ok(Box::new(Attention {
            asks: self.asks,
            query: scope.param("query.weight", &[self.rank, site.input], spread)?,
            // Far enough apart that modules are told apart from the start.
            keys: PerModule::build(
                "module_attention",
                "keys",
                bank,
                &[self.rank],
                Init::Normal(1.0),
                scope,
            )?,
            cooling: self.temperature.build("module_attention.temperature", scope)?,
        }))
    }
}

#[derive(Debug)]
struct Attention {
    asks: Asks,
    /// W, `[rank, in]`.
    query: Tensor,
    /// k, `[rank]` each.
    keys: PerModule,
    cooling: Cooling,
}

impl Aggregator for Attention {
    fn kind(&self) -> &'static str {
        "module_attention"
    }

    fn order(&self) -> Order {
        Order::Outputs
    }

    fn looks_ahead(&self) -> bool {
        self.asks == Asks::Row
    }

    fn outputs(&self, _: &Routing, h: &Outputs) -> Result<Signal> {
        let changes = Changes::of("module_attention", h)?;
        let Some(z) = &changes.z else { return Ok(changes.base) };
        let kind = z.kind();
        let x = h.input().x.to_kind(kind)?;
        let (asks, pooled) = match (self.asks, x.dim()) {
            (Asks::Token, _) | (Asks::Row, 0..=2) => (x, false),
            (Asks::Row, _) => match h.context().find("mask") {
                Some(mask) if mask.size() == x.size()[..2] => (x.masked_mean(mask)?, true),
                _ => (x.mean_dims(&[1], false)?, true),
            },
        };
        let q = asks.linear(&self.query.to_kind(kind)?, None)?;
        let keys = self.keys.active(h)?.to_kind(kind)?;
        let scale = (self.query.len_of(0) as f64).sqrt().recip();
        let s = self.cooling.apply(&q.linear(&keys, None)?.mul_scalar(scale)?)?;
        let s = if pooled { s.unsqueeze(1)? } else { s };
        let p = changes.to_all(&attend(&s, &changes.alpha)?)?;
        changes.give(&changes.y.add(&blend(&p, z)?)?)
    }

    fn after_step(&self, done: u64, _: u64) -> Result<()> {
        self.cooling.after_step(done)
    }
}
