//! Training strategies (survey §6): which parameters are trained on which data, in which order.
//!
//! | family | survey | what is trained |
//! |---|---|---|
//! | `joint` | §6.1 | everything selected, on the data of all tasks at once |
//! | `continual` | §6.2 | one task after the other; earlier ones do not come back |
//! | `meta` | §6.2 | a start from which tasks are learned quickly |
//! | `post_hoc` | §6.3 | modules of a pretrained model, or what chooses among them |

mod continual;
mod job;
pub mod joint;
mod meta;
mod post_hoc;

use std::fmt::Debug;

use modl_core::{Catalog, Entry, Result};
use serde::de::DeserializeOwned;

pub use continual::{
    AGem, AccuracyMatrix, As, Continual, Convention, Ewc, Gem, Growth, InferredTask, Labels,
    Learner, Lwf, ModulePerTask, Naive, Replay, Si, TaskContext, TaskInference,
};
pub use job::Job;
pub use joint::Joint;
pub use meta::{Adaptation, Maml, Order, Reptile};
pub use post_hoc::{PerTask, RoutingOnly};

/// A way to train a modular network.
pub trait Strategy: Debug + Send + Sync {
    /// The name in recipes: `joint`.
    fn kind(&self) -> &'static str;

    /// The patterns of what is trained where a phase has no `train`.
    fn trains(&self) -> Vec<String>;

    /// Trains. Called again after a stop, it goes on from what it has saved under `job.folder`.
    fn run(&self, job: &mut Job) -> Result<()>;
}

/// The strategies of this crate.
pub(crate) fn catalog() -> Result<Catalog<dyn Strategy>> {
    let mut all = Catalog::new("strategy");
    joint::register(&mut all)?;
    continual::register(&mut all)?;
    post_hoc::register(&mut all)?;
    meta::register(&mut all)?;
    Ok(all)
}

fn entry<S: Strategy + DeserializeOwned + 'static>(
    name: &'static str,
    title: &'static str,
    citation: &'static str,
    section: &'static str,
) -> Entry<dyn Strategy> {
    let parse = |config| Ok(Box::new(modl_core::from_json::<S>("strategy", config)?) as _);
    Entry { name, title, citation, section, parse }
}
