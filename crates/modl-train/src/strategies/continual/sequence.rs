//! One task after the other, over stops and restarts.
//!
//! ```text
//! PHASE/accuracy_matrix.json   what was measured after each task
//! PHASE/task_inference.json    and in the end without the tasks' labels, where that is asked for
//! PHASE/01-TASK/state.json …   the state of a task's training while it runs
//! PHASE/01-TASK/done.safetensors   what is learned and kept after it; written last
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use modl_core::checkpoint;
use modl_core::{Error, Result, ResultExt, Seed, Select, Tensors};

use super::matrix::{AccuracyMatrix, Convention};
use super::{Continual, Job, Learner, Strategy};
use crate::{Batch, Dataset, Event, TrainConfig, evaluate, outcome};

/// A continual method as a strategy.
#[derive(Debug)]
pub(super) struct Sequence<C>(pub(super) C);

/// What a learner works with before and after a task.
#[derive(Debug)]
pub struct TaskContext<'a, 'j> {
    /// The model, the objective, all tasks' data.
    pub job: &'a mut Job<'j>,
    /// The task.
    pub task: &'a str,
    /// All tasks in order; those before this one are learned.
    pub tasks: &'a [String],
    /// The task's number, from 0.
    pub index: usize,
    /// The task's examples for training.
    pub data: &'a Dataset,
    seed: Seed,
}

impl TaskContext<'_, '_> {
    /// Where random numbers of this task come from, apart from those of its training.
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// The phase's settings for this task.
    pub fn config(&self) -> TrainConfig {
        self.job.phase.train.clone().naming("{task}", self.task)
    }

    /// What the phase's settings take, by name.
    pub fn to_train(&self) -> Tensors {
        let select = Select::any(self.config().train);
        let model = &*self.job.model;
        let own = model.params().iter().map(|(n, p)| (n.to_owned(), p));
        let base = model.backbone().params().iter().map(|(n, p)| (format!("base.{n}"), p));
        let taken = own.chain(base).filter(|(n, p)| !p.is_buffer() && select.matches(n));
        taken.map(|(n, p)| (n, p.tensor().clone())).collect()
    }

    /// What has been trained, by name.
    pub fn trained(&self) -> Tensors {
        self.job.model.trainable().into_iter().collect()
    }
}

impl<C: Continual> Strategy for Sequence<C> {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn trains(&self) -> Vec<String> {
        self.0.trains()
    }

    fn run(&self, job: &mut Job) -> Result<()> {
        let tasks = order(job);
        let mut learner = self.0.start()?;
        let mut matrix = Measured::open(job, learner.as_ref(), &tasks)?;
        for (index, task) in tasks.iter().enumerate() {
            let part = part(index, task);
            let done = job.folder.join(&part).join(DONE);
            if done.exists() {
                let beside = outcome::load(&done, job.model, job.methods)?;
                job.router = beside.router;
                learner.load_state(beside.kept)?;
                continue;
            }
            matrix.forget_after(index);
            let data = job.data.of_task(task)?;
            let seed = job.seed().child(&part).child("task");
            let mut cx = TaskContext { job, task, tasks: &tasks, index, data: &data, seed };
            learner.begin(&mut cx).at(task)?;
            if let Some(config) = learner.config(&cx)? {
                cx.job.train_by(learner.as_mut(), Some(&part), config, &data)?;
            }
            learner.end(&mut cx).at(task)?;
            matrix.measure(job, learner.as_ref(), index)?;
            finish(job, learner.as_ref(), &done)?;
        }
        learner.conclude(job, &matrix.held_out())?;
        matrix.tell(job)
    }
}

const DONE: &str = "done.safetensors";
const MATRIX: &str = "accuracy_matrix.json";

/// The tasks in the order in which they are learned.
fn order(job: &Job) -> Vec<String> {
    let all = || job.data.task_order().into_iter().map(str::to_owned).collect();
    job.phase.tasks.clone().unwrap_or_else(all)
}

