//! `modl plan`: what a recipe will train, for how long and with how much memory. Nothing is written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use modl_core::{Kind, Seed, Select, Tensor};
use modl_train::{Batch, Dataset, Event, Methods, Phase, Sink, TrainConfig, Trainer};

use super::run_folder::{self, Loaded};
use crate::report::Table;
use crate::trials::peak_rss_mb;

/// Steps that are measured, after one that is not.
const MEASURED: u64 = 3;

/// Arguments of `modl plan`.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// The recipe.
    recipe: PathBuf,
    /// Sets a value of the recipe, for instance phases.0.lr=1e-4; as often as wanted.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(crate) fn run(args: &PlanArgs, methods: &Methods) -> Result<()> {
    let text = std::fs::read_to_string(&args.recipe)
        .with_context(|| format!("recipe {}", args.recipe.display()))?;
    let recipe = run_folder::read(&args.recipe, &text, &args.set, methods)?;
    let mut loaded = Loaded::new(recipe, methods)?;
    loaded.prepare(methods)?;
    let weights = loaded.model.backbone().params().iter().map(|(_, p)| bytes(p.tensor()));
    println!(
        "{} examples for training, {} held out; the backbone has {} parameters, {}\n",
        loaded.part(None).train.len(),
        loaded.part(None).test.len(),
        loaded.model.backbone().params().iter().map(|(_, p)| p.tensor().numel()).sum::<usize>(),
        size(weights.sum()),
    );
    println!("{}\n", trained(&loaded).text());
    let mut table = Table::new([
        "phase",
        "strategy",
        "examples",
        "steps",
        "FLOPs a step",
        "optimiser",
        "a step",
        "all",
    ]);
    let mut whole = 0.0;
    for phase in &loaded.recipe.phases.clone() {
        loaded.route_in(phase, methods)?;
        let plan = Plan::of(phase, &loaded, methods).with_context(|| phase.name.clone())?;
        whole += plan.seconds * plan.steps as f64;
        table.row([
            phase.name.clone(),
            kind(phase),
            plan.examples.to_string(),
            match &phase.train.stop {
                Some(_) => format!("up to {}", plan.steps),
                None => plan.steps.to_string(),
            },
            format!("{:.2e}", plan.flops),
            size(plan.optimizer),
            time(plan.seconds),
            time(plan.seconds * plan.steps as f64),
        ]);
    }
    println!("{}\n", table.text());
    println!(
        "About {}, and {} of memory at its height, as measured in {MEASURED} steps of each phase with \
         the plain gradients of its batches: a strategy that needs several passes takes several times \
         as long. FLOPs are estimated: twice the numbers of all matrices for each token forwards, \
         the same back, and the trained ones once more.",
        time(whole),
        peak_rss_mb().map_or("an unknown amount".to_owned(), |mb| size((mb * 1e6) as u64)),
    );
    Ok(())
}

fn kind(phase: &Phase) -> String {
    phase.strategy.get("type").and_then(|t| t.as_str()).unwrap_or_default().to_owned()
}

/// The patterns of what a phase trains; where it is one module or task after the other, of all.
fn select(phase: &Phase) -> Select {
    let any = |p: &String| p.replace("{module}", "*").replace("{task}", "*");
    Select::any(phase.train.train.iter().map(any))
}

/// Trained parameters by module and phase.
fn trained(loaded: &Loaded) -> Table {
    let head = ["trained parameters".to_owned(), "all".to_owned()];
    let phases = &loaded.recipe.phases;
    let mut table = Table::new(head.into_iter().chain(phases.iter().map(|p| p.name.clone())));
    let selects: Vec<Select> = phases.iter().map(select).collect();
    let mut groups: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (name, numel) in named(loaded) {
        // `modules.NAME` and `heads.NAME`; all else as one.
        let mut parts = name.split('.');
        let first = parts.next().unwrap_or_default();
        let group = match (first, parts.next()) {
            ("modules" | "heads", Some(own)) => format!("{first}.{own}"),
            _ => first.to_owned(),
        };
        let row = groups.entry(group).or_insert_with(|| vec![0; selects.len() + 1]);
        let counts = std::iter::once(true).chain(selects.iter().map(|s| s.matches(&name)));
        row.iter_mut().zip(counts).for_each(|(sum, counts)| *sum += numel * usize::from(counts));
    }
    let mut sums = vec![0; selects.len() + 1];
    for (group, row) in groups {
        sums.iter_mut().zip(&row).for_each(|(sum, n)| *sum += n);
        table.row([group].into_iter().chain(row.iter().map(usize::to_string)));
    }
    table.row(["together".to_owned()].into_iter().chain(sums.iter().map(usize::to_string)));
    table
}

/// All parameters that could be trained, with their sizes.
fn named(loaded: &Loaded) -> Vec<(String, usize)> {
    let base = loaded.model.backbone().params().iter().map(|(n, p)| (format!("base.{n}"), p));
    let own = loaded.model.params().iter().map(|(n, p)| (n.to_owned(), p));
    let all = own.chain(base).filter(|(_, p)| !p.is_buffer());
    all.map(|(n, p)| (n, p.tensor().numel())).collect()
}

/// What is expected of a phase.
struct Plan {
    examples: usize,
    steps: u64,
    flops: f64,
    /// Bytes that the optimiser keeps.
    optimizer: u64,
    /// Of a step.
    seconds: f64,
}

