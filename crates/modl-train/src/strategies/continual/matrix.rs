//! What continual learning is measured by: the accuracy of each task after each task, and the means
//! of Lopez-Paz and Ranzato 2017, *Gradient Episodic Memory*, arXiv 1706.08840.
//!
//! With R[i][j] the accuracy on task j after task i, and b[j] that of the untrained model:
//!
//! ```text
//! ACC        = mean over j of R[T][j]
//! BWT        = mean over j < T of R[T][j] − R[j][j]
//! FWT        = mean over j > 1 of R[j−1][j] − b[j]
//! forgetting = mean over j < T of max over i < T of R[i][j] − R[T][j]
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How BWT and FWT are averaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Convention {
    /// Over the T − 1 tasks that have a part in them, as in the paper.
    #[default]
    Paper,
    /// Over all T, one of which is 0, as the paper's own program does: (T − 1) ⁄ T of the others.
    Reference,
}

/// The accuracy of each task after each task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccuracyMatrix {
    /// The tasks in the order in which they are learned.
    pub tasks: Vec<String>,
    /// What is measured: the objective's first metric.
    pub metric: String,
    /// b: that of the untrained model for each task; nothing where it has no answer yet, as where each
    /// task has a module of its own.
    pub before: Vec<Option<f64>>,
    /// R: a row after each task.
    pub rows: Vec<Vec<Option<f64>>>,
}

impl AccuracyMatrix {
    /// `R[i][j]`, counted from 0, where it was measured.
    pub fn at(&self, i: usize, j: usize) -> Option<f64> {
        self.rows.get(i)?.get(j).copied().flatten()
    }

    /// `acc`, and with two tasks or more `bwt`, `fwt` and `forgetting`, those of them that are defined;
    /// nothing before all tasks are learned.
    pub fn metrics(&self, convention: Convention) -> BTreeMap<&'static str, f64> {
        let tasks = self.tasks.len();
        let mut all = BTreeMap::new();
        if tasks == 0 || self.rows.len() < tasks {
            return all;
        }
        let last = tasks - 1;
        let mean = |of: &dyn Fn(usize) -> Option<f64>, from: usize, to: usize, count: usize| {
            let sum: Option<f64> = (from..to).map(of).sum();
            sum.filter(|_| count > 0).map(|s| s / count as f64)
        };
        let count = match convention {
            Convention::Paper => last,
            Convention::Reference => tasks,
        };
        let acc = mean(&|j| self.at(last, j), 0, tasks, tasks);
        all.extend(acc.map(|v| ("acc", v)));
        if last == 0 {
            return all;
        }
        let backward = |j: usize| Some(self.at(last, j)? - self.at(j, j)?);
        let forward = |j: usize| {
            Some(self.at(j.checked_sub(1)?, j)? - self.before.get(j).copied().flatten()?)
        };
        let lost = |j: usize| {
            let best = (0..last).filter_map(|i| self.at(i, j)).reduce(f64::max)?;
            Some(best - self.at(last, j)?)
        };
        all.extend(mean(&backward, 0, last, count).map(|v| ("bwt", v)));
        all.extend(mean(&forward, 1, tasks, count).map(|v| ("fwt", v)));
        all.extend(mean(&lost, 0, last, last).map(|v| ("forgetting", v)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_means_are_those_computed_by_hand() {
        let matrix = AccuracyMatrix {
            tasks: ["a", "b", "c"].map(str::to_owned).to_vec(),
            metric: "accuracy".into(),
            before: [0.1, 0.2, 0.1].map(Some).to_vec(),
            rows: [[0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.8, 0.5, 0.9]]
                .map(|r| r.map(Some).to_vec())
                .to_vec(),
        };
        let close = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-12, "{found}");
        let paper = matrix.metrics(Convention::Paper);
        close(paper["acc"], 2.2 / 3.0);
        close(paper["bwt"], (-0.1 - 0.3) / 2.0);
        close(paper["fwt"], ((0.3 - 0.2) + (0.2 - 0.1)) / 2.0);
        // The best of the rows before the last: 0.9 for a, 0.8 for b.
        close(paper["forgetting"], (0.1 + 0.3) / 2.0);
        let reference = matrix.metrics(Convention::Reference);
        close(reference["bwt"], -0.4 / 3.0);
        close(reference["fwt"], 0.2 / 3.0);
    }

    #[test]
    fn what_has_no_answer_before_it_is_learned_has_no_forward_transfer() {
        let matrix = AccuracyMatrix {
            tasks: ["a", "b"].map(str::to_owned).to_vec(),
            metric: "accuracy".into(),
            before: vec![None, None],
            rows: vec![vec![Some(0.9), None], vec![Some(0.9), Some(0.7)]],
        };
        let found = Vec::from_iter(matrix.metrics(Convention::Paper));
        assert_eq!(found, [("acc", 0.8), ("bwt", 0.0), ("forgetting", 0.0)]);
    }

    #[test]
    fn there_are_no_means_before_all_is_learned_and_no_differences_of_one_task() {
        let mut matrix = AccuracyMatrix { tasks: vec!["a".into()], ..Default::default() };
        assert!(matrix.metrics(Convention::Paper).is_empty());
        matrix.rows.push(vec![Some(0.5)]);
        assert_eq!(Vec::from_iter(matrix.metrics(Convention::Paper)), [("acc", 0.5)]);
    }
}
