//! The training loop, from batch to step, in one piece.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use modl_core::{
    Error, Kind, Modular, ParamStore, Result, ResultExt, Seed, Select, Tensor, Tensors,
};

use crate::assignments::Assignments;
use crate::clip::clip_grad_norm;
use crate::passes::Passing;
use crate::state::{self, Parts, RunState};
use crate::{
    Batches, Cursor, Dataset, Describe, Event, Objective, Optimizer, Plain, Sink, StepContext,
    StepGradients, StepRule, TrainConfig,
};

/// A model in training.
#[derive(Debug)]
pub struct Trainer<'a> {
    name: String,
    model: &'a Modular,
    objective: &'a dyn Objective,
    config: TrainConfig,
    seed: Seed,
    params: Vec<(String, Tensor)>,
    /// What a state holds: the trained parameters, and the buffers, which modules may change after
    /// a step.
    kept: Vec<(String, Tensor)>,
    optimizer: Box<dyn Optimizer>,
    folder: Option<PathBuf>,
    step: u64,
    saved: Option<u64>,
}

impl<'a> Trainer<'a> {
    /// Freezes all parameters but those that `config.train` takes. `name` is for reports.
    ///
    /// # Errors
    /// Where the configuration does not fit, nothing is left to train, or a trained parameter is
    /// not in f32 or f64, in which small steps would be lost.
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
        for (name, t) in &params {
            if !matches!(t.kind(), Kind::Float | Kind::Double) {
                let problem = format!("is {t:?}; load the backbone in f32 to train it");
                return Err(Error::invalid(format!("trained parameter `{name}`"), problem));
            }
        }
        let buffers = model.params().iter().filter(|(_, p)| p.is_buffer());
        let mut kept = params.clone();
        kept.extend(buffers.map(|(n, p)| (n.to_owned(), p.tensor().clone())));
        Ok(Trainer {
            name: name.to_owned(),
            model,
            objective,
            config,
            seed,
            params,
            kept,
            optimizer,
            folder: None,
            step: 0,
            saved: None,
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
    /// Where a saved state is another run's, the loss or a gradient is not finite (the state saved
    /// last is kept), or a forward pass fails.
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
        let keeps = self.config.passes.keep.then(|| Assignments::new(data)).transpose()?;
        let mut assignments = keeps.map(RefCell::new);
        let known = assignments.as_mut().map(RefCell::get_mut);
        let (cursor, note) = self.take_up(data, known, rule)?;
        let device = self.model.device();
        let mut batches = Batches::new(data, self.config.batch_size, self.seed, device, cursor)?
            .sampled(self.config.sampling)?;
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
        while self.step < steps {
            let clock = Instant::now();
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
            self.finite("loss", losses.total.item()?)?;
            let grad_norm = clip_grad_norm(&mut grads, self.config.clip)?;
            self.finite("norm of the gradients", grad_norm)?;
            self.optimizer.step(&self.params, &grads, &|n| lr * self.config.lr_factor(n))?;
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
            if every(self.config.checkpoint_every, self.step) && self.step < steps {
                self.save(batches.cursor(), data, assignments.as_ref(), rule, sink)?;
            }
        }
        if self.saved != Some(self.step) {
            self.save(batches.cursor(), data, assignments.as_ref(), rule, sink)?;
        }
        let name = |i: usize| self.params.get(i).map(|(n, _)| n.clone());
        let unused = unused.into_iter().filter_map(name).collect();
        sink.event(&Event::Finished { name: self.name.clone(), step: self.step, unused })
    }

    /// Gradients by the names of what they are of.
    fn named(&self, grads: &[Option<Tensor>]) -> Tensors {
        let named = self.params.iter().zip(grads);
        named.filter_map(|((n, _), g)| Some((n.clone(), g.clone()?))).collect()
    }

    fn finite(&self, what: &str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        let kept = match (&self.folder, self.saved) {
            (Some(f), Some(step)) => format!("the state of step {step} is in {}", f.display()),
            _ => "no state had been saved".to_owned(),
        };
        let advice = "try a lower lr, a longer warm-up, a smaller clip, or f32 instead of bf16";
        let place = format!("{}, step {}", self.name, self.step + 1);
        Err(Error::invalid(what, format!("is {value}; {advice}; {kept}"))).at(place)
    }

    fn save(
        &mut self,
        cursor: Cursor,
        data: &Dataset,
        assignments: Option<&RefCell<Assignments>>,
        rule: &dyn StepRule,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let state = RunState::new(self.step, cursor, self.seed, &self.config, self.model, data)?;
        let assigned = assignments.map(|all| all.borrow().tensors()).transpose()?;
        let tensors = Parts {
            params: self.kept.clone(),
            optimizer: self.optimizer.state()?,
            assignments: assigned.unwrap_or_default(),
            rule: rule.state()?,
        };
        state::save(folder, state, &tensors)?;
        self.saved = Some(self.step);
        sink.event(&Event::Saved { path: folder.clone(), step: self.step })
    }

    /// Takes up the saved state, if there is one: where the data goes on, and what may differ.
    fn take_up(
        &mut self,
        data: &Dataset,
        assignments: Option<&mut Assignments>,
        rule: &mut dyn StepRule,
    ) -> Result<(Cursor, Option<String>)> {
        let Some(folder) = &self.folder else { return Ok(Default::default()) };
        let Some(saved) = state::load(folder, self.model.device())? else {
            return Ok(Default::default());
        };
        let own = RunState::new(0, Cursor::default(), self.seed, &self.config, self.model, data)?;
        let note = saved.state.check(&own, folder)?;
        let mut store = ParamStore::new();
        for (name, t) in &self.kept {
            store.insert(name.clone(), t.clone())?;
        }
        let tensors = saved.tensors;
        self.optimizer.load_state(&self.params, tensors.optimizer)?;
        if let Some(all) = assignments {
            all.load(tensors.assignments)?;
        }
        rule.load_state(tensors.rule)?;
        let params = tensors.params.iter().map(|(n, t)| (n.as_str(), t));
        store.load(&folder.display().to_string(), params, &Select::all())?;
        self.step = saved.state.step;
        self.saved = Some(self.step);
        Ok((saved.state.cursor, note))
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
