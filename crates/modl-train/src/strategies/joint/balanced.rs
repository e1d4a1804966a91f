//! Steps with the gradients of each task's rows: the batch is divided by task, each part has a
//! backward pass of its own, and a method says what becomes of the gradients.
//!
//! The parts together have the rows of the batch, so that this costs hardly more than one backward
//! pass of the whole. Each part has the losses of routers and of the backbone over its own rows.

use std::fmt::Debug;

use modl_core::{Error, Result, Seed, Tensor};

use super::weighted::unknown;
use super::{Gram, TaskGradients};
use crate::{Batch, StepContext, StepGradients, StepRule};

/// What a method knows of the tasks in a step, two or more.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    /// Their names, sorted.
    pub(super) tasks: &'a [String],
    /// The mean loss of each one's rows.
    pub(super) losses: &'a [f64],
    /// The products of their gradients for shared parameters.
    pub(super) gram: &'a Gram,
    /// Where random numbers of the step come from.
    pub(super) seed: Seed,
    /// The learning rate of the step.
    pub(super) lr: f64,
}

/// What becomes of the tasks' gradients.
pub(super) trait Balance: Debug {
    /// The factor of each task's gradient for shared parameters, and for its own ones; of these it is
    /// 1 ⁄ T where nothing else is said.
    fn factors(&mut self, seen: &Seen) -> Result<(Vec<f64>, Option<Vec<f64>>)>;

    /// What has to be saved to go on later.
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes up a saved state.
    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        unknown(&state)
    }
}

/// Steps by such a method.
#[derive(Debug)]
pub(super) struct Balanced<B>(pub(super) B);

impl<B: Balance> StepRule for Balanced<B> {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut parts = batch.by_task()?;
        if parts.len() < 2 {
            return cx.gradients(batch);
        }
        parts.sort_by(|(a, _), (b, _)| a.cmp(b));
        let (mut tasks, mut losses, mut grads) = (Vec::new(), Vec::new(), Vec::new());
        let mut all = None;
        let mut passed = 0;
        for (task, part) in parts {
            let part = part.trimmed()?;
            // With `accumulate` a batch may be larger than what is passed at once.
            let pieces = part.len().div_ceil(cx.batch_size()) as u64;
            let own = cx.gradients_in_parts(&part, pieces, passed, &|_| Ok(()))?;
            passed += pieces;
            grads.push(own.grads);
            losses.push(own.loss.objective().item()?);
            tasks.push(task);
            let loss = own.loss.times(part.len() as f64 / batch.len() as f64)?;
            all = Some(match all {
                None => loss,
                Some(before) => loss.and(before)?,
            });
        }
        let loss = all.ok_or_else(|| Error::invalid("batch", "has no rows"))?;
        let grads = TaskGradients::new(grads)?;
        let gram = grads.gram()?;
        let seen = Seen { tasks: &tasks, losses: &losses, gram: &gram, seed: cx.seed(), lr: cx.lr };
        let (shared, private) = self.0.factors(&seen)?;
        let private = private.unwrap_or_else(|| vec![1.0 / tasks.len() as f64; tasks.len()]);
        let mut noted = gram.conflicts(&tasks);
        let named = tasks.iter().zip(&shared).map(|(task, w)| (format!("weight.{task}"), *w));
        noted.extend(named.filter(|_| grads.shared() > 0));
        Ok(StepGradients { loss, grads: grads.combine(&shared, &private)?, noted })
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.0.load_state(state)
    }
}
