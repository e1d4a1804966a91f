//! Aggregators that look at what modules give before they weigh it: attention over modules. Survey
//! §5.2.2.
//!
//! The router's α is the prior of all of them: pⱼ ∝ αⱼ exp(sⱼ ⁄ T). With the same α for all modules
//! it is the softmax of the scores; a module of weight 0 takes no part; a row without any module is
//! left to f_θ.

mod adapterhub;
mod fusion;
mod modules;
mod temperature;

pub use adapterhub::{load_fusion, save_fusion};
pub(crate) use fusion::Fused;
pub use fusion::{Fusion, QuerySource, ValueStart};
pub use modules::{Asks, ModuleAttention};
pub use temperature::{Falling, Temperature};

use modl_core::{AggregatorConfig, Catalog, Result};

pub(crate) fn register(r: &mut Catalog<dyn AggregatorConfig>) -> Result<()> {
    r.register::<Fusion>("AdapterFusion", "Pfeiffer et al. 2021", "5.2")?;
    r.register::<ModuleAttention>("Attention over modules by keys", "Smith et al. 2023", "5.2")
}
