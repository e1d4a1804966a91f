//! Hypernetworks: modules whose parameters are generated, φ = G_η(z). Survey §3.4.
//!
//! What is generated is any module of this crate that shows all of its parameters: LoRA, bottleneck
//! adapters, norms, whole weights. z is put together from what the [context](modl_core::Context)
//! says of a row (its task, its language, a feature) and from where the site is; rows with different
//! z get different modules. [`bake`] makes an ordinary module of what is generated for one task.

mod bake;
mod builder;
mod cpg;
mod generated;
mod hyper_lora;
mod hyper_network;
mod hyper_x;
mod hyperformer;
mod hyperformer_plus_plus;
mod mad_g;
mod network;
mod place;
mod source;

use modl_core::{Catalog, ModuleConfig, Result};

pub use bake::bake;
pub use cpg::Cpg;
pub use hyper_lora::HyperLora;
pub use hyper_network::HyperNetwork;
pub use hyper_x::HyperX;
pub use hyperformer::HyperFormer;
pub use hyperformer_plus_plus::HyperFormerPlusPlus;
pub use mad_g::MadG;
pub use source::Condition;

use crate::{Bottleneck, BottleneckInit, Nested};

/// What language and task adapters are generated as by default: bottleneck adapters after Pfeiffer
/// et al. which change nothing at the start.
fn pfeiffer_without_effect() -> Nested {
    let init_weights = BottleneckInit::MamAdapter;
    Nested::new(Bottleneck { init_weights, ..Bottleneck::pfeiffer() })
}

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<HyperNetwork>("Static hypernetwork", "Ha et al. 2016, arXiv 1609.09106", "3.4")?;
    r.register::<Cpg>(
        "Contextual parameter generator (CPG)",
        "Platanios et al. 2018, arXiv 1808.08493",
        "3.4",
    )?;
    let mahabadi = "Karimi Mahabadi et al. 2021, arXiv 2106.04489";
    r.register::<HyperFormer>("HyperFormer", mahabadi, "3.4")?;
    r.register::<HyperFormerPlusPlus>("HyperFormer++", mahabadi, "3.4")?;
    r.register::<HyperX>("Hyper-X", "Üstün et al. 2022, arXiv 2205.12148", "3.4")?;
    let mad_g = "Ansell et al. 2021, Findings of EMNLP";
    r.register::<MadG>("Multilingual adapter generation (MAD-G)", mad_g, "3.4")?;
    r.register::<HyperLora>("HyperLoRA", "Ponti et al. 2023, arXiv 2202.13914", "3.4")
}
