//! `modl barrier`: linear mode connectivity, measured by a user's own evaluation.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use modl_aggregate::connectivity::Curve;
use modl_aggregate::merge::MergeMethods;
use modl_core::checkpoint::write_whole;
use serde_json::json;

use super::MergeArgs;
use super::search::candidate;
use super::trials::Trials;
use crate::commands::adapter::is_adapter;
use crate::report::{Page, Table, curves};

/// Arguments of `modl barrier`.
#[derive(Debug, Args)]
pub(crate) struct BarrierArgs {
    /// A model or an adapter.
    a: PathBuf,
    /// Another of the same shape.
    b: PathBuf,
    /// A command that evaluates the model in `$MODEL`; the last line that it prints is a number, more is
    /// better.
    #[arg(long, value_name = "COMMAND")]
    eval: String,
    /// The evaluation is a loss: less is better.
    #[arg(long)]
    minimize: bool,
    /// The folder to write: a page with the curve, and all evaluations. Started again, a command that was
    /// stopped goes on where it was.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Points on the line, with the two models.
    #[arg(long, default_value_t = 25)]
    points: usize,
}

pub(crate) fn run(args: &BarrierArgs, methods: &MergeMethods) -> Result<()> {
    anyhow::ensure!(args.points >= 2, "--points {}: is to be at least 2", args.points);
    let inputs = vec![args.a.clone(), args.b.clone()];
    let adapters = inputs.iter().filter(|p| is_adapter(p)).count();
    anyhow::ensure!(adapters != 1, "one is an adapter and the other is not");
    let mut merge = MergeArgs {
        inputs,
        out: args.out.clone(),
        eval: Some(args.eval.clone()),
        minimize: args.minimize,
        ..MergeArgs::default()
    };
    if adapters == 0 {
        merge.method = Some("linear".to_owned());
        merge.settings = vec!["normalize=false".to_owned()];
    }
    let what = json!({ "barrier": [args.a, args.b] });
    let mut trials = Trials::open(&merge, &what, args.points as u64)?;
    let (mut printed, mut losses) = (Vec::new(), Vec::new());
    for n in 0..args.points {
        let lambda = n as f64 / (args.points - 1) as f64;
        let point = json!(lambda);
        // The ends are the models as they are.
        let found = if n == 0 {
            trials.of(&point, &args.a)
        } else if n == args.points - 1 {
            trials.of(&point, &args.b)
        } else {
            let weights = [1.0 - lambda, lambda];
            let inputs = merge.inputs.clone();
            let make = |out: &Path| candidate(&merge, methods, inputs, &weights, out);
            trials.of_candidate(&point, make)
        };
        let found = found.with_context(|| format!("at λ = {lambda:.4}"))?;
        printed.push((lambda, found));
        losses.push((lambda, -trials.worth(found)));
    }
    let curve = Curve::through(losses)?;
    write(args, &printed, &curve)?;
    trials.finish(&args.out)?;
    println!("page: {}", args.out.join("barrier.html").display());
    Ok(())
}

/// Shows the curve and writes the page.
fn write(args: &BarrierArgs, printed: &[(f64, f64)], curve: &Curve) -> Result<()> {
    let ends = [printed.first(), printed.last()].map(|p| p.map_or(0.0, |(_, found)| *found));
    let straight = |lambda: f64| (1.0 - lambda) * ends[0] + lambda * ends[1];
    let mut table = Table::new(["λ", "evaluation", "straight line", "difference"]);
    for (lambda, found) in printed {
        let line = straight(*lambda);
        let numbers = [*found, line, found - line].map(|x| format!("{x:.6}"));
        table.row([[format!("{lambda:.4}")].as_slice(), numbers.as_slice()].concat());
    }
    println!("{}", table.text());
    let side = if args.minimize { "above" } else { "below" };
    let verdict = if curve.barrier > 0.0 {
        format!(
            "barrier {:.6} at λ = {:.4}: so far the evaluation lies {side} the straight line",
            curve.barrier, curve.at
        )
    } else {
        format!("no barrier: the evaluation lies nowhere {side} the straight line")
    };
    println!("{verdict}");
    let names = [&args.a, &args.b].map(|p| p.display().to_string());
    let mut page = Page::new(&format!("From {} to {}", names[0], names[1]));
    page.paragraph(&format!(
        "Models (1 − λ) A + λ B, with A = {} and B = {}, evaluated by: {}. {verdict}.",
        names[0], names[1], args.eval
    ));
    let line = vec![(0.0, ends[0]), (1.0, ends[1])];
    let series = [("evaluation", printed.to_vec()), ("straight line", line)];
    let svg = curves("evaluation between the models", ["λ", "evaluation"], &series)?;
    page.figure(&svg, "λ = 0 is the first model, λ = 1 the second.");
    page.table(&table);
    write_whole(args.out.join("barrier.html"), page.html().as_bytes()).context("the page")
}
