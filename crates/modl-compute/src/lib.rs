#![doc = include_str!("../README.md")]

mod bottleneck;
mod dropout;
mod lora;
mod patterns;
pub mod peft;

use modl_core::{Registry, Result};

pub use bottleneck::{Bottleneck, BottleneckInit, Residual, Scaling};
pub use lora::{Lora, LoraInit};
pub use patterns::Patterns;

/// Adds the modules of this crate.
///
/// # Errors
/// Where a name is taken.
pub fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.modules;
    r.register::<Lora>(
        "Low-rank adaptation (LoRA, rsLoRA)",
        "Hu et al. 2021, arXiv 2106.09685",
        "3.1",
    )?;
    r.register::<Bottleneck>(
        "Bottleneck adapter (Houlsby, Pfeiffer, parallel)",
        "Houlsby et al. 2019, arXiv 1902.00751",
        "3.3",
    )
}
