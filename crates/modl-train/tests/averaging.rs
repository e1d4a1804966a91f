//! What a training gives in the end: averages, the best of what was watched; and what a step is of.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::{Error, Modular, Result, Seed, Tensor};
use modl_train::{
    Batch, Event, Objective, Sink, Stop, TrainConfig, Trainer, evaluate, mean_absolute_error,
};
use toy::{data, head, model, with_dropout};

type Params = Vec<(String, Tensor)>;

fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps: Some(steps), batch_size: 4, lr: 0.02, ..TrainConfig::default() }
}

fn params(model: &Modular) -> Params {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect()
}

fn assert_bit_equal(a: &Params, b: &Params) {
    assert_eq!(a.len(), b.len());
    for ((name, x), (_, y)) in a.iter().zip(b) {
        assert!(x.bit_equal(y).unwrap(), "{name}");
    }
}

/// Trains the toy model, and gives what happened and what it came to.
fn trained(config: TrainConfig, folder: Option<&Path>) -> (Vec<Event>, Params) {
    let (model, head) = (model(3), head());
    let mut events = Vec::new();
    run(&model, &head, config, folder, &mut events).unwrap();
    let found = params(&model);
    (events, found)
}

fn run(
    model: &Modular,
    head: &dyn Objective,
    config: TrainConfig,
    folder: Option<&Path>,
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut trainer = Trainer::new("toy", model, head, config, Seed(7)).unwrap();
    if let Some(folder) = folder {
        trainer = trainer.keep_in(folder);
    }
    trainer.train(&data(10), &Batch::describe, sink)
}

/// Stops as a crash would, at each save from `0` on.
struct StopAt(u64);

impl Sink for StopAt {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Saved { step, .. } if *step == self.0 => Err(Error::invalid("test", "stop")),
            _ => Ok(()),
        }
    }
}

#[test]
fn the_average_is_what_a_training_gives_and_the_raw_parameters_are_what_it_goes_on_with() {
    let (steps, decay) = (6, 0.8f64);
    let dir = tempfile::tempdir().unwrap();
    let averaged = TrainConfig { ema: Some(decay), checkpoint_every: 2, ..config(steps) };
    let (_, found) = trained(averaged.clone(), Some(&dir.path().join("straight")));
    // The same steps without an average, each of which the average is made of.
    let of_steps: Vec<Params> = (1..=steps).map(|n| trained(config(n), None).1).collect();
    let weights: Vec<f64> = (1..=steps).map(|k| decay.powi((steps - k) as i32)).collect();
    let all: f64 = weights.iter().sum();
    for (i, (name, found)) in found.iter().enumerate() {
        let found = found.to_vec::<f64>().unwrap();
        let mut mean = vec![0.0; found.len()];
        for (params, weight) in of_steps.iter().zip(&weights) {
            let values = params[i].1.to_vec::<f64>().unwrap();
            mean.iter_mut().zip(values).for_each(|(m, v)| *m += weight * v / all);
        }
        for (a, b) in found.iter().zip(&mean) {
            assert!((a - b).abs() < 1e-6, "{name}: {a} {b}");
        }
    }
    // The steps themselves are those of a training without it.
    let state = dir.path().join(format!("straight/state-{steps}.safetensors"));
    let state = modl_core::checkpoint::Checkpoint::open(state).unwrap();
    for (name, raw) in of_steps.last().unwrap() {
        let kept = state.tensor(&format!("params.{name}"), modl_core::Device::Cpu).unwrap();
        assert!(kept.bit_equal(raw).unwrap(), "{name}");
    }
    // A stop changes no bit, and a training that has ended gives the same again.
    let resumed = dir.path().join("resumed");
    let crashed = model(3);
    run(&crashed, &head(), averaged.clone(), Some(&resumed), &mut StopAt(4)).unwrap_err();
    assert_bit_equal(&trained(averaged.clone(), Some(&resumed)).1, &found);
    assert_bit_equal(&trained(averaged, Some(&resumed)).1, &found);
}

