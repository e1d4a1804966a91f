//! A low-rank module as its recipe makes it, for tests.

use modl_core::{Attachment, Init, LowRank, Module, ModuleConfig, Result, Scope};
use serde_json::{Value, json};

/// ΔW = scale · B A of rank `rank`, with random A and B.
#[derive(Debug, Clone, Copy)]
pub struct Lora {
    pub rank: i64,
    pub scale: f64,
}

impl ModuleConfig for Lora {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({"rank": self.rank, "scale": self.scale}))
    }

    fn build(&self, at: &Attachment, scope: &mut Scope) -> Result<Box<dyn Module>> {
        let site = at.site;
        Ok(Box::new(LowRank {
            down: scope.param("down", &[self.rank, site.input], Init::Normal(0.5))?,
            up: scope.param("up", &[site.output, self.rank], Init::Normal(0.5))?,
            scale: self.scale,
        }))
    }
}
