//! Meta-learning against derivatives that are computed by hand, and restarts.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::collections::BTreeMap;
use std::path::Path;

use modl_core::{Context, Device, Init, Modular, Result, Seed, Tensor};
use modl_train::{
    Adaptation, Batch, Dataset, Event, Example, Examples, Objective, Recipe, Sink, run,
};
use toy::{StopAfter, backbone, data, head, methods};

/// ¼ Σⱼ (cⱼ θⱼ − x)⁴ of numbers θ without any network: its curvature depends on θ.
#[derive(Debug)]
struct Quartic;

const C: [f64; 3] = [1.0, 1.5, 0.5];
const TASKS: [(&str, f64); 3] = [("a", 1.0), ("b", -0.5), ("c", 0.7)];

impl Objective for Quartic {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        model.scope("heads.numbers").param("theta", &[3], Init::Zeros)?;
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, _: &Context) -> Result<Tensor> {
        let theta = model.params().get("heads.numbers.theta")?;
        let scaled = theta.mul(&Tensor::from_slice(&C.map(|c| c as f32), &[3], Device::Cpu)?)?;
        Tensor::stack(&vec![scaled; batch.len()], 0)
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        let away = predicted.sub(&batch.targets.unsqueeze(-1)?)?;
        away.square()?.square()?.sum_dims(&[-1], false)?.mul_scalar(0.25)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, _: &Batch) -> Result<Tensor> {
        a.sub(b)?.square()?.sum_dims(&[-1], false)
    }
}

/// θ after one step of gradient descent with a learning rate of 0.1 by a strategy. All rows of a task
/// are alike, so that it does not matter which are drawn.
fn one_step(strategy: &str) -> Vec<f64> {
    let examples = TASKS.iter().flat_map(|(task, x)| {
        (0..6).map(|i| Example {
            id: i.to_string(),
            task: (*task).to_owned(),
            ids: vec![1].into(),
            target: *x as f32,
        })
    });
    let data = Dataset::new(examples.collect()).unwrap();
    let text = format!(
        r#"
[backbone]
path = "toy"

[data]
tasks = {{ a = "a.tsv" }}

[head]
type = "regression"

[[phases]]
name = "learn"
strategy = {strategy}
train = ["heads.*"]
steps = 1
lr = 0.1
clip = 1000.0
optimizer = {{ type = "sgd" }}
schedule = {{ type = "constant" }}
"#
    );
    let recipe = Recipe::parse(&text, "recipe.toml", &methods()).unwrap();
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    run(&recipe, &methods(), &mut model, &Quartic, &data, dir.path(), &mut ()).unwrap();
    model.params().get("heads.numbers.theta").unwrap().to_vec::<f64>().unwrap()
}

/// The part of a task's loss that a number has.
fn loss(j: usize, theta: f64, x: f64) -> f64 {
    0.25 * (C[j] * theta - x).powi(4)
}

fn slope(j: usize, theta: f64, x: f64) -> f64 {
    C[j] * (C[j] * theta - x).powi(3)
}

/// Gradient descent on one task.
fn descend(j: usize, mut theta: f64, x: f64, alpha: f64, steps: usize) -> f64 {
    for _ in 0..steps {
        theta -= alpha * slope(j, theta, x);
    }
    theta
}

fn assert_step(strategy: &str, gradient: impl Fn(usize) -> f64) {
    let found = one_step(strategy);
    for (j, found) in found.into_iter().enumerate() {
        let wanted = -0.1 * gradient(j);
        assert!((found - wanted).abs() < 1e-6, "{strategy}, {j}: {found} wanted {wanted}");
    }
}

