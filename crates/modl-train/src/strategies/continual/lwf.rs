//! Learning without forgetting: a task is learned while the model keeps saying of its examples what it
//! said before.
//!
//! Before a task its examples are shown to the model, and what it says, ŷ, is written down. Then
//! L' = L + λ · D(ŷ, y), for classes with T² KL(softmax(ŷ ⁄ T) ‖ softmax(y ⁄ T)), for numbers with the
//! squared difference. With `tasks = "each"` rows are looked at as if they were of each earlier task,
//! as heads and modules of single tasks need it, and D is the sum over them.
//!
//! Li and Hoiem 2016, *Learning without Forgetting*, arXiv 1606.09282. Survey §6.2.

use std::collections::HashMap;

use modl_core::{Context, Error, Result, Tensor, no_grad};
use serde::{Deserialize, Serialize};

use super::{Continual, Learner, TaskContext};
use crate::{Batch, StepContext, StepGradients, StepRule};

/// Settings of learning without forgetting.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lwf {
    /// λ, 0 or more; default 1, as in the paper.
    pub lambda: f64,
    /// T, above 0; default 2, as in the paper. For classes alone.
    pub temperature: f64,
    /// As whose rows they are looked at; default `own`.
    pub tasks: As,
}

/// As rows of which task a task's rows are looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum As {
    /// Of their own: one head, and no routing by task.
    #[default]
    Own,
    /// Of each earlier one, in turn.
    Each,
}

impl Default for Lwf {
    fn default() -> Self {
        Lwf { lambda: 1.0, temperature: 2.0, tasks: As::Own }
    }
}

impl Continual for Lwf {
    fn kind(&self) -> &'static str {
        "lwf"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if !(self.lambda >= 0.0 && self.lambda.is_finite()) {
            return Err(Error::invalid("lambda", "is to be 0 or more"));
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return Err(Error::invalid("temperature", "is to be above 0"));
        }
        Ok(Box::new(Taught { config: self.clone(), said: Vec::new() }))
    }
}

#[derive(Debug)]
struct Taught {
    config: Lwf,
    /// For each earlier task, or the own one, what was said of each example.
    said: Vec<Said>,
}

/// What was said of the examples of a task.
#[derive(Debug)]
struct Said {
    /// As rows of which task; their own where it is `None`.
    task: Option<String>,
    /// Rows of `values` by example.
    rows: HashMap<String, usize>,
    /// `[examples, …]`.
    values: Tensor,
}

impl Said {
    /// The batch as it is looked at.
    fn seen(&self, batch: &Batch) -> Batch {
        let mut seen = batch.clone();
        if let Some(task) = &self.task {
            seen.tasks = vec![task.clone(); batch.len()];
        }
        seen
    }

    /// What was said of its rows.
    fn of(&self, batch: &Batch) -> Result<Tensor> {
        let row = |id: &String| self.rows.get(id).map(|r| *r as i64);
        let rows: Option<Vec<i64>> = batch.ids.iter().map(row).collect();
        let rows =
            rows.ok_or_else(|| Error::invalid("batch", "has rows that are not the task's"))?;
        let device = self.values.device();
        self.values.index_select(0, &Tensor::from_slice(&rows, &[rows.len() as i64], device)?)
    }
}

impl StepRule for Taught {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut loss = cx.loss(batch)?;
        for (n, said) in self.said.iter().enumerate() {
            let seen = said.seen(batch);
            let other;
            let predicted = match (&said.task, loss.predicted()) {
                (None, Some(predicted)) => predicted,
                _ => {
                    let seed = cx.seed().child("as").nth(n as u64);
                    let described = seen.describe(Context::train(seed, cx.done()))?;
                    other = cx.objective().predict(cx.model(), &seen, &described)?;
                    &other
                }
            };
            let apart =
                cx.objective().distill(predicted, &said.of(batch)?, self.config.temperature)?;
            loss.add("lwf", &apart.mean()?, self.config.lambda)?;
        }
        let grads = cx.gradients_of(&loss)?;
        Ok(StepGradients { loss, grads, noted: Default::default() })
    }
}

impl Learner for Taught {
    /// Everything that is said again follows from the model as it is now, so nothing is saved.
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.said.clear();
        let earlier = cx.tasks.get(..cx.index).unwrap_or_default();
        let tasks: Vec<Option<String>> = match self.config.tasks {
            As::Own if earlier.is_empty() => Vec::new(),
            As::Own => vec![None],
            As::Each => earlier.iter().cloned().map(Some).collect(),
        };
        for task in tasks {
            let mut said = Said {
                task,
                rows: HashMap::new(),
                values: Tensor::from_slice(&[0f32], &[1], cx.job.model.device())?,
            };
            let all: Vec<usize> = (0..cx.data.len()).collect();
            let mut values = Vec::new();
            for rows in all.chunks(64) {
                let batch = said.seen(&cx.data.batch(rows, cx.job.model.device())?);
                let described = batch.describe(Context::eval())?;
                let model = &*cx.job.model;
                values.push(no_grad(|| cx.job.objective.predict(model, &batch, &described))?);
                for (row, id) in rows.iter().zip(&batch.ids) {
                    said.rows.insert(id.clone(), *row);
                }
            }
            said.values = Tensor::cat(&values, 0)?;
            self.said.push(said);
        }
        Ok(())
    }
}
