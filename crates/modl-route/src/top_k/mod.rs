//! Sparse routing: the modules with the largest scores (survey §4.2.3).

mod plain;

pub use plain::TopK;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<TopK>("Top-k of a softmax", "Shazeer et al. 2017", "4.2.3")?;
    Ok(())
}
