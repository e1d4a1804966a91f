//! Continual training: what is measured, what is kept, restarts, and methods against closed forms.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Error, Init, Modular, Result, Seed, Tensor};
use modl_train::{
    AccuracyMatrix, Batch, Convention, Dataset, Event, Example, Examples, Objective, Recipe, Sink,
    run,
};
use toy::{backbone, data, head, methods};

/// A recipe with one shared module and a continual strategy.
fn recipe(strategy: &str, train: &str) -> Recipe {
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
alpha = 8

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
train = {train}
tasks = ["plus", "minus"]
steps = 60
batch_size = 8
lr = 0.03
checkpoint_every = 25
"#
    );
    Recipe::parse(&text, "recipe.toml", &methods()).unwrap()
}

const ALL: &str = r#"["modules.*", "heads.*"]"#;

fn learn(recipe: &Recipe, folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = Modular::new(backbone(), Seed(3))?;
    let data = data(24);
    let examples = Examples { train: &data, test: Some(&data) };
    run(recipe, &methods(), &mut model, &head(), examples, folder, sink)?;
    Ok(model)
}

fn matrix(folder: &Path) -> AccuracyMatrix {
    let text = std::fs::read(folder.join("phases/1-learn/accuracy_matrix.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Stops after so many states have been saved.
struct StopAfter(usize);

impl Sink for StopAfter {
    fn event(&mut self, event: &Event) -> Result<()> {
        if matches!(event, Event::Saved { .. }) {
            self.0 -= 1;
        }
        if self.0 == 0 { Err(Error::invalid("test", "stop")) } else { Ok(()) }
    }
}

#[test]
fn the_second_task_undoes_the_first_and_the_matrix_shows_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut events: Vec<Event> = Vec::new();
    learn(&recipe(r#""naive""#, ALL), dir.path(), &mut events).unwrap();
    let matrix = matrix(dir.path());
    assert_eq!(
        (matrix.tasks.as_slice(), matrix.metric.as_str()),
        (["plus".into(), "minus".into()].as_slice(), "sign_accuracy")
    );
    // The tasks want opposite signs of like texts.
    assert!(matrix.rows[0][0] > 0.9 && matrix.rows[1][1] > 0.9, "{matrix:?}");
    let found = matrix.metrics(Convention::Paper);
    assert!(found["bwt"] < -0.5, "{found:?}");
    let told = events.iter().find_map(|e| match e {
        Event::Evaluated { name, metrics } if name == "learn" => Some(metrics["bwt"]),
        _ => None,
    });
    assert_eq!(told, Some(found["bwt"]));
}

#[test]
fn strong_springs_hold_the_first_task() {
    let dir = tempfile::tempdir().unwrap();
    learn(&recipe(r#"{ type = "ewc", lambda = 1e6 }"#, ALL), dir.path(), &mut ()).unwrap();
    let held = matrix(dir.path());
    assert!(held.rows[1][0] > 0.9, "{held:?}");
    let dir = tempfile::tempdir().unwrap();
    learn(&recipe(r#"{ type = "ewc", lambda = 0 }"#, ALL), dir.path(), &mut ()).unwrap();
    let free = matrix(dir.path());
    let naive = tempfile::tempdir().unwrap();
    learn(&recipe(r#""naive""#, ALL), naive.path(), &mut ()).unwrap();
    assert_eq!(free.rows, matrix(naive.path()).rows, "λ = 0 is nothing");
}

/// Every method that is stopped anywhere comes to the same bytes.
#[test]
fn stopped_runs_come_to_the_same_bytes() {
    modl_core::set_threads(1);
    for strategy in [r#""naive""#, r#"{ type = "ewc", online = 0.9 }"#] {
        let recipe = recipe(strategy, ALL);
        let whole = tempfile::tempdir().unwrap();
        learn(&recipe, whole.path(), &mut ()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let stops = [1, 1, 2, 1].map(|n| learn(&recipe, dir.path(), &mut StopAfter(n)).is_err());
        assert!(stops[0] && stops[2], "{strategy}: {stops:?}");
        learn(&recipe, dir.path(), &mut ()).unwrap();
        for file in ["params.safetensors", "accuracy_matrix.json", "02-minus/done.safetensors"] {
            let read = |dir: &Path| std::fs::read(dir.join("phases/1-learn").join(file)).unwrap();
            assert_eq!(read(whole.path()), read(dir.path()), "{strategy}: {file}");
        }
    }
}

/// The loss ½ Σⱼ (cⱼ θⱼ − x)² of numbers θ without any network.
#[derive(Debug)]
struct Means;

const C: [f32; 3] = [1.0, 2.0, 0.5];

impl Objective for Means {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        model.scope("heads.means").param("theta", &[3], Init::Zeros)?;
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, _: &Context) -> Result<Tensor> {
        let theta = model.params().get("heads.means.theta")?;
        let scaled = theta.mul(&Tensor::from_slice(&C, &[3], Device::Cpu)?)?;
        Tensor::stack(&vec![scaled; batch.len()], 0)
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        let away = predicted.sub(&batch.targets.unsqueeze(-1)?)?;
        away.square()?.sum_dims(&[-1], false)?.mul_scalar(0.5)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, _: &Batch) -> Result<Tensor> {
        a.sub(b)?.square()?.sum_dims(&[-1], false)
    }
}

/// On quadratic losses EWC is the mode of the Gaussian posterior, task after task, which is computed
/// here in f64 by its formula: precision λF + c², mean weighted by it.
#[test]
fn on_quadratic_losses_ewc_is_the_bayesian_posterior() {
    let tasks: [(&str, [f64; 4]); 3] =
        [("a", [1.0, 2.0, 0.5, 0.1]), ("b", [-1.0, -0.4, 0.3, 0.0]), ("c", [0.7, 0.2, 0.9, 1.9])];
    let examples = tasks.iter().flat_map(|(task, xs)| {
        xs.iter().enumerate().map(|(i, x)| Example {
            id: i.to_string(),
            task: (*task).to_owned(),
            ids: vec![1],
            target: *x as f32,
        })
    });
    let data = Dataset::new(examples.collect()).unwrap();
    let lambda = 3.0;
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
strategy = {{ type = "ewc", lambda = {lambda} }}
train = ["heads.*"]
steps = 800
batch_size = 4
lr = 0.1
clip = 1000.0
optimizer = {{ type = "sgd" }}
schedule = {{ type = "constant" }}
"#
    );
    let recipe = Recipe::parse(&text, "recipe.toml", &methods()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    run(&recipe, &methods(), &mut model, &Means, &data, dir.path(), &mut ()).unwrap();
    let found = model.params().get("heads.means.theta").unwrap().to_vec::<f64>().unwrap();

    for (j, c) in C.map(f64::from).into_iter().enumerate() {
        // Precision and mean of the prior, in units of the loss.
        let (mut precision, mut mean) = (0.0, 0.0);
        for (_, xs) in &tasks {
            let average = xs.iter().sum::<f64>() / 4.0;
            let mode = (c * average + precision * mean) / (c * c + precision);
            let fisher = xs.iter().map(|x| (c * (c * mode - x)).powi(2)).sum::<f64>() / 4.0;
            let more = lambda * fisher;
            mean = (precision * mean + more * mode) / (precision + more);
            precision += more;
            if xs == &tasks[2].1 {
                assert!((found[j] - mode).abs() < 1e-5, "{j}: {} wanted {mode}", found[j]);
            }
        }
    }
}
