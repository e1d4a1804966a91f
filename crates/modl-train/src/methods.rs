//! Everything that a recipe can name.

use modl_core::{Catalog, Registry, Result};

use crate::Strategy;

/// The methods of all four axes: computation, routing and aggregation, and how they are trained.
#[derive(Debug)]
pub struct Methods {
    /// Modules, routers and aggregators.
    pub registry: Registry,
    /// Training strategies.
    pub strategies: Catalog<dyn Strategy>,
}

impl Methods {
    /// The methods of `registry`, with this crate's strategies.
    pub fn new(registry: Registry) -> Result<Self> {
        Ok(Methods { registry, strategies: crate::strategies::catalog()? })
    }
}
