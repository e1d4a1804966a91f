//! RMSprop and Adafactor against PyTorch's and transformers' own numbers (made by
//! tests/python/make_optimizer_golden.py), Lion against a loop over numbers, and all of them in
//! recipes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Error, Kind, Modular, Result, Seed, Tensor};
use modl_train::{Event, Optimizer, OptimizerConfig, Recipe, Sink, run};
use serde_json::{Value, json};

const SHAPES: [&str; 4] = ["vector", "matrix", "tall", "stack"];
const STEPS: i64 = 25;

fn golden() -> Checkpoint {
    Checkpoint::open("tests/fixtures/optimizers.safetensors").unwrap()
}

fn build(config: &Value) -> Box<dyn Optimizer> {
    serde_json::from_value::<OptimizerConfig>(config.clone()).unwrap().build().unwrap()
}

/// The starts of all shapes.
fn start(golden: &Checkpoint) -> Vec<(String, Tensor)> {
    let of = |shape: &str| golden.tensor(&format!("start.{shape}"), Device::Cpu).unwrap();
    SHAPES.iter().map(|s| (s.to_string(), of(s).copy().unwrap())).collect()
}

/// The steps `range` with the fixed gradients.
fn steps(
    optimizer: &mut dyn Optimizer,
    params: &[(String, Tensor)],
    lr: f64,
    golden: &Checkpoint,
    range: std::ops::Range<i64>,
) {
    for step in range {
        let grad = |(n, t): &(String, Tensor)| {
            let all = golden.tensor(&format!("grads.{n}"), Device::Cpu).unwrap();
            Some(all.select(0, step).unwrap().to_kind(t.kind()).unwrap())
        };
        let grads: Vec<_> = params.iter().map(grad).collect();
        optimizer.step(params, &grads, &|_| lr).unwrap();
    }
}

/// The settings in the file: name, configuration, learning rate.
fn settings(golden: &Checkpoint) -> Vec<(String, Value, f64)> {
    let read = |(name, text): (String, String)| {
        let mut config: Value = serde_json::from_str(&text).unwrap();
        let lr = config.as_object_mut().unwrap().remove("lr").unwrap().as_f64().unwrap();
        (name, config, lr)
    };
    golden.metadata().into_iter().map(read).collect()
}

#[test]
fn rmsprop_and_adafactor_are_theirs() {
    let golden = golden();
    let settings = settings(&golden);
    assert_eq!(settings.len(), 11);
    for (name, config, lr) in settings {
        let (params, start) = (start(&golden), start(&golden));
        let mut optimizer = build(&config);
        for range in [0..10, 10..STEPS] {
            steps(optimizer.as_mut(), &params, lr, &golden, range.clone());
            for ((shape, ours), (_, start)) in params.iter().zip(&start) {
                let key = format!("{name}.{}.{shape}", range.end);
                let theirs = golden.tensor(&key, Device::Cpu).unwrap();
                let diff = ours.max_abs_diff(&theirs).unwrap();
                // Starts are of size 1; numbers on their way through 0 have no relative error.
                assert!(ours.all_close(&theirs, 1e-7, 1e-6).unwrap(), "{key}: {diff:e}");
                assert!(theirs.max_abs_diff(start).unwrap() > 1e-5, "{key} has not moved");
            }
        }
    }
}

