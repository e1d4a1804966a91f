//! `modl sweep`: all combinations of some settings of a recipe, each with several seeds.
//!
//! Each combination is trained with each seed as `modl train` would train it, in a folder of its own,
//! `OUT/SETTINGS/seed-N`, which `modl eval` and `modl inspect` understand. What is known is kept in
//! `OUT/runs.jsonl`: the same command goes on, and a larger grid or more seeds add to it.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::{FolderLock, checkpoint};
use modl_train::{Methods, Metric, less_is_better};
use serde_json::{Map, Value, json};

use super::study::{Study, folder};
use crate::trials::{Columns, Measure, Results, Run, interval_cell};

/// Arguments of `modl sweep`.
#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    /// The recipe.
    recipe: PathBuf,
    /// A value of the recipe and what it is to be, for instance phases.0.lr=1e-4,1e-3; as often as
    /// wanted. Values are TOML; commas within brackets, braces and quotes are theirs.
    #[arg(long, value_name = "KEY=V1,V2", required = true)]
    grid: Vec<String>,
    /// How many seeds, from 0.
    #[arg(long, default_value_t = 1, value_name = "N")]
    seeds: u64,
    /// Where runs and tables go.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Sets a value of the recipe for all, for instance phases.0.steps=100; as often as wanted.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// A combination.
#[derive(Debug, Clone, PartialEq)]
struct Condition {
    /// `phases.0.lr=1e-4 modules.a.r=8`.
    label: String,
    /// Keys and values.
    set: Vec<(String, String)>,
}

pub(crate) fn run(args: &SweepArgs, methods: &Methods) -> Result<()> {
    anyhow::ensure!(args.seeds > 0, "--seeds is to be at least 1");
    let axes = args.grid.iter().map(|g| axis(g)).collect::<Result<Vec<_>>>()?;
    let conditions = combinations(&axes)?;
    let mut study = Study::open(&args.recipe, &args.out, methods)?;
    let all = |c: &Condition| -> Vec<String> {
        let own = c.set.iter().map(|(key, value)| format!("{key}={value}"));
        args.set.iter().cloned().chain(own).collect()
    };
    // A wrong one is refused before anything is trained.
    for condition in &conditions {
        study.recipe(&all(condition)).with_context(|| condition.label.clone())?;
    }
    let recipe = study.recipe(&args.set)?;
    let _lock = FolderLock::take(&args.out, "sweep.lock", "another sweep")?;
    println!(
        "{} combinations with {} seeds each; results go to {}",
        conditions.len(),
        args.seeds,
        args.out.display()
    );
    let mut runs = Vec::new();
    for condition in &conditions {
        for seed in 0..args.seeds {
            runs.push(study.run(&condition.label, &all(condition), seed)?);
        }
    }
    let of = |m: &Metric| Measure { key: m.key, title: m.title, digits: 4 };
    let measures: Vec<Measure> = recipe.last_head().metrics().iter().map(of).collect();
    report(args, &conditions, &measures, &runs)
}

/// `KEY=V1,V2`: the key and its values.
fn axis(text: &str) -> Result<(String, Vec<String>)> {
    let (key, rest) = text.split_once('=').with_context(|| {
        format!("--grid {text}: is to be KEY=V1,V2, as in phases.0.lr=1e-4,1e-3")
    })?;
    let (mut values, mut depth, mut quoted) = (vec![String::new()], 0usize, false);
    for c in rest.chars() {
        match c {
            '"' => quoted = !quoted,
            '[' | '{' if !quoted => depth += 1,
            ']' | '}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        if c == ',' && depth == 0 && !quoted {
            values.push(String::new());
        } else if let Some(last) = values.last_mut() {
            last.push(c);
        }
    }
    let values: Vec<String> = values.iter().map(|v| v.trim().to_owned()).collect();
    anyhow::ensure!(!values.iter().any(String::is_empty), "--grid {text}: has an empty value");
    Ok((key.trim().to_owned(), values))
}

/// Every combination, the last key first.
fn combinations(axes: &[(String, Vec<String>)]) -> Result<Vec<Condition>> {
    let mut all: Vec<Vec<(String, String)>> = vec![Vec::new()];
    for (i, (key, values)) in axes.iter().enumerate() {
        if axes.iter().take(i).any(|(k, _)| k == key) {
            anyhow::bail!("--grid {key}: is there twice; give all its values in one");
        }
        let with = |set: Vec<(String, String)>| {
            let one = move |v: &String| [set.as_slice(), &[(key.clone(), v.clone())]].concat();
            values.iter().map(one).collect::<Vec<_>>()
        };
        all = all.into_iter().flat_map(with).collect();
    }
    let mut conditions: Vec<Condition> = Vec::new();
    for set in all {
        let label: Vec<String> = set.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let label = label.join(" ");
        if let Some(same) = conditions.iter().find(|c| folder(&c.label) == folder(&label)) {
            anyhow::bail!("--grid: `{}` and `{label}` are the same", same.label);
        }
        conditions.push(Condition { label, set });
    }
    Ok(conditions)
}

