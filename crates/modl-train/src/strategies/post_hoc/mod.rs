//! Post-hoc training: modules for a model that is there, or what chooses among modules that are
//! there (survey §6.3).

mod per_task;
mod routing;

use modl_core::{Catalog, Result};

use super::{Job, Strategy, entry};

pub use per_task::PerTask;
pub use routing::RoutingOnly;

pub(super) fn register(all: &mut Catalog<dyn Strategy>) -> Result<()> {
    const FUSION: &str = "Pfeiffer et al. 2021, arXiv 2005.00247";
    all.add(entry::<PerTask>("per_task", "Each module alone on its task", FUSION, "6.3"))?;
    all.add(entry::<RoutingOnly>("routing", "Routing over frozen modules", FUSION, "6.3"))
}
