//! The training loop, from batch to step, in one piece.

mod given;
mod masters;
mod saving;
mod writing;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use modl_core::{Error, Modular, Result, ResultExt, Seed, Select, Tensor, Tensors};

use crate::assignments::Assignments;
use crate::clip::clip_grad_norm;
use crate::not_finite::Broken;
use crate::passes::Passing;
use crate::state::RunState;
use crate::{
    Batches, Dataset, Describe, Event, Objective, OnNan, Optimizer, Plain, Sink, StepContext,
    StepGradients, StepRule, TrainConfig,
};

use given::{Given, Measuring};
use masters::Masters;
use writing::Writing;

/// A model in training.
#[derive(Debug)]
pub struct Trainer<'a> {
    name: String,
    model: &'a Modular,
    objective: &'a dyn Objective,
    config: TrainConfig,
    seed: Seed,
    params: Vec<(String, Tensor)>,
    masters: Masters,
    /// What a state holds: the masters of the trained parameters, and the buffers, which modules may
    /// change after a step.
    kept: Vec<(String, Tensor)>,
    optimizer: Box<dyn Optimizer>,
    folder: Option<PathBuf>,
    /// What a state says of the run it is of, where states are saved.
    own: Option<RunState>,
    step: u64,
    /// Steps that were left out because of a loss or gradients that were not finite.
    skipped: u64,
    given: Given,
    saved: Option<u64>,
    /// A state that is on its way to the disk.
    writing: Option<Writing>,
}

impl<'a> Trainer<'a> {
    /// Freezes all parameters but those that `config.train` takes. `name` is for reports.
    ///
    /// # Errors
    /// Where the configuration does not fit, nothing is left to train, or a trained parameter has no
    /// floating-point numbers.
    pub fn new(
        name: &str,
        model: &'a Modular,
        objective: &'a dyn Objective,
        config: TrainConfig,
        seed: Seed,
    ) -> Result<Self> {
        config.check()?;
        let optimizer = config.optimizer.build()?;
        model.train_only(&Select::any(config.train.clone()))?;
        let params = model.trainable();
        if params.is_empty() {
            let known = model.params().iter().map(|(n, _)| n).collect::<Vec<_>>().join(", ");
            let problem = format!("{:?} takes none of the parameters: {known}", config.train);
            return Err(Error::invalid("train", problem));
        }
        config.check_factors(&params)?;
        let masters = Masters::of(&params)?;
        let buffers = model.params().iter().filter(|(_, p)| p.is_buffer());
        let mut kept = masters.all().to_vec();
        kept.extend(buffers.map(|(n, p)| (n.to_owned(), p.tensor().clone())));
        Ok(Trainer {
            name: name.to_owned(),
            model,
            objective,
            config,
            seed,
            params,
            masters,
            kept,
            optimizer,
            folder: None,
            own: None,
            step: 0,
            skipped: 0,
            given: Given::default(),
            saved: None,
            writing: None,
        })
    }

