//! Function composition: modules that work on what a base function returns, f_φ ∘ f_θ. Survey §3.3.

mod bottleneck;

use modl_core::{Catalog, ModuleConfig, Result};

pub use bottleneck::{Bottleneck, BottleneckInit, Residual, Scaling};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Bottleneck>(
        "Bottleneck adapter (Houlsby, Pfeiffer, parallel)",
        "Houlsby et al. 2019, arXiv 1902.00751",
        "3.3",
    )
}
