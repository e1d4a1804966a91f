//! Function composition: modules that work on what a base function returns, f_φ ∘ f_θ. Survey §3.3.

mod adapter_drop;
mod bottleneck;
mod columns;
mod compacter;
mod conditional_norm;
mod cross_stitch;
mod feed_forward;
mod film;
mod gated;
mod ia3;
mod invertible;
mod modulation;
mod nested;
mod orthonormal;
mod progressive;
mod reft;
mod residual_adapter;
mod sluice;
mod task_heads;
mod tasks;
pub mod unified;
mod union;

use modl_core::{Catalog, ModuleConfig, Result};

pub use adapter_drop::{AdapterDrop, drop_layers, load_dropped};
pub use bottleneck::{Bottleneck, BottleneckInit, Residual, Scaling};
pub use compacter::Compacter;
pub use conditional_norm::ConditionalNorm;
pub use cross_stitch::CrossStitch;
pub use feed_forward::FeedForward;
pub use film::Film;
pub use gated::Gated;
pub use ia3::{Ia3, Ia3Init};
pub use invertible::{Coupling, Invertible, InvertibleBlock};
pub use nested::Nested;
pub use orthonormal::Orthonormal;
pub(crate) use orthonormal::{BASE, ORIGINAL};
pub use progressive::Progressive;
pub use reft::Reft;
pub use residual_adapter::{ResidualAdapter, ResidualPlacement};
pub use sluice::Sluice;
pub use task_heads::TaskHeads;
pub(crate) use union::of_part;
pub use union::{Part, Union};

pub(crate) fn register(r: &mut Catalog<dyn ModuleConfig>) -> Result<()> {
    r.register::<Bottleneck>(
        "Bottleneck adapter (Houlsby, Pfeiffer, parallel)",
        "Houlsby et al. 2019, arXiv 1902.00751",
        "3.3",
    )?;
    r.register::<Ia3>("(IA)³", "Liu et al. 2022, arXiv 2205.05638", "3.3")?;
    r.register::<Compacter>("Compacter", "Karimi Mahabadi et al. 2021, arXiv 2106.04647", "3.3")?;
    r.register::<Invertible>(
        "Invertible adapter (NICE, GLOW)",
        "Pfeiffer et al. 2020, arXiv 2005.00052",
        "3.3",
    )?;
    r.register::<AdapterDrop>("AdapterDrop", "Rücklé et al. 2021, arXiv 2010.11918", "3.3")?;
    r.register::<Film>("FiLM", "Perez et al. 2018, arXiv 1709.07871", "3.3")?;
    r.register::<ConditionalNorm>(
        "Conditional layer norm and batch norm",
        "De Vries et al. 2017, arXiv 1707.00683",
        "3.3",
    )?;
    r.register::<ResidualAdapter>(
        "Residual adapter (series, parallel)",
        "Rebuffi et al. 2017, arXiv 1705.08045",
        "3.3",
    )?;
    r.register::<FeedForward>(
        "Feed-forward network (MLP, SwiGLU) as an expert",
        "Shazeer 2020, arXiv 2002.05202",
        "3.3",
    )?;
    r.register::<Reft>("ReFT (LoReFT, NoReFT, DiReFT)", "Wu et al. 2024, arXiv 2404.03592", "3.3")?;
    r.register::<TaskHeads>(
        "Hard parameter sharing with task heads",
        "Ruder 2017, arXiv 1706.05098",
        "3.3",
    )?;
    r.register::<CrossStitch>("Cross-stitch units", "Misra et al. 2016, arXiv 1604.03539", "3.3")?;
    r.register::<Sluice>("Sluice network", "Ruder et al. 2019, arXiv 1705.08142", "3.3")?;
    r.register::<Progressive>("Progressive network", "Rusu et al. 2016, arXiv 1606.04671", "3.3")?;
    r.register::<Gated>("Gate of UniPELT", "Mao et al. 2022, arXiv 2110.07577", "3.5")?;
    r.register::<Union>("Union of parts (MAM, UniPELT)", "He et al. 2022, arXiv 2110.04366", "3.5")
}
