//! A step's loss by task, and with factors of the tasks' rows.

use std::collections::BTreeMap;

use modl_core::{Result, Tensor};

use crate::StepLoss;
use crate::passes::Passed;

impl StepLoss {
    /// The mean loss of each task's rows.
    ///
    /// # Errors
    /// Where losses cannot be read.
    pub fn of_tasks(&self) -> Result<BTreeMap<String, f64>> {
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for p in &self.passed {
            let counts = p.counts_of_rows()?;
            for ((task, loss), counts) in p.tasks.iter().zip(p.known.to_vec::<f64>()?).zip(counts) {
                let (sum, count) = sums.entry(task.clone()).or_default();
                *sum += counts * loss;
                *count += counts;
            }
        }
        Ok(sums.into_iter().map(|(task, (sum, count))| (task, sum / count)).collect())
    }

    /// Multiplies the losses of each task's rows by a factor in [`StepLoss::total`]. What is added to
    /// the objective's loss stays. A task without a factor has 1.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn weigh(&mut self, factors: &BTreeMap<String, f64>) -> Result<()> {
        for p in &self.passed {
            let of = |(task, counts): (&String, f64)| {
                (factors.get(task).copied().unwrap_or(1.0) - 1.0) * counts
            };
            let more: Vec<f64> = p.tasks.iter().zip(p.counts_of_rows()?).map(of).collect();
            let more = Tensor::from_slice(&more, &p.losses.size(), p.losses.device())?;
            let change = p.losses.mul(&more.to_kind(p.losses.kind())?)?.sum()?;
            self.total = self.total.add(&change.to_kind(self.total.kind())?)?;
        }
        Ok(())
    }
}

impl Passed {
    /// What each row counts in the step's loss.
    fn counts_of_rows(&self) -> Result<Vec<f64>> {
        match &self.chosen {
            Some(chosen) => {
                Ok(chosen.to_vec::<f64>()?.into_iter().map(|c| c * self.counts).collect())
            }
            None => Ok(vec![self.counts; self.tasks.len()]),
        }
    }
}