fn report(
    args: &SweepArgs,
    conditions: &[Condition],
    measures: &[Measure],
    runs: &[Run],
) -> Result<()> {
    let results = Results::new(runs);
    let rows: Vec<(String, String)> =
        conditions.iter().map(|c| (c.label.clone(), c.label.clone())).collect();
    let means = Columns { head: "settings", rows: &rows, measures }.means(&results)?;
    println!("{}", means.text());
    if args.seeds > 1 {
        println!("In brackets the 95 % interval by the bootstrap over {} seeds.", args.seeds);
    }
    if let Some(first) = measures.first() {
        let mut best: Option<(&str, f64)> = None;
        for c in conditions {
            let (value, _) = results.mean(&c.label, first.key)?;
            let better =
                |old: f64| if less_is_better(first.key) { value < old } else { value > old };
            if value.is_finite() && best.is_none_or(|(_, old)| better(old)) {
                best = Some((&c.label, value));
            }
        }
        if let Some((label, _)) = best {
            let mean = interval_cell(results.mean(label, first.key)?, first.digits);
            println!("best {}: {mean} with {label}, chosen on the held-out examples", first.title);
        }
    }
    let write =
        |name: &str, text: &str| checkpoint::write_whole(args.out.join(name), text.as_bytes());
    write("sweep.csv", &csv(conditions, measures, runs))?;
    write("sweep.json", &serde_json::to_string_pretty(&to_json(conditions, measures, &results)?)?)?;
    println!("{}: sweep.csv has each run, sweep.json the means", args.out.display());
    Ok(())
}

/// A line for each run: the settings, the seed, what was measured, and the time.
fn csv(conditions: &[Condition], measures: &[Measure], runs: &[Run]) -> String {
    let quoted = |cell: &str| match cell.contains([',', '"', '\n']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    };
    let keys =
        conditions.first().into_iter().flat_map(|c| c.set.iter().map(|(key, _)| key.clone()));
    let measured = measures.iter().map(|m| m.key.to_owned());
    let head = keys.chain(["seed".to_owned()]).chain(measured).chain(["seconds".to_owned()]);
    let mut lines = vec![head.map(|c| quoted(&c)).collect::<Vec<_>>().join(",")];
    for run in runs {
        let Some(condition) = conditions.iter().find(|c| c.label == run.condition) else {
            continue;
        };
        let settings = condition.set.iter().map(|(_, value)| value.clone());
        let value = |m: &Measure| run.metrics.get(m.key).map_or(String::new(), f64::to_string);
        let line = settings.chain([run.seed.to_string()]).chain(measures.iter().map(value));
        let line = line.chain([format!("{:.2}", run.seconds)]);
        lines.push(line.map(|c| quoted(&c)).collect::<Vec<_>>().join(","));
    }
    lines.join("\n") + "\n"
}

/// The means with their intervals by combination.
fn to_json(conditions: &[Condition], measures: &[Measure], results: &Results) -> Result<Value> {
    let one = |c: &Condition| -> Result<Value> {
        let mut found = Map::new();
        for m in measures {
            let (mean, ends) = results.mean(&c.label, m.key)?;
            let interval = ends.map(|(low, high)| json!([low, high]));
            found.insert(m.key.to_owned(), json!({ "mean": mean, "interval": interval }));
        }
        let settings: Map<String, Value> =
            c.set.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        Ok(json!({ "settings": settings, "metrics": found }))
    };
    let all = conditions.iter().map(one).collect::<Result<Vec<_>>>()?;
    Ok(json!({ "seeds": results.seeds(), "combinations": all }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_all_combinations_and_commas_within_values_are_theirs() {
        let (key, values) = axis(r#"modules.a.targets=["query", "value"],["a,b"], x"#).unwrap();
        assert_eq!(key, "modules.a.targets");
        assert_eq!(values, [r#"["query", "value"]"#, r#"["a,b"]"#, "x"]);
        let axes = ["a=1,-1", "b=x", "c=1,2"].map(|t| axis(t).unwrap());
        let labels: Vec<String> =
            combinations(&axes).unwrap().into_iter().map(|c| c.label).collect();
        assert_eq!(labels, ["a=1 b=x c=1", "a=1 b=x c=2", "a=-1 b=x c=1", "a=-1 b=x c=2"]);
        for (wrong, part) in [("a", "KEY=V1,V2"), ("a=1,,2", "empty value"), ("a=", "empty value")]
        {
            assert!(axis(wrong).unwrap_err().to_string().contains(part), "{wrong}");
        }
        let twice = ["a=1", "a=2"].map(|t| axis(t).unwrap());
        assert!(combinations(&twice).unwrap_err().to_string().contains("twice"));
        assert!(combinations(&[axis("a=1,1").unwrap()]).unwrap_err().to_string().contains("same"));
    }
}
