//! `modl merge --soup` and `--search`: which models, or which weights, an evaluation likes best.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use modl_aggregate::merge::{Base, MergeMethods};
use modl_aggregate::search::{Evolution, lora_hub};
use modl_aggregate::soups::{Convention, greedy};
use modl_core::Seed;
use serde_json::json;

use super::trials::{Failure, Trials};
use super::{MergeArgs, SearchKind, Soup, merge_inputs, numbers, one_each};
use crate::commands::adapter::is_adapter;
use crate::report::Table;

/// The same merge of some of the inputs, with weights.
fn with(args: &MergeArgs, inputs: Vec<PathBuf>, weights: &[f64], out: &Path) -> MergeArgs {
    let weight: Vec<String> = weights.iter().map(f64::to_string).collect();
    let mut made = args.clone();
    (made.inputs, made.weight, made.out) = (inputs, Some(weight.join(",")), out.to_owned());
    (made.soup, made.search) = (None, None);
    made
}

fn are_adapters(args: &MergeArgs) -> bool {
    args.inputs.iter().all(|p| is_adapter(p))
}

/// A merge that only an evaluation looks at: nothing is told of it.
pub(super) fn candidate(
    args: &MergeArgs,
    methods: &MergeMethods,
    inputs: Vec<PathBuf>,
    weights: &[f64],
    out: &Path,
) -> Result<()> {
    // An adapter that changes nothing is not written; this one's change is lost where it is added.
    let nothing = weights.iter().all(|w| *w == 0.0) && are_adapters(args);
    let least = vec![1e-30; weights.len()];
    let mut made = with(args, inputs, if nothing { &least } else { weights }, out);
    (made.quiet, made.report, made.eval) = (true, None, None);
    merge_inputs(&made, methods)
}

/// The average of all models, or of those with which an evaluation does not fall.
pub(super) fn soup(args: &MergeArgs, methods: &MergeMethods, kind: Soup) -> Result<()> {
    let mut args = args.clone();
    if !are_adapters(&args) {
        args.method = Some("linear".to_owned());
    }
    let average = |members: &[usize]| {
        let inputs: Vec<PathBuf> =
            members.iter().filter_map(|m| args.inputs.get(*m).cloned()).collect();
        let share = 1.0 / inputs.len().max(1) as f64;
        (vec![share; inputs.len()], inputs)
    };
    let all: Vec<usize> = (0..args.inputs.len()).collect();
    if kind == Soup::Uniform {
        let (weights, inputs) = average(&all);
        return merge_inputs(&with(&args, inputs, &weights, &args.out), methods);
    }
    let n = all.len() as u64;
    let what = json!({ "soup": "greedy", "inputs": args.inputs, "dtype": args.dtype });
    let mut trials = Trials::open(&args, &what, 2 * n - 1)?;
    let mut alone = Vec::new();
    for (m, model) in args.inputs.iter().enumerate() {
        let printed = trials.of(&json!([m]), model)?;
        alone.push(trials.worth(printed));
    }
    let mut failure = Failure::default();
    let found = greedy(&alone, Convention::Paper, |members| {
        let (weights, inputs) = average(members);
        let make = |out: &Path| candidate(&args, methods, inputs, &weights, out);
        let printed = failure.keep(trials.of_candidate(&json!(members), make))?;
        Ok(trials.worth(printed))
    });
    let soup = failure.told(found)?;
    let mut table =
        Table::new(["tried in this order", "alone", "the soup with it", "taken"]).left();
    for (m, score) in &soup.tried {
        let one = alone.get(*m).copied().unwrap_or_default();
        let taken = if soup.members.contains(m) { "yes" } else { "no" };
        let name = args.inputs.get(*m).map(|p| p.display().to_string()).unwrap_or_default();
        let shown = |worth: f64| format!("{:.6}", trials.worth(worth));
        table.row([name, shown(one), shown(*score), taken.to_owned()]);
    }
    println!("{}", table.text());
    let (weights, inputs) = average(&soup.members);
    let mut last = with(&args, inputs, &weights, &args.out);
    last.eval = None;
    merge_inputs(&last, methods)?;
    trials.finish(&args.out)
}

