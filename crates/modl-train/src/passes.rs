//! The loss of a step: what one or several passes of a batch give, with all that is added to it.
//!
//! Several passes are for routers that draw their choices. Their losses ℓ₁ … ℓₙ of each row become
//!
//! - `mean`: Σ ℓᵢ ⁄ n, a Monte-Carlo estimate of the expected loss;
//! - `best`: minᵢ (ℓᵢ − ln pᵢ), where pᵢ is the probability of what the routers chose in pass i: the
//!   Viterbi step of Kirsch, Kunze, Barber 2018, *Modular networks: learning to decompose neural
//!   computation*, arXiv 1811.05249, with −ln p(y|x) as the loss; routers note `log_prob`;
//! - `consistent`: Σ ℓᵢ ⁄ n and by its weight the mean divergence of consecutive passes'
//!   predictions: THOR (Zuo et al. 2022, arXiv 2110.04260) and AdaMix (Wang et al. 2022,
//!   arXiv 2205.12410).

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use modl_core::{
    ActivationCheckpoints, Context, Error, Modular, Outcome, Result, Seed, Tensor, Trace, no_grad,
};
use serde::{Deserialize, Serialize};

use crate::assignments::Assignments;
use crate::routed::routed;
use crate::{Batch, Describe, LossWeight, Objective, TrainConfig};

/// How often a batch is passed, and what becomes of the losses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Passes {
    /// The number of passes, each with its own draws. Default: 1.
    pub count: u64,
    /// What becomes of their losses. Default: `mean`.
    pub combine: Combine,
    /// With `best`: for each example the best choices so far are kept and tried again in a pass of
    /// their own, by routers that can (`modular_network`). Default: false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

impl Default for Passes {
    fn default() -> Self {
        Passes { count: 1, combine: Combine::Mean, keep: false }
    }
}

/// What becomes of the losses of several passes.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their mean.
    #[default]
    Mean,
    /// For each row that of the pass with the most probable loss and choices together.
    Best,
    /// Their mean, and by this weight how far predictions are apart.
    Consistent(f64),
}

impl Passes {
    /// Checks the numbers.
    ///
    /// # Errors
    /// By name.
    pub fn check(&self) -> Result<()> {
        if self.count == 0 {
            return Err(Error::invalid("passes.count", "is to be 1 or more"));
        }
        if self.keep && self.combine != Combine::Best {
            return Err(Error::invalid("passes.keep", "is for `combine = \"best\"` alone"));
        }
        match self.combine {
            Combine::Best if self.keep => Ok(()),
            Combine::Consistent(w) if !(w >= 0.0 && w.is_finite()) => {
                Err(Error::invalid("passes.combine.consistent", "is to be 0 or above"))
            }
            Combine::Consistent(_) | Combine::Best if self.count < 2 => {
                Err(Error::invalid("passes.count", "is to be 2 or more for what compares passes"))
            }
            _ => Ok(()),
        }
    }
}

/// One pass that has been made.
#[derive(Debug)]
pub(crate) struct Passed {
    cx: Context,
    trace: Trace,
    /// `[batch, …]`, in the graph.
    predicted: Tensor,
    /// `[batch]`, in the graph.
    pub(crate) losses: Tensor,
    /// `[batch]`, outside the graph.
    pub(crate) known: Tensor,
    /// Which rows count, where of several passes the best is taken.
    pub(crate) chosen: Option<Tensor>,
    /// What a row counts in the step's loss.
    pub(crate) counts: f64,
    /// The tasks of the rows.
    pub(crate) tasks: Vec<String>,
}

impl Passed {
    fn outcome(&self) -> Outcome<'_> {
        let mut outcome = Outcome::new(&self.known, &self.cx);
        outcome.chosen = self.chosen.as_ref();
        outcome
    }
}

/// The loss of a step.
#[derive(Debug)]
pub struct StepLoss {
    /// The objective's.
    pub(crate) loss: Tensor,
    /// With all that is added.
    pub(crate) total: Tensor,
    /// What was added, by name.
    pub(crate) aux: BTreeMap<String, f64>,
    pub(crate) passed: Vec<Passed>,
    /// What the passes kept for the backward pass, where they keep only some.
    pub(crate) kept: Option<ActivationCheckpoints>,
}

impl StepLoss {
    /// The objective's, `[]`, in the graph.
    pub fn objective(&self) -> &Tensor {
        &self.loss
    }

    /// With all that is added to it, `[]`, in the graph.
    pub fn total(&self) -> &Tensor {
        &self.total
    }

    /// What the model said of the rows, `[batch, …]`, in the graph; `None` where the rows were passed
    /// in several parts or several times.
    pub fn predicted(&self) -> Option<&Tensor> {
        match self.passed.as_slice() {
            [one] => Some(&one.predicted),
            _ => None,
        }
    }

