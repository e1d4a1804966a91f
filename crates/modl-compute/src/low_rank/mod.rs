//! Parameter composition by low-rank and other structured changes of a weight, f_{θ ⊕ φ}(x).
//! Survey §3.1.

mod lora;

use modl_core::{Catalog, ModuleConfig, Result, Targets};

pub(crate) use lora::{EMBEDDING_A, START_A, START_B};
pub use lora::{Lora, LoraInit};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Lora>(
        "Low-rank adaptation (LoRA, rsLoRA)",
        "Hu et al. 2021, arXiv 2106.09685",
        "3.1",
    )
}

/// Where low-rank methods usually stand: the projections to queries and values, under the names
/// that the backbones give them.
fn query_and_value() -> Targets {
    Targets::pattern(r"(.*\.)?(query|value|q_proj|v_proj|c_attn|q|v)")
}
