//! Routing that is not learned: tables, and controls (survey §4.1).

mod table;
mod uniform;

pub use table::{Choice, Fixed};
pub use uniform::Uniform;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Fixed>("By task, or a fixed set", "Pfeiffer et al. 2020, MAD-X", "4.1")?;
    r.register::<Uniform>("All modules alike", "a control", "4.1")?;
    Ok(())
}
