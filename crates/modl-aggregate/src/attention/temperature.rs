//! The temperature of a softmax, constant or falling while a model is trained.
//!
//! With n of N steps done, T = from − (from − to)·min(n ⁄ N, 1). AdapterHub's fusions start at 50 and
//! fall to 1 in 980 forward passes, those of evaluation included, and forget it in their files; here
//! it follows the steps of training alone, and where it has got to is saved as a buffer.

use modl_core::{Error, Result, Scope, Tensor, no_grad};
use serde::{Deserialize, Serialize};

/// The name of the buffer that holds the temperature of now.
const BUFFER: &str = "temperature";

/// T.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Temperature {
    /// The same for ever, above 0.
    Constant(f64),
    /// A line from one to another, `{ from = 50, to = 1, steps = 980 }`.
    Falling(Falling),
}

/// A line between two temperatures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Falling {
    /// Before the first step, above 0.
    pub from: f64,
    /// After the last of `steps` steps, above 0.
    pub to: f64,
    /// At least 1.
    pub steps: u64,
}

impl Default for Temperature {
    /// 1.
    fn default() -> Self {
        Temperature::Constant(1.0)
    }
}

impl Temperature {
    /// That of AdapterHub's fusions with `temperature` set: from 50 to 1 in 980 steps.
    pub fn adapterhub() -> Self {
        Temperature::Falling(Falling { from: 50.0, to: 1.0, steps: 980 })
    }

    /// T with `done` steps done.
    pub fn after(&self, done: u64) -> f64 {
        match self {
            Temperature::Constant(t) => *t,
            Temperature::Falling(Falling { from, to, steps }) => {
                from - (from - to) * (done as f64 / (*steps).max(1) as f64).min(1.0)
            }
        }
    }

    /// # Errors
    /// Where it is not above 0, or falls in no step. `what` is its name.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        let ends = match self {
            Temperature::Constant(t) => [*t, *t],
            Temperature::Falling(Falling { steps: 0, .. }) => {
                return Err(Error::invalid(what, "falls in 0 steps, wants 1 or more"));
            }
            Temperature::Falling(line) => [line.from, line.to],
        };
        match ends.iter().find(|t| !(t.is_finite() && **t > 0.0)) {
            Some(t) => Err(Error::invalid(what, format!("is {t}, wants a number above 0"))),
            None => Ok(()),
        }
    }

    /// What keeps it during training.
    pub(crate) fn build(self, what: &str, scope: &mut Scope) -> Result<Cooling> {
        self.check(what)?;
        let now = match self {
            Temperature::Constant(_) => None,
            Temperature::Falling(line) => {
                let start = Tensor::full(&[1], line.from, scope.kind(), scope.device())?;
                Some(scope.buffer(BUFFER, &start)?)
            }
        };
        Ok(Cooling { schedule: self, now })
    }
}

/// A temperature and where it has got to.
#[derive(Debug)]
pub(crate) struct Cooling {
    schedule: Temperature,
    /// `[1]`, where it falls.
    now: Option<Tensor>,
}

impl Cooling {
    /// scores ⁄ T.
    pub(crate) fn apply(&self, scores: &Tensor) -> Result<Tensor> {
        match (&self.now, self.schedule) {
            (Some(now), _) => scores.div(&now.to_kind(scores.kind())?),
            (None, Temperature::Constant(t)) if t != 1.0 => scores.mul_scalar(1.0 / t),
            (None, _) => Ok(scores.clone()),
        }
    }

    /// `done` steps of training are done.
    pub(crate) fn after_step(&self, done: u64) -> Result<()> {
        let Some(now) = &self.now else { return Ok(()) };
        let t = Tensor::full(&[1], self.schedule.after(done), now.kind(), now.device())?;
        no_grad(|| now.clone().copy_from(&t))
    }
}
