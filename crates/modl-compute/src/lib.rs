#![doc = include_str!("../README.md")]

mod bottleneck;
mod dropout;
mod lora;
mod patterns;
pub mod peft;

use modl_core::{Entry, ModuleConfig, Registry, Result};
use serde::de::DeserializeOwned;

pub use bottleneck::{Bottleneck, BottleneckInit, Residual, Scaling};
pub use lora::{Lora, LoraInit};
pub use patterns::Patterns;

/// Adds the modules of this crate.
///
/// # Errors
/// Where a name is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    r.modules.add(Entry {
        name: "lora",
        title: "Low-rank adaptation (LoRA, rsLoRA)",
        citation: "Hu et al. 2021, arXiv 2106.09685",
        section: "3.1",
        parse: |c| parse::<Lora>("lora", c),
    })?;
    r.modules.add(Entry {
        name: "bottleneck",
        title: "Bottleneck adapter (Houlsby, Pfeiffer, parallel)",
        citation: "Houlsby et al. 2019, arXiv 1902.00751",
        section: "3.3",
        parse: |c| parse::<Bottleneck>("bottleneck", c),
    })
}

fn parse<C: ModuleConfig + DeserializeOwned + 'static>(
    name: &str,
    config: serde_json::Value,
) -> Result<Box<dyn ModuleConfig>> {
    Ok(Box::new(Entry::<dyn ModuleConfig>::read::<C>(name, config)?))
}
