//! Reptile: the start moves towards where a task's own training ends.
//!
//! ```text
//! θ ← θ + ε (mean over tasks of θ_K − θ),   θ_K after K steps of gradient descent on the task
//! ```
//!
//! The phase's optimiser is given θ − θ_K for a gradient: `optimizer = { type = "sgd" }` with
//! `lr = ε` and a schedule that falls to 0 is the paper's.
//!
//! Nichol, Achiam, Schulman 2018, *On First-Order Meta-Learning Algorithms*, arXiv 1803.02999. Survey
//! §6.2.

use modl_core::{Error, Result, Tensor, no_grad};
use rand::seq::index;
use serde::Deserialize;

use super::adaptation::{self, Descent, copies, put_back};
use super::{Job, Strategy};
use crate::gradients::accumulate;
use crate::{Batch, Dataset, StepContext, StepGradients, StepLoss, StepRule, TrainConfig};

/// Settings of Reptile.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reptile {
    /// The learning rate of the inner steps, 0 or more; default 0.02.
    pub inner_lr: f64,
    /// K, 1 or more; default 5. With 1 it is joint training.
    pub inner_steps: usize,
    /// Tasks in a step; default 1, the paper's serial form.
    pub tasks: usize,
    /// Rows of each inner step; default 10.
    pub rows: usize,
}

impl Default for Reptile {
    fn default() -> Self {
        Reptile { inner_lr: 0.02, inner_steps: 5, tasks: 1, rows: 10 }
    }
}

impl Strategy for Reptile {
    fn kind(&self) -> &'static str {
        "reptile"
    }

    fn trains(&self) -> Vec<String> {
        TrainConfig::default().train
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        let inner = Descent { lr: self.inner_lr, steps: self.inner_steps };
        inner.check()?;
        for (key, n) in [("tasks", self.tasks), ("rows", self.rows)] {
            if n == 0 {
                return Err(Error::invalid(key, "is to be 1 or more"));
            }
        }
        let tasks = job.data.tasks().into_keys().map(|task| job.data.of_task(task));
        let tasks = tasks.collect::<Result<_>>()?;
        let mut rule = Towards { config: self.clone(), inner, tasks };
        job.train_by(&mut rule, None, job.phase.train.clone(), job.data)?;
        adaptation::measure(job, inner, self.rows)
    }
}

#[derive(Debug)]
struct Towards {
    config: Reptile,
    inner: Descent,
    tasks: Vec<Dataset>,
}

impl StepRule for Towards {
    fn gradients(&mut self, cx: &StepContext, _: &Batch) -> Result<StepGradients> {
        let count = self.config.tasks.min(self.tasks.len());
        let mut rng = cx.seed().child("tasks").rng();
        let chosen = index::sample(&mut rng, self.tasks.len(), count);
        let start = copies(cx.params())?;
        let mut sums: Vec<Option<Tensor>> = vec![None; start.len()];
        let mut whole: Option<StepLoss> = None;
        for (n, task) in chosen.into_iter().enumerate() {
            let Some(data) = self.tasks.get(task) else { continue };
            let made = self.trained(cx, n, data);
            let gone: Result<Vec<Option<Tensor>>> = no_grad(|| {
                let ends = cx.params().iter().zip(&start);
                ends.map(|((_, end), start)| {
                    let gone = start.sub(&end.detach()?)?;
                    // What did not move had no part.
                    let moved = gone.abs()?.sum()?.item()? > 0.0;
                    Ok(moved.then_some(gone))
                })
                .collect()
            });
            put_back(cx.params(), &start)?;
            let loss = made?.times(1.0 / count as f64)?;
            accumulate(&mut sums, 1.0 / count as f64, &gone?)?;
            whole = Some(loss.after(whole)?);
        }
        let loss = whole.ok_or_else(|| Error::invalid("episodes", "there are none"))?;
        Ok(StepGradients { loss, grads: sums, noted: Default::default() })
    }
}

impl Towards {
    /// Trains on one task from where the parameters are; the loss of the first step.
    fn trained(&self, cx: &StepContext, n: usize, data: &Dataset) -> Result<StepLoss> {
        let mut first = None;
        for k in 0..self.inner.steps {
            let seed = cx.seed().nth(n as u64).nth(k as u64);
            let count = self.config.rows.min(data.len());
            let rows = index::sample(&mut seed.rng(), data.len(), count).into_vec();
            let rows = data.batch(&rows, cx.model().device())?;
            let part = (n * self.inner.steps + k) as u64;
            let loss = cx.loss_of_part(&rows, part)?;
            let grads = cx.gradients_of(&loss)?;
            self.inner.step(cx.params(), &grads)?;
            first.get_or_insert(loss);
        }
        first.ok_or_else(|| Error::invalid("inner_steps", "is to be 1 or more"))
    }
}
