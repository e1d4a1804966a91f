//! Which task a batch is of, where nobody says it (Wortsman et al. 2020, *Supermasks in Superposition*,
//! arXiv 2006.14769): the module that would lower the entropy of what is said most
//! ([`modl_compute::sparse::infer_task_by`]), and what the model says of the batch with that module.

use modl_compute::sparse::{TaskSearch, infer_task_by};
use modl_core::{Context, Error, Result, checkpoint};
use serde::{Deserialize, Serialize};

use super::Job;
use crate::{Batch, Dataset, Event, evaluate};

/// What came of all tasks' held-out examples without their labels, a batch at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskInference {
    /// How the task of a batch was searched for.
    pub search: TaskSearch,
    /// Rows of a batch; the last one of a task may have fewer.
    pub rows: usize,
    /// What is measured beside the task: the objective's first metric.
    pub metric: String,
    /// The tasks in the order in which they were learned.
    pub tasks: Vec<InferredTask>,
}

/// What came of a task's held-out examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InferredTask {
    /// The task.
    pub task: String,
    /// The share of the rows that were sent to the task's own module.
    pub task_id: f64,
    /// The metric of what was said by the modules that the rows were sent to.
    pub score: Option<f64>,
}

impl TaskInference {
    /// The mean share over tasks.
    pub fn task_id(&self) -> f64 {
        self.tasks.iter().map(|t| t.task_id).sum::<f64>() / self.tasks.len() as f64
    }

    /// The mean of the metric over tasks, where each has one.
    pub fn score(&self) -> Option<f64> {
        let sum: Option<f64> = self.tasks.iter().map(|t| t.score).sum();
        sum.map(|sum| sum / self.tasks.len() as f64)
    }
}

/// The file beside the accuracy matrix.
const FILE: &str = "task_inference.json";

/// Measures, writes down and tells.
pub(super) fn measure(
    job: &mut Job,
    held_out: &[(String, Dataset)],
    search: TaskSearch,
    rows: usize,
) -> Result<()> {
    if job.objective.classes().is_empty() || job.objective.asks_task() {
        return Err(Error::unsupported(
            "telling tasks apart by what is said",
            "it takes a choice among classes by one head for all tasks, or by the backbone's own outputs",
        ));
    }
    if held_out.is_empty() {
        return Ok(());
    }
    let found = job.with_other_routing(|job| {
        let metric = job.objective.metrics().first().map(|m| m.key.to_owned());
        let of = |(task, test): &(String, Dataset)| of_task(job, task, test, search, rows);
        let tasks = held_out.iter().map(of).collect::<Result<_>>()?;
        Ok(TaskInference { search, rows, metric: metric.unwrap_or_default(), tasks })
    })?;
    let path = job.folder.join(FILE);
    let text = serde_json::to_vec_pretty(&found).map_err(|e| Error::file(&path, e))?;
    checkpoint::write_whole(&path, &text)?;
    let name = format!("{}/without task labels", job.phase.name);
    let score = found.score().map(|score| (found.metric.clone(), score));
    let metrics = [("task_id".to_owned(), found.task_id())].into_iter().chain(score).collect();
    job.sink.event(&Event::Evaluated { name, step: None, metrics })
}

fn of_task(
    job: &mut Job,
    task: &str,
    test: &Dataset,
    search: TaskSearch,
    rows: usize,
) -> Result<InferredTask> {
    let index: Vec<usize> = (0..test.len()).collect();
    let (mut said, mut own) = (Vec::new(), 0);
    for index in index.chunks(rows) {
        let (objective, batch) = (job.objective, test.batch(index, job.model.device())?);
        let cx = batch.describe_without_tasks(Context::eval())?;
        let module =
            infer_task_by(job.model, &|model| objective.predict(model, &batch, &cx), search)?;
        own += if module == task { index.len() } else { 0 };
        let part = test.rows(index)?;
        said.extend(evaluate(job.model, objective, &part, rows, &Batch::describe_without_tasks)?);
    }
    let scores = job.objective.scores(&said.iter().collect::<Vec<_>>());
    let first = job.objective.metrics().first();
    let score = first.and_then(|metric| scores.get(metric.key)).copied();
    Ok(InferredTask { task: task.to_owned(), task_id: own as f64 / test.len() as f64, score })
}
