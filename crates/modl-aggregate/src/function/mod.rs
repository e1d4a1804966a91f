//! Functions of functions: compositions of modules written down as values. Survey §5.3.

mod compose;
mod composition;
mod graph;
mod trees;

pub use compose::Compose;
pub use composition::Composition;
pub use graph::{Graph, Join, Node};
pub use trees::{Tree, run_trees};

use modl_core::{AggregatorConfig, Catalog, Result};

pub(crate) fn register(r: &mut Catalog<dyn AggregatorConfig>) -> Result<()> {
    r.register::<Compose>("Nested compositions", "Pfeiffer et al. 2020, AdapterHub", "5.3")?;
    r.register::<Graph>("Graph of modules", "Andreas et al. 2016", "5.3")
}
