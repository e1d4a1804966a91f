//! Continual training (survey §6.2): one task after the other, of which earlier ones do not come
//! back, and what is done against forgetting them.
//!
//! The tasks are those of the phase's `tasks` in that order, else those of the data. After each of
//! them all tasks are measured on what is held out: [`AccuracyMatrix`].

mod ewc;
mod matrix;
mod naive;
mod quadratic;
mod sequence;

use std::fmt::Debug;

use modl_core::{Catalog, Entry, Result};
use serde::de::DeserializeOwned;

use super::{Job, Strategy};
use crate::{StepRule, TrainConfig};

pub use ewc::{Ewc, Labels};
pub use matrix::{AccuracyMatrix, Convention};
pub use naive::Naive;
pub use sequence::TaskContext;

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

    /// Keeps what it needs of a task that has been learned.
    ///
    /// # Errors
    /// Where something cannot be computed.
    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        let _ = cx;
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
