//! Joint training: the data of all tasks at once (survey §6.1), and how the losses of several tasks
//! become one step.
//!
//! | strategy | what is balanced | what it needs |
//! |---|---|---|
//! | `joint` | nothing: the mean over all rows | one backward pass |
//! | `scalarised` | losses, by fixed weights | one backward pass |
//! | `uncertainty` | losses, by learned variances | one backward pass |
//! | `dwa` | losses, by how fast they fall | one backward pass |
//! | `gradnorm` | the norms of gradients, by learned weights | a backward pass for each task's rows |
//! | `pcgrad` | directions: conflicts are projected away | a backward pass for each task's rows |
//! | `cagrad` | the task that is served least | a backward pass for each task's rows |
//! | `mgda` | the gradients' shortest combination | a backward pass for each task's rows |
//! | `nash_mtl` | gains, whatever the losses' scales | a backward pass for each task's rows |
//!
//! All but `joint` start from Σ L_t ⁄ T, with L_t the mean loss of a task's rows in the batch and T the
//! number of tasks that have any: a task without a row takes no part in the step. The functions that are
//! public here work on numbers and gradients alone and can be used in any loop.

mod balanced;
mod cagrad;
mod dwa;
mod gradnorm;
mod gram;
mod learned;
mod mgda;
mod multitask;
mod nash_mtl;
mod pcgrad;
mod plain;
mod scalarisation;
mod simplex;
mod task_gradients;
mod uncertainty;
mod weighted;

use modl_core::{Catalog, Result};

use super::{Job, Strategy, entry};
use multitask::entry as multitask;

pub use cagrad::{CaGrad, cagrad};
pub use dwa::{Dwa, dwa_weights};
pub use gradnorm::{GradNorm, gradnorm_slopes};
pub use gram::Gram;
pub use mgda::{Mgda, mgda};
pub use multitask::Multitask;
pub use nash_mtl::{NashMtl, nash_bargain, nash_mtl};
pub use pcgrad::{PcGrad, pcgrad};
pub use plain::Joint;
pub use scalarisation::Scalarised;
pub use task_gradients::TaskGradients;
pub use uncertainty::{Form, Uncertainty};

pub(super) fn register(all: &mut Catalog<dyn Strategy>) -> Result<()> {
    all.add(entry::<Joint>("joint", "All tasks at once", "Caruana 1997", "6.1"))?;
    all.add(multitask::<Scalarised>(
        "scalarised",
        "Fixed weights of the tasks' losses",
        "Kurin et al. 2022, arXiv 2201.04122",
    ))?;
    all.add(multitask::<Uncertainty>(
        "uncertainty",
        "Losses weighted by learned uncertainty",
        "Kendall et al. 2018, arXiv 1705.07115",
    ))?;
    all.add(multitask::<Dwa>(
        "dwa",
        "Dynamic weight averaging (DWA)",
        "Liu et al. 2019, arXiv 1803.10704",
    ))?;
    all.add(multitask::<GradNorm>(
        "gradnorm",
        "GradNorm: gradients of equal rates",
        "Chen et al. 2018, arXiv 1711.02257",
    ))?;
    all.add(multitask::<PcGrad>(
        "pcgrad",
        "PCGrad: conflicting gradients projected",
        "Yu et al. 2020, arXiv 2001.06782",
    ))?;
    all.add(multitask::<CaGrad>(
        "cagrad",
        "CAGrad: conflict-averse near the mean gradient",
        "Liu et al. 2021, arXiv 2110.14048",
    ))?;
    all.add(multitask::<Mgda>(
        "mgda",
        "MGDA: the gradients' shortest combination",
        "Sener and Koltun 2018, arXiv 1810.04650",
    ))?;
    all.add(multitask::<NashMtl>(
        "nash_mtl",
        "Nash-MTL: tasks bargain for the direction",
        "Navon et al. 2022, arXiv 2202.01017",
    ))
}