/// Measurements by step.
fn measured(events: &[Event], metric: &str) -> Vec<(u64, f64)> {
    let of = |e: &Event| match e {
        Event::Evaluated { name, step: Some(step), metrics } if name == "toy/watched" => {
            Some((*step, metrics[metric]))
        }
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

#[test]
fn training_ends_where_it_does_not_help_any_more_and_the_best_is_kept() {
    // A rate at which the loss jumps about.
    let stop = Stop { every: 2, patience: 3, share: 0.4, ..Stop::default() };
    let wild = TrainConfig { stop: Some(stop), lr: 0.3, checkpoint_every: 1, ..config(200) };
    let dir = tempfile::tempdir().unwrap();
    let (events, found) = trained(wild.clone(), Some(&dir.path().join("straight")));
    let series = measured(&events, "loss");
    let ended = series.last().unwrap().0;
    assert!(ended < 200, "it went on to the end: {series:?}");
    let (best, value) = series.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(series.len() as u64, ended / 2, "each two steps");
    assert_eq!(ended - best, 3 * 2, "three measurements after the best: {series:?}");
    let said =
        |e: &Event| matches!(e, Event::Notice { text, .. } if text.contains("stopped early"));
    assert_eq!(events.iter().filter(|e| said(e)).count(), 1);
    assert!(matches!(events.last(), Some(Event::Finished { step, .. }) if *step == ended));
    // What is given is what was there after the best step: an undisturbed training that has only so
    // many steps ends with it.
    let short = TrainConfig { steps: Some(best), ..wild.clone() };
    let (events, after_best) = trained(short, None);
    assert_eq!(measured(&events, "loss").last(), Some(&(best, value)));
    assert_bit_equal(&found, &after_best);
    // Stopped anywhere, before, at and after the best, it ends the same; and where it has ended, it
    // does not go on.
    for at in [1, best, best + 1, ended - 1, ended] {
        let folder = dir.path().join(at.to_string());
        run(&model(3), &head(), wild.clone(), Some(&folder), &mut StopAt(at)).unwrap_err();
        let (events, resumed) = trained(wild.clone(), Some(&folder));
        assert_bit_equal(&resumed, &found);
        let steps = events.iter().filter(|e| matches!(e, Event::Step { .. })).count() as u64;
        assert_eq!(steps, ended - at);
    }
}

#[test]
fn what_is_watched_is_not_trained_on_and_may_be_any_metric() {
    let stop =
        |metric: &str| Stop { metric: metric.into(), every: 4, share: 0.3, ..Stop::default() };
    let watching =
        TrainConfig { stop: Some(stop("mae")), epochs: Some(1), steps: None, ..config(0) };
    let (model, head) = (with_dropout(0.0, 3), head());
    let mut events: Vec<Event> = Vec::new();
    run(&model, &head, watching.clone(), None, &mut events).unwrap();
    let Event::Started { examples, .. } = events[0] else { panic!("{events:?}") };
    let watched = 20 - examples;
    assert!((2..=10).contains(&watched), "{examples}");
    let series = measured(&events, "mae");
    assert_eq!(series.last().unwrap().0, (examples as u64).div_ceil(4), "at the end at least");
    // The last value is that of the parameters that are given, if it is the best.
    let (_, out) = data(10).split(Seed(7).child("stop").0, 0.3).unwrap();
    assert_eq!(out.len(), watched);
    let said = evaluate(&model, &head, &out, 3, &Batch::describe).unwrap();
    let (a, b): (Vec<f64>, Vec<f64>) = said.iter().map(|p| (p.prediction, p.target)).unzip();
    let best = series.iter().map(|(_, v)| *v).fold(f64::INFINITY, f64::min);
    assert!((mean_absolute_error(&a, &b).unwrap() - best).abs() < 1e-6);
    let wrong = TrainConfig { stop: Some(stop("accuracey")), ..watching };
    let e = run(&model, &head, wrong, None, &mut ()).unwrap_err().to_string();
    assert!(e.contains("unknown metric `accuracey`") && e.contains("loss"), "{e}");
}

#[test]
fn parts_of_a_step_give_the_gradients_of_the_whole() {
    let after = |batch_size: usize, accumulate: u64| {
        let (model, head) = (with_dropout(0.0, 3), head());
        let sgd = serde_json::from_value(serde_json::json!({"type": "sgd"})).unwrap();
        let config = TrainConfig { batch_size, accumulate, optimizer: sgd, ..config(6) };
        let mut events: Vec<Event> = Vec::new();
        run(&model, &head, config, None, &mut events).unwrap();
        let step = |e: &Event| match e {
            Event::Step { loss, grad_norm, .. } => Some((*loss, *grad_norm)),
            _ => None,
        };
        (events.iter().filter_map(step).collect::<Vec<_>>(), params(&model))
    };
    let (whole, expected) = after(12, 1);
    for (size, parts) in [(4, 3), (3, 4), (1, 12)] {
        let (steps, found) = after(size, parts);
        assert_eq!(steps.len(), whole.len());
        for ((a, b), (c, d)) in steps.iter().zip(&whole) {
            assert!((a - c).abs() < 1e-6 && (b - d).abs() < 1e-5, "{a} {c}, {b} {d}");
        }
        for ((name, a), (_, b)) in found.iter().zip(&expected) {
            assert!(a.all_close(b, 1e-6, 1e-6).unwrap(), "{name}: {}", a.max_abs_diff(b).unwrap());
        }
    }
    let moved = params(&with_dropout(0.0, 3));
    let most = moved.iter().zip(&expected).map(|((_, a), (_, b))| a.max_abs_diff(b).unwrap());
    assert!(most.fold(0.0, f64::max) > 1e-3, "nothing was trained");
}