#[test]
fn a_saved_state_goes_on_bit_for_bit() {
    let golden = golden();
    let mut all = settings(&golden);
    all.push(("lion".into(), json!({"type": "lion", "weight_decay": 0.1}), 0.02));
    for (name, config, lr) in all {
        let straight = start(&golden);
        steps(build(&config).as_mut(), &straight, lr, &golden, 0..STEPS);
        let resumed = start(&golden);
        let mut first = build(&config);
        steps(first.as_mut(), &resumed, lr, &golden, 0..12);
        let copy = |(n, t): (String, Tensor)| (n, t.copy().unwrap());
        let state: Vec<_> = first.state().unwrap().into_iter().map(copy).collect();
        let mut second = build(&config);
        second.load_state(&resumed, state.clone()).unwrap();
        steps(second.as_mut(), &resumed, lr, &golden, 12..STEPS);
        for ((shape, a), (_, b)) in straight.iter().zip(&resumed) {
            assert!(a.bit_equal(b).unwrap(), "{name} {shape}");
        }
        // The state counts: without it the rest of the way is another one.
        let fresh = start(&golden);
        steps(build(&config).as_mut(), &fresh, lr, &golden, 0..12);
        steps(build(&config).as_mut(), &fresh, lr, &golden, 12..STEPS);
        assert!(fresh.iter().zip(&straight).any(|(a, b)| !a.1.bit_equal(&b.1).unwrap()), "{name}");

        // A part of another shape is refused by name; and where there are several, one too few.
        let (last, t) = state.last().unwrap();
        let mut bent = state.clone();
        bent.last_mut().unwrap().1 = t.reshape(&[-1, 1, 1, 1]).unwrap();
        let e = build(&config).load_state(&resumed, bent).unwrap_err().to_string();
        assert!(e.contains("optimiser state of `") && e.contains("has shape"), "{name}: {e}");
        let (part, of) = last.split_once('.').unwrap();
        if state.iter().any(|(n, _)| n.ends_with(of) && !n.starts_with(part)) {
            let short = state.iter().filter(|(n, _)| n != last).cloned().collect();
            let e = build(&config).load_state(&resumed, short).unwrap_err().to_string();
            assert!(e.contains(&format!("`{of}`")) && e.contains("not whole"), "{name}: {e}");
        }
    }
}

/// Lion by its definition, one number after another.
fn lion(theta: &mut [f64], grads: &[Vec<f64>], lr: f64, betas: (f64, f64), decay: f64) {
    let mut m = vec![0.0; theta.len()];
    for grad in grads {
        for ((x, m), g) in theta.iter_mut().zip(&mut m).zip(grad) {
            let c = betas.0 * *m + (1.0 - betas.0) * g;
            let sign = if c == 0.0 { 0.0 } else { c.signum() };
            *x -= lr * (sign + decay * *x);
            *m = betas.1 * *m + (1.0 - betas.1) * g;
        }
    }
}

