//! Growth: a task is served by a module that is there, or where none serves it by one of its own.
//!
//! Before a task some of its examples are shown to each module alone. The one with the least loss serves
//! the task where that loss is at most (1 + `tolerance`) times what the module had, at the end of its
//! training, on the task that it was made for; nothing is trained then. Otherwise a module of the same
//! method is attached under the task's name and trained alone. Tasks with one module share it, so that
//! their number grows with what is new and not with what comes; earlier outputs stay bit for bit, as
//! in [`super::ModulePerTask`].
//!
//! The recipe has the first task's module under the task's name and the router `fixed`, whose table is
//! kept with the results. Heads are common: they are trained with the first task.
//!
//! Cf. Ostapenko et al. 2021, *Continual Learning via Local Module Composition*, arXiv 2111.07736, where
//! a module is added where those that are there call an input an outlier. Survey §6.2.

use std::collections::BTreeMap;

use modl_core::{Context, Device, Error, Modular, Result, Tensor, no_grad};
use rand::seq::index;
use serde::Deserialize;
use serde_json::json;

use super::module_per_task::{attach_like_before, of_own};
use super::{Continual, Learner, TaskContext};
use crate::{StepRule, TrainConfig};

/// Settings of growth.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Growth {
    /// By how much of its own loss a module may be worse on another task and still serve it, 0 or more;
    /// default 0.25.
    pub tolerance: f64,
    /// So many examples, drawn by seed, are shown; default 128.
    pub examples: usize,
}

impl Default for Growth {
    fn default() -> Self {
        Growth { tolerance: 0.25, examples: 128 }
    }
}

impl Continual for Growth {
    fn kind(&self) -> &'static str {
        "growth"
    }

    fn trains(&self) -> Vec<String> {
        ["modules.{task}.*", "heads.*"].map(str::to_owned).to_vec()
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return Err(Error::invalid("tolerance", "is to be 0 or more"));
        }
        if self.examples == 0 {
            return Err(Error::invalid("examples", "is to be 1 or more"));
        }
        Ok(Box::new(Growing {
            config: self.clone(),
            module_of: Vec::new(),
            loss_of: Vec::new(),
            begun: Vec::new(),
        }))
    }
}

#[derive(Debug)]
struct Growing {
    config: Growth,
    /// For each task by its number that of the task whose module serves it.
    module_of: Vec<i64>,
    /// For each of them what its module's loss is on the task that it was made for.
    loss_of: Vec<f64>,
    /// The tasks that have begun.
    begun: Vec<String>,
}

impl Growing {
    /// Sends each task that has begun to its module.
    fn route(&self, cx: &mut TaskContext) -> Result<()> {
        let named = |i: &i64| usize::try_from(*i).ok().and_then(|i| cx.tasks.get(i));
        let pairs = cx.tasks.iter().zip(&self.module_of);
        let table: BTreeMap<&String, &String> =
            pairs.filter_map(|(task, module)| Some((task, named(module)?))).collect();
        cx.job.route(json!({ "type": "fixed", "table": table, "skip_absent": true }))
    }

    /// The mean loss on some examples of the task with one module alone.
    fn loss(&self, cx: &mut TaskContext, module: &str) -> Result<f64> {
        cx.job.route(json!({ "type": "fixed", "modules": [module], "skip_absent": true }))?;
        let count = self.config.examples.min(cx.data.len());
        let mut rng = cx.seed().child("shown").rng();
        let rows = index::sample(&mut rng, cx.data.len(), count).into_vec();
        let mut sum = 0.0;
        for rows in rows.chunks(64) {
            let batch = cx.data.batch(rows, cx.job.model.device())?;
            let described = batch.describe(Context::eval())?;
            let (model, objective) = (&*cx.job.model, cx.job.objective);
            let mean = no_grad(|| objective.loss(model, &batch, &described)?.item())?;
            sum += mean * rows.len() as f64;
        }
        Ok(sum / count as f64)
    }

    /// The module that serves the task, by the number of the task that it was made for, with its loss
    /// there.
    fn serving(&self, cx: &mut TaskContext) -> Result<Option<(i64, f64)>> {
        let mut best: Option<(f64, i64, f64)> = None;
        let made: Vec<(i64, f64)> =
            self.module_of.iter().copied().zip(self.loss_of.iter().copied()).collect();
        for (n, (module, own)) in made.into_iter().enumerate() {
            // Each module once, where it was made.
            if module != n as i64 {
                continue;
            }
            let Some(name) = cx.tasks.get(n).cloned() else { continue };
            let found = self.loss(cx, &name)?;
            if best.is_none_or(|(least, ..)| found < least) {
                best = Some((found, module, own));
            }
        }
        let serves = best.filter(|(found, _, own)| *found <= (1.0 + self.config.tolerance) * own);
        Ok(serves.map(|(_, module, own)| (module, own)))
    }

    fn is_new(&self, task: usize) -> bool {
        self.module_of.get(task) == Some(&(task as i64))
    }
}

impl StepRule for Growing {
    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let shape = [self.module_of.len() as i64];
        let modules = Tensor::from_slice(&self.module_of, &shape, Device::Cpu)?;
        let losses = Tensor::from_slice(&self.loss_of, &[self.loss_of.len() as i64], Device::Cpu)?;
        Ok(vec![("module_of".to_owned(), modules), ("loss_of".to_owned(), losses)])
    }

    fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        for (name, t) in state {
            match name.as_str() {
                "module_of" => self.module_of = t.to_vec()?,
                "loss_of" => self.loss_of = t.to_vec()?,
                _ => {
                    let problem = format!("holds `{name}`, which is not of `growth`");
                    return Err(Error::invalid("saved state", problem));
                }
            }
        }
        Ok(())
    }
}

impl Learner for Growing {
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        let router = cx.job.recipe.router.as_ref().and_then(|r| r.config.get("type"));
        if router.is_none_or(|kind| kind != "fixed") {
            let problem = "`growth` sends tasks to modules by a table; give the recipe `fixed`";
            return Err(Error::invalid("router", problem));
        }
        self.module_of.truncate(cx.index);
        self.loss_of.truncate(cx.index);
        let serves = self.serving(cx)?;
        if serves.is_none() {
            attach_like_before(cx)?;
        }
        let (module, loss) = serves.unwrap_or((cx.index as i64, f64::NAN));
        self.module_of.push(module);
        self.loss_of.push(loss);
        self.begun = cx.tasks.iter().take(cx.index + 1).cloned().collect();
        self.route(cx)
    }

    fn answers(&self, _: &Modular, task: &str) -> bool {
        self.begun.iter().any(|t| t == task)
    }

    fn config(&self, cx: &TaskContext) -> Result<Option<TrainConfig>> {
        Ok(self.is_new(cx.index).then(|| of_own(cx)))
    }

    fn end(&mut self, cx: &mut TaskContext) -> Result<()> {
        if !self.is_new(cx.index) {
            return Ok(());
        }
        let loss = self.loss(cx, cx.task)?;
        if let Some(slot) = self.loss_of.get_mut(cx.index) {
            *slot = loss;
        }
        self.route(cx)
    }
}
