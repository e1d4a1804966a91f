//! A step's loss by task, and with other weights of the tasks than their numbers of rows.

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

    /// Puts Σ w_t L_t ⁄ T in the place of the mean over rows in [`StepLoss::total`], where L_t is the
    /// mean loss of a task's rows and T the number of tasks that have any. What is added to the
    /// objective's loss stays. A task without a weight has 1.
    ///
    /// # Errors
    /// Where libtorch refuses it.
    pub fn weigh(&mut self, weights: &BTreeMap<String, f64>) -> Result<()> {
        let mut shares: BTreeMap<&str, f64> = BTreeMap::new();
        for p in &self.passed {
            for (task, counts) in p.tasks.iter().zip(p.counts_of_rows()?) {
                *shares.entry(task).or_default() += counts;
            }
        }
        let tasks = shares.len() as f64;
        let mut weighted: Option<Tensor> = None;
        for p in &self.passed {
            let of_row = |(task, counts): (&String, f64)| {
                let share = shares.get(task.as_str()).copied().unwrap_or(1.0);
                weights.get(task).copied().unwrap_or(1.0) * counts / (tasks * share)
            };
            let factors: Vec<f64> = p.tasks.iter().zip(p.counts_of_rows()?).map(of_row).collect();
            let factors = Tensor::from_slice(&factors, &p.losses.size(), p.losses.device())?;
            let own = p.losses.mul(&factors.to_kind(p.losses.kind())?)?.sum()?;
            weighted = Some(match weighted {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        let Some(weighted) = weighted else { return Ok(()) };
        let change = weighted.sub(&self.loss)?;
        self.total = self.total.add(&change.to_kind(self.total.kind())?)?;
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
