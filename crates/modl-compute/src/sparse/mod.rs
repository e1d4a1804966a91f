//! Parameter composition by sparse changes: masks over θ and deltas under a mask, θ + m ⊙ δ or
//! m ⊙ θ. Survey §3.1.

mod bitfit;
mod full;
mod ln_tuning;

use modl_core::{Catalog, ModuleConfig, Result};

pub use bitfit::BitFit;
pub use full::{Form, Full};
pub use ln_tuning::LnTuning;

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Full>(
        "Full fine-tuning of a site",
        "Ilharco et al. 2023, arXiv 2212.04089",
        "3.1",
    )?;
    r.register::<BitFit>("BitFit", "Ben Zaken et al. 2022, arXiv 2106.10199", "3.1")?;
    r.register::<LnTuning>("Layer-norm tuning", "Zhao et al. 2024, arXiv 2312.11420", "3.1")
}
