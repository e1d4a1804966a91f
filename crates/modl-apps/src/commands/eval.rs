//! `modl eval`: a trained run on its held-out examples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use modl_core::checkpoint;
use modl_train::{Batch, Methods, evaluate};

use super::run_folder::{self, Loaded};
use crate::report::Table;

/// Arguments of `modl eval`.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// The run's folder.
    run: PathBuf,
}

pub(crate) fn run(args: &EvalArgs, methods: &Methods) -> Result<()> {
    let mut loaded = Loaded::new(run_folder::recipe_of(&args.run, methods)?, methods)?;
    modl_train::restore(
        &loaded.recipe,
        methods,
        &mut loaded.model,
        loaded.objective.as_ref(),
        &args.run,
    )?;
    report(&loaded, &args.run).map(drop)
}

/// Rows of a batch.
const BATCH: usize = 64;

/// Prints the metrics of the held-out examples by task as a table, and writes predictions and metrics.
pub(super) fn report(loaded: &Loaded, folder: &Path) -> Result<Table> {
    let all = measure(loaded, folder)?;
    let metrics = || loaded.objective.metrics().iter().map(|m| m.key);
    let mut table = Table::new(["held out", "examples"].into_iter().chain(metrics()));
    for (name, examples, found) in all {
        let value = |m: &str| found.get(m).map_or("-".to_owned(), |v| format!("{v:.4}"));
        table.row([name, examples.to_string()].into_iter().chain(metrics().map(value)));
    }
    println!("{}", table.text());
    Ok(table)
}

/// Tasks with the number of their held-out examples and their metrics; `all` is the last.
pub(super) type Measured = Vec<(String, usize, BTreeMap<String, f64>)>;

/// Evaluates the held-out examples, and writes predictions and metrics.
pub(super) fn measure(loaded: &Loaded, folder: &Path) -> Result<Measured> {
    let said =
        evaluate(&loaded.model, loaded.objective.as_ref(), &loaded.test, BATCH, &Batch::describe)?;
    let mut measured = Measured::new();
    let tasks = loaded.test.tasks();
    for task in tasks.keys().map(|t| Some(*t)).chain([None]) {
        let rows: Vec<_> = said.iter().filter(|p| task.is_none_or(|t| t == p.task)).collect();
        let found = loaded.objective.scores(&rows);
        measured.push((task.unwrap_or("all").to_owned(), rows.len(), found));
    }
    let json: BTreeMap<&str, _> = measured.iter().map(|(n, _, m)| (n.as_str(), m)).collect();
    checkpoint::write_whole(folder.join("metrics.json"), &serde_json::to_vec_pretty(&json)?)?;
    checkpoint::write_whole(folder.join("predictions.json"), &serde_json::to_vec(&said)?)?;
    Ok(measured)
}
