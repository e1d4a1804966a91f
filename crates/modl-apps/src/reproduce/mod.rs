//! `modl reproduce`: published claims on small data that is made here, with seeds, controls,
//! intervals, and thresholds that were declared before.
//!
//! An experiment is one file. What it measured is kept, one line for each condition and seed, so
//! that a run that was stopped goes on, and further seeds are added to the ones that are there. A
//! threshold that is missed is a result and is reported as one.

mod balance;
mod catalog;
mod chains;
mod conflict;
mod demix;
mod dropping;
mod encoder;
mod experiment;
mod expert;
mod fit;
mod forgetting;
mod fusion;
mod glyphs;
mod merged;
mod merging;
mod mittal;
mod mlp;
mod network;
mod packing;
mod polytropon;
mod report;
mod schedule;
mod sequence;
mod skills;
mod soups;
mod supsup;
mod tuning;

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use modl_core::Error;
use modl_train::Methods;

use experiment::Experiment;
use schedule::Plan;

/// Arguments of `modl reproduce`.
#[derive(Debug, Args)]
pub(crate) struct ReproduceArgs {
    /// The experiments, by `modl list experiments`; all where none is named.
    #[arg(value_delimiter = ',')]
    names: Vec<String>,
    /// How many seeds, from 0; as many as the experiment wants where it is left out.
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Where runs and reports go, a folder for each experiment.
    #[arg(long, default_value = "runs/reproduce", value_name = "DIR")]
    out: PathBuf,
    /// Few steps, to see that it runs: the numbers say nothing, and thresholds are not judged.
    #[arg(long)]
    quick: bool,
}

/// An experiment in a list.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) citation: &'static str,
    pub(crate) section: &'static str,
}

/// All experiments.
pub(crate) fn list() -> Vec<Listed> {
    let listed = |e: Box<dyn Experiment>| {
        let about = e.about();
        let (name, title) = (about.name, about.title);
        Listed { name, title, citation: about.citation, section: about.section }
    };
    catalog::all().into_iter().map(listed).collect()
}

pub(crate) fn run(args: &ReproduceArgs, methods: &Methods, threads: Option<i32>) -> Result<()> {
    anyhow::ensure!(args.seeds != Some(0), "--seeds is to be at least 1");
    for experiment in chosen(&args.names)? {
        let plan = Plan {
            experiment: experiment.as_ref(),
            registry: &methods.registry,
            seeds: args.seeds.unwrap_or(experiment.about().seeds),
            quick: args.quick,
            folder: args.out.join(experiment.about().name),
            workers: workers(threads),
        };
        let done = plan.run()?;
        report::write(&plan, &done)?;
    }
    Ok(())
}

/// One worker for each thread that tensor work may take: many small networks are trained at once,
/// each by one thread, which is faster than one after the other, and gives the same numbers on any
/// number of cores.
fn workers(threads: Option<i32>) -> usize {
    let asked = threads.and_then(|n| usize::try_from(n).ok());
    asked.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1)
}

fn chosen(names: &[String]) -> Result<Vec<Box<dyn Experiment>>> {
    let mut all = catalog::all();
    if names.is_empty() {
        return Ok(all);
    }
    for name in names {
        let known = || all.iter().map(|e| e.about().name);
        if !known().any(|k| k == name) {
            return Err(Error::unknown("experiment", name, known()).into());
        }
    }
    all.retain(|e| names.iter().any(|n| n == e.about().name));
    Ok(all)
}
