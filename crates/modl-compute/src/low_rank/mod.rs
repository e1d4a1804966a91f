//! Parameter composition by low-rank and other structured changes of a weight, f_{θ ⊕ φ}(x).
//! Survey §3.1.

mod adalora;
mod boft;
mod dora;
mod extract;
mod fastfood;
mod fourierft;
mod intrinsic;
mod loha;
mod lokr;
mod lora;
mod lycoris;
mod oft;
mod part_dropout;
mod permutation;
mod rotation;
mod vera;
mod weight_change;

use modl_core::{Catalog, ModuleConfig, Result, Targets};

pub use adalora::AdaLora;
pub(crate) use adalora::{E, averaged};
pub use boft::Boft;
pub(crate) use dora::MAGNITUDE;
pub use dora::{AdapterHubDora, Dora};
pub use extract::{
    Extracted, Extraction, WholeChange, changes, extract, extract_difference, truncate,
};
pub use fastfood::{Fastfood, walsh_hadamard};
pub use fourierft::FourierFt;
pub use intrinsic::Intrinsic;
pub use loha::Loha;
pub use lokr::{Lokr, LokrInit};
pub(crate) use lora::{EMBEDDING_A, START_A, START_B};
pub use lora::{Lora, LoraInit};
pub use oft::Oft;
pub use vera::Vera;
pub(crate) use vera::{B as VERA_B, D as VERA_D, SHARED as VERA_SHARED};

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
    r.register::<AdapterHubDora>(
        "DoRA as AdapterHub computes it",
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
    )?;
    let loha = "Hyeon-Woo et al. 2022, arXiv 2108.06098";
    r.register::<Loha>("Low-rank Hadamard product (LoHa)", loha, "3.1")?;
    let lokr = "Edalati et al. 2022, arXiv 2212.10650";
    r.register::<Lokr>("Low-rank Kronecker product (LoKr, KronA)", lokr, "3.1")?;
    r.register::<Oft>("Orthogonal fine-tuning (OFT)", "Qiu et al. 2023, arXiv 2306.07280", "3.1")?;
    r.register::<Boft>("Butterfly OFT (BOFT)", "Liu et al. 2024, arXiv 2311.06243", "3.1")?;
    r.register::<FourierFt>("Fourier fine-tuning", "Gao et al. 2024, arXiv 2405.03003", "3.1")?;
    let said = "Aghajanyan et al. 2021, arXiv 2012.13255";
    r.register::<Intrinsic>("Intrinsic dimension (Fastfood, SAID)", said, "3.1")
}

/// Where low-rank methods usually stand: the projections to queries and values, under the names
/// that the backbones give them.
fn query_and_value() -> Targets {
    Targets::pattern(r"(.*\.)?(query|value|q_proj|v_proj|c_attn|q|v)")
}
