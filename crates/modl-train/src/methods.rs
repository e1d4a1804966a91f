//! Everything that a recipe can name.

use modl_aggregate::merge::{MergeMethod, MergeMethods};
use modl_core::{Catalog, Registry, Result};

use crate::Strategy;

/// The methods of all four axes: computation, routing and aggregation, and how they are trained.
#[derive(Debug)]
pub struct Methods {
    /// Modules, routers and aggregators.
    pub registry: Registry,
    /// Training strategies.
    pub strategies: Catalog<dyn Strategy>,
    /// Ways to make one model of several.
    pub merges: MergeMethods,
}

impl Methods {
    /// The methods of `registry`, with this crate's strategies and modl's merge methods.
    ///
    /// # Errors
    /// Where two strategies have one name.
    pub fn new(registry: Registry) -> Result<Self> {
        let strategies = crate::strategies::catalog()?;
        Ok(Methods { registry, strategies, merges: MergeMethods::default() })
    }

    /// With one merge method more.
    ///
    /// # Errors
    /// Where its name is taken.
    pub fn with_merge(mut self, method: impl MergeMethod + 'static) -> Result<Self> {
        self.merges.add(method)?;
        Ok(self)
    }
}
