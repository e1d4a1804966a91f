//! The partial E-step with assignments that are kept for each example.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::perturb;
use modl_core::{Context, Device, Modular, Result, Seed, Select, Targets, Tensor};
use modl_route::ModularNetwork;
use modl_train::{Batch, Combine, Event, Objective, Passes, Sink, TrainConfig, Trainer};
use serde_json::json;
use toy::{StopAfter, data, head, methods, with_dropout};

/// Two modules at two sites under controllers that prefer some of them.
fn model() -> Modular {
    let mut model = with_dropout(0.0, 3);
    for name in ["plus", "minus"] {
        model.detach(name).unwrap();
    }
    for name in ["a", "b"] {
        let lora = modl_compute::Lora { r: 2, alpha: 4.0, ..Default::default() };
        model.attach(name, Box::new(lora), &Targets::names(["query", "value"])).unwrap();
    }
    model.route(Box::new(ModularNetwork::default()), false).unwrap();
    model.aggregate(Box::new(modl_aggregate::WeightedSum::default())).unwrap();
    perturb(&model, &Select::any(["modules.*", "routers.*"]), 0.5, Seed(5)).unwrap();
    model
}

fn config(steps: u64, keep: bool) -> TrainConfig {
    TrainConfig {
        steps: Some(steps),
        batch_size: 20,
        lr: 0.0,
        passes: Passes { count: 2, combine: Combine::Best, keep },
        checkpoint_every: 3,
        ..TrainConfig::default()
    }
}

fn train(
    model: &Modular,
    config: TrainConfig,
    folder: Option<&Path>,
    sink: &mut dyn Sink,
) -> Result<()> {
    let head = head();
    let mut trainer = Trainer::new("em", model, &head, config, Seed(7))?;
    if let Some(folder) = folder {
        trainer = trainer.keep_in(folder);
    }
    trainer.train(&data(10), &Batch::describe, sink)
}

/// The mean of ℓ − ln p over the rows of each step.
fn objective(keep: bool, steps: u64) -> Vec<f64> {
    let mut events: Vec<Event> = Vec::new();
    train(&model(), config(steps, keep), None, &mut events).unwrap();
    let of = |e: &Event| match e {
        Event::Step { loss, aux, .. } => Some(loss + aux["controller"]),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

/// The least ℓ − ln p of each row over all assignments, as often drawn as it takes to meet them all.
fn least() -> f64 {
    let (model, data) = (model(), data(10));
    let batch = data.batch(&(0..20).collect::<Vec<_>>(), Device::Cpu).unwrap();
    let mut best = [f64::INFINITY; 20];
    let mut met = std::collections::BTreeSet::new();
    for draw in 0..400 {
        let cx = batch.describe(Context::train(Seed(1000 + draw), 0)).unwrap();
        let predicted = head().predict(&model, &batch, &cx).unwrap();
        let losses = head().losses(&predicted, &batch).unwrap().to_vec::<f64>().unwrap();
        let trace = cx.take_trace();
        let numbers = |name: &str| -> Vec<Vec<f64>> {
            let of = |r: &modl_core::Routing| match name {
                "log_prob" => r.noted.need(name).unwrap().to_vec::<f64>().unwrap(),
                _ => r.dense(modl_core::Kind::Double, Device::Cpu).unwrap().to_vec().unwrap(),
            };
            trace.routings.iter().map(|(_, r)| of(r)).collect()
        };
        let (log_prob, alpha) = (numbers("log_prob"), numbers("alpha"));
        for row in 0..20 {
            let cost = losses[row] - log_prob.iter().map(|p| p[row]).sum::<f64>();
            best[row] = best[row].min(cost);
            met.insert((row, alpha.iter().map(|a| a[2 * row] == 1.0).collect::<Vec<_>>()));
        }
    }
    assert_eq!(met.len(), 20 * 4, "every row has had every assignment");
    best.iter().sum::<f64>() / 20.0
}

#[test]
fn with_what_is_kept_no_step_is_worse_and_the_best_is_found() {
    modl_core::set_threads(1);
    let (kept, drawn) = (objective(true, 60), objective(false, 60));
    for pair in kept.windows(2) {
        assert!(pair[1] <= pair[0] + 1e-6, "{pair:?}");
    }
    let least = least();
    assert!((kept[59] - least).abs() < 1e-5, "{} {least}", kept[59]);
    // Draws that are forgotten do not get there, and go up and down.
    assert!(drawn.windows(2).any(|p| p[1] > p[0] + 1e-3), "{drawn:?}");
    assert!(drawn[59] > least + 1e-3, "{} {least}", drawn[59]);
    assert_eq!(kept[0], drawn[0], "at first nothing is kept");
}

fn params(model: &Modular) -> Vec<(String, Tensor)> {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect()
}

#[test]
fn assignments_are_saved_and_taken_up_bit_for_bit() {
    modl_core::set_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let settings = || TrainConfig { lr: 0.03, batch_size: 4, ..config(14, true) };
    let straight = model();
    let mut events: Vec<Event> = Vec::new();
    train(&straight, settings(), Some(&one), &mut events).unwrap();
    for stop in [2, 4] {
        let stopped = model();
        train(&stopped, settings(), Some(&two), &mut StopAfter(stop)).unwrap_err();
        let resumed = model();
        train(&resumed, settings(), Some(&two), &mut ()).unwrap();
        for ((name, a), (_, b)) in params(&straight).iter().zip(&params(&resumed)) {
            assert!(a.bit_equal(b).unwrap(), "{stop}: {name}");
        }
        std::fs::remove_dir_all(&two).unwrap();
    }
    let file = Checkpoint::open(one.join("state-14.safetensors")).unwrap();
    for (name, t) in file.tensors(Device::Cpu).unwrap() {
        if let Some(router) = name.strip_prefix("assignments.assigned:routers.") {
            let all = t.to_vec::<i64>().unwrap();
            assert!(all.len() == 20 && all.iter().all(|j| (0..2).contains(j)), "{router}: {all:?}");
            events.clear();
        }
    }
    assert!(events.is_empty(), "the state holds assignments");
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let mean = Passes { count: 2, combine: Combine::Mean, keep: true };
    let e = mean.check().unwrap_err().to_string();
    assert!(e.contains("passes.keep") && e.contains("best"), "{e}");
    for router in [json!({"type": "soft"}), json!({"type": "modular_network", "input": "tokens"})] {
        let mut model = model();
        let router = methods().registry.routers.parse(&router).unwrap();
        model.route(router, false).unwrap();
        let e = train(&model, config(1, true), None, &mut ()).unwrap_err().to_string();
        assert!(e.contains("passes.keep") && e.contains("modular_network"), "{e}");
    }
}
