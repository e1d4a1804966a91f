//! Tasks and their rows, drawn for a step.

use modl_core::{Device, Error, Result, Seed};
use rand::seq::{SliceRandom, index};

use crate::{Batch, Dataset};

/// The tasks that episodes are drawn from.
#[derive(Debug)]
pub(super) struct Episodes {
    tasks: Vec<(String, Dataset)>,
    support: usize,
    query: usize,
}

/// Rows of one task: some to learn from, others to be tested on.
#[derive(Debug)]
pub(super) struct Episode {
    pub(super) support: Batch,
    pub(super) query: Batch,
}

impl Episodes {
    /// # Errors
    /// Where a task has too few examples.
    pub(super) fn new(data: &Dataset, support: usize, query: usize) -> Result<Self> {
        for (key, n) in [("support", support), ("query", query)] {
            if n == 0 {
                return Err(Error::invalid(key, "is to be 1 row or more"));
            }
        }
        let mut tasks = Vec::new();
        for (task, n) in data.tasks() {
            if n < support + query {
                let wanted = format!("{support} to learn from and {query} to be tested on");
                let problem = format!("has {n} examples, an episode wants {wanted}");
                return Err(Error::invalid(format!("task `{task}`"), problem));
            }
            tasks.push((task.to_owned(), data.of_task(task)?));
        }
        Ok(Episodes { tasks, support, query })
    }

    /// An episode each of `count` different tasks, or of all where there are fewer.
    pub(super) fn draw(&self, count: usize, seed: Seed, device: Device) -> Result<Vec<Episode>> {
        let count = count.min(self.tasks.len());
        let chosen = index::sample(&mut seed.child("tasks").rng(), self.tasks.len(), count);
        let drawn = chosen.into_iter().filter_map(|t| self.tasks.get(t));
        drawn.map(|(task, data)| self.of(data, seed.child(task), device)).collect()
    }

    fn of(&self, data: &Dataset, seed: Seed, device: Device) -> Result<Episode> {
        let mut rows: Vec<usize> = (0..data.len()).collect();
        let (drawn, _) = rows.partial_shuffle(&mut seed.rng(), self.support + self.query);
        let (support, query) = drawn.split_at(self.support.min(drawn.len()));
        Ok(Episode { support: data.batch(support, device)?, query: data.batch(query, device)? })
    }
}
