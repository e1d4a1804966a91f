//! Parameter composition by low-rank and other structured changes of a weight, f_{θ ⊕ φ}(x).
//! Survey §3.1.

mod adalora;
mod dora;
mod extract;
mod lora;
mod vera;

use modl_core::{Catalog, ModuleConfig, Result, Targets};

pub use adalora::AdaLora;
pub(crate) use adalora::{E, is_average};
pub use dora::Dora;
pub use extract::{Extracted, Extraction, extract, extract_difference, truncate};
pub use lora::{Lora, LoraInit};
pub(crate) use vera::SHARED as VERA_SHARED;
pub use vera::Vera;

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Lora>(
        "Low-rank adaptation (LoRA, rsLoRA)",
        "Hu et al. 2021, arXiv 2106.09685",
        "3.1",
    )?;
    r.register::<Dora>(
        "Weight-decomposed low-rank adaptation (DoRA)",
        "Liu et al. 2024, arXiv 2402.09353",
        "3.1",
    )?;
    r.register::<AdaLora>(
        "Adaptive budget allocation over low-rank changes (AdaLoRA)",
        "Zhang et al. 2023, arXiv 2303.10512",
        "3.1",
    )?;
    r.register::<Vera>(
        "Vector-based random matrix adaptation (VeRA)",
        "Kopiczko et al. 2023, arXiv 2310.11454",
        "3.1",
    )
}

/// Where low-rank methods usually stand: the projections to queries and values, under the names
/// that the backbones give them.
fn query_and_value() -> Targets {
    Targets::pattern(r"(.*\.)?(query|value|q_proj|v_proj|c_attn|q|v)")
}
