//! A module for each task: what a task learns is its own, and no later task touches it.
//!
//! The recipe has the first task's module under the task's name. Before each further task a module of
//! the same method is attached at the same sites under its name, `pack_net` with what earlier tasks
//! have left free ([`modl_compute::sparse::pack_next`]). A router that goes by task (`fixed`) picks it. Of
//! what earlier tasks use, nothing is trained again, so their outputs stay what they were bit for
//! bit: heads of single tasks are trained with their task, a head that is common with the first.
//!
//! Any method will do: `sup_sup`, `piggyback` and `edge_popup` make masks on frozen weights, `lora` and
//! `bottleneck` small additions, `full` copies of whole layers.
//!
//! With `infer` all tasks are asked about once more in the end, without their labels (`task_inference.rs`).
//!
//! Mallya and Lazebnik 2018, *PackNet*, arXiv 1711.05769; Mallya et al. 2018, *Piggyback*,
//! arXiv 1801.06519; Wortsman et al. 2020, *Supermasks in Superposition*, arXiv 2006.14769. Survey
//! §6.2.

use modl_compute::sparse::TaskSearch;
use modl_core::{Error, Modular, Result, Select};
use serde::Deserialize;

use super::{Continual, Job, Learner, TaskContext, task_inference};
use crate::{Dataset, StepRule, TrainConfig};

/// Parameters of a task's own.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModulePerTask {
    /// How the task of a batch is found where all tasks are asked about without their labels, after the
    /// last one; they are not where it is `None`.
    pub infer: Option<TaskSearch>,
    /// Rows of such a batch; default 128.
    pub rows: usize,
}

impl Default for ModulePerTask {
    fn default() -> Self {
        ModulePerTask { infer: None, rows: 128 }
    }
}

impl Continual for ModulePerTask {
    fn kind(&self) -> &'static str {
        "module_per_task"
    }

    fn trains(&self) -> Vec<String> {
        ["modules.{task}.*", "heads.*"].map(str::to_owned).to_vec()
    }

    fn start(&self) -> Result<Box<dyn Learner>> {
        if self.rows == 0 {
            return Err(Error::invalid("rows", "are to be 1 or more"));
        }
        Ok(Box::new(Isolated(self.clone())))
    }
}

#[derive(Debug)]
struct Isolated(ModulePerTask);

impl StepRule for Isolated {}

impl Learner for Isolated {
    fn begin(&mut self, cx: &mut TaskContext) -> Result<()> {
        attach_like_before(cx)
    }

    fn answers(&self, model: &Modular, task: &str) -> bool {
        model.modules().contains(&task)
    }

    fn config(&self, cx: &TaskContext) -> Result<Option<TrainConfig>> {
        Ok(Some(of_own(cx)))
    }

    fn conclude(&self, job: &mut Job, held_out: &[(String, Dataset)]) -> Result<()> {
        match self.0.infer {
            Some(search) => task_inference::measure(job, held_out, search, self.0.rows),
            None => Ok(()),
        }
    }
}

/// Attaches a module of the task's name where there is none, like that of the task before.
pub(super) fn attach_like_before(cx: &mut TaskContext) -> Result<()> {
    let model = &mut *cx.job.model;
    if model.modules().contains(&cx.task) {
        return Ok(());
    }
    let mut before = cx.tasks.iter().take(cx.index).rev();
    let previous = before.find(|t| model.modules().contains(&t.as_str())).ok_or_else(|| {
        let advice = format!("call the recipe's module [modules.\"{}\"]", cx.task);
        Error::invalid("the first task", format!("has no module of its name; {advice}"))
    })?;
    let (config, targets) = model.recipe(previous)?;
    if config.kind() == "pack_net" {
        return modl_compute::sparse::pack_next(model, previous, cx.task);
    }
    let targets = targets.clone();
    let config = cx.job.methods.registry.modules.parse(&model.configuration(previous)?)?;
    model.attach(cx.task, config, &targets)
}

/// The phase's settings with what it takes but for all that another task uses.
pub(super) fn of_own(cx: &TaskContext) -> TrainConfig {
    let earlier = cx.tasks.get(..cx.index).unwrap_or_default();
    let of_head = |task: &str| Select::new(format!("heads.*.{task}.*"));
    let others: Vec<Select> =
        cx.tasks.iter().filter(|t| *t != cx.task).map(|t| of_head(t)).collect();
    let own_head = of_head(cx.task);
    let used = |name: &str| {
        let module = earlier.iter().any(|t| name.starts_with(&format!("modules.{t}.")));
        // Of the first task's: what all have in common.
        let common = cx.index > 0 && !own_head.matches(name) && !name.starts_with("modules.");
        module || common || others.iter().any(|head| head.matches(name))
    };
    let mut config = cx.config();
    config.train = cx.to_train().names().filter(|n| !used(n)).map(str::to_owned).collect();
    config
}