    /// Saves states in `folder`. Where there is one already, training goes on from it, bit for bit
    /// as if it had never stopped (on the same machine with one thread).
    pub fn keep_in(self, folder: impl AsRef<Path>) -> Self {
        Trainer { folder: Some(folder.as_ref().to_owned()), ..self }
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// Where a saved state is another run's, a forward pass fails, a state cannot be saved, or the loss
    /// or a gradient is not finite and the configuration does not say to leave such steps out. Then
    /// the state saved last is kept; where there is none, that before the step is saved.
    pub fn train(
        &mut self,
        data: &Dataset,
        describe: &Describe,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        self.train_by(&mut Plain, data, describe, sink)
    }

    /// Trains to the end, each step by a rule.
    ///
    /// # Errors
    /// As [`Trainer::train`], or where the rule fails.
    pub fn train_by(
        &mut self,
        rule: &mut dyn StepRule,
        data: &Dataset,
        describe: &Describe,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let (given, left) = Given::new(&self.config, self.seed, self.masters.all(), data)?;
        let whole = data;
        let data = left.as_ref().unwrap_or(data);
        self.given = given;
        let keeps = self.config.passes.keep.then(|| Assignments::new(data)).transpose()?;
        let mut assignments = keeps.map(RefCell::new);
        let known = assignments.as_mut().map(RefCell::get_mut);
        let (cursor, note) = self.take_up(whole, known, rule)?;
        let device = self.model.device();
        let size = self.config.batch_size * self.config.accumulate as usize;
        let mut batches =
            Batches::new(data, size, self.seed, device, cursor)?.sampled(self.config.sampling)?;
        let epochs = self.config.epochs.unwrap_or(1);
        let steps = self.config.steps.unwrap_or(epochs * batches.per_epoch());
        let params = self.params.clone();
        let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
        let mut unused: BTreeSet<usize> = (0..leaves.len()).collect();
        let frozen = self.frozen_sample()?;
        let weights = self.config.weights_of_losses(self.model);
        sink.event(&Event::Started {
            name: self.name.clone(),
            step: self.step,
            steps,
            trained: leaves.iter().map(|t| t.numel()).sum(),
            examples: data.len(),
            note,
            losses: weights.clone(),
        })?;
        let mut told: BTreeSet<String> = BTreeSet::new();
        while self.step < steps && !self.given.stopped() {
            let clock = Instant::now();
            let before = batches.cursor();
            let batch = batches.advance()?;
            let lr = self.config.lr * self.config.schedule.factor(self.step, steps);
            let cx = StepContext {
                passing: Passing {
                    model: self.model,
                    objective: self.objective,
                    config: &self.config,
                    weights: &weights,
                    describe,
                    assignments: assignments.as_ref(),
                    seed: self.seed,
                    done: self.step,
                },
                params: &params,
                steps,
                lr,
            };
            let batch = rule.batch(&cx, batch)?;
            let StepGradients { loss: losses, mut grads, noted } = rule.gradients(&cx, &batch)?;
            let grad_norm = clip_grad_norm(&mut grads, self.config.clip)?;
            if let Some(broken) = Broken::of(losses.total.item()?, grad_norm) {
                match self.config.on_nan {
                    OnNan::Skip(most) if self.skipped < most => {
                        (self.step, self.skipped) = (self.step + 1, self.skipped + 1);
                        let text = broken.skipped(self.skipped, most);
                        sink.event(&Event::Notice { step: self.step, text })?;
                        continue;
                    }
                    _ => return self.stop(&broken, before, assignments.as_ref(), rule, sink),
                }
            }
            let factor = |n: &str| lr * self.config.lr_factor(n);
            self.optimizer.step(self.masters.all(), &grads, &factor)?;
            self.masters.round()?;
            rule.after_step(&cx, &grads)?;
            self.step += 1;
            for name in self.model.after_step(&self.named(&grads), self.step, steps)? {
                self.optimizer.forget(&name);
            }
            losses.teach(self.model)?;
            for name in losses.left_out() {
                if told.insert(name.to_owned()) {
                    sink.event(&Event::Notice { step: self.step, text: left_out(name) })?;
                }
            }
            if every(self.config.log_routing_every, self.step) {
                let routed = losses.routed()?;
                if let Some(metrics) = routed {
                    sink.event(&Event::Routed { step: self.step, metrics })?;
                }
            }

            let by = Measuring {
                name: &self.name,
                model: self.model,
                objective: self.objective,
                batch_size: self.config.batch_size,
                describe,
                kept: &self.kept,
                masters: &self.masters,
            };
            self.given.after_step(self.step, self.step == steps, &by, sink)?;
            unused.retain(|i| grads.get(*i).is_some_and(Option::is_none));
            if cfg!(debug_assertions) && !frozen.is_empty() && self.step == 1 {
                debug_assert_eq!(frozen, self.frozen_sample()?, "a frozen parameter has changed");
            }
            if every(self.config.log_every, self.step) {
                let (loss, seconds) = (losses.loss.item()?, clock.elapsed().as_secs_f64());
                let mut aux = losses.aux;
                aux.extend(noted);
                sink.event(&Event::Step { step: self.step, loss, aux, lr, grad_norm, seconds })?;
            }
            self.look_at_writing(sink)?;
            if every(self.config.checkpoint_every, self.step) && self.step < steps {
                self.save(batches.cursor(), assignments.as_ref(), rule, sink)?;
            }
        }
        self.finish_writing(sink)?;
        if self.saved != Some(self.step) {
            self.save(batches.cursor(), assignments.as_ref(), rule, sink)?;
            self.finish_writing(sink)?;
        }
        self.given.publish(&self.kept)?;
        self.masters.round()?;
        let name = |i: usize| self.params.get(i).map(|(n, _)| n.clone());
        let unused = unused.into_iter().filter_map(name).collect();
        sink.event(&Event::Finished { name: self.name.clone(), step: self.step, unused })
    }

    /// Gradients by the names of what they are of.
    fn named(&self, grads: &[Option<Tensor>]) -> Tensors {
        let named = self.params.iter().zip(grads);
        named.filter_map(|((n, _), g)| Some((n.clone(), g.clone()?))).collect()
    }

    /// The first numbers of each frozen parameter, to see in debug builds that none changes.
    fn frozen_sample(&self) -> Result<Vec<(String, Vec<u8>)>> {
        if !cfg!(debug_assertions) {
            return Ok(Vec::new());
        }
        let all = self.model.params().iter().chain(self.model.backbone().params().iter());
        let frozen = all.filter(|(_, p)| !p.trainable() && !p.is_buffer());
        let first =
            |t: &Tensor| t.reshape(&[-1])?.narrow(0, 0, t.numel().min(8) as i64)?.to_bytes();
        frozen.map(|(n, p)| Ok((n.to_owned(), first(p.tensor()).at(n)?))).collect()
    }
}

/// What is said of a loss of the backbone's own that a pass did not give.
fn left_out(name: &str) -> String {
    format!(
        "the backbone's `{name}` is left out, in this step and in others like it: modules around its \
         mixtures of experts send rows or tokens past a router, and the loss is of all of them"
    )
}

/// Whether something that is done each `n` steps is due; never where `n` is 0.
fn every(n: u64, step: u64) -> bool {
    n > 0 && step.is_multiple_of(n)
}
