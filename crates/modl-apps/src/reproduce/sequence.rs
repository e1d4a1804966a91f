//! Experiments with tasks one after the other: a recipe over data in memory, and what it measured.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use modl_core::{Device, Modular, Seed, Tensor};
use modl_train::{
    AccuracyMatrix, Convention, Dataset, Event, Example, Examples, Methods, Objective, Recipe,
    Sink, TaskInference, TokenIds, run,
};
use serde::de::DeserializeOwned;

use super::experiment::{Lab, largest};
use super::glyphs::{Hand, SIDE, glyphs};

/// Rows of a task as examples, which are called by their numbers.
pub(super) fn dataset(task: &str, rows: Tensor, classes: &Tensor) -> Result<Dataset> {
    let classes = classes.to_vec::<i64>()?;
    let example = |(i, class): (usize, &i64)| Example {
        id: i.to_string(),
        task: task.to_owned(),
        ids: TokenIds::default(),
        target: *class as f32,
    };
    Ok(Dataset::dense(classes.iter().enumerate().map(example).collect(), "pixel_values", rows)?)
}

/// `n` digits of a task, `00` and on, with its order of pixels; `part` names those that go together.
pub(super) fn permuted(
    task: usize,
    n: usize,
    hand: Hand,
    seed: Seed,
    part: &str,
) -> Result<Dataset> {
    let mut order: Vec<i64> = (0..(SIDE * SIDE) as i64).collect();
    let drawn = seed.child("order").nth(task as u64);
    order.sort_by_key(|pixel| drawn.nth(*pixel as u64).0);
    let order = Tensor::from_slice(&order, &[order.len() as i64], Device::Cpu)?;
    let (x, y) = glyphs(n, 0, hand, seed.child(part).nth(task as u64))?;
    dataset(&format!("{task:02}"), x.index_select(-1, &order)?, &y)
}

/// Several tasks as one set.
pub(super) fn together(tasks: impl IntoIterator<Item = Result<Dataset>>) -> Result<Dataset> {
    let mut all: Option<Dataset> = None;
    for task in tasks {
        let task = task?;
        all = Some(match all {
            Some(all) => all.and(&task)?,
            None => task,
        });
    }
    all.context("there are no tasks")
}

/// Runs a recipe's phase `learn`, by its network and its phases alone.
pub(super) fn learn(
    recipe: &str,
    objective: &dyn Objective,
    train: &Dataset,
    test: &Dataset,
    lab: &Lab,
) -> Result<Learned> {
    let methods = Methods::new(crate::builtin()?)?;
    let recipe = Recipe::parse(recipe, "recipe.toml", &methods)?;
    let fresh = recipe.fresh_backbone(&methods)?.context("the recipe's network is a fresh one")?;
    let mut model = Modular::from_box(fresh, Seed(recipe.seed))?;
    let folder = tempfile::tempdir()?;
    let examples = Examples { train, test: Some(test) };
    let mut ticks = Ticks(lab.tick);
    run(&recipe, &methods, &mut model, objective, examples, folder.path(), &mut ticks)?;
    let phase = folder.path().join("phases/1-learn");
    let matrix = read(&phase.join("accuracy_matrix.json"))?.unwrap_or_default();
    Ok(Learned { model, matrix, inference: read(&phase.join("task_inference.json"))? })
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    Ok(match path.exists() {
        true => Some(serde_json::from_slice(&std::fs::read(path)?)?),
        false => None,
    })
}

/// What a recipe came to.
pub(super) struct Learned {
    pub(super) model: Modular,
    pub(super) matrix: AccuracyMatrix,
    /// Without the tasks' labels, where the strategy asked for it.
    pub(super) inference: Option<TaskInference>,
}

impl Learned {
    /// `acc`, `bwt`, `fwt`, `forgetting`, as the paper has them.
    pub(super) fn metrics(&self) -> BTreeMap<String, f64> {
        let all = self.matrix.metrics(Convention::Paper);
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// The most that the accuracy on a task has changed since it was learned.
    pub(super) fn moved(&self) -> Result<f64> {
        let tasks = self.matrix.tasks.len();
        let moved = |j: usize| {
            let (now, then) = (self.matrix.at(tasks - 1, j), self.matrix.at(j, j));
            let (now, then) = now.zip(then).context("the accuracy of each task")?;
            Ok((now - then).abs())
        };
        Ok(largest((0..tasks).map(moved).collect::<Result<Vec<f64>>>()?))
    }
}

struct Ticks<'a>(&'a dyn Fn());

impl Sink for Ticks<'_> {
    fn event(&mut self, event: &Event) -> modl_core::Result<()> {
        if matches!(event, Event::Step { .. }) {
            (self.0)();
        }
        Ok(())
    }
}
