//! Parameter composition by sparse changes: masks over θ and deltas under a mask, θ + m ⊙ δ or
//! m ⊙ θ. Survey §3.1.

use modl_core::{Catalog, ModuleConfig, Result};

pub(crate) fn register(_: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    Ok(())
}
