//! Averaged gradient episodic memory: no step may raise the loss on a memory of earlier tasks.
//!
//! ```text
//! g̃ = g                                if g·r ≥ 0
//! g̃ = g − (g·r ⁄ r·r) r                otherwise, r the gradient on rows of the memory
//! ```
//!
//! so that g̃·r ≥ 0, by the smallest change. A parameter without a gradient in g, such as another task's
//! head, stays untouched and has no part in the products.
//!
//! Chaudhry et al. 2019, *Efficient Lifelong Learning with A-GEM*, arXiv 1812.00420. Survey §6.2.

use modl_core::{Result, Tensor};
use serde::Deserialize;

use super::memory::Memory;
use super::{Continual, Learner, TaskContext};
use crate::gradients::{accumulate, dot, where_there};
use crate::{Batch, StepContext, StepGradients, StepRule};

/// Settings of A-GEM.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AGem {
    /// Examples that are kept of all tasks together; default 200.
    pub memory: usize,
    /// Rows of the memory whose gradient is compared with; default 64.
    pub rows: usize,
}

impl Default for AGem {
    fn default() -> Self {
        AGem { memory: 200, rows: 64 }
    }
}

impl Continual for AGem {
    fn kind(&self) -> &'static str {
        "a_gem"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        Ok(Box::new(Constrained(Memory::new(self.memory, self.rows)?)))
    }
}

#[derive(Debug)]
struct Constrained(Memory);

impl StepRule for Constrained {
    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<StepGradients> {
        let Some(memory) = self.0.draw(cx)? else { return cx.gradients(batch) };
        let reference = cx.gradients_of(&cx.loss_of_part(&memory, 1)?)?;
        let mut step = cx.gradients(batch)?;
        let reference = where_there(reference, &step.grads);
        let (along, own) = (dot(&step.grads, &reference)?, dot(&reference, &reference)?);
        let turned = along < 0.0 && own > 0.0;
        if turned {
            accumulate(&mut step.grads, -along / own, &reference)?;
        }
        step.noted.insert("a_gem".into(), f64::from(turned));
        Ok(step)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.0.load_state(state)
    }
}

impl Learner for Constrained {
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.0.recall(cx)
    }

    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.0.keep(cx)
    }
}
