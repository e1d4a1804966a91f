//! Input composition: f_θ([φ; x]). Survey §3.2.

use modl_core::{Catalog, ModuleConfig, Result};

pub(crate) fn register(_: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    Ok(())
}
