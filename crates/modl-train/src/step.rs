//! What a strategy may change in a step: the rows that are trained on, the gradients, and what
//! happens after the optimiser.
//!
//! ```text
//! batch → StepRule::batch → StepRule::gradients → clip → optimiser → StepRule::after_step
//! ```
//!
//! A rule that changes nothing is ordinary training: the mean loss of the batch and its gradients.
//! Replay adds rows, EWC and A-GEM change the gradients, PCGrad makes them of the tasks' own, Synaptic
//! Intelligence looks on.

use std::collections::BTreeMap;
use std::fmt::Debug;

use modl_core::{ActivationCheckpoints, Error, Kind, Modular, Result, Seed, Tensor};

use crate::gradients::added;
use crate::passes::Passing;
use crate::{Batch, Objective, StepLoss};

/// What a strategy does in each step; by default nothing is changed.
pub trait StepRule: Debug {
    /// The rows that are trained on.
    ///
    /// # Errors
    /// Where rows cannot be had; training then stops.
    fn batch(&mut self, cx: &StepContext, batch: Batch) -> Result<Batch> {
        let _ = cx;
        Ok(batch)
    }

    /// The loss and the gradients of what is trained.
    ///
    /// # Errors
    /// Where a pass fails.
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        cx.gradients(batch)
    }

    /// Looks on after the optimiser, or corrects what it did. `grads` are those that it was given.
    ///
    /// # Errors
    /// Where something cannot be computed.
    fn after_step(&mut self, cx: &StepContext, grads: &[Option<Tensor>]) -> Result<()> {
        let _ = (cx, grads);
        Ok(())
    }

    /// What has to be saved to go on later.
    ///
    /// # Errors
    /// Where it cannot be made into tensors.
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Where it is none of this rule.
    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        match state.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::invalid(
                "saved state",
                format!("holds `{name}`, which nothing takes up"),
            )),
        }
    }
}

/// Ordinary training.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl StepRule for Plain {}

/// The loss of a step and the gradients of what is trained.
#[derive(Debug)]
pub struct StepGradients {
    /// The loss.
    pub loss: StepLoss,
    /// One for each of [`StepContext::params`]; `None` where a parameter had no part.
    pub grads: Vec<Option<Tensor>>,
    /// Numbers for the step's log.
    pub noted: BTreeMap<String, f64>,
}

/// What a rule works with in a step.
pub struct StepContext<'a> {
    pub(crate) passing: Passing<'a>,
    pub(crate) params: &'a [(String, Tensor)],
    /// The number of steps that will have been done.
    pub steps: u64,
    /// The learning rate of this step, before the factors of single parameters.
    pub lr: f64,
}

impl Debug for StepContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepContext").field("done", &self.done()).finish_non_exhaustive()
    }
}

impl<'a> StepContext<'a> {
    /// The model in training.
    pub fn model(&self) -> &'a Modular {
        self.passing.model
    }

    /// What is predicted.
    pub fn objective(&self) -> &'a dyn Objective {
        self.passing.objective
    }

    /// What is trained, by name.
    pub fn params(&self) -> &'a [(String, Tensor)] {
        self.params
    }

    /// The number of steps that were done before this one.
    pub fn done(&self) -> u64 {
        self.passing.done
    }

    /// In how many parts a batch is passed.
    pub(crate) fn accumulate(&self) -> u64 {
        self.passing.config.accumulate
    }

    /// How many rows are passed at once.
    pub(crate) fn batch_size(&self) -> usize {
        self.passing.config.batch_size.max(1)
    }

    /// Where this step's random numbers come from.
    pub fn seed(&self) -> Seed {
        self.passing.seed.child("step").nth(self.done())
    }

    /// The mean loss over the rows of a batch, in the graph, with all that routers, backbone and
    /// modules add.
    ///
    /// # Errors
    /// Where a pass fails.
    pub fn loss(&self, batch: &Batch) -> Result<StepLoss> {
        self.loss_of_part(batch, 0)
    }

    /// [`StepContext::loss`] for the part `n` of a step, which has dropout and routes drawn of its
    /// own.
    ///
    /// # Errors
    /// Where a pass fails.
    pub fn loss_of_part(&self, batch: &Batch, n: u64) -> Result<StepLoss> {
        let kept = self.passing.config.activation_checkpointing.then(ActivationCheckpoints::new);
        let seed = self.passing.seed;
        let seed = if n == 0 { seed } else { seed.child("rows").nth(n) };
        Passing { seed, ..self.passing }.step(batch, kept.as_ref())
    }

    /// The gradients of a loss, one for each of [`StepContext::params`], in f32 where a parameter has fewer
    /// bits. The graph is freed.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn gradients_of(&self, loss: &StepLoss) -> Result<Vec<Option<Tensor>>> {
        let leaves: Vec<&Tensor> = self.params.iter().map(|(_, t)| t).collect();
        // Without any trained module in this batch there is nothing to differentiate.
        let grads = match (loss.total.requires_grad(), &loss.kept) {
            (true, Some(kept)) => kept.gradients(self.model(), &loss.total, &leaves)?,
            (true, None) => loss.total.gradients(&leaves, false)?,
            (false, _) => vec![None; leaves.len()],
        };
        let wide = |g: Tensor| match g.kind() {
            Kind::BFloat16 | Kind::Half => g.to_kind(Kind::Float),
            _ => Ok(g),
        };
        grads.into_iter().map(|g| g.map(wide).transpose()).collect()
    }

    /// Loss and gradients of a batch, as ordinary training has them.
    ///
    /// # Errors
    /// Where a pass fails.
    pub fn gradients(&self, batch: &Batch) -> Result<StepGradients> {
        self.gradients_in_parts(batch, self.accumulate(), 0, &|_| Ok(()))
    }

    /// Loss and gradients of a batch that is passed in `parts`, which are the parts from `first` on of
    /// the step; `change` is made to each part's loss, as it counts in the sum, before its backward
    /// pass.
    pub(crate) fn gradients_in_parts(
        &self,
        batch: &Batch,
        parts: u64,
        first: u64,
        change: &dyn Fn(&mut StepLoss) -> Result<()>,
    ) -> Result<StepGradients> {
        let (mut sum, mut all) = (None, None);
        // One after the other, so that only one part's graph is in memory.
        for (n, part) in (first..).zip(batch.in_parts(parts)?.iter()) {
            let share = part.len() as f64 / batch.len().max(1) as f64;
            let loss = self.loss_of_part(part, n)?;
            let mut loss = if share == 1.0 { loss } else { loss.times(share)? };
            change(&mut loss)?;
            let grads = self.gradients_of(&loss)?;
            sum = Some(loss.after(sum)?);
            all = Some(match all {
                Some(all) => added(all, grads)?,
                None => grads,
            });
        }
        let (loss, grads) = sum.zip(all).ok_or_else(|| Error::invalid("batch", "has no rows"))?;
        Ok(StepGradients { loss, grads, noted: BTreeMap::new() })
    }
}
