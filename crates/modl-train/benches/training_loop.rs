//! What the loop costs beside its passes, how long a checkpoint keeps training waiting, and what a step
//! of each continual method costs against a step without any.
//!
//! - **Loop**: a LoRA of rank 8 of MiniLM on the sentiment texts, batches of 16, with a log of every
//!   step as JSON lines and for TensorBoard and a checkpoint each 10 steps, against the same batches,
//!   passes and optimiser steps and nothing else, by turns. Nothing where the model is not there
//!   (`cargo xtask setup`).
//! - **Checkpoint**: the time between two steps with a state saved there and without, with 10 MB of
//!   parameters, of which AdamW keeps 20 MB more.
//! - **Continual**: permuted tasks of 784 numbers for a perceptron 784-100-100; the median time from
//!   step to step on the third task, runs by turns.
//!
//! `OMP_NUM_THREADS=2 cargo bench -p modl-train --bench training_loop`; `-- loop`, `-- checkpoint`,
//! `-- continual` for one of them, `--quick` for a look.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs)]

#[path = "../tests/toy/mod.rs"]
mod toy;

use std::path::Path;
use std::time::Instant;

use modl_aggregate::WeightedSum;
use modl_compute::Lora;
use modl_core::testing::TinyBackbone;
use modl_core::{
    Device, Init, Kind, Modular, Result, Seed, Select, Targets, Tensor, keep_freed_memory,
};
use modl_models::{LoadOptions, Tokenizer, open};
use modl_route::Fixed;
use modl_train::{
    Batch, Batches, Classification, Dataset, Event, Example, Fanout, JsonLines, Objective, Recipe,
    Regression, Sink, StepContext, StepRule, TensorBoard, TokenIds, TrainConfig, Trainer, read_tsv,
    run,
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let wanted = |part: &str| {
        let named = args.iter().filter(|a| !a.starts_with("--")).cloned().collect::<Vec<_>>();
        named.is_empty() || named.iter().any(|n| part.contains(n.as_str()))
    };
    keep_freed_memory(); // as the modl binary does
    let rounds = if has("--quick") { 3 } else { 15 };
    if wanted("loop") {
        the_loop(rounds);
    }
    if wanted("checkpoint") {
        checkpoint(if has("--quick") { 6 } else { 40 });
    }
    if wanted("continual") {
        continual(if has("--quick") { 2 } else { 9 });
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// The middle one and the quarters.
fn spread(all: &[f64]) -> String {
    let mut all = all.to_vec();
    all.sort_by(f64::total_cmp);
    let at = |share: usize| all[(all.len() - 1) * share / 4];
    format!("{:.3} [{:.3}, {:.3}]", at(2), at(1), at(3))
}

/// The sentiment texts in MiniLM's tokens.
fn texts(assets: &Path) -> Dataset {
    let tokenizer = Tokenizer::open(assets.join("all-MiniLM-L6-v2")).unwrap();
    let mut examples = Vec::new();
    for task in ["tweets", "amazon", "movies", "nyt"] {
        let rows = read_tsv(assets.join("sentiment").join(format!("{task}.tsv"))).unwrap();
        for row in rows.into_iter().take(400) {
            let ids = tokenizer.encode_one(&row.text).unwrap().into();
            examples.push(Example { id: row.id, task: task.to_owned(), ids, target: row.score });
        }
    }
    Dataset::new(examples).unwrap()
}

fn the_loop(rounds: usize) {
    const STEPS: u64 = 20;
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets");
    if !assets.join("all-MiniLM-L6-v2").exists() {
        eprintln!("loop: nothing is measured, there is no {}", assets.display());
        return;
    }
    let data = texts(&assets);
    let objective = Regression { head: "score".into(), dim: 384 };
    let model = || {
        let backbone = open(assets.join("all-MiniLM-L6-v2"), &LoadOptions::default()).unwrap();
        let mut model = Modular::from_box(backbone, Seed(0)).unwrap();
        let lora = Lora { r: 8, alpha: 16.0, ..Lora::default() };
        model.attach("all", Box::new(lora), &Targets::names(["query", "value"])).unwrap();
        model.route(Box::new(Fixed::modules(["all"])), false).unwrap();
        model.aggregate(Box::new(WeightedSum::default())).unwrap();
        objective.setup(&mut model).unwrap();
        model
    };
    let model = model();
    let config = TrainConfig {
        steps: Some(STEPS),
        batch_size: 16,
        lr: 1e-4,
        checkpoint_every: 10,
        ..TrainConfig::default()
    };
    model.train_only(&Select::any(config.train.clone())).unwrap();
    let params = model.trainable();
    let leaves: Vec<&Tensor> = params.iter().map(|(_, t)| t).collect();
    let mut optimizer = config.optimizer.build().unwrap();
    let (mut ratios, mut steps) = (Vec::new(), Vec::new());
    for round in 0..rounds as u64 {
        let mut batches =
            Batches::new(&data, 16, Seed(round), Device::Cpu, Default::default()).unwrap();
        let all: Vec<Batch> = (0..STEPS).map(|_| batches.advance().unwrap()).collect();
        let clock = Instant::now();
        for (step, batch) in all.iter().enumerate() {
            let cx = modl_core::Context::train(Seed(round), step as u64);
            let cx = Batch::describe(batch, cx).unwrap();
            let loss = objective.loss(&model, batch, &cx).unwrap();
            let grads = loss.gradients(&leaves, false).unwrap();
            optimizer.step(&params, &grads, &|_| 1e-4).unwrap();
            loss.item().unwrap();
        }
        let without = clock.elapsed().as_secs_f64();
        let folder = tempfile::tempdir().unwrap();
        let mut lines = JsonLines::append(folder.path().join("events.jsonl")).unwrap();
        let mut board = TensorBoard::below(folder.path().join("board"));
        let trainer = Trainer::new("fit", &model, &objective, config.clone(), Seed(round)).unwrap();
        let mut trainer = trainer.keep_in(folder.path().join("state"));
        let clock = Instant::now();
        let mut sinks = Fanout(vec![&mut lines, &mut board]);
        trainer.train(&data, &Batch::describe, &mut sinks).unwrap();
        let with = clock.elapsed().as_secs_f64();
        ratios.push(with / without);
        steps.push(without / STEPS as f64 * 1e3);
    }
    println!("loop: a step of {:.1} ms; with everything × {}", median(steps), spread(&ratios));
}

/// Notes when steps begin and end.
#[derive(Debug, Default)]
struct Between {
    ended: Option<Instant>,
    gaps: Vec<f64>,
}

impl StepRule for Between {
    fn batch(&mut self, _: &StepContext, batch: Batch) -> Result<Batch> {
        self.gaps.extend(self.ended.map(|t| t.elapsed().as_secs_f64() * 1e3));
        Ok(batch)
    }

    fn after_step(&mut self, _: &StepContext, _: &[Option<Tensor>]) -> Result<()> {
        self.ended = Some(Instant::now());
        Ok(())
    }
}

struct Silent;

impl Sink for Silent {
    fn event(&mut self, _: &Event) -> Result<()> {
        Ok(())
    }
}

fn checkpoint(steps: u64) {
    const EVERY: usize = 4;
    let mut model =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(0)).unwrap();
    // A head as large as such an adapter: 10 MB in 40 parameters.
    let objective = Regression { head: "score".into(), dim: 8 };
    objective.setup(&mut model).unwrap();
    let mut scope = model.scope("heads.large");
    for n in 0..40 {
        scope.param(&format!("part{n}"), &[256, 256], Init::Zeros).unwrap();
    }
    let example = |i: usize| Example {
        id: i.to_string(),
        task: "t".into(),
        ids: vec![(i % 16) as i64; 8].into(),
        target: 1.0,
    };
    let data = Dataset::new((0..256).map(example).collect()).unwrap();
    let config = TrainConfig {
        train: vec!["heads.*".into()],
        steps: Some(steps),
        batch_size: 64,
        checkpoint_every: EVERY as u64,
        ..TrainConfig::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let mut rule = Large::default();
    let trainer = Trainer::new("fit", &model, &objective, config, Seed(0)).unwrap();
    trainer
        .keep_in(folder.path())
        .train_by(&mut rule, &data, &Batch::describe, &mut Silent)
        .unwrap();
    let bytes =
        std::fs::metadata(folder.path().join(format!("state-{steps}.safetensors"))).unwrap();
    let (at, between): (Vec<_>, Vec<_>) =
        rule.0.gaps.iter().enumerate().partition(|(i, _)| (i + 1) % EVERY == 0);
    let of = |all: Vec<(usize, &f64)>| all.into_iter().map(|(_, t)| *t).collect::<Vec<f64>>();
    println!(
        "checkpoint of {:.1} MB: a step waits {} ms, without one {}",
        bytes.len() as f64 / 1e6,
        spread(&of(at)),
        spread(&of(between)),
    );
}

/// [`Between`] steps in which the large parameters have gradients.
#[derive(Debug, Default)]
struct Large(Between);

impl StepRule for Large {
    fn batch(&mut self, cx: &StepContext, batch: Batch) -> Result<Batch> {
        self.0.batch(cx, batch)
    }

    fn gradients(&mut self, cx: &StepContext, batch: &Batch) -> Result<modl_train::StepGradients> {
        let mut found = cx.gradients(batch)?;
        for (slot, (_, t)) in found.grads.iter_mut().zip(cx.params()) {
            slot.get_or_insert(t.detach()?.ones_like()?);
        }
        // A real step takes its time, in which the state before is written.
        std::thread::sleep(std::time::Duration::from_millis(50));
        Ok(found)
    }

    fn after_step(&mut self, cx: &StepContext, grads: &[Option<Tensor>]) -> Result<()> {
        self.0.after_step(cx, grads)
    }
}

const METHODS: [(&str, &str); 9] = [
    ("naive", r#""naive""#),
    ("ewc", r#"{ type = "ewc" }"#),
    ("ewc, online", r#"{ type = "ewc", online = 0.9 }"#),
    ("si", r#"{ type = "si" }"#),
    ("lwf", r#"{ type = "lwf" }"#),
    ("replay", r#"{ type = "replay", memory = 500, rows = 64 }"#),
    ("a_gem", r#"{ type = "a_gem", memory = 500, rows = 64 }"#),
    ("gem", r#"{ type = "gem", memory_per_task = 64 }"#),
    ("pack_net", r#""module_per_task""#),
];

/// When each step of the third task was over.
#[derive(Default)]
struct Steps {
    third: bool,
    last: Option<Instant>,
    times: Vec<f64>,
}

impl Sink for Steps {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started { name, .. } => {
                (self.third, self.last) = (name.contains("03-"), None);
            }
            Event::Step { .. } if self.third => {
                self.times.extend(self.last.map(|t| t.elapsed().as_secs_f64() * 1e3));
                self.last = Some(Instant::now());
            }
            _ => {}
        }
        Ok(())
    }
}

fn continual(rounds: usize) {
    const INPUTS: i64 = 784;
    let methods = toy::methods();
    let classes: Vec<usize> = (0..10).collect();
    let rows =
        Init::Normal(1.0).tensor(&[2000, INPUTS], Seed(1), Kind::Float, Device::Cpu).unwrap();
    let example = |i: usize| Example {
        id: i.to_string(),
        task: "digits".into(),
        ids: TokenIds::default(),
        target: (i % 10) as f32,
    };
    let data = Dataset::dense((0..2000).map(example).collect(), "pixel_values", rows).unwrap();
    let data = data.permuted(3, Seed(1)).unwrap();
    let one = |strategy: &str, packed: bool| {
        let (modules, train) = match packed {
            true => (
                "modules.permutation-0 = { type = \"pack_net\", prune = 0.75, targets = [\"linear\"] }\n\
                 router = { type = \"fixed\" }\naggregator = { type = \"weighted_sum\" }",
                "modules.{task}.*",
            ),
            false => ("", "base.*"),
        };
        let recipe = format!(
            r#"seed = 1
backbone.fresh = {{ type = "mlp", inputs = {INPUTS}, hidden = [100, 100] }}
data.tasks = {{ digits = "none" }}
head = {{ type = "classification", classes = ["0", "1"] }}
{modules}
[[phases]]
name = "learn"
strategy = {strategy}
train = ["{train}", "heads.*"]
steps = 60
batch_size = 64
log_every = 1
optimizer = {{ type = "sgd" }}
"#
        );
        let recipe = Recipe::parse(&recipe, "recipe.toml", &methods).unwrap();
        let fresh = recipe.fresh_backbone(&methods).unwrap().unwrap();
        let mut model = Modular::from_box(fresh, Seed(1)).unwrap();
        let objective = Classification {
            head: "class".into(),
            dim: 100,
            classes: classes.iter().map(usize::to_string).collect(),
            ..Classification::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let mut steps = Steps::default();
        run(&recipe, &methods, &mut model, &objective, &data, folder.path(), &mut steps).unwrap();
        median(steps.times)
    };
    let mut times = vec![Vec::new(); METHODS.len()];
    for _ in 0..rounds {
        for (i, (name, strategy)) in METHODS.iter().enumerate() {
            times[i].push(one(strategy, *name == "pack_net"));
        }
    }
    println!("| continual method | ms from step to step | against `naive` |\n|---|---|---|");
    for (i, (name, _)) in METHODS.iter().enumerate() {
        let ratios: Vec<f64> = times[i].iter().zip(&times[0]).map(|(t, naive)| t / naive).collect();
        println!("| {name} | {:.2} | {} |", median(times[i].clone()), spread(&ratios));
    }
}
