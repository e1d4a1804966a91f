//! Soft routing: all modules, each with a weight of its own (survey §4.2.3).

mod soft_moe;
mod softmax;

pub use soft_moe::SoftMoe;
pub use softmax::Soft;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Soft>("Softmax over all modules", "Jacobs et al. 1991", "4.2.3")?;
    r.register::<SoftMoe>("Mixtures of tokens", "Puigcerver et al. 2023", "4.2.3")?;
    Ok(())
}
