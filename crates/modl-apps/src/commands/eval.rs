//! `modl eval`: a trained run on its held-out examples, as it is or with other routing or fewer layers of
//! modules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
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
    /// As it was after this phase, by its head; after the last one where nothing is said.
    #[arg(long, value_name = "NAME")]
    phase: Option<String>,
    /// Another router, as a recipe has it: '{ type = "fixed", modules = ["en"] }'.
    #[arg(long, value_name = "TOML")]
    router: Option<String>,
    /// Another aggregator, as a recipe has it: '{ type = "stack" }'.
    #[arg(long, value_name = "TOML")]
    aggregator: Option<String>,
    /// Without the modules of so many of the lowest layers (AdapterDrop).
    #[arg(long, value_name = "N")]
    drop_layers: Option<i64>,
    /// Where metrics and predictions go. The run's folder where the run is evaluated as it is, nowhere
    /// where it is changed.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl EvalArgs {
    /// Whether what is evaluated is what the run has come to.
    fn plain(&self) -> bool {
        self.phase.is_none()
            && self.router.is_none()
            && self.aggregator.is_none()
            && self.drop_layers.is_none()
    }

    /// What a phase has come to, changed as the arguments say.
    fn change(&self, loaded: &mut Loaded, methods: &Methods) -> Result<()> {
        let (recipe, model) = (&loaded.recipe, &mut loaded.model);
        if let Some(first) = self.drop_layers {
            let phase = run_folder::phase_of(recipe, self.phase.as_deref());
            let phase = phase.context("the recipe has no phase")?;
            recipe.drop_layers(first, phase, model, methods)?;
        }
        let (router, aggregator) = (self.router.as_deref(), self.aggregator.as_deref());
        Ok(recipe.reroute(router, aggregator, model, methods)?)
    }
}

pub(crate) fn run(args: &EvalArgs, methods: &Methods) -> Result<()> {
    let mut loaded = Loaded::new(run_folder::recipe_of(&args.run, methods)?, methods)?;
    let phase = args.phase.as_deref();
    loaded.restore(&args.run, phase, methods)?;
    args.change(&mut loaded, methods)?;
    let out = args.out.as_deref().or(args.plain().then_some(args.run.as_path()));
    let clock = Instant::now();
    report(&loaded, phase, out)?;
    println!("in {:.2} s", clock.elapsed().as_secs_f64());
    Ok(())
}

/// Rows of a batch.
const BATCH: usize = 64;

/// Prints the metrics of the held-out examples by task as a table, and writes predictions and metrics into
/// a folder.
pub(super) fn report(loaded: &Loaded, phase: Option<&str>, out: Option<&Path>) -> Result<Table> {
    let all = measure(loaded, phase, out)?;
    let metrics = || loaded.part(phase).objective.metrics().iter().map(|m| m.key);
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

/// Evaluates the held-out examples by the head of a phase, and writes predictions and metrics into a
/// folder.
pub(super) fn measure(
    loaded: &Loaded,
    phase: Option<&str>,
    out: Option<&Path>,
) -> Result<Measured> {
    let part = loaded.part(phase);
    let (objective, test) = (part.objective.as_ref(), &part.test);
    let said = evaluate(&loaded.model, objective, test, BATCH, &Batch::describe)?;
    let mut measured = Measured::new();
    let tasks = test.tasks();
    for task in tasks.keys().map(|t| Some(*t)).chain([None]) {
        let rows: Vec<_> = said.iter().filter(|p| task.is_none_or(|t| t == p.task)).collect();
        measured.push((task.unwrap_or("all").to_owned(), rows.len(), objective.scores(&rows)));
    }
    if let Some(folder) = out {
        let json: BTreeMap<&str, _> = measured.iter().map(|(n, _, m)| (n.as_str(), m)).collect();
        checkpoint::write_whole(folder.join("metrics.json"), &serde_json::to_vec_pretty(&json)?)?;
        checkpoint::write_whole(folder.join("predictions.json"), &serde_json::to_vec(&said)?)?;
    }
    Ok(measured)
}
