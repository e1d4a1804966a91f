//! `modl route-report`: how the routers of a run use its modules.
//!
//! ```text
//! RUN/routing/trace.safetensors   what was chosen, unit by unit: `--trace` reports it again
//! RUN/routing/report.json         all numbers
//! RUN/routing/report.html         tables, signs of collapse, heat maps
//! RUN/routing/use-SPLIT….svg      the heat maps
//! RUN/routing/load-….svg, …       how load and entropies went in training
//! ```

mod curves;
mod heat_maps;
mod labels;
mod numbers;
mod pass;
mod words;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::checkpoint::write_whole;
use modl_route::stats::{RoutingTrace, Thresholds};
use modl_train::Methods;

use crate::report::Page;
use heat_maps::Map;
use labels::By;
use numbers::Numbers;

/// Arguments of `modl route-report`.
#[derive(Debug, Args)]
pub(crate) struct RouteReportArgs {
    /// The folder of a run: its examples are passed, and what routers choose is recorded.
    #[arg(required_unless_present = "trace")]
    run: Option<PathBuf>,
    /// Reports what was recorded in this file, without a model.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["run", "limit", "by"])]
    trace: Option<PathBuf>,
    /// Where the page, the numbers and the heat maps go; RUN/routing, or the folder of the trace,
    /// where it is left out.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Examples of each task at most, of those trained on and of those held out.
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
    /// What choices are counted by in place of the task: `token-class` (special, word, number,
    /// punctuation), or a file with a line for each example: its task, its id and its label, separated
    /// by tabs. Tables and maps say task all the same.
    #[arg(long, value_name = "LABELS", default_value = "task", value_parser = by)]
    by: By,
}

fn by(text: &str) -> Result<By, std::convert::Infallible> {
    Ok(By::from(text))
}

pub(crate) fn run(args: &RouteReportArgs, methods: &Methods) -> Result<()> {
    let (trace, folder) = match (&args.trace, &args.run) {
        (Some(file), _) => {
            let folder = file.parent().filter(|p| !p.as_os_str().is_empty());
            (RoutingTrace::open(file)?, folder.unwrap_or(Path::new(".")).to_owned())
        }
        (None, Some(run)) => {
            anyhow::ensure!(args.limit > 0, "--limit is to be at least 1");
            let trace = pass::record(run, args.limit, &args.by, methods)?;
            let folder = run.join("routing");
            trace.save(args.out.as_ref().unwrap_or(&folder).join("trace.safetensors"))?;
            (trace, folder)
        }
        (None, None) => anyhow::bail!("name the folder of a run, or a --trace"),
    };
    let curves = args.run.as_ref().map(|run| curves::of(run)).transpose()?.unwrap_or_default();
    if args.by != By::Task {
        println!("tasks are here: the {} of each\n", args.by);
    }
    write(&trace, &curves, &args.by, args.out.as_ref().unwrap_or(&folder))
}

/// Prints the report, and writes it as numbers, a page and plots.
fn write(trace: &RoutingTrace, curves: &[Map], by: &By, folder: &Path) -> Result<()> {
    let numbers = Numbers::of(trace, &Thresholds::default())?;
    write_whole(folder.join("report.json"), &serde_json::to_vec_pretty(&numbers)?)?;
    let mut page = Page::new("How routers use modules");
    page.paragraph(words::PREFACE);
    if *by != By::Task {
        page.paragraph(&format!("Tasks are here: the {by} of each."));
    }
    page.heading("What looks wrong");
    words::signs(&numbers).iter().for_each(|line| page.paragraph(line));
    for split in &numbers.splits {
        let title = format!("{}: {} rows", words::split(&split.name), split.rows);
        let (uses, rules) = (words::uses(split), words::rules(split));
        println!("{title}\n{}\n{}\n", uses.text(), rules.text());
        page.heading(&title);
        page.table(&uses);
        page.table(&rules);
        for map in heat_maps::of(split)? {
            page.figure(&map.svg, &map.caption);
            write_whole(folder.join(&map.file), map.svg.as_bytes())?;
        }
    }
    if !curves.is_empty() {
        page.heading("In training");
    }
    for curve in curves {
        page.figure(&curve.svg, &curve.caption);
        write_whole(folder.join(&curve.file), curve.svg.as_bytes())?;
    }
    let path = folder.join("report.html");
    write_whole(&path, page.html().as_bytes()).with_context(|| path.display().to_string())?;
    words::signs_in_short(&numbers).iter().for_each(|line| println!("{line}"));
    println!("\nreport: {}", path.display());
    Ok(())
}
