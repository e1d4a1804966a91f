//! Function composition: modules that work on what a base function returns, f_φ ∘ f_θ. Survey §3.3.

mod bottleneck;
mod ia3;

use modl_core::{Catalog, ModuleConfig, Result};

pub use bottleneck::{Bottleneck, BottleneckInit, Residual, Scaling};
pub use ia3::{Ia3, Ia3Init};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Bottleneck>(
        "Bottleneck adapter (Houlsby, Pfeiffer, parallel)",
        "Houlsby et al. 2019, arXiv 1902.00751",
        "3.3",
    )?;
    r.register::<Ia3>("(IA)³", "Liu et al. 2022, arXiv 2205.05638", "3.3")
}
