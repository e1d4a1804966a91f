//! Routing by the task of a row, learned: each task chooses its modules once for all of its rows
//! (survey §4.2, §4.3 on the level of routing).

mod labels;
mod multi_head;
mod polytropon;
mod sub_network;
mod task_moe;

pub use labels::TaskLabels;
pub use multi_head::MultiHead;
pub use polytropon::{Polytropon, SkillSettings};
pub use sub_network::{Part, SubNetwork};
pub use task_moe::TaskMoe;

use modl_core::{Registry, Result};

/// Adds these routers to a registry.
pub(crate) fn register(r: &mut Registry) -> Result<()> {
    let r = &mut r.routers;
    r.register::<Polytropon>("Skills of tasks", "Ponti et al. 2023", "4.2.3")?;
    r.register::<MultiHead>("Skills of tasks, head by head", "Page-Caccia et al. 2023", "4.2.3")?;
    r.register::<TaskMoe>("Top-k of a task's embedding", "Kudugunta et al. 2021", "4.2.3")?;
    r.register::<SubNetwork>("What one task uses", "Kudugunta et al. 2021", "4.2.3")
}