/// The folder of a task, made of letters that any file system has.
fn part(index: usize, task: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' };
    format!("{:02}-{}", index + 1, task.chars().map(plain).collect::<String>())
}

/// Writes down what is learned; then what was there to go on within the task is not needed.
fn finish(job: &Job, learner: &dyn Learner, done: &Path) -> Result<()> {
    outcome::save(done, job.model, job.router.as_ref(), learner.state()?)?;
    let within = done.parent().map(fs::read_dir);
    for entry in within.into_iter().flatten().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("state") {
            // One that cannot be removed does no harm: the task is done.
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// The accuracy matrix as it grows; none where nothing is held out.
struct Measured {
    matrix: AccuracyMatrix,
    path: PathBuf,
    test: Vec<Option<Dataset>>,
}

impl Measured {
    fn open(job: &mut Job, learner: &dyn Learner, tasks: &[String]) -> Result<Self> {
        let path = job.folder.join(MATRIX);
        let held_out = |t: &String| job.test.map(|all| all.of_task(t)).transpose();
        let test: Vec<Option<Dataset>> = tasks.iter().map(held_out).collect::<Result<_>>()?;
        let mut all = Measured { matrix: AccuracyMatrix::default(), path, test };
        if all.path.exists() {
            let text = fs::read(&all.path).map_err(|e| Error::file(&all.path, e))?;
            all.matrix = serde_json::from_slice(&text).map_err(|e| Error::file(&all.path, e))?;
            return Ok(all);
        }
        all.matrix.tasks = tasks.to_vec();
        let metric = job.objective.metrics().first();
        all.matrix.metric = metric.map(|m| m.key.to_owned()).unwrap_or_default();
        all.matrix.before = all.row(job, learner)?;
        Ok(all)
    }

    /// What is measured of each task now.
    fn row(&self, job: &Job, learner: &dyn Learner) -> Result<Vec<Option<f64>>> {
        let mut row = Vec::new();
        for (task, test) in self.matrix.tasks.iter().zip(&self.test) {
            let Some(test) = test.as_ref().filter(|_| learner.answers(job.model, task)) else {
                row.push(None);
                continue;
            };
            let said = evaluate(job.model, job.objective, test, 64, &Batch::describe)?;
            let found = job.objective.scores(&said.iter().collect::<Vec<_>>());
            row.push(found.get(&self.matrix.metric).copied());
        }
        Ok(row)
    }

    /// The tasks of which something is held out, with that.
    fn held_out(&self) -> Vec<(String, Dataset)> {
        let all = self.matrix.tasks.iter().zip(&self.test);
        all.filter_map(|(task, test)| Some((task.clone(), test.clone()?))).collect()
    }

    /// Rows of tasks that were not finished.
    fn forget_after(&mut self, index: usize) {
        self.matrix.rows.truncate(index);
    }

    fn measure(&mut self, job: &mut Job, learner: &dyn Learner, index: usize) -> Result<()> {
        let row = self.row(job, learner)?;
        let named = self.matrix.tasks.iter().cloned().zip(&row);
        let metrics = named.filter_map(|(task, v)| Some((task, (*v)?))).collect();
        let after = self.matrix.tasks.get(index).map(String::as_str).unwrap_or_default();
        let name = format!("{}/after {after}", job.phase.name);
        job.sink.event(&Event::Evaluated { name, step: None, metrics })?;
        self.matrix.rows.push(row);
        self.save()
    }

    fn save(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.matrix);
        let text = text.map_err(|e| Error::file(&self.path, e))?;
        checkpoint::write_whole(&self.path, &text)
    }

    /// ACC, BWT, FWT and forgetting.
    fn tell(&self, job: &mut Job) -> Result<()> {
        if self.test.iter().all(Option::is_none) {
            return Ok(());
        }
        let metrics = self.matrix.metrics(Convention::Paper);
        let metrics = metrics.into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
        job.sink.event(&Event::Evaluated { name: job.phase.name.clone(), step: None, metrics })
    }
}
