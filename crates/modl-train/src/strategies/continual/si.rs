//! Synaptic intelligence: each parameter keeps account of how much its way has lowered the loss.
//!
//! ```text
//! ω ← ω − g · (θ' − θ)          in each step, g the gradient of the task's own loss
//! Ω ← Ω + ω⁺ ⁄ ((θ_end − θ_start)² + ξ)   after the task; then ω ← 0
//! L' = L + c · Σ Ω (θ − θ_end)²
//! ```
//!
//! Over a task Σ ω is what the loss has fallen by, in the limit of small steps. Negative ω, of
//! parameters that made the loss rise, count 0.
//!
//! Zenke, Poole, Ganguli 2017, *Continual Learning Through Synaptic Intelligence*, arXiv 1703.04200.
//! Survey §6.2.

use modl_core::{Error, Result, Tensor, Tensors, no_grad};
use serde::Deserialize;

use super::quadratic::Quadratic;
use super::{Continual, Learner, TaskContext};
use crate::{Batch, StepContext, StepGradients, StepRule};

/// Settings of synaptic intelligence.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Si {
    /// c, 0 or more; default 0.1, the paper's for permuted MNIST.
    pub c: f64,
    /// ξ, above 0; default 0.1, the paper's for permuted MNIST.
    pub xi: f64,
}

impl Default for Si {
    fn default() -> Self {
        Si { c: 0.1, xi: 0.1 }
    }
}

impl Continual for Si {
    fn kind(&self) -> &'static str {
        "si"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if !(self.c >= 0.0 && self.c.is_finite()) {
            return Err(Error::invalid("c", "is to be 0 or more"));
        }
        if !(self.xi > 0.0 && self.xi.is_finite()) {
            return Err(Error::invalid("xi", "is to be above 0"));
        }
        Ok(Box::new(Synapses {
            config: self.clone(),
            springs: Quadratic::default(),
            way: Tensors::new(),
            start: Tensors::new(),
            step: Vec::new(),
        }))
    }
}

#[derive(Debug)]
struct Synapses {
    config: Si,
    springs: Quadratic,
    /// ω by parameter.
    way: Tensors,
    /// θ before the task.
    start: Tensors,
    /// Within a step: where each parameter stood, and its gradient.
    step: Vec<Option<(Tensor, Tensor)>>,
}

impl StepRule for Synapses {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let mut step = cx.gradients(batch)?;
        self.step = no_grad(|| {
            let pairs = cx.params().iter().zip(&step.grads);
            let kept = pairs.map(|((_, theta), grad)| {
                let Some(grad) = grad else { return Ok(None) };
                Ok(Some((theta.detach()?.copy()?, grad.detach()?)))
            });
            kept.collect::<Result<_>>()
        })?;
        let held = self.springs.pull(2.0 * self.config.c, cx.params(), &mut step.grads)?;
        step.noted.insert("si".into(), held);
        Ok(step)
    }

    fn after_step(&mut self, cx: &StepContext, _: &[Option<Tensor>]) -> Result<()> {
        no_grad(|| {
            for ((name, theta), before) in cx.params().iter().zip(self.step.drain(..)) {
                let Some((before, grad)) = before else { continue };
                let lowered = before.sub(&theta.detach()?)?.mul(&grad)?;
                let sum = match self.way.get(name) {
                    Some(way) => way.add(&lowered)?,
                    None => lowered,
                };
                self.way.set(name.clone(), sum);
            }
            Ok(())
        })
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.springs.state();
        all.extend(self.way.iter().map(|(n, t)| (format!("way.{n}"), t.clone())));
        all.extend(self.start.iter().map(|(n, t)| (format!("start.{n}"), t.clone())));
        Ok(all)
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        (self.springs, self.way, self.start) = Default::default();
        for (name, t) in state {
            match name.split_once('.') {
                Some(("way", rest)) => self.way.set(rest.to_owned(), t),
                Some(("start", rest)) => self.start.set(rest.to_owned(), t),
                _ => self.springs.load(&name, t)?,
            }
        }
        Ok(())
    }
}

impl Learner for Synapses {
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.way = Tensors::new();
        self.start = cx.to_train().map(|_, t| t.detach()?.copy())?;
        Ok(())
    }

    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        no_grad(|| {
            let now = cx.trained();
            let mut importance = Tensors::new();
            for (name, way) in self.way.iter() {
                let gone = now.need(name)?.detach()?.sub(self.start.need(name)?)?.square()?;
                let own = way.relu()?.div(&gone.add_scalar(self.config.xi)?)?;
                importance.set(name.to_owned(), own);
            }
            self.springs.add(&importance, &now)?;
            // The anchor is where the last task ended, for all parameters that moved.
            for (name, theta) in now.iter().filter(|(n, _)| importance.get(n).is_some()) {
                self.springs.anchor.set(name.to_owned(), theta.detach()?.copy()?);
            }
            (self.way, self.start) = Default::default();
            Ok(())
        })
    }
}
