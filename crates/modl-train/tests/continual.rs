//! Continual training: what is measured, what is kept, restarts, and methods against closed forms.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod toy;

use std::path::Path;

use modl_core::{Context, Device, Init, Modular, Result, Seed, Tensor};
use modl_train::{
    AccuracyMatrix, Batch, Convention, Dataset, Event, Example, Examples, Objective, Recipe, Sink,
    evaluate, restore, run,
};
use toy::{StopAfter, backbone, data, head, methods};

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
    assert!(matrix.at(0, 0) > Some(0.9) && matrix.at(1, 1) > Some(0.9), "{matrix:?}");
    let found = matrix.metrics(Convention::Paper);
    assert!(found["bwt"] < -0.5, "{found:?}");
    let told = events.iter().find_map(|e| match e {
        Event::Evaluated { name, metrics, .. } if name == "learn" => Some(metrics["bwt"]),
        _ => None,
    });
    assert_eq!(told, Some(found["bwt"]));
}

/// Texts of which one can tell the task, of two tasks with opposite signs.
fn told_apart(n: usize) -> Dataset {
    let examples = ["plus", "minus"].into_iter().enumerate().flat_map(|(t, task)| {
        (0..n).map(move |i| {
            let ids = (0..3).map(|k| ((i * 5 + k * 3) % 8 + 8 * t) as i64).collect();
            let size = 0.5 + (i % 4) as f32 / 8.0;
            let target = if t == 0 { size } else { -size };
            Example { id: i.to_string(), task: task.to_owned(), ids, target }
        })
    });
    Dataset::new(examples.collect()).unwrap()
}