    /// Adds `weight` times `loss`, `[]`, and notes it under `name`.
    ///
    /// # Errors
    /// Where it is not one number.
    pub fn add(&mut self, name: &str, loss: &Tensor, weight: f64) -> Result<()> {
        *self.aux.entry(name.to_owned()).or_default() += loss.item()?;
        let own = loss.mul_scalar(weight)?.to_kind(self.total.kind())?;
        self.total = self.total.add(&own)?;
        Ok(())
    }

    /// Lets routers learn from what became of their choices, after the step.
    pub(crate) fn teach(&self, model: &Modular) -> Result<()> {
        for p in &self.passed {
            model.routers_learn(&p.trace, &p.outcome())?;
        }
        Ok(())
    }

    /// The losses of the backbone's own that a pass did not give.
    pub(crate) fn left_out(&self) -> BTreeSet<&str> {
        self.passed.iter().flat_map(|p| &p.trace.left_out).map(String::as_str).collect()
    }

    /// What the routers chose, the mean over sites and passes; `None` where nothing was routed.
    pub(crate) fn routed(&self) -> Result<Option<BTreeMap<String, f64>>> {
        routed(self.passed.iter().map(|p| (&p.trace, &p.cx, p.known.len_of(0) as usize)))
    }
}

/// Passes batches of one model.
pub(crate) struct Passing<'a> {
    pub(crate) model: &'a Modular,
    pub(crate) objective: &'a dyn Objective,
    pub(crate) config: &'a TrainConfig,
    /// What the losses of routers and of the backbone count.
    pub(crate) weights: &'a BTreeMap<String, LossWeight>,
    pub(crate) describe: &'a Describe<'a>,
    /// What is kept for each example, where anything is.
    pub(crate) assignments: Option<&'a RefCell<Assignments>>,
    pub(crate) seed: Seed,
    /// The number of steps that are done.
    pub(crate) done: u64,
}

