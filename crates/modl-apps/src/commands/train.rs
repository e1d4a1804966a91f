//! `modl train`: what a recipe says.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_train::{Event, Examples, Fanout, JsonLines, LossWeight, Methods, Sink};

use super::run_folder::{self, Loaded};
use crate::progress::Bars;

/// Arguments of `modl train`.
#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// The recipe.
    recipe: PathBuf,
    /// The run's folder. Where a run of the same recipe is there, it goes on.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
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
            Event::Notice { step, text } => println!("step {step}: {text}"),
            _ => {}
        }
        Ok(())
    }
}

pub(crate) fn run(args: &TrainArgs, methods: &Methods) -> Result<()> {
    let text = std::fs::read_to_string(&args.recipe)
        .with_context(|| format!("recipe {}", args.recipe.display()))?;
    let recipe = run_folder::read(&args.recipe, &text, &args.set, methods)?;
    let mut loaded = Loaded::new(recipe, methods)?;
    println!(
        "{} examples for training, {} held out; results go to {}",
        loaded.train.len(),
        loaded.test.len(),
        args.out.display()
    );
    run_folder::note(&args.out, &args.recipe, &text, &args.set)?;
    let mut bars = Bars::default();
    let mut lines = JsonLines::append(args.out.join("events.jsonl"))?;
    modl_train::run(
        &loaded.recipe,
        methods,
        &mut loaded.model,
        loaded.objective.as_ref(),
        Examples { train: &loaded.train, test: Some(&loaded.test) },
        &args.out,
        &mut Fanout(vec![&mut Told, &mut bars, &mut lines]),
    )?;
    super::eval::report(&loaded, &args.out)?;
    println!("{}: done; `modl eval {0}` tests it again", args.out.display());
    Ok(())
}
