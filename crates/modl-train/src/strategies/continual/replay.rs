//! Experience replay: each step also sees examples of earlier tasks, from a memory of fixed size.
//!
//! The loss is the mean over the batch's rows and as many rows of the memory as `rows` says. After
//! each task its examples are offered to the memory, which is a [`Reservoir`]: each example of all
//! tasks so far has the same chance to be in it.
//!
//! Ratcliff 1990; Chaudhry et al. 2019, *On Tiny Episodic Memories in Continual Learning*,
//! arXiv 1902.10486. Survey §6.2.

use modl_core::{Result, Tensor};
use serde::Deserialize;

use super::memory::Memory;
use super::{Continual, Learner, TaskContext};
use crate::{Batch, StepContext, StepRule};

/// Settings of experience replay.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Replay {
    /// Examples that are kept of all tasks together; default 200.
    pub memory: usize,
    /// Rows of the memory in each step; default 16.
    pub rows: usize,
}

impl Default for Replay {
    fn default() -> Self {
        Replay { memory: 200, rows: 16 }
    }
}

impl Continual for Replay {
    fn kind(&self) -> &'static str {
        "replay"
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        Ok(Box::new(Replayed(Memory::new(self.memory, self.rows)?)))
    }
}

#[derive(Debug)]
struct Replayed(Memory);

impl StepRule for Replayed {
    fn batch(&mut self, cx: &StepContext, batch: Batch) -> Result<Batch> {
        match self.0.draw(cx)? {
            Some(more) => batch.and(more),
            None => Ok(batch),
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.state()
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.0.load_state(state)
    }
}

impl Learner for Replayed {
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.0.recall(cx)
    }

    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        self.0.keep(cx)
    }
}