/// The derivative by differences of what the loss is after the inner steps.
#[test]
fn the_second_order_is_the_derivative_through_all_inner_steps() {
    let (alpha, steps) = (0.2, 3);
    let through = |j: usize| {
        let after = |theta: f64| {
            let task = |(_, x): &(&str, f64)| loss(j, descend(j, theta, *x, alpha, steps), *x);
            TASKS.iter().map(task).sum::<f64>() / 3.0
        };
        (after(1e-5) - after(-1e-5)) / 2e-5
    };
    let strategy =
        r#"{ type = "maml", inner_lr = 0.2, inner_steps = 3, tasks = 3, support = 2, query = 3 }"#;
    assert_step(strategy, through);
    // The curvature is no small thing here.
    let first = |j| {
        TASKS.iter().map(|(_, x)| slope(j, descend(j, 0.0, *x, alpha, steps), *x)).sum::<f64>()
            / 3.0
    };
    assert!((0..3).any(|j| (first(j) - through(j)).abs() > 0.02));
    assert_step(&strategy.replace("inner_lr", r#"order = "first", inner_lr"#), first);
}

#[test]
fn without_a_way_it_is_the_joint_gradient() {
    let joint = |j: usize| TASKS.iter().map(|(_, x)| slope(j, 0.0, *x)).sum::<f64>() / 3.0;
    for order in ["first", "second"] {
        let strategy = format!(
            r#"{{ type = "maml", inner_lr = 0.0, order = "{order}", tasks = 5, support = 1, query = 1 }}"#
        );
        assert_step(&strategy, joint);
    }
}

#[test]
fn reptile_goes_towards_where_training_ends() {
    let gone =
        |j: usize| -TASKS.iter().map(|(_, x)| descend(j, 0.0, *x, 0.2, 4)).sum::<f64>() / 3.0;
    assert_step(
        r#"{ type = "reptile", inner_lr = 0.2, inner_steps = 4, tasks = 3, rows = 2 }"#,
        gone,
    );
}

fn recipe(strategy: &str, tasks: &str) -> Recipe {
    let text = format!(
        r#"
[backbone]
path = "toy"

[data]
tasks = {{ plus = "plus.tsv", minus = "minus.tsv" }}

[modules.shared]
type = "lora"
targets = ["query", "value"]
r = 4
dropout = 0.1

[router]
type = "fixed"
modules = ["shared"]

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "learn"
strategy = {strategy}
tasks = {tasks}
steps = 12
lr = 0.02
checkpoint_every = 5
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

const STRATEGIES: [&str; 3] = [
    r#"{ type = "maml", inner_lr = 0.05, inner_steps = 2, support = 4, query = 4 }"#,
    r#"{ type = "maml", order = "first", inner_lr = 0.05, support = 4, query = 4 }"#,
    r#"{ type = "reptile", inner_lr = 0.05, inner_steps = 3, rows = 4 }"#,
];

#[test]
fn stopped_runs_come_to_the_same_bytes() {
    modl_core::set_threads(1);
    let data = data(12);
    for strategy in STRATEGIES {
        let recipe = recipe(strategy, r#"["plus", "minus"]"#);
        let start = |folder: &Path, examples: Examples, sink: &mut dyn Sink| {
            let mut model = Modular::new(backbone(), Seed(3)).unwrap();
            run(&recipe, &methods(), &mut model, &head(), examples, folder, sink)
        };
        let both = Examples { train: &data, test: Some(&data) };
        let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        // What is measured does not change what is learned.
        start(whole.path(), (&data).into(), &mut ()).unwrap();
        let stop = start(dir.path(), both, &mut StopAfter(2)).unwrap_err();
        assert!(stop.to_string().contains("stop"), "{stop}");
        start(dir.path(), both, &mut ()).unwrap();
        let read =
            |dir: &Path| std::fs::read(dir.join("phases/1-learn/params.safetensors")).unwrap();
        assert!(read(whole.path()) == read(dir.path()), "{strategy}");
    }
}

#[test]
fn a_new_task_is_adapted_to_and_told_apart() {
    let data = data(40);
    let recipe = recipe(STRATEGIES[0], r#"["plus"]"#);
    let dir = tempfile::tempdir().unwrap();
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    let examples = Examples { train: &data, test: Some(&data) };
    let mut events: Vec<Event> = Vec::new();
    run(&recipe, &methods(), &mut model, &head(), examples, dir.path(), &mut events).unwrap();
    let text = std::fs::read(dir.path().join("phases/1-learn/adaptation.json")).unwrap();
    let all: BTreeMap<String, Adaptation> = serde_json::from_slice(&text).unwrap();
    assert_eq!(
        all.iter().map(|(t, a)| (t.as_str(), a.new)).collect::<Vec<_>>(),
        [("minus", true), ("plus", false)]
    );
    let told = events.iter().find_map(|e| match e {
        Event::Evaluated { name, metrics, .. } if name == "learn/after adaptation" => {
            Some(metrics.clone())
        }
        _ => None,
    });
    assert_eq!(told.unwrap()["minus"], all["minus"].after.unwrap());
}

#[test]
fn what_cannot_be_is_refused() {
    let data = data(3);
    for (strategy, word) in [
        (r#"{ type = "maml", support = 3, query = 3 }"#, "has 3 examples"),
        (r#"{ type = "maml", inner_steps = 0 }"#, "inner_steps"),
        (r#"{ type = "reptile", inner_lr = -1.0 }"#, "inner_lr"),
    ] {
        let recipe = recipe(strategy, r#"["plus"]"#);
        let dir = tempfile::tempdir().unwrap();
        let mut model = Modular::new(backbone(), Seed(3)).unwrap();
        let error = run(&recipe, &methods(), &mut model, &head(), &data, dir.path(), &mut ());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
