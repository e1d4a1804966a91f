//! Examples of earlier tasks that steps can go back to: for replay and A-GEM.

use modl_core::{Error, Result, Tensor};
use rand::seq::{SliceRandom, index};

use super::TaskContext;
use super::reservoir::Reservoir;
use crate::{Batch, Dataset, StepContext};

/// A reservoir and what is in it.
#[derive(Debug)]
pub(super) struct Memory {
    all: Reservoir,
    /// Rows that a step draws.
    rows: usize,
    /// What was kept of the tasks before this one.
    data: Option<Dataset>,
}

impl Memory {
    pub(super) fn new(size: usize, rows: usize) -> Result<Self> {
        if rows == 0 {
            return Err(Error::invalid("rows", "is to be 1 or more"));
        }
        Ok(Memory { all: Reservoir::new(size)?, rows, data: None })
    }

    /// Before a task: looks up what is kept.
    pub(super) fn recall(&mut self, cx: &TaskContext) -> Result<()> {
        self.data = self.all.of(cx.job.data)?;
        Ok(())
    }

    /// After a task: offers its examples, shuffled.
    pub(super) fn keep(&mut self, cx: &TaskContext) -> Result<()> {
        let examples = cx.job.data.examples().iter().enumerate();
        let mut own: Vec<usize> =
            examples.filter(|(_, e)| e.task == cx.task).map(|(i, _)| i).collect();
        own.shuffle(&mut cx.seed().child("offered").rng());
        self.all.offer(own, cx.seed().child("reservoir"));
        Ok(())
    }

    /// Rows of earlier tasks for a step, each at most once; `None` in the first task.
    pub(super) fn draw(&self, cx: &StepContext) -> Result<Option<Batch>> {
        let Some(data) = &self.data else { return Ok(None) };
        let mut rng = cx.seed().child("memory").rng();
        let rows = index::sample(&mut rng, data.len(), self.rows.min(data.len())).into_vec();
        data.batch(&rows, cx.model().device()).map(Some)
    }

    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.all.state()
    }

    pub(super) fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        self.all.load_state(state)
    }
}