/// The weights of a method under which an evaluation is best.
pub(super) fn weights(args: &MergeArgs, methods: &MergeMethods, kind: SearchKind) -> Result<()> {
    let adapters = are_adapters(args);
    let mut inputs = args.inputs.len();
    if !adapters {
        let method = args.method.as_deref().with_context(
            || "--search looks for the weights of a --method; `modl list merges` shows them",
        )?;
        let spec = methods.find(method)?.spec();
        anyhow::ensure!(spec.has("weight"), "--search: `{method}` has no weights");
        inputs -= usize::from(spec.base == Base::Required);
    }
    anyhow::ensure!(inputs > 0, "--search: there is no model beside the base");
    let start = start(args, kind, inputs)?;
    let bounds = args.bounds.as_deref().map(two).transpose()?;
    let what = json!({
        "search": format!("{kind:?}"), "inputs": args.inputs, "method": args.method,
        "density": args.density, "set": args.settings, "dtype": args.dtype, "rank": args.rank,
        "convention": args.convention, "start": start, "bounds": bounds.map(|(lo, hi)| [lo, hi]),
        "minimize": args.minimize, "seed": args.seed,
    });
    let mut trials = Trials::open(args, &what, args.budget as u64 + 1)?;
    let (mut failure, seed) = (Failure::default(), Seed(args.seed));
    let mut first = None;
    let loss = |w: &[f64]| {
        let make = |out: &Path| candidate(args, methods, args.inputs.clone(), w, out);
        let printed = failure.keep(trials.of_candidate(&json!(w), make))?;
        first.get_or_insert(printed);
        Ok(-trials.worth(printed))
    };
    let found = match kind {
        SearchKind::LoraHub => lora_hub(inputs, args.budget, seed, loss),
        SearchKind::CmaEs => {
            let search =
                Evolution { bounds, evaluations: args.budget, seed, ..Evolution::default() };
            search.minimize(&start, loss)
        }
    };
    let found = failure.told(found)?;
    anyhow::ensure!(
        !adapters || found.weights.iter().any(|w| *w != 0.0),
        "the evaluation is best with no part of any adapter: all weights are 0, and there is nothing to \
         write"
    );
    let point = json!(found.weights);
    let best = trials.of(&point, &args.out)?;
    let mut table = Table::new(["input", "weight"]);
    let names = args.inputs.iter().skip(args.inputs.len() - inputs);
    for (name, w) in names.zip(&found.weights) {
        table.row([name.display().to_string(), format!("{w:.6}")]);
    }
    println!("{}", table.text());
    println!("evaluation {:.6} at the start, {best:.6} with these weights", first.unwrap_or(best));
    let mut last = with(args, args.inputs.clone(), &found.weights, &args.out);
    last.eval = None;
    merge_inputs(&last, methods)?;
    trials.finish(&args.out)
}

/// Where the search starts: --weight, else equal shares; LoraHub's is nothing of any module.
fn start(args: &MergeArgs, kind: SearchKind, n: usize) -> Result<Vec<f64>> {
    if kind == SearchKind::LoraHub {
        anyhow::ensure!(
            args.weight.is_none() && args.bounds.is_none(),
            "--search lora-hub starts at 0 within ±1.5; --weight and --bounds are of cma-es"
        );
        return Ok(vec![0.0; n]);
    }
    let Some(text) = args.weight.as_deref() else { return Ok(vec![1.0 / n as f64; n]) };
    one_each("weight", text, n, "models")
}

fn two(text: &str) -> Result<(f64, f64)> {
    match numbers("bounds", text)?.as_slice() {
        [lo, hi] => Ok((*lo, *hi)),
        _ => anyhow::bail!("--bounds {text}: is to be LO,HI"),
    }
}
