//! One learned number for each task, changed by Adam without decay.

use std::collections::BTreeMap;

use modl_core::{Device, Error, Result, Tensor};

use crate::Optimizer;
use crate::optim::{AdamW, AdamWConfig};

/// The numbers, by task. One that a step does not name stays as it is, with its moments.
#[derive(Debug)]
pub(super) struct Learned {
    values: BTreeMap<String, f64>,
    optimizer: AdamW,
}

const VALUE: &str = "value.";
const ADAM: &str = "adam.";

impl Learned {
    /// `start` for each of these tasks.
    pub(super) fn new<'t>(tasks: impl Iterator<Item = &'t str>, start: f64) -> Result<Self> {
        let optimizer = AdamW::new(AdamWConfig::default())?;
        Ok(Learned { values: tasks.map(|t| (t.to_owned(), start)).collect(), optimizer })
    }

    /// A task's number.
    pub(super) fn get(&self, task: &str) -> Result<f64> {
        let known = || Error::unknown("task", task, self.values.keys());
        self.values.get(task).copied().ok_or_else(known)
    }

    /// Puts another number in its place; the moments stay.
    pub(super) fn set(&mut self, task: &str, value: f64) {
        self.values.insert(task.to_owned(), value);
    }

    /// A step down a task's slope.
    pub(super) fn step(&mut self, task: &str, slope: f64, lr: f64) -> Result<()> {
        let value = number(self.get(task)?)?;
        self.optimizer.update(task, value.clone(), &number(slope)?, lr)?;
        self.set(task, value.item()?);
        Ok(())
    }

    /// The numbers and their moments.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let values = self.values.iter().map(|(t, v)| Ok((format!("{VALUE}{t}"), number(*v)?)));
        let moments = self.optimizer.state()?.into_iter();
        values.chain(moments.map(|(n, t)| Ok((format!("{ADAM}{n}"), t)))).collect()
    }

    /// Takes up a saved state; what is none of it comes back.
    pub(super) fn load_state(
        &mut self,
        state: Vec<(String, Tensor)>,
    ) -> Result<Vec<(String, Tensor)>> {
        let (mut moments, mut others) = (Vec::new(), Vec::new());
        for (name, t) in state {
            if let Some(task) = name.strip_prefix(VALUE) {
                self.get(task)?;
                self.set(task, t.item()?);
            } else if let Some(name) = name.strip_prefix(ADAM) {
                moments.push((name.to_owned(), t.to_device(Device::Cpu)?));
            } else {
                others.push((name, t));
            }
        }
        let values = self.values.iter().map(|(t, v)| Ok((t.clone(), number(*v)?)));
        self.optimizer.load_state(&values.collect::<Result<Vec<_>>>()?, moments)?;
        Ok(others)
    }
}

/// A number to be saved or learned, `[1]` f64.
pub(super) fn number(value: f64) -> Result<Tensor> {
    Tensor::from_slice(&[value], &[1], Device::Cpu)
}