impl Passing<'_> {
    /// The loss of a batch.
    pub(crate) fn step(
        &self,
        batch: &Batch,
        kept: Option<&ActivationCheckpoints>,
    ) -> Result<StepLoss> {
        let parts = match self.config.split_by_length {
            true => Cow::Owned(batch.by_length()?),
            false => Cow::Borrowed(std::slice::from_ref(batch)),
        };
        let mut sum: Option<StepLoss> = None;
        let mut penalty = None;
        for (i, part) in parts.iter().enumerate() {
            let share = part.tasks.len() as f64 / batch.tasks.len() as f64;
            // Each part draws its own dropout.
            let seed = if i == 0 { self.seed } else { self.seed.child("part").nth(i as u64) };
            let own = self.part(part, seed, kept, share)?;
            if i == 0 {
                penalty = own.passed.first().map(|p| self.model.penalty(&p.cx)).transpose()?;
            }
            sum = Some(own.after(sum)?);
        }
        let mut sum = sum.ok_or_else(|| Error::invalid("batch", "has no rows"))?;
        if let Some(penalty) = penalty.flatten() {
            sum.total = sum.total.add(&penalty.to_kind(sum.total.kind())?)?;
        }
        Ok(sum)
    }

    /// The loss of a part of a batch, which counts `share`.
    fn part(
        &self,
        part: &Batch,
        seed: Seed,
        kept: Option<&ActivationCheckpoints>,
        share: f64,
    ) -> Result<StepLoss> {
        let Passes { count, combine, .. } = self.config.passes;
        let mut passed = Vec::new();
        let assigned = match self.assignments {
            Some(all) => all.borrow().of(part, self.model.device())?,
            None => Vec::new(),
        };
        // First what is kept, which of equal ones is taken.
        if !assigned.is_empty() {
            let cx = Context::train(seed.child("kept"), self.done).as_pass(count, seed);
            let cx = (self.describe)(part, cx)?;
            let cx = assigned.into_iter().fold(cx, |cx, (name, t)| cx.with_feature(name, t));
            passed.push(self.pass(part, cx, kept)?);
        }
        for n in 0..count {
            let own = if n == 0 { seed } else { seed.child("pass").nth(n) };
            let cx = Context::train(own, self.done).as_pass(n, seed);
            passed.push(self.pass(part, (self.describe)(part, cx)?, kept)?);
        }
        let chosen = match combine {
            Combine::Best => Some(best(&passed)?),
            _ => None,
        };
        if let (Some(all), Some(chosen)) = (self.assignments, &chosen) {
            let traces: Vec<&Trace> = passed.iter().map(|p| &p.trace).collect();
            all.borrow_mut().keep(part, &traces, chosen)?;
        }
        let each = 1.0 / passed.len().max(1) as f64;
        let mut aux: BTreeMap<String, f64> = BTreeMap::new();
        let mut loss: Option<Tensor> = None;
        let mut more: Option<Tensor> = None;
        for (n, p) in passed.iter_mut().enumerate() {
            p.chosen = chosen.as_ref().map(|c| c.select(0, n as i64)).transpose()?;
            let rows = p.losses.len_of(0).max(1) as f64;
            let mean = match &p.chosen {
                Some(mine) => p.losses.mul(mine)?.sum()?.mul_scalar(share / rows)?,
                None if share == count as f64 => p.losses.mean()?,
                None => p.losses.mean()?.mul_scalar(share / count as f64)?,
            };
            p.counts = share / rows / if p.chosen.is_some() { 1.0 } else { count as f64 };
            loss = Some(plus(loss, mean)?);
            // Routers' losses are of all rows of a pass, what comes of the outcome of the chosen ones.
            let of_chosen = if p.chosen.is_some() { share } else { share * each };
            let credits = self.model.router_credits(&p.trace, &p.outcome())?.into_iter();
            let credits = credits.map(|(name, own)| (name, own, of_chosen));
            let losses = p.trace.losses()?.into_iter().map(|(name, own)| (name, own, share * each));
            for (name, own, share) in losses.chain(credits) {
                more = self.weighed(&name, &own, share, more)?;
                *aux.entry(name).or_default() += share * own.item()?;
            }
        }
        if let Combine::Consistent(weight) = combine {
            let apart = self.apart(&passed, part)?;
            *aux.entry("consistency".into()).or_default() += share * apart.item()?;
            more = Some(plus(more, apart.mul_scalar(share * weight)?)?);
        }
        let loss = loss.ok_or_else(|| Error::invalid("batch", "was not passed"))?;
        let total = match more {
            Some(more) => loss.add(&more.to_kind(loss.kind())?)?,
            None => loss.clone(),
        };
        Ok(StepLoss { loss, total, aux, passed, kept: kept.cloned() })
    }

    fn pass(
        &self,
        part: &Batch,
        mut cx: Context,
        kept: Option<&ActivationCheckpoints>,
    ) -> Result<Passed> {
        if let Some(kept) = kept {
            cx = cx.with_activation_checkpoints(kept.clone());
        }
        let predicted = self.objective.predict(self.model, part, &cx)?;
        let losses = self.objective.losses(&predicted, part)?;
        let known = losses.detach()?;
        let (trace, tasks) = (cx.take_trace(), part.tasks.clone());
        Ok(Passed { trace, cx, predicted, losses, known, chosen: None, counts: 0.0, tasks })
    }

    /// `sum` and a router's loss by its weight.
    fn weighed(
        &self,
        name: &str,
        own: &Tensor,
        share: f64,
        sum: Option<Tensor>,
    ) -> Result<Option<Tensor>> {
        let weight = self.weights.get(name).map(|w| w.weight).ok_or_else(|| {
            let advice = format!("say what it counts, for instance {name} = 0.01");
            let problem = format!("a router gives it that has no usual weight; {advice}");
            Error::invalid(format!("loss_weights.{name}"), problem)
        })?;
        if weight == 0.0 {
            return Ok(sum);
        }
        plus(sum, own.mul_scalar(share * weight)?).map(Some)
    }

    /// How far the predictions of consecutive passes are apart, the mean over rows.
    fn apart(&self, passed: &[Passed], part: &Batch) -> Result<Tensor> {
        let mut sum = None;
        for (a, b) in passed.iter().zip(passed.iter().skip(1)) {
            let own = self.objective.divergence(&a.predicted, &b.predicted, part)?.mean()?;
            sum = Some(plus(sum, own)?);
        }
        let sum = sum.ok_or_else(|| Error::invalid("passes.count", "is to be 2 or more"))?;
        sum.mul_scalar(1.0 / (passed.len() as f64 - 1.0).max(1.0))
    }
}

fn plus(sum: Option<Tensor>, own: Tensor) -> Result<Tensor> {
    match sum {
        Some(s) => s.add(&own.to_kind(s.kind())?),
        None => Ok(own),
    }
}

/// 1 where a pass is the best of a row and 0 elsewhere, `[passes, batch]`; the first of equal ones.
fn best(passed: &[Passed]) -> Result<Tensor> {
    no_grad(|| {
        let costs: Vec<Tensor> = passed
            .iter()
            .map(|p| {
                let mut cost = p.known.clone();
                // What a router decided for several sites has been drawn once.
                for (site, routing) in p.trace.routings.iter().filter(|(_, r)| !r.repeated) {
                    let Some(log_prob) = routing.noted.get("log_prob") else { continue };
                    let rows = cost.len_of(0);
                    if log_prob.len_of(0) != rows {
                        let problem = format!("log_prob is {log_prob:?} for {rows} rows");
                        return Err(Error::invalid(site, problem));
                    }
                    let of_rows = log_prob.reshape(&[rows, -1])?.sum_dims(&[-1], false)?;
                    cost = cost.sub(&of_rows.to_kind(cost.kind())?)?;
                }
                Ok(cost)
            })
            .collect::<Result<_>>()?;
        let costs = Tensor::stack(&costs, 0)?; // [passes, batch]
        let (_, first) = costs.t()?.neg()?.max_dim(-1)?;
        first.one_hot(costs.len_of(0))?.t()?.to_kind(costs.kind())
    })
}
