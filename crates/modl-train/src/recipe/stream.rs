//! Streams: many tasks of one, for continual and multitask learning.

use modl_core::{Error, Result, Seed};
use serde::{Deserialize, Serialize};

use crate::Dataset;

/// How tasks are made of one. What is held out stays held out in all of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Stream {
    /// `permutation-0` is the task as it is; each further task has the numbers of all examples in
    /// another order, drawn once for the task (Goodfellow et al. 2013, arXiv 1312.6211).
    Permuted {
        /// How many, the first one included.
        tasks: usize,
        /// The seed of the permutations; it does not follow the recipe's.
        #[serde(default)]
        seed: u64,
    },
    /// The classes in their order, so many in each task, which is called by them: `0-1`, `2-3`
    /// (Zenke et al. 2017, arXiv 1703.04200).
    Split {
        /// The classes of a task.
        classes_per_task: usize,
    },
    /// Images turned by so many degrees counter-clockwise, `rotation-0`, `rotation-30`, with
    /// bilinear interpolation and 0 beyond their edges (Lopez-Paz and Ranzato 2017, arXiv
    /// 1706.08840).
    Rotated {
        /// The degrees of each task.
        degrees: Vec<f64>,
    },
}

impl Stream {
    pub(super) fn check(&self) -> Result<(), String> {
        match self {
            Stream::Permuted { tasks: 0, .. } => Err("`tasks` is to be 1 at least".into()),
            Stream::Split { classes_per_task: 0 } => {
                Err("`classes_per_task` is to be 1 at least".into())
            }
            Stream::Rotated { degrees } if degrees.is_empty() => {
                Err("`degrees` is empty; give it the angles of the tasks: [0, 30, 60]".into())
            }
            Stream::Rotated { degrees }
                if degrees
                    .iter()
                    .enumerate()
                    .any(|(i, d)| degrees.iter().take(i).any(|e| e == d)) =>
            {
                Err("`degrees` has an angle twice".into())
            }
            _ => Ok(()),
        }
    }

    /// The stream of the examples of one task.
    pub(super) fn of(&self, data: &Dataset, classes: &[String]) -> Result<Dataset> {
        match self {
            Stream::Permuted { tasks, seed } => data.permuted(*tasks, Seed(*seed)),
            Stream::Rotated { degrees } => data.rotated(degrees),
            Stream::Split { .. } => {
                let tasks = self.classes(classes)?;
                let names: Vec<String> = tasks.iter().map(|(name, _)| name.clone()).collect();
                data.divided(&names, |e| {
                    tasks.iter().position(|(_, own)| own.contains(&(e.target as usize)))
                })
            }
        }
    }

    /// Each task with its classes by their indices.
    ///
    /// # Errors
    /// Where classes cannot be divided so.
    pub(super) fn classes(&self, classes: &[String]) -> Result<Vec<(String, Vec<usize>)>> {
        let all: Vec<usize> = (0..classes.len()).collect();
        let same = |name: String| (name, all.clone());
        match self {
            Stream::Permuted { tasks, .. } => Ok((0..*tasks).map(permutation).map(same).collect()),
            Stream::Rotated { degrees } => Ok(degrees.iter().map(|d| same(rotation(*d))).collect()),
            Stream::Split { classes_per_task: n } => {
                if *n == 0 || classes.is_empty() || !classes.len().is_multiple_of(*n) {
                    let problem =
                        format!("cannot divide {} classes into tasks of {n}", classes.len());
                    return Err(Error::invalid("data.stream", problem));
                }
                let name = |own: &[usize]| {
                    let names = own.iter().filter_map(|c| classes.get(*c).map(String::as_str));
                    (names.collect::<Vec<_>>().join("-"), own.to_vec())
                };
                Ok(all.chunks(*n).map(name).collect())
            }
        }
    }
}

pub(crate) fn permutation(task: usize) -> String {
    format!("permutation-{task}")
}

pub(crate) fn rotation(degrees: f64) -> String {
    format!("rotation-{degrees}")
}
