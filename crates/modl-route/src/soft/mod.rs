//! Soft routing: all modules, each with a weight of its own (survey §4.2.3).

mod softmax;

pub use softmax::Soft;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Soft>("Softmax over all modules", "Jacobs et al. 1991", "4.2.3")?;
    Ok(())
}
