//! Meta-learning (survey §6.2): a start from which a task is learned in a few steps from a few
//! examples.
//!
//! Steps are made of episodes: a few tasks are drawn, and of each some rows to learn from (the
//! support) and others to be tested on (the query). The loop's own batches are not used, so a phase
//! says `steps` rather than `epochs`. At the end each task's held-out rows are learned from the same
//! way, and what that brings is written to `adaptation.json`; tasks that the phase does not train on
//! (`tasks`) are new ones.

mod adaptation;
mod episodes;
mod maml;
mod reptile;

use modl_core::{Catalog, Result};

use super::{Job, Strategy, entry};

pub use adaptation::Adaptation;
pub use maml::{Maml, Order};
pub use reptile::Reptile;

pub(super) fn register(all: &mut Catalog<dyn Strategy>) -> Result<()> {
    all.add(entry::<Maml>(
        "maml",
        "Model-agnostic meta-learning (MAML), first and second order",
        "Finn et al. 2017, arXiv 1703.03400",
        "6.2",
    ))?;
    all.add(entry::<Reptile>("reptile", "Reptile", "Nichol et al. 2018, arXiv 1803.02999", "6.2"))
}
