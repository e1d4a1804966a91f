//! Many tasks of one: permuted, rotated, divided by class.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use modl_core::{Error, Result, Seed};

use crate::dense::DenseRows;
use crate::rearranged::Rearranged;
use crate::recipe::stream::{permutation, rotation};
use crate::{Dataset, Example};

impl Dataset {
    /// The tasks in the order in which they appear.
    pub fn task_order(&self) -> Vec<&str> {
        let mut tasks: Vec<&str> = Vec::new();
        for e in self.examples() {
            // Examples of a task stand together as a rule.
            if tasks.last() != Some(&e.task.as_str()) && !tasks.contains(&e.task.as_str()) {
                tasks.push(&e.task);
            }
        }
        tasks
    }

    /// `tasks` tasks of all examples: `permutation-0` as they are, and `permutation-1`, … with the
    /// numbers of each dense input in an order that is drawn from `seed` for the task.
    ///
    /// # Errors
    /// Where there is no dense input.
    pub fn permuted(&self, tasks: usize, seed: Seed) -> Result<Dataset> {
        let seed = seed.child("permutation");
        self.views((0..tasks).map(permutation), |task, rows| match task {
            0 => Ok(None),
            _ => Rearranged::permutation(rows.width(), seed.nth(task as u64)).map(Some),
        })
    }

    /// A task for each angle: all examples, whose dense inputs are images `[height, width]`, turned
    /// by so many degrees counter-clockwise (`rotation-30`), bilinear and with 0 beyond their edges.
    ///
    /// # Errors
    /// Where there is no dense input, or one is no image.
    pub fn rotated(&self, degrees: &[f64]) -> Result<Dataset> {
        self.views(degrees.iter().map(|d| rotation(*d)), |task, rows| {
            let angle = degrees.get(task).copied().unwrap_or_default();
            Rearranged::rotation(&rows.shape(), angle).map(Some)
        })
    }

    /// The examples in these tasks, one after the other in this order; `of` says by its number to
    /// which an example belongs, and examples that belong to none are left out.
    ///
    /// # Errors
    /// Where none belongs to any.
    pub fn divided(
        &self,
        tasks: &[String],
        of: impl Fn(&Example) -> Option<usize>,
    ) -> Result<Dataset> {
        let numbers: Vec<Option<usize>> = self.examples().iter().map(of).collect();
        let own = |task: usize| {
            let all = numbers.iter().enumerate();
            all.filter(move |(_, n)| **n == Some(task)).map(|(i, _)| i)
        };
        let (mut index, mut names) = (Vec::new(), Vec::new());
        for (number, task) in tasks.iter().enumerate() {
            index.extend(own(number));
            names.resize(index.len(), task.clone());
        }
        Ok(self.rows(&index)?.named(names))
    }

    /// The same examples with the numbers of their dense inputs as (x − mean) ⁄ deviation; bytes are
    /// from 0 to 1 before.
    pub fn normalized(mut self, mean: f64, deviation: f64) -> Self {
        let inputs = std::mem::take(&mut self.inputs).into_iter();
        self.inputs = inputs.map(|(n, rows)| (n, rows.normalized(mean, deviation))).collect();
        Dataset { fingerprint: OnceLock::new(), ..self }
    }

    /// All examples once for each task, which sees their dense inputs as `view` says.
    ///
    /// # Errors
    /// Where there are none to be seen.
    pub(crate) fn views(
        &self,
        tasks: impl Iterator<Item = String>,
        view: impl Fn(usize, &DenseRows) -> Result<Option<Rearranged>>,
    ) -> Result<Dataset> {
        if self.inputs.is_empty() {
            let advice = "make it of images or other rows of numbers";
            return Err(Error::unsupported("this stream of texts", advice));
        }
        let tasks: Vec<String> = tasks.collect();
        let n = self.len();
        let mut inputs = BTreeMap::new();
        for (name, rows) in &self.inputs {
            let views = (0..tasks.len()).map(|task| view(task, rows)).collect::<Result<_>>()?;
            inputs.insert(name.clone(), rows.seen(views)?);
        }
        let index: Vec<usize> = (0..n * tasks.len()).map(|i| i % n).collect();
        let of = |i: usize| self.examples.get(i).cloned();
        let all = Dataset {
            examples: index.iter().filter_map(|i| of(*i)).collect(),
            inputs,
            features: self.feature_rows(&index)?,
            origins: self.origins.clone(),
            pad: self.pad,
            ..Dataset::default()
        };
        let names = tasks.iter().flat_map(|task| std::iter::repeat_n(task.clone(), n));
        all.named(names.collect()).checked()
    }

    /// The same examples with other tasks.
    pub(crate) fn named(mut self, tasks: Vec<String>) -> Self {
        self.fingerprint = OnceLock::new();
        for (e, task) in self.examples.iter_mut().zip(tasks) {
            e.task = task;
        }
        self
    }
}
