//! Parameter composition by low-rank and other structured changes of a weight, f_{θ ⊕ φ}(x).
//! Survey §3.1.

mod extract;
mod lora;

use modl_core::{Catalog, ModuleConfig, Result};

pub use extract::{Extracted, Extraction, extract, extract_difference, truncate};
pub use lora::{Lora, LoraInit};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Lora>(
        "Low-rank adaptation (LoRA, rsLoRA)",
        "Hu et al. 2021, arXiv 2106.09685",
        "3.1",
    )
}
