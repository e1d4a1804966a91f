//! Continual training (survey §6.2): one task after the other, of which earlier ones do not come
//! back, and what is done against forgetting them.
//!
//! The tasks are those of the phase's `tasks` in that order, else those of the data. After each of
//! them all tasks are measured on what is held out: [`AccuracyMatrix`].

mod a_gem;
mod ewc;
mod gem;
mod growth;
mod lwf;
mod matrix;
mod memory;
mod module_per_task;
mod naive;
mod quadratic;
mod replay;
mod reservoir;
mod sequence;
mod si;
mod task_inference;

use std::fmt::Debug;

use modl_core::{Catalog, Entry, Modular, Result};
use serde::de::DeserializeOwned;

use super::{Job, Strategy};
use crate::{Dataset, StepRule, TrainConfig};

pub use a_gem::AGem;
pub use ewc::{Ewc, Labels};
pub use gem::Gem;
pub use growth::Growth;
pub use lwf::{As, Lwf};
pub use matrix::{AccuracyMatrix, Convention};
pub use module_per_task::ModulePerTask;
pub use naive::Naive;
pub use replay::Replay;
pub use sequence::TaskContext;
pub use si::Si;
pub use task_inference::{InferredTask, TaskInference};

/// A way to learn one task after the other: its settings.
pub trait Continual: Debug + Send + Sync {
    /// The name in recipes: `ewc`.
    fn kind(&self) -> &'static str;

    /// The patterns of what is trained where a phase has no `train`; `{task}` stands for the task's
    /// name.
    fn trains(&self) -> Vec<String> {
        TrainConfig::default().train
    }

    /// What learns, before the first task.
    ///
    /// # Errors
    /// Where a setting is out of its range.
    fn start(&self) -> Result<Box<dyn Learner>>;
}

/// What learns one task after the other. All that it keeps is its [`StepRule::state`].
pub trait Learner: StepRule {
    /// Gets ready for a task.
    ///
    /// # Errors
    /// Where something cannot be computed.
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// How a task is trained: as the phase says, where nothing else is said. `None` trains nothing.
    ///
    /// # Errors
    /// Where a setting does not fit.
    fn config(&self, cx: &TaskContext) -> Result<Option<TrainConfig>> {
        Ok(Some(cx.config()))
    }

    /// Whether a task can be asked about: always, where nothing else is said.
    fn answers(&self, model: &Modular, task: &str) -> bool {
        let _ = (model, task);
        true
    }

    /// Keeps what it needs of a task that has been learned.
    ///
    /// # Errors
    /// Where something cannot be computed.
    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        let _ = cx;
        Ok(())
    }

    /// Measures what else there is to measure once all tasks are learned, on what is held out of each
    /// of them in their order; nothing where nothing is.
    ///
    /// # Errors
    /// Where something cannot be computed.
    fn conclude(&self, job: &mut Job, held_out: &[(String, Dataset)]) -> Result<()> {
        let _ = (job, held_out);
        Ok(())
    }
}

pub(super) fn register(all: &mut Catalog<dyn Strategy>) -> Result<()> {
    all.add(entry::<Naive>(
        "naive",
        "One task after the other, nothing done against forgetting",
        "McCloskey and Cohen 1989",
    ))?;
    all.add(entry::<Ewc>(
        "ewc",
        "Elastic weight consolidation (EWC), separate or online",
        "Kirkpatrick et al. 2017, arXiv 1612.00796",
    ))?;
    all.add(entry::<Si>("si", "Synaptic intelligence", "Zenke et al. 2017, arXiv 1703.04200"))?;
    all.add(entry::<Lwf>(
        "lwf",
        "Learning without forgetting (LwF)",
        "Li and Hoiem 2016, arXiv 1606.09282",
    ))?;
    all.add(entry::<Replay>(
        "replay",
        "Experience replay from a reservoir",
        "Chaudhry et al. 2019, arXiv 1902.10486",
    ))?;
    all.add(entry::<ModulePerTask>(
        "module_per_task",
        "A module for each task: PackNet, SupSup, Piggyback, any other",
        "Mallya and Lazebnik 2018, arXiv 1711.05769",
    ))?;
    all.add(entry::<Growth>(
        "growth",
        "A new module where none that is there serves",
        "cf. Ostapenko et al. 2021, arXiv 2111.07736",
    ))?;
    all.add(entry::<AGem>(
        "a_gem",
        "Averaged gradient episodic memory (A-GEM)",
        "Chaudhry et al. 2019, arXiv 1812.00420",
    ))?;
    all.add(entry::<Gem>(
        "gem",
        "Gradient episodic memory (GEM)",
        "Lopez-Paz and Ranzato 2017, arXiv 1706.08840",
    ))
}

fn entry<C: Continual + DeserializeOwned + 'static>(
    name: &'static str,
    title: &'static str,
    citation: &'static str,
) -> Entry<dyn Strategy> {
    let parse = |config| {
        let method = modl_core::from_json::<C>("strategy", config)?;
        method.start()?;
        Ok(Box::new(sequence::Sequence(method)) as _)
    };
    Entry { name, title, citation, section: "6.2", parse }
}
