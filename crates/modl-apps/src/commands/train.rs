//! `modl train`: what a recipe says.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_train::{Event, Fanout, JsonLines, LossWeight, Methods, RunFolder, Sink, TensorBoard};

use super::run_folder::{self, Loaded};
use crate::progress::Bars;

/// Arguments of `modl train`.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The recipe.
    recipe: PathBuf,
    /// The run's folder.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Goes on with the run of this recipe that is in the folder; begins one where there is none.
    #[arg(long)]
    resume: bool,
    /// Sets a value of the recipe, for instance phases.0.lr=1e-4; as often as wanted.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Says in words what a run adds to the loss, and what one may not expect.
#[derive(Debug)]
struct Told;

impl Sink for Told {
    fn event(&mut self, event: &Event) -> modl_core::Result<()> {
        match event {
            Event::Started { name, losses, .. } if !losses.is_empty() => {
                let said = |(loss, w): (&String, &LossWeight)| {
                    let by = if w.default { ", the default" } else { "" };
                    format!("{loss} (weight {}{by})", w.weight)
                };
                let all: Vec<String> = losses.iter().map(said).collect();
                println!("{name}: added to the loss: {}", all.join(", "));
            }
            Event::Evaluated { name, metrics, step: None } => {
                let said = |(key, value): (&String, &f64)| format!("{key} {value:.4}");
                let all: Vec<String> = metrics.iter().map(said).collect();
                println!("{name}: {}", all.join(", "));
            }
            Event::Notice { step, text } => println!("step {step}: {text}"),
            _ => {}
        }
        Ok(())
    }
}

impl TrainArgs {
    /// Refuses a folder that has a run, where it is not to go on.
    fn may_begin(&self) -> Result<()> {
        anyhow::ensure!(
            self.resume || !RunFolder::has_run(&self.out),
            "{}: holds a run already; --resume goes on with it, another --out begins a new one",
            self.out.display()
        );
        Ok(())
    }
}

pub(crate) fn run(args: &TrainArgs, methods: &Methods) -> Result<()> {
    let text = std::fs::read_to_string(&args.recipe)
        .with_context(|| format!("recipe {}", args.recipe.display()))?;
    let recipe = run_folder::read(&args.recipe, &text, &args.set, methods)?;
    args.may_begin()?;
    let mut loaded = Loaded::new(recipe, methods)?;
    println!(
        "{} examples for training, {} held out; results go to {}",
        loaded.part(None).train.len(),
        loaded.part(None).test.len(),
        args.out.display()
    );
    let folder = RunFolder::hold(&args.out)?;
    args.may_begin()?;
    run_folder::note(&args.out, &args.recipe, &text, &args.set)?;
    let mut bars = Bars::default();
    let mut lines = JsonLines::append(args.out.join("events.jsonl"))?;
    let mut board = TensorBoard::below(args.out.join("tensorboard"));
    let mut told = Told;
    let mut sink = Fanout(vec![&mut told, &mut bars, &mut lines, &mut board]);
    loaded.run(&folder, methods, &mut sink)?;
    let measured = super::eval::report(&loaded, None, Some(&args.out))?;
    let report = super::train_report::write(&args.out, &args.recipe, &measured)?;
    println!("{}: done; `modl eval {0}` tests it again; {}", args.out.display(), report.display());
    Ok(())
}