#[test]
fn lion_is_its_definition() {
    let golden = golden();
    for (betas, decay) in
        [((0.9, 0.99), 0.0), ((0.9, 0.99), 0.3), ((0.95, 0.98), 0.1), ((0.0, 0.5), 0.0)]
    {
        for kind in [Kind::Double, Kind::Float] {
            let params: Vec<(String, Tensor)> =
                start(&golden).into_iter().map(|(n, t)| (n, t.to_kind(kind).unwrap())).collect();
            let config = json!({"type": "lion", "betas": betas, "weight_decay": decay});
            steps(build(&config).as_mut(), &params, 0.01, &golden, 0..STEPS);
            for ((shape, ours), (_, start)) in params.iter().zip(start(&golden)) {
                let wide = |t: &Tensor| t.to_kind(Kind::Double).unwrap().to_vec::<f64>().unwrap();
                let all = golden.tensor(&format!("grads.{shape}"), Device::Cpu).unwrap();
                let grads: Vec<Vec<f64>> =
                    (0..STEPS).map(|s| wide(&all.select(0, s).unwrap())).collect();
                let mut wanted = wide(&start);
                lion(&mut wanted, &grads, 0.01, betas, decay);
                let tolerance = if kind == Kind::Double { 1e-13 } else { 1e-6 };
                for (a, b) in wide(ours).iter().zip(wanted) {
                    assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{shape}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn lion_moves_each_number_by_the_learning_rate() {
    let golden = golden();
    let params = start(&golden);
    steps(build(&json!({"type": "lion"})).as_mut(), &params, 0.25, &golden, 0..1);
    for ((shape, t), (_, start)) in params.iter().zip(start(&golden)) {
        let moved = t.sub(&start).unwrap().abs().unwrap();
        let quarter = moved.ones_like().unwrap().mul_scalar(0.25).unwrap();
        assert!(moved.all_close(&quarter, 1e-6, 0.0).unwrap(), "{shape}");
    }
}

#[test]
fn adafactor_keeps_rows_and_columns_of_matrices() {
    let golden = golden();
    let params = start(&golden);
    let mut optimizer = build(&json!({"type": "adafactor"}));
    steps(optimizer.as_mut(), &params, 0.01, &golden, 0..1);
    let sizes: Vec<(String, Vec<i64>)> =
        optimizer.state().unwrap().into_iter().map(|(n, t)| (n, t.size())).collect();
    for (name, size) in [
        ("row.matrix", vec![6]),
        ("column.matrix", vec![9]),
        ("row.stack", vec![2, 5]),
        ("column.stack", vec![2, 4]),
        ("square.vector", vec![7]),
    ] {
        assert!(sizes.contains(&(name.to_owned(), size)), "{name}: {sizes:?}");
    }
    assert_eq!(sizes.len(), 3 * 3 + 2, "row, column, steps; square, steps: {sizes:?}");
}

#[test]
fn rmsprop_stays_finite_where_gradients_do_not_vary() {
    let params = vec![("x".to_owned(), Tensor::ones(&[64], Kind::Float, Device::Cpu).unwrap())];
    let grad = Tensor::from_slice(
        &(1..=64).map(|i| i as f32 / 7.0).collect::<Vec<_>>(),
        &[64],
        Device::Cpu,
    );
    let grad = grad.unwrap();
    let mut optimizer = build(&json!({"type": "rmsprop", "centered": true}));
    for _ in 0..3000 {
        optimizer.step(&params, &[Some(grad.clone())], &|_| 1e-12).unwrap();
    }
    params[0].1.check_finite("x").unwrap();
}

const RECIPE: &str = r#"
[backbone]
path = "toy"

[data]
tasks = { plus = "plus.tsv", minus = "minus.tsv" }

[modules.plus]
type = "lora"
targets = ["query", "value"]
r = 2

[modules.minus]
type = "lora"
targets = ["query", "value"]
r = 2

[router]
type = "fixed"

[aggregator]
type = "weighted_sum"

[head]
type = "regression"

[[phases]]
name = "fit"
strategy = "joint"
steps = 40
checkpoint_every = 10
"#;

/// Stops a run as a crash would, once `step` is saved.
struct StopAt(u64);

impl Sink for StopAt {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Saved { step, .. } if *step == self.0 => Err(Error::invalid("test", "stop")),
            _ => Ok(()),
        }
    }
}

fn trained(recipe: &Recipe, seed: u64, folder: &Path, sink: &mut dyn Sink) -> Result<Modular> {
    let mut model = Modular::new(toy::backbone(), Seed(seed))?;
    let data = toy::data(10);
    run(recipe, &toy::methods(), &mut model, &toy::head(), &data, folder, sink)?;
    Ok(model)
}

#[test]
fn recipes_train_with_each_and_go_on_after_a_stop() {
    for line in [
        "lr = 0.005\noptimizer = { type = \"lion\", weight_decay = 0.1 }",
        "lr = 0.01\noptimizer = { type = \"rmsprop\", momentum = 0.5, centered = true }",
        "lr = 0.02\noptimizer = { type = \"adafactor\", beta1 = 0.5 }",
        "lr = 1\noptimizer = { type = \"adafactor\", relative_step = true, scale_parameter = true }",
        "lr = 0.01\nlora_plus_ratio = 8",
    ] {
        let recipe =
            Recipe::parse(&format!("{RECIPE}{line}\n"), "r.toml", &toy::methods()).unwrap();
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut events: Vec<Event> = Vec::new();
        let straight = trained(&recipe, 3, a.path(), &mut events).unwrap();
        let losses: Vec<f64> = events
            .iter()
            .filter_map(|e| if let Event::Step { loss, .. } = e { Some(*loss) } else { None })
            .collect();
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (before, after) = (mean(&losses[..5]), mean(&losses[35..]));
        assert!(after < 0.8 * before, "{line}: {before} → {after}");

        trained(&recipe, 3, b.path(), &mut StopAt(20)).unwrap_err();
        // Another start, to see that everything comes from the state.
        let mut events: Vec<Event> = Vec::new();
        let resumed = trained(&recipe, 99, b.path(), &mut events).unwrap();
        assert!(matches!(&events[0], Event::Started { step: 20, steps: 40, .. }), "{events:?}");
        let params = |m: &Modular| -> Vec<(String, Tensor)> {
            m.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().clone())).collect()
        };
        for ((name, x), (_, y)) in params(&straight).iter().zip(&params(&resumed)) {
            assert!(x.bit_equal(y).unwrap(), "{line}: {name}");
        }
    }
}
