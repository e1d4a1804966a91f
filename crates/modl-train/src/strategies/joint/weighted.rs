//! Steps with weights of the tasks' losses: one backward pass of Σ w_t L_t ⁄ T.

use std::collections::BTreeMap;
use std::fmt::Debug;

use modl_core::{Error, Result, Tensor};

use crate::{Batch, StepContext, StepGradients, StepLoss, StepRule};

/// Weights of tasks, which may change from step to step.
pub(super) trait Weights: Debug {
    /// A task's weight in this step.
    fn weight(&self, task: &str) -> Result<f64>;

    /// Gets ready for a step.
    fn begin(&mut self, cx: &StepContext) {
        let _ = cx;
    }

    /// Learns from the step's losses for those after it.
    fn learn(&mut self, cx: &StepContext, losses: &BTreeMap<String, f64>) -> Result<()> {
        let _ = (cx, losses);
        Ok(())
    }

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
        self.0.begin(cx);
        let mut rows: BTreeMap<&String, f64> = BTreeMap::new();
        batch.tasks.iter().for_each(|task| *rows.entry(task).or_default() += 1.0);
        let (mut noted, mut factors) = (BTreeMap::new(), BTreeMap::new());
        for (task, own) in &rows {
            let weight = self.0.weight(task)?;
            noted.insert(format!("weight.{task}"), weight);
            // From the mean over all rows to Σ w_t L_t ⁄ T.
            let equal = batch.len() as f64 / (own * rows.len() as f64);
            factors.insert((*task).clone(), weight * equal);
        }
        let weigh = |loss: &mut StepLoss| loss.weigh(&factors);
        let step = cx.gradients_in_parts(batch, cx.accumulate(), 0, &weigh)?;
        self.0.learn(cx, &step.loss.of_tasks()?)?;
        Ok(StepGradients { noted, ..step })
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.0.load_state(state)
    }
}
