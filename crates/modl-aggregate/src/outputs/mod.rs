//! Combining what modules give with weights that are learned or inferred. Survey §5.2.1.

mod bayesian_mixture;
mod ensemble;
mod gated;
mod scalar_mix;
mod soup;

pub use bayesian_mixture::{BayesianMixture, Prior};
pub use ensemble::{Ensemble, EnsembleOf};
pub use gated::{Gate, Gated};
pub use scalar_mix::{ScalarMix, scalar_mix};
pub use soup::AdapterSoup;

use modl_core::{AggregatorConfig, Catalog, Result};

pub(crate) fn register(r: &mut Catalog<dyn AggregatorConfig>) -> Result<()> {
    r.register::<ScalarMix>("Learned scalar mix of outputs", "Peters et al. 2018, ELMo", "5.2")?;
    r.register::<Gated>("Gated sum of outputs", "Arevalo et al. 2017", "5.2")
}
