//! Routing that is not learned with gradients: tables, prototypes, lots, and controls (survey §4.1).

mod adamix;
mod hash;
mod k_means;
mod nearest_prototype;
mod random;
mod table;
mod thor;
mod uniform;

pub use adamix::AdaMix;
pub use hash::{Assignment, Hash};
pub(crate) use nearest_prototype::unit;
pub use nearest_prototype::{NearestPrototype, Similarity};
pub use random::{Evaluation, Random};
pub use table::{Choice, Fixed, Labels};
pub use thor::Thor;
pub use uniform::Uniform;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Fixed>("By task, or a fixed set", "Pfeiffer et al. 2020, MAD-X", "4.1")?;
    r.register::<Uniform>("All modules alike", "a control", "4.1")?;
    r.register::<Random>("Modules by lot", "a control", "4.1")?;
    r.register::<Hash>("By the ids of tokens", "Roller et al. 2021", "4.1")?;
    r.register::<NearestPrototype>("Nearest prototype", "Jang et al. 2023", "4.2.3")?;
    r.register::<Thor>("One module by lot for each pass", "Zuo et al. 2022", "4.2.2")?;
    r.register::<AdaMix>("By lot, then the average", "Wang et al. 2022", "4.2.2")
}
