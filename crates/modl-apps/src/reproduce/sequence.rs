//! Experiments with tasks one after the other: a recipe over data in memory, and what it measured.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use modl_core::{Modular, Seed, Tensor};
use modl_train::{
    AccuracyMatrix, Convention, Dataset, Event, Example, Examples, Methods, Objective, Recipe,
    Sink, run,
};

use super::experiment::Lab;

/// Rows of a task as examples, which are called by their numbers.
pub(super) fn dataset(task: &str, rows: Tensor, classes: &Tensor) -> Result<Dataset> {
    let classes = classes.to_vec::<i64>()?;
    let example = |(i, class): (usize, &i64)| Example {
        id: i.to_string(),
        task: task.to_owned(),
        ids: Vec::new(),
        target: *class as f32,
    };
    Ok(Dataset::dense(classes.iter().enumerate().map(example).collect(), "pixel_values", rows)?)
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
    let path = folder.path().join("phases/1-learn/accuracy_matrix.json");
    let matrix = match path.exists() {
        true => serde_json::from_slice(&std::fs::read(path)?)?,
        false => AccuracyMatrix::default(),
    };
    Ok(Learned { model, matrix })
}

/// What a recipe came to.
pub(super) struct Learned {
    pub(super) model: Modular,
    pub(super) matrix: AccuracyMatrix,
}

impl Learned {
    /// `acc`, `bwt`, `fwt`, `forgetting`, as the paper has them.
    pub(super) fn metrics(&self) -> BTreeMap<String, f64> {
        let all = self.matrix.metrics(Convention::Paper);
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
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