/// Where one can tell the tasks apart, what is done against forgetting leaves more of the first task
/// than nothing does.
#[test]
fn each_method_forgets_less_than_none() {
    let data = told_apart(16);
    let error = |strategy: &str| {
        let dir = tempfile::tempdir().unwrap();
        let mut model = Modular::new(backbone(), Seed(3)).unwrap();
        run(&recipe(strategy, ALL), &methods(), &mut model, &head(), &data, dir.path(), &mut ())
            .unwrap();
        let first = data.of_task("plus").unwrap();
        let said = evaluate(&model, &head(), &first, 16, &Batch::describe).unwrap();
        said.iter().map(|p| (p.prediction - p.target).powi(2)).sum::<f64>() / said.len() as f64
    };
    let naive = error(r#""naive""#);
    for strategy in [
        r#"{ type = "ewc", lambda = 100, labels = "drawn" }"#,
        r#"{ type = "si", c = 1.0 }"#,
        r#"{ type = "lwf", lambda = 1.0 }"#,
        r#"{ type = "replay", memory = 16, rows = 8 }"#,
        r#"{ type = "a_gem", memory = 16, rows = 16 }"#,
        r#"{ type = "gem", memory_per_task = 16 }"#,
    ] {
        let found = error(strategy);
        assert!(found < 0.7 * naive, "{strategy}: {found}, naive {naive}");
    }
}

#[test]
fn strong_springs_hold_the_first_task() {
    let dir = tempfile::tempdir().unwrap();
    learn(&recipe(r#"{ type = "ewc", lambda = 1e6 }"#, ALL), dir.path(), &mut ()).unwrap();
    let held = matrix(dir.path());
    assert!(held.at(1, 0) > Some(0.9), "{held:?}");
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
    for strategy in [
        r#""naive""#,
        r#"{ type = "ewc", online = 0.9 }"#,
        r#""si""#,
        r#""lwf""#,
        r#"{ type = "replay", memory = 10, rows = 4 }"#,
        r#"{ type = "a_gem", memory = 10, rows = 4 }"#,
        r#"{ type = "gem", memory_per_task = 5 }"#,
    ] {
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

/// With a module for each task the outputs on earlier tasks stay bit for bit what they were, by the
/// method and not by luck: the optimiser decays, and has momentum.
#[test]
fn modules_of_tasks_do_not_touch_each_other() {
    modl_core::set_threads(1);
    let data = told_apart(16);
    for module in ["pack_net", "sup_sup", "piggyback", "lora", "bottleneck"] {
        let text = format!(
            r#"
[backbone]
path = "toy"

[data]
tasks = {{ plus = "plus.tsv", minus = "minus.tsv" }}

[modules.plus]
type = "{module}"
targets = ["{}"]

[router]
type = "fixed"

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "learn"
strategy = "module_per_task"
tasks = ["plus", "minus"]
steps = 40
batch_size = 8
lr = 0.02
optimizer = {{ type = "adamw", weight_decay = 0.1, no_decay = [] }}
checkpoint_every = 15
"#,
            if module == "bottleneck" { "output" } else { "query" }
        );
        let recipe = Recipe::parse(&text, "recipe.toml", &methods()).unwrap();
        let learn = |folder: &Path, sink: &mut dyn Sink| -> Result<Modular> {
            let mut model = Modular::new(backbone(), Seed(3)).unwrap();
            let examples = Examples { train: &data, test: Some(&data) };
            run(&recipe, &methods(), &mut model, &head(), examples, folder, sink)?;
            Ok(model)
        };
        let said = |model: &Modular, task: &str| {
            let rows = data.of_task(task).unwrap();
            let said = evaluate(model, &head(), &rows, 16, &Batch::describe).unwrap();
            said.iter().map(|p| p.prediction.to_bits()).collect::<Vec<_>>()
        };
        let dir = tempfile::tempdir().unwrap();
        // The first task is done, and the second has begun.
        let stop = learn(dir.path(), &mut StopAfter(4)).unwrap_err().to_string();
        assert!(stop.contains("stop"), "{module}: {stop}");
        let done = dir.path().join("phases/1-learn/01-plus/done.safetensors");
        assert!(
            done.exists() && !dir.path().join("phases/1-learn/02-minus/done.safetensors").exists()
        );
        let first = {
            let stopped = tempfile::tempdir().unwrap();
            let only = text.replace(r#"tasks = ["plus", "minus"]"#, r#"tasks = ["plus"]"#);
            let only = Recipe::parse(&only, "recipe.toml", &methods()).unwrap();
            let mut model = Modular::new(backbone(), Seed(3)).unwrap();
            run(&only, &methods(), &mut model, &head(), &data, stopped.path(), &mut ()).unwrap();
            said(&model, "plus")
        };
        let model = learn(dir.path(), &mut ()).unwrap();
        assert_eq!(said(&model, "plus"), first, "{module}");
        let matrix = matrix(dir.path());
        assert_eq!(matrix.at(0, 0), matrix.at(1, 0), "{module}");
        let mut again = Modular::new(backbone(), Seed(3)).unwrap();
        restore(&recipe, &methods(), &mut again, &head(), dir.path()).unwrap();
        for task in ["plus", "minus"] {
            assert_eq!(said(&again, task), said(&model, task), "{module}, restored");
        }
        assert_ne!(said(&model, "minus"), said(&model, "plus"));
    }
}

/// Of three tasks the last is like the first: it gets that one's module, and nothing is trained.
#[test]
fn a_module_grows_only_where_none_serves() {
    let data = {
        let again = told_apart(16);
        let mut examples = again.examples().to_vec();
        let like = again.examples().iter().filter(|e| e.task == "plus");
        examples.extend(like.map(|e| Example { task: "like_plus".into(), ..e.clone() }));
        Dataset::new(examples).unwrap()
    };
    let text = r#"
[backbone]
path = "toy"

[data]
tasks = { plus = "plus.tsv", minus = "minus.tsv" }

[modules.plus]
type = "lora"
targets = ["query", "value"]
r = 4

[router]
type = "fixed"

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "learn"
strategy = "growth"
tasks = ["plus", "minus", "like_plus"]
steps = 60
batch_size = 8
lr = 0.03
checkpoint_every = 25
"#;
    modl_core::set_threads(1);
    let recipe = Recipe::parse(text, "recipe.toml", &methods()).unwrap();
    let learn = |folder: &Path, sink: &mut dyn Sink| -> Result<Modular> {
        let mut model = Modular::new(backbone(), Seed(3)).unwrap();
        let examples = Examples { train: &data, test: Some(&data) };
        run(&recipe, &methods(), &mut model, &head(), examples, folder, sink)?;
        Ok(model)
    };
    let dir = tempfile::tempdir().unwrap();
    let stop = learn(dir.path(), &mut StopAfter(5)).unwrap_err().to_string();
    assert!(stop.contains("stop"), "{stop}");
    let model = learn(dir.path(), &mut ()).unwrap();
    assert_eq!(model.modules(), ["minus", "plus"]);
    let rows = matrix(dir.path()).rows;
    assert_eq!(rows[0].iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, false]);
    assert_eq!(rows[2][0], rows[0][0], "what was learned stays");
    assert_eq!(rows[2][2], rows[0][0], "by the same module");
    // What is restored sends the tasks where they were sent.
    let mut again = Modular::new(backbone(), Seed(3)).unwrap();
    restore(&recipe, &methods(), &mut again, &head(), dir.path()).unwrap();
    let said = |model: &Modular| {
        let said = evaluate(model, &head(), &data, 16, &Batch::describe).unwrap();
        said.iter().map(|p| p.prediction.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(said(&model), said(&again));
    let whole = tempfile::tempdir().unwrap();
    learn(whole.path(), &mut ()).unwrap();
    let read = |dir: &Path| std::fs::read(dir.join("phases/1-learn/params.safetensors")).unwrap();
    assert!(read(whole.path()) == read(dir.path()), "a stop changes nothing");
}

#[test]
fn the_first_module_is_to_have_the_name_of_the_first_task() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(r#""module_per_task""#, ALL);
    let error = learn(&recipe, dir.path(), &mut ()).unwrap_err().to_string();
    assert!(error.contains(r#"[modules."plus"]"#), "{error}");
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

/// Three tasks of four numbers each.
const NUMBERS: [(&str, [f64; 4]); 3] =
    [("a", [1.0, 2.0, 0.5, 0.1]), ("b", [-1.0, -0.4, 0.3, 0.0]), ("c", [0.7, 0.2, 0.9, 1.9])];

/// [`Means`] of cⱼ θⱼ + bⱼ, b a task's own.
#[derive(Debug)]
struct OwnMeans;

impl Objective for OwnMeans {
    fn setup(&self, model: &mut Modular) -> Result<()> {
        for (task, _) in NUMBERS {
            model.scope(&format!("heads.own.{task}")).param("b", &[3], Init::Zeros)?;
        }
        Means.setup(model)
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let own = batch.tasks.iter().map(|t| model.params().get(&format!("heads.own.{t}.b")));
        let own = own.map(|b| b.cloned()).collect::<Result<Vec<_>>>()?;
        Means.predict(model, batch, cx)?.add(&Tensor::stack(&own, 0)?)
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        Means.losses(predicted, batch)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, batch: &Batch) -> Result<Tensor> {
        Means.divergence(a, b, batch)
    }
}

/// θ after the tasks of [`NUMBERS`], each of whose steps sees all four, by gradient descent with a
/// learning rate of 0.1.
fn means(strategy: &str, tasks: usize, steps: usize, folder: &Path) -> Vec<f64> {
    descend(&Means, strategy, tasks, steps, folder)
}

fn descend(
    objective: &dyn Objective,
    strategy: &str,
    tasks: usize,
    steps: usize,
    folder: &Path,
) -> Vec<f64> {
    let examples = NUMBERS.iter().take(tasks).flat_map(|(task, xs)| {
        xs.iter().enumerate().map(|(i, x)| Example {
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
steps = {steps}
batch_size = 4
lr = 0.1
clip = 1000.0
optimizer = {{ type = "sgd" }}
schedule = {{ type = "constant" }}
"#
    );
    let recipe = Recipe::parse(&text, "recipe.toml", &methods()).unwrap();
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    run(&recipe, &methods(), &mut model, objective, &data, folder, &mut ()).unwrap();
    model.params().get("heads.means.theta").unwrap().to_vec::<f64>().unwrap()
}

/// The gradient of the mean loss of some numbers, in f64.
fn slope(theta: &[f64], xs: &[f64]) -> Vec<f64> {
    let mean = xs.iter().sum::<f64>() / xs.len() as f64;
    theta.iter().zip(C).map(|(t, c)| f64::from(c) * (f64::from(c) * t - mean)).collect()
}

/// Gradient descent on the tasks by a rule that makes a step of the gradients on the task and on all
/// tasks before it.
fn by_hand(
    tasks: usize,
    steps: usize,
    rule: impl Fn(Vec<f64>, &[Vec<f64>]) -> Vec<f64>,
) -> Vec<f64> {
    let mut theta = vec![0.0; 3];
    for t in 0..tasks {
        for _ in 0..steps {
            let earlier: Vec<_> = NUMBERS[..t].iter().map(|(_, xs)| slope(&theta, xs)).collect();
            let step = rule(slope(&theta, &NUMBERS[t].1), &earlier);
            theta.iter_mut().zip(step).for_each(|(t, g)| *t -= 0.1 * g);
        }
    }
    theta
}

fn assert_close(found: &[f64], wanted: &[f64]) {
    for (f, w) in found.iter().zip(wanted) {
        assert!((f - w).abs() < 1e-5, "{found:?} wanted {wanted:?}");
    }
}

/// On quadratic losses EWC is the mode of the Gaussian posterior, task after task, which is computed
/// here in f64 by its formula: precision λF + c², mean weighted by it.
#[test]
fn on_quadratic_losses_ewc_is_the_bayesian_posterior() {
    let lambda = 3.0;
    let dir = tempfile::tempdir().unwrap();
    let strategy = format!(r#"{{ type = "ewc", lambda = {lambda} }}"#);
    let found = means(&strategy, 3, 800, dir.path());
    let wanted = C.map(f64::from).map(|c| {
        // Precision and mean of the prior, in units of the loss.
        let (mut precision, mut mean, mut mode) = (0.0, 0.0, 0.0);
        for (_, xs) in &NUMBERS {
            let average = xs.iter().sum::<f64>() / 4.0;
            mode = (c * average + precision * mean) / (c * c + precision);
            let fisher = xs.iter().map(|x| (c * (c * mode - x)).powi(2)).sum::<f64>() / 4.0;
            let more = lambda * fisher;
            mean = (precision * mean + more * mode) / (precision + more);
            precision += more;
        }
        mode
    });
    assert_close(&found, &wanted);
}

/// The way of each parameter is what its part of the loss has fallen by, up to the size of steps: here
/// by the sum of a geometric series, and within that of steps that go to 0.
#[test]
fn synapses_keep_account_of_what_they_lowered() {
    let (steps, xi) = (40, 0.1);
    let dir = tempfile::tempdir().unwrap();
    let theta = means(r#"{ type = "si", c = 0.5, xi = 0.1 }"#, 1, steps, dir.path());
    let done = dir.path().join("phases/1-learn/01-a/done.safetensors");
    let done = modl_core::checkpoint::Checkpoint::open(done).unwrap();
    let kept = done.tensor("rule.importance.heads.means.theta", Device::Cpu).unwrap();
    let kept = kept.to_vec::<f64>().unwrap();
    let mean = NUMBERS[0].1.iter().sum::<f64>() / 4.0;
    for (j, c) in C.map(f64::from).into_iter().enumerate() {
        let way = kept[j] * (theta[j] * theta[j] + xi);
        let (h, away) = (c * c, mean / c);
        let shrink = 1.0 - 0.1 * h;
        let series = (1.0 - shrink.powi(2 * steps as i32)) / (1.0 - shrink * shrink);
        let wanted = 0.1 * (h * away).powi(2) * series;
        assert!((way - wanted).abs() < 1e-5, "{way} wanted {wanted}");
        let fallen = 0.5 * h * (away * away - (away - theta[j]).powi(2));
        assert!((way / fallen - 1.0).abs() < 0.1 * h, "{way} of {fallen}");
    }
}

#[test]
fn replay_is_descent_on_the_mean_of_both() {
    let dir = tempfile::tempdir().unwrap();
    let found = means(r#"{ type = "replay", memory = 10, rows = 4 }"#, 2, 7, dir.path());
    let mean = |g: Vec<f64>, earlier: &[Vec<f64>]| match earlier {
        [] => g,
        [r, ..] => g.iter().zip(r).map(|(g, r)| (g + r) / 2.0).collect(),
    };
    assert_close(&found, &by_hand(2, 7, mean));
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn a_gem_and_gem_go_no_step_against_the_memory() {
    let project = |g: Vec<f64>, earlier: &[Vec<f64>]| match earlier {
        [r, ..] if dot(&g, r) < 0.0 => {
            let share = dot(&g, r) / dot(r, r);
            g.iter().zip(r).map(|(g, r)| g - share * r).collect()
        }
        _ => g,
    };
    let wanted = by_hand(2, 7, project);
    let free = by_hand(2, 7, |g, _| g);
    assert!((wanted[1] - free[1]).abs() > 0.1, "the memory objects: {wanted:?} {free:?}");
    for strategy in [
        r#"{ type = "a_gem", memory = 10, rows = 4 }"#,
        r#"{ type = "gem", memory_per_task = 4, margin = 0.0 }"#,
    ] {
        let dir = tempfile::tempdir().unwrap();
        assert_close(&means(strategy, 2, 7, dir.path()), &wanted);
    }
}

/// What only earlier tasks have, such as their heads, cannot move in a step, and so has no part in what
/// the memory objects to: the memory's loss does not rise by what can.
#[test]
fn the_memory_objects_by_what_can_move_alone() {
    let mean = |t: usize| NUMBERS[t].1.iter().sum::<f64>() / 4.0;
    let (mut theta, mut own) = ([0.0; 3], [[0.0; 3]; 2]);
    let c = C.map(f64::from);
    let mut objected = 0;
    for t in 0..2 {
        for _ in 0..7 {
            let away = |t: usize| [0, 1, 2].map(|j| c[j] * theta[j] + own[t][j] - mean(t));
            let of_own = away(t);
            let mut g = [0, 1, 2].map(|j| c[j] * of_own[j]);
            let r = [0, 1, 2].map(|j| c[j] * away(0)[j]);
            if t == 1 && dot(&g, &r) < 0.0 {
                objected += 1;
                let share = dot(&g, &r) / dot(&r, &r);
                g = [0, 1, 2].map(|j| g[j] - share * r[j]);
            }
            for j in 0..3 {
                theta[j] -= 0.1 * g[j];
                own[t][j] -= 0.1 * of_own[j];
            }
        }
    }
    assert!(objected > 0);
    for strategy in [
        r#"{ type = "a_gem", memory = 10, rows = 4 }"#,
        r#"{ type = "gem", memory_per_task = 4, margin = 0.0 }"#,
    ] {
        let dir = tempfile::tempdir().unwrap();
        assert_close(&descend(&OwnMeans, strategy, 2, 7, dir.path()), &theta);
    }
}

/// L' = ½ Σ (cθ − x)² + λ Σ (cθ − cθ_a)²: in the limit cθ = (x̄ + 2λ cθ_a) ⁄ (1 + 2λ).
#[test]
fn what_was_said_is_said_on() {
    let dir = tempfile::tempdir().unwrap();
    let found = means(r#"{ type = "lwf", lambda = 0.7 }"#, 2, 800, dir.path());
    let mean = |t: usize| NUMBERS[t].1.iter().sum::<f64>() / 4.0;
    let wanted = C.map(f64::from).map(|c| (mean(1) + 1.4 * mean(0)) / 2.4 / c);
    assert_close(&found, &wanted);
}