impl Plan {
    fn of(phase: &Phase, loaded: &Loaded, methods: &Methods) -> Result<Plan> {
        let part = loaded.part(Some(&phase.name));
        let mut data = match &phase.tasks {
            Some(tasks) => part.train.of_tasks(tasks)?,
            None => part.train.clone(),
        };
        if let Some(n) = phase.limit {
            data = data.sample(n, loaded.recipe.data.split_seed)?;
        }
        // Continual strategies train task after task, `per_task` module after module.
        let name = kind(phase);
        let entry = methods.strategies.entries().iter().find(|e| e.name == name);
        let meta = ["maml", "reptile"].contains(&name.as_str());
        let parts: Vec<Dataset> = if entry.is_some_and(|e| e.section == "6.2") && !meta {
            data.tasks().keys().map(|t| data.of_task(t)).collect::<modl_core::Result<_>>()?
        } else if name == "per_task" {
            let wanted = |m: &&str| phase.tasks.as_ref().is_none_or(|t| t.iter().any(|t| t == m));
            let own = loaded.model.modules().into_iter().filter(wanted).map(|m| data.of_task(m));
            own.collect::<modl_core::Result<_>>()?
        } else {
            vec![data.clone()]
        };
        let TrainConfig { steps, epochs, batch_size, accumulate, .. } = phase.train;
        let rows = (batch_size as u64 * accumulate).max(1);
        let of = |part: &Dataset| {
            steps.unwrap_or(epochs.unwrap_or(1) * (part.len() as u64).div_ceil(rows))
        };
        let config = TrainConfig {
            train: vec![],
            epochs: None,
            steps: Some(1 + MEASURED),
            stop: None,
            log_every: 1,
            log_routing_every: 0,
            ..phase.train.clone()
        };
        let select = select(phase);
        let names: Vec<(String, usize)> = named(loaded);
        let train: Vec<String> =
            names.iter().filter(|(n, _)| select.matches(n)).map(|(n, _)| n.clone()).collect();
        let numbers: usize = names.iter().filter(|(n, _)| select.matches(n)).map(|(_, n)| n).sum();
        let mut watch = Clock::default();
        let seed = Seed(0).child("plan");
        let config = TrainConfig { train, ..config };
        Trainer::new(&phase.name, &loaded.model, part.objective.as_ref(), config.clone(), seed)?
            .train(&data, &Batch::describe, &mut watch)?;
        Ok(Plan {
            examples: parts.iter().map(Dataset::len).sum(),
            steps: parts.iter().map(of).sum(),
            flops: flops(loaded, &data, numbers, rows),
            optimizer: (kept(&config)? * 4.0 * numbers as f64) as u64,
            seconds: watch.seconds(),
        })
    }
}

/// Floating-point operations of a step.
fn flops(loaded: &Loaded, data: &Dataset, trained: usize, rows: u64) -> f64 {
    let tokens: usize = data.examples().iter().map(|e| e.ids.len().max(1)).sum();
    let tokens = tokens as f64 / data.len().max(1) as f64 * rows as f64;
    let matrices = loaded.model.backbone().params().iter().filter(|(name, p)| {
        // Embeddings are looked up.
        p.tensor().dim() > 1
            && !name.contains("embed")
            && !name.contains("wte")
            && !name.contains("wpe")
    });
    let matrices: usize = matrices.map(|(_, p)| p.tensor().numel()).sum();
    2.0 * tokens * (2.0 * matrices as f64 + trained as f64)
}

/// How many numbers the optimiser keeps for each trained one, by those of a matrix.
fn kept(config: &TrainConfig) -> Result<f64> {
    let mut optimizer = config.optimizer.build()?;
    let shape = [64, 64];
    let matrix = Tensor::zeros(&shape, Kind::Float, modl_core::Device::Cpu)?;
    let params = [("m".to_owned(), matrix.copy()?)];
    optimizer.step(&params, &[Some(matrix)], &|_| 0.0)?;
    let state: usize = optimizer.state()?.iter().map(|(_, t)| t.numel()).sum();
    Ok(state as f64 / 64.0 / 64.0)
}

/// How long steps take.
#[derive(Debug, Default)]
struct Clock(Vec<f64>);

impl Clock {
    /// The middle one of the measured steps.
    fn seconds(&self) -> f64 {
        let mut all: Vec<f64> = self.0.iter().skip(1).copied().collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

impl Sink for Clock {
    fn event(&mut self, event: &Event) -> modl_core::Result<()> {
        if let Event::Step { seconds, .. } = event {
            self.0.push(*seconds);
        }
        Ok(())
    }
}

fn bytes(t: &Tensor) -> u64 {
    let each = match t.kind() {
        Kind::Double | Kind::Int64 => 8,
        Kind::BFloat16 | Kind::Half => 2,
        Kind::Uint8 | Kind::Int8 | Kind::Bool => 1,
        _ => 4,
    };
    t.numel() as u64 * each
}

/// `1.3 GB`.
fn size(bytes: u64) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.0} kB", (b / 1e3).ceil()),
    }
}

/// `3 min 20 s`.
fn time(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "–".to_owned(),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_said_in_their_units() {
        assert_eq!([size(10), size(2_500_000), size(1_300_000_000)], ["1 kB", "2.5 MB", "1.3 GB"]);
        let said = [0.0125, 1.0, 119.0, 600.0, 9000.0, f64::NAN].map(time);
        assert_eq!(said, ["12 ms", "1.0 s", "119.0 s", "10 min", "2.5 h", "–"]);
    }

    #[test]
    fn what_an_optimiser_keeps_is_counted() {
        let of = |optimizer: &str| {
            let text = format!(r#"{{"optimizer":{{"type":"{optimizer}"}}}}"#);
            kept(&serde_json::from_str(&text).unwrap()).unwrap()
        };
        assert!((of("adamw") - 2.0).abs() < 0.01 && (of("lion") - 1.0).abs() < 0.01);
        assert!(of("sgd") < 0.01 && of("adafactor") < 0.1);
    }
}
