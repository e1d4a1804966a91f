//! A method for several tasks' losses or gradients as a strategy.

use std::fmt::Debug;

use modl_core::{Entry, Error, Result};
use serde::de::DeserializeOwned;

use super::{Job, Strategy};
use crate::{StepRule, TrainConfig};

/// A method for several tasks' losses or gradients: its settings.
pub trait Multitask: Debug + Send + Sync {
    /// The name in recipes: `pcgrad`.
    fn kind(&self) -> &'static str;

    /// Refuses settings out of their range.
    ///
    /// # Errors
    /// By name.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// What makes the steps.
    ///
    /// # Errors
    /// Where a setting does not fit the tasks.
    fn rule(&self, job: &Job) -> Result<Box<dyn StepRule>>;
}

/// A method as a strategy.
#[derive(Debug)]
struct Together<M>(M);

impl<M: Multitask> Strategy for Together<M> {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn trains(&self) -> Vec<String> {
        TrainConfig::default().train
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        if let [only] = job.data.tasks().keys().collect::<Vec<_>>().as_slice() {
            let problem = format!("is for two tasks or more, but there is only `{only}`");
            return Err(Error::invalid(
                format!("strategy `{}`", self.kind()),
                format!("{problem}; use `joint`, or name more in the phase's `tasks`"),
            ));
        }
        let mut rule = self.0.rule(job)?;
        job.train_by(rule.as_mut(), None, job.phase.train.clone(), job.data)
    }
}

/// The entry of a method.
pub(super) fn entry<M: Multitask + DeserializeOwned + 'static>(
    name: &'static str,
    title: &'static str,
    citation: &'static str,
) -> Entry<dyn Strategy> {
    let parse = |config| {
        let method = modl_core::from_json::<M>("strategy", config)?;
        method.check()?;
        Ok(Box::new(Together(method)) as _)
    };
    Entry { name, title, citation, section: "6.1", parse }
}
