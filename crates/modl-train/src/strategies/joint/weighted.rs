//! Steps with weights of the tasks' losses: one backward pass of Σ w_t L_t ⁄ T.

use std::collections::BTreeMap;
use std::fmt::Debug;

use modl_core::{Error, Result, Tensor};

use crate::{Batch, StepContext, StepGradients, StepRule};

/// Weights of tasks, which may change from step to step.
pub(super) trait Weights: Debug {
    /// The weights for this step, of the tasks that have a loss in it; what is learned of the losses
    /// is for the steps after it.
    fn weights(
        &mut self,
        cx: &StepContext,
        losses: &BTreeMap<String, f64>,
    ) -> Result<BTreeMap<String, f64>>;

    /// What has to be saved to go on later.
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes up a saved state.
    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        unknown(&state)
    }
}

/// Refuses a state of which nothing is known.
pub(super) fn unknown(state: &[(String, Tensor)]) -> Result<()> {
    match state.first() {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::invalid("saved state", format!("holds `{name}`, which nothing takes up")))
        }
    }
}

/// Steps by such weights.
#[derive(Debug)]
pub(super) struct Weighted<W>(pub(super) W);

impl<W: Weights> StepRule for Weighted<W> {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut loss = cx.loss(batch)?;
        let weights = self.0.weights(cx, &loss.of_tasks()?)?;
        loss.weigh(&weights)?;
        let grads = cx.gradients_of(&loss)?;
        let noted = weights.into_iter().map(|(task, w)| (format!("weight.{task}"), w)).collect();
        Ok(StepGradients { loss, grads, noted })
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.0.load_state(state)
    }
}
