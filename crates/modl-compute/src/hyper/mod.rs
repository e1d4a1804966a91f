//! Hypernetworks: modules whose parameters are generated, φ = G_η(z). Survey §3.4.

use modl_core::{Catalog, ModuleConfig, Result};

pub(crate) fn register(_: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    Ok(())
}
