//! What a few steps on a few examples of a task bring, from where the model is.
//!
//! Of each task's held-out rows some are learned from, and the others measured before and after. The
//! model is what it was afterwards.

use std::collections::BTreeMap;

use modl_core::{Context, Error, Result, Tensor, checkpoint, no_grad};
use serde::{Deserialize, Serialize};

use super::Job;
use crate::{Batch, Event, evaluate};

/// Plain gradient descent: the inner loop.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descent {
    pub(super) lr: f64,
    pub(super) steps: usize,
}

impl Descent {
    pub(super) fn check(&self) -> Result<()> {
        if !(self.lr >= 0.0 && self.lr.is_finite()) {
            return Err(Error::invalid("inner_lr", "is to be 0 or more"));
        }
        if self.steps == 0 {
            return Err(Error::invalid("inner_steps", "is to be 1 or more"));
        }
        Ok(())
    }

    /// One step in place.
    pub(super) fn step(&self, params: &[(String, Tensor)], grads: &[Option<Tensor>]) -> Result<()> {
        no_grad(|| {
            for ((_, theta), grad) in params.iter().zip(grads) {
                let Some(grad) = grad else { continue };
                theta.clone().add_in_place(&grad.mul_scalar(-self.lr)?)?;
            }
            Ok(())
        })
    }
}

/// Copies of parameters, outside the graph.
pub(super) fn copies(params: &[(String, Tensor)]) -> Result<Vec<Tensor>> {
    params.iter().map(|(_, t)| t.detach()?.copy()).collect()
}

/// Makes of parameters what [`copies`] kept.
pub(super) fn put_back(params: &[(String, Tensor)], kept: &[Tensor]) -> Result<()> {
    no_grad(|| params.iter().zip(kept).try_for_each(|((_, t), kept)| t.clone().copy_from(kept)))
}

/// What a task's metric was before and after its adaptation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adaptation {
    /// Whether the phase did not train on it.
    pub new: bool,
    /// The objective's first metric on rows that are not learned from, before.
    pub before: Option<f64>,
    /// And after.
    pub after: Option<f64>,
}

/// Adapts to each task with held-out rows, and writes and tells what it brings: an
/// [`Adaptation`] for each. Tasks with too few rows are left out.
pub(super) fn measure(job: &mut Job, inner: Descent, support: usize) -> Result<()> {
    let Some(test) = job.test else { return Ok(()) };
    let trained = job.data.tasks();
    let metric = job.objective.metrics().first().map(|m| m.key).unwrap_or_default();
    let params = job.model.trainable();
    let start = copies(&params)?;
    let mut all: BTreeMap<String, Adaptation> = BTreeMap::new();
    for (task, n) in test.tasks().into_iter().filter(|(_, n)| *n > support) {
        let data = test.of_task(task)?;
        let seed = job.seed().child("adaptation").child(task);
        let mut rows: Vec<usize> = (0..n).collect();
        let (learned, rest) =
            rand::seq::SliceRandom::partial_shuffle(rows.as_mut_slice(), &mut seed.rng(), support);
        let (learned, rest) = (data.batch(learned, job.model.device())?, data.rows(rest)?);
        let worth = |job: &Job| -> Result<Option<f64>> {
            let said = evaluate(job.model, job.objective, &rest, 64, &Batch::describe)?;
            Ok(job.objective.scores(&said.iter().collect::<Vec<_>>()).get(metric).copied())
        };
        let before = worth(job)?;
        let adapted = adapt(job, inner, &params, &learned).and_then(|()| worth(job));
        put_back(&params, &start)?;
        let new = !trained.contains_key(task);
        all.insert(task.to_owned(), Adaptation { new, before, after: adapted? });
    }
    let path = job.folder.join("adaptation.json");
    let text = serde_json::to_vec_pretty(&all).map_err(|e| Error::file(&path, e))?;
    checkpoint::write_whole(&path, &text)?;
    for (when, of) in [("before", (|a| a.before) as fn(&Adaptation) -> _), ("after", |a| a.after)] {
        let metrics = all.iter().filter_map(|(t, a)| Some((t.clone(), of(a)?))).collect();
        let name = format!("{}/{when} adaptation", job.phase.name);
        job.sink.event(&Event::Evaluated { name, step: None, metrics })?;
    }
    Ok(())
}

fn adapt(job: &Job, inner: Descent, params: &[(String, Tensor)], rows: &Batch) -> Result<()> {
    let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    for _ in 0..inner.steps {
        let cx = rows.describe(Context::eval())?;
        let loss = job.objective.loss(job.model, rows, &cx)?;
        if loss.requires_grad() {
            inner.step(params, &loss.gradients(&leaves, false)?)?;
        }
    }
    Ok(())
}
