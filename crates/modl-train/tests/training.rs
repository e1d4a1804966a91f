//! The loop: what moves, what stays, and that a stopped run goes on bit for bit.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::path::Path;

use modl_aggregate::WeightedSum;
use modl_compute::{CrossStitch, Lora, LtSft};
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Error, Modular, Result, Seed, Targets, Tensor};
use modl_models::{LoadOptions, open};
use modl_route::Fixed;
use modl_train::{
    Batch, Dataset, Event, Objective, OnNan, OptimizerConfig, Prediction, Regression, Sink,
    TrainConfig, Trainer, evaluate, mean_absolute_error,
};
use toy::{data, head, model, with_dropout};

fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps: Some(steps), batch_size: 4, lr: 0.02, ..TrainConfig::default() }
}

fn params(model: &Modular) -> Vec<(String, Tensor)> {
    model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect()
}

fn assert_bit_equal(a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    assert_eq!(a.len(), b.len());
    for ((name, x), (_, y)) in a.iter().zip(b) {
        assert!(x.bit_equal(y).unwrap(), "{name}");
    }
}

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

fn train(model: &Modular, config: TrainConfig, folder: &Path, sink: &mut dyn Sink) -> Result<()> {
    let head = head();
    let trainer = Trainer::new("toy", model, &head, config, Seed(7))?;
    trainer.keep_in(folder).train(&data(10), &Batch::describe, sink)
}

#[test]
fn training_fits_the_data() {
    let (model, data, head) = (model(3), data(10), head());
    let error = || {
        let all: Vec<Prediction> = evaluate(&model, &head, &data, 3, &Batch::describe).unwrap();
        let (said, right): (Vec<f64>, Vec<f64>) =
            all.iter().map(|p| (p.prediction, p.target)).unzip();
        mean_absolute_error(&said, &right).unwrap()
    };
    let before = error();
    let mut events: Vec<Event> = Vec::new();
    let mut trainer = Trainer::new("toy", &model, &head, config(60), Seed(7)).unwrap();
    trainer.train(&data, &Batch::describe, &mut events).unwrap();
    let after = error();
    assert!(after < 0.5 * before, "{before} → {after}");
    assert!(matches!(&events[0], Event::Started { steps: 60, examples: 20, .. }));
    assert!(matches!(&events[1], Event::Step { step: 1, .. }));
    let Some(Event::Finished { step: 60, unused, .. }) = events.last() else {
        panic!("{events:?}")
    };
    assert!(unused.is_empty(), "{unused:?}");
    // Each row goes to the one module of its task, at each of two sites.
    let routed = |e: &Event| match e {
        Event::Routed { step, metrics } => Some((*step, metrics.clone())),
        _ => None,
    };
    let routed: Vec<_> = events.iter().filter_map(routed).collect();
    assert_eq!(routed.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [10, 20, 30, 40, 50, 60]);
    for (_, m) in &routed {
        assert_eq!((m["mean_entropy"], m["overflow"], m["unrouted"]), (0.0, 0.0, 0.0), "{m:?}");
        // MaxVio = 2 max f − 1 and CV² = MaxVio² for two modules.
        assert!((m["load_cv2"] - m["max_violation"].powi(2)).abs() < 1e-12, "{m:?}");
    }
    let silent = TrainConfig { log_routing_every: 0, ..config(20) };
    let mut events: Vec<Event> = Vec::new();
    let mut trainer = Trainer::new("toy", &model, &head, silent, Seed(7)).unwrap();
    trainer.train(&data, &Batch::describe, &mut events).unwrap();
    assert!(!events.iter().any(|e| matches!(e, Event::Routed { .. })));
}

/// A prompt alone, made by a recipe's configuration, with a head.
fn prompted(config: &serde_json::Value) -> Modular {
    let mut model = Modular::new(toy::backbone(), Seed(3)).unwrap();
    let prompt = toy::methods().registry.modules.parse(config).unwrap();
    let targets = prompt.usual_targets();
    model.attach("prompt", prompt, &targets).unwrap();
    model.route(Given::only(0), false).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    head().setup(&mut model).unwrap();
    model
}

#[test]
fn prompts_are_trained_although_they_lengthen_the_sequence() {
    let data = data(10).of_task("plus").unwrap();
    for kind in ["prompt_tuning", "p_tuning"] {
        let recipe = serde_json::json!({"type": kind, "num_virtual_tokens": 3});
        let (model, head) = (prompted(&recipe), head());
        let error = || {
            let all = evaluate(&model, &head, &data, 3, &Batch::describe).unwrap();
            let (said, right): (Vec<f64>, Vec<f64>) =
                all.iter().map(|p| (p.prediction, p.target)).unzip();
            mean_absolute_error(&said, &right).unwrap()
        };
        let (start, before) = (params(&model), error());
        let mut events: Vec<Event> = Vec::new();
        let mut trainer = Trainer::new("toy", &model, &head, config(60), Seed(7)).unwrap();
        trainer.train(&data, &Batch::describe, &mut events).unwrap();
        let after = error();
        assert!(after < 0.5 * before, "{kind}: {before} → {after}");
        for ((name, old), (_, new)) in start.iter().zip(params(&model)) {
            assert!(!old.bit_equal(&new).unwrap(), "{kind}: {name} has not moved");
        }
    }
}

#[test]
fn a_batch_in_groups_of_similar_length_gives_the_same_gradients() {
    let data = data(10);
    let rows: Vec<usize> = (0..data.len()).collect();
    let parts = data.batch(&rows, modl_core::Device::Cpu).unwrap().by_length().unwrap();
    assert!(parts.len() > 1, "the lengths differ");
    let trained = |split_by_length: bool| {
        let (model, head) = (with_dropout(0.0, 3), head());
        let config = TrainConfig { split_by_length, batch_size: data.len(), ..config(5) };
        let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
        trainer.train(&data, &Batch::describe, &mut Vec::<Event>::new()).unwrap();
        params(&model)
    };
    let (whole, split) = (trained(false), trained(true));
    let mut moved = 0.0f64;
    for (((name, a), (_, b)), (_, start)) in
        whole.iter().zip(&split).zip(params(&with_dropout(0.0, 3)))
    {
        let apart = a.max_abs_diff(b).unwrap();
        assert!(a.all_close(b, 1e-5, 1e-4).unwrap(), "{name}: {apart}");
        moved = moved.max(a.max_abs_diff(&start).unwrap());
    }
    assert!(moved > 0.05, "{moved}");
}

#[test]
fn recomputed_activations_give_the_same_training() {
    let (data, head) = (data(10), Regression { head: "score".into(), dim: 32 });
    let trained = |activation_checkpointing: bool| {
        let backbone = open(
            concat!(env!("CARGO_MANIFEST_DIR"), "/../modl-models/tests/fixtures/base_bert"),
            &LoadOptions::default(),
        );
        let mut model = Modular::from_box(backbone.unwrap(), Seed(3)).unwrap();
        let lora = Lora { dropout: 0.1, ..Lora::default() };
        model.attach("both", Box::new(lora), &Targets::names(["query", "value"])).unwrap();
        model.route(Box::new(Fixed::modules(["both"])), false).unwrap();
        model.aggregate(Box::new(WeightedSum::default())).unwrap();
        head.setup(&mut model).unwrap();
        let config = TrainConfig { activation_checkpointing, ..config(5) };
        let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
        trainer.train(&data, &Batch::describe, &mut Vec::<Event>::new()).unwrap();
        params(&model)
    };
    let (kept, recomputed) = (trained(false), trained(true));
    for ((name, a), (_, b)) in kept.iter().zip(&recomputed) {
        assert!(a.all_close(b, 1e-6, 1e-5).unwrap(), "{name}: {}", a.max_abs_diff(b).unwrap());
    }
    let up = kept.iter().find(|(name, _)| name.contains("lora_B")).unwrap();
    assert!(up.1.abs().unwrap().sum().unwrap().item().unwrap() > 0.1, "nothing was learned");
}

#[test]
fn predictions_come_in_the_order_of_the_data_whatever_the_batch() {
    let (model, data, head) = (model(3), data(7), head());
    let one = evaluate(&model, &head, &data, 1, &Batch::describe).unwrap();
    let many = evaluate(&model, &head, &data, 6, &Batch::describe).unwrap();
    for ((a, b), e) in one.iter().zip(&many).zip(data.examples()) {
        assert_eq!((&a.id, &a.task), (&e.id, &e.task));
        assert!((a.prediction - b.prediction).abs() < 1e-5, "{a:?} {b:?}");
    }
}

/// How far one step of plain SGD moves each parameter.
fn moves(lr_scale: &[(&str, f64)], lora_plus_ratio: Option<f64>) -> Vec<(String, Tensor)> {
    let (model, head) = (model(3), head());
    let before = params(&model);
    let lr_scale = lr_scale.iter().map(|(p, f)| (p.to_string(), *f)).collect();
    let sgd = serde_json::from_value(serde_json::json!({"type": "sgd"})).unwrap();
    let config = TrainConfig { lr: 0.01, lr_scale, lora_plus_ratio, optimizer: sgd, ..config(1) };
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    trainer.train(&data(10), &Batch::describe, &mut ()).unwrap();
    let moved = before.into_iter().zip(params(&model));
    moved.map(|((name, old), (_, new))| (name, new.sub(&old).unwrap())).collect()
}

#[test]
fn some_parameters_learn_faster() {
    let plain = moves(&[], None);
    // LoRA+ by a pattern and by its own key; and another pattern whose factor is multiplied.
    for scaled in [
        moves(&[("*.lora_B.*", 16.0), ("modules.plus.*", 0.5)], None),
        moves(&[("modules.plus.*", 0.5)], Some(16.0)),
    ] {
        for ((name, a), (_, b)) in plain.iter().zip(&scaled) {
            let up = if name.contains("lora_B") { 16.0 } else { 1.0 };
            let factor = if name.starts_with("modules.plus") { 0.5 * up } else { up };
            assert!(a.mul_scalar(factor).unwrap().all_close(b, 1e-6, 1e-3).unwrap(), "{name}");
        }
    }
    let far = |(n, t): &(String, Tensor)| {
        n.contains("lora_B") && t.norm().unwrap().item().unwrap() > 1e-3
    };
    assert!(plain.iter().any(far), "{plain:?}");
}

#[test]
fn a_factor_that_is_nobodys_or_no_factor_is_named() {
    let (model, head) = (model(3), head());
    for (pattern, factor) in [("*.lora_C.*", 2.0), ("*.lora_B.*", -1.0), ("*.lora_B.*", f64::NAN)] {
        let config = TrainConfig { lr_scale: [(pattern.to_owned(), factor)].into(), ..config(1) };
        let e = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap_err().to_string();
        assert!(e.contains("lr_scale") && e.contains(pattern), "{e}");
    }
}

#[test]
fn the_ratios_of_lora_plus_are_for_the_parameters_of_their_names() {
    let (lora_plus_ratio, lora_plus_embedding_ratio) = (Some(16.0), Some(0.25));
    let both = TrainConfig { lora_plus_ratio, lora_plus_embedding_ratio, ..config(1) };
    both.check().unwrap();
    for (name, factor) in [
        ("modules.plus.layer.0.query.lora_A.weight", 1.0),
        ("modules.plus.layer.0.query.lora_B.weight", 16.0),
        ("modules.plus.layer.0.query.lora_B.bias", 16.0),
        ("modules.plus.layer.0.query.lora_B", 16.0),
        ("modules.plus.word.lora_embedding_A", 0.25),
        ("modules.plus.word.lora_embedding_B", 0.25),
        ("modules.my_lora_B.layer.0.query.lora_A.weight", 1.0),
        ("heads.score.weight", 1.0),
    ] {
        assert_eq!(both.lr_factor(name), factor, "{name}");
    }
    let (model, head) = (model(3), head());
    let refused =
        |config| Trainer::new("toy", &model, &head, config, Seed(7)).unwrap_err().to_string();
    let e = refused(both);
    assert!(e.contains("lora_plus_embedding_ratio") && e.contains("none of the trained"), "{e}");
    let train = vec!["heads.*".to_owned()];
    let e = refused(TrainConfig { train, lora_plus_ratio, ..config(1) });
    assert!(e.contains("lora_plus_ratio") && e.contains("none of the trained"), "{e}");
    for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let e = refused(TrainConfig { lora_plus_ratio: Some(wrong), ..config(1) });
        assert!(e.contains("lora_plus_ratio") && e.contains("above 0"), "{e}");
    }
}

#[test]
fn what_was_not_routed_stays_bit_for_bit_and_is_reported() {
    let (model, head) = (model(3), head());
    let before = params(&model);
    let mut events: Vec<Event> = Vec::new();
    let decay = serde_json::json!({"type": "adamw", "weight_decay": 0.5});
    let config = TrainConfig {
        optimizer: serde_json::from_value::<OptimizerConfig>(decay).unwrap(),
        ..config(3)
    };
    let plus = data(10).of_task("plus").unwrap();
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    trainer.train(&plus, &Batch::describe, &mut events).unwrap();
    for ((name, old), (_, new)) in before.iter().zip(params(&model)) {
        assert_eq!(old.bit_equal(&new).unwrap(), name.contains(".minus."), "{name}");
    }
    let Some(Event::Finished { unused, .. }) = events.last() else { panic!() };
    assert!(unused.len() == 4 && unused.iter().all(|n| n.contains(".minus.")), "{unused:?}");
}

#[test]
fn a_batch_without_any_trained_module_is_no_error() {
    let (model, head) = (model(3), head());
    let minus = data(10).of_task("minus").unwrap();
    let config = TrainConfig { train: vec!["modules.plus.*".into()], ..config(2) };
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    trainer.train(&minus, &Batch::describe, &mut ()).unwrap();
}

#[test]
fn a_resumed_run_is_the_straight_one_bit_for_bit() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = TrainConfig { checkpoint_every: 3, ..config(6) };
    let straight = model(3);
    train(&straight, config.clone(), a.path(), &mut ()).unwrap();

    let stopped = model(3);
    train(&stopped, config.clone(), b.path(), &mut StopAt(3)).unwrap_err();
    // What a kill during the next save leaves: half a file that state.json does not name.
    std::fs::write(b.path().join("state-6.safetensors"), b"half").unwrap();
    drop(stopped);
    // Another start, to see that everything comes from the state.
    let resumed = model(99);
    let mut events: Vec<Event> = Vec::new();
    train(&resumed, config.clone(), b.path(), &mut events).unwrap();
    assert!(matches!(&events[0], Event::Started { step: 3, steps: 6, note: None, .. }));
    let (straight, resumed) = (params(&straight), params(&resumed));
    assert_bit_equal(&straight, &resumed);
    assert!(!straight[0].1.bit_equal(&params(&model(3))[0].1).unwrap(), "something was learned");

    // A finished run is taken up as it is.
    let done = model(98);
    train(&done, config, b.path(), &mut ()).unwrap();
    assert_bit_equal(&params(&done), &straight);
    let files = std::fs::read_dir(b.path()).unwrap().count();
    assert_eq!(files, 2, "state.json and the file that it names");
}

#[test]
fn dropout_and_order_follow_the_seed() {
    let run = |seed: u64| {
        let (model, head) = (model(3), head());
        let mut trainer = Trainer::new("toy", &model, &head, config(4), Seed(seed)).unwrap();
        trainer.train(&data(10), &Batch::describe, &mut ()).unwrap();
        params(&model)
    };
    assert_bit_equal(&run(1), &run(1));
    assert!(!run(1)[0].1.bit_equal(&run(2)[0].1).unwrap());
}

#[test]
fn another_runs_state_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    train(&model(3), config(2), dir.path(), &mut ()).unwrap();
    let before = params(&model(4));
    let refused = |config: TrainConfig| {
        let model = model(4);
        let e = train(&model, config, dir.path(), &mut ()).unwrap_err().to_string();
        assert_bit_equal(&params(&model), &before);
        e
    };
    let e = refused(TrainConfig { lr: 0.5, ..config(2) });
    assert!(e.contains("lr 0.02, now 0.5"), "{e}");
    let e = refused(TrainConfig { train: vec!["heads.*".into()], ..config(2) });
    assert!(e.contains("train ["), "{e}");

    let (model, head) = (model(4), head());
    let trainer = Trainer::new("toy", &model, &head, config(2), Seed(7)).unwrap();
    let e = trainer.keep_in(dir.path()).train(&data(9), &Batch::describe, &mut ()).unwrap_err();
    assert!(e.to_string().contains("another data"), "{e}");
    let trainer = Trainer::new("toy", &model, &head, config(2), Seed(8)).unwrap();
    let e = trainer.keep_in(dir.path()).train(&data(10), &Batch::describe, &mut ()).unwrap_err();
    assert!(e.to_string().contains("seed 7, now 8"), "{e}");
}

/// A loss that is not a number from a certain step on.
#[derive(Debug)]
struct Breaks(u64);

impl Objective for Breaks {
    fn setup(&self, _: &mut Modular) -> Result<()> {
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let said = head().predict(model, batch, cx)?;
        if cx.step >= self.0 { said.mul_scalar(f64::NAN) } else { Ok(said) }
    }

    fn losses(&self, predicted: &Tensor, batch: &Batch) -> Result<Tensor> {
        head().losses(predicted, batch)
    }

    fn divergence(&self, a: &Tensor, b: &Tensor, batch: &Batch) -> Result<Tensor> {
        head().divergence(a, b, batch)
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(3);
    let config = TrainConfig { checkpoint_every: 2, ..config(9) };
    let trainer = Trainer::new("toy", &model, &Breaks(3), config.clone(), Seed(7)).unwrap();
    let e = trainer.keep_in(dir.path()).train(&data(10), &Batch::describe, &mut ()).unwrap_err();
    assert!(matches!(e.root(), Error::Invalid { what, .. } if what == "loss"), "{e}");
    let e = e.to_string();
    assert!(e.contains("step 4") && e.contains("lower lr") && e.contains("step 2 is in"), "{e}");
    assert!(dir.path().join("state-2.safetensors").exists());
    for (name, t) in params(&model) {
        assert!(t.is_finite().unwrap().all().unwrap().item().unwrap() == 1.0, "{name}");
    }
}

#[test]
fn nothing_to_train_is_refused_with_what_there_is() {
    let (model, head) = (model(3), head());
    let none = TrainConfig { train: vec!["module.*".into()], ..config(2) };
    let e = Trainer::new("toy", &model, &head, none, Seed(7)).unwrap_err().to_string();
    assert!(e.contains("module.*") && e.contains("modules.plus"), "{e}");
    let both = TrainConfig { epochs: Some(1), ..config(2) };
    assert!(Trainer::new("toy", &model, &head, both, Seed(7)).is_err());
}

#[test]
fn routers_losses_count_as_they_are_weighed() {
    let head = head();
    let run_all = |balance: Option<f64>| {
        let mut model = model(3);
        model.route(Box::new(modl_route::TopK::default()), false).unwrap();
        let mut loss_weights = std::collections::BTreeMap::from([("z".to_owned(), 0.0)]);
        loss_weights.extend(balance.map(|w| ("balance".to_owned(), w)));
        let config =
            TrainConfig { train: vec!["routers.*".into()], loss_weights, clip: None, ..config(1) };
        let mut events: Vec<Event> = Vec::new();
        let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
        trainer.train(&data(10), &Batch::describe, &mut events).unwrap();
        events
    };
    let run = |balance| run_all(balance).swap_remove(1);
    let step = |weight: f64| match run(Some(weight)) {
        Event::Step { loss, aux, grad_norm, .. } => (loss, aux, grad_norm),
        other => panic!("{other:?}"),
    };
    let (none, half, one) = (step(0.0), step(0.5), step(1.0));
    assert_eq!((none.0, &none.1), (one.0, &one.1), "what is reported is not weighed");
    assert!(none.1["balance"] > 0.0 && none.1.contains_key("z"));
    // Fresh modules change nothing, so that only the balance has a gradient here.
    assert_eq!(none.2, 0.0);
    assert!(one.2 > 0.0 && (one.2 - 2.0 * half.2).abs() < 1e-6 * one.2, "{half:?} {one:?}");
    // Where nothing is said it counts what its paper has, and the run says so.
    let events = run_all(None);
    let Event::Started { losses, .. } = &events[0] else { panic!("{events:?}") };
    let said = |weight, default| modl_train::LossWeight { weight, default };
    let wanted = [("balance".to_owned(), said(0.01, true)), ("z".to_owned(), said(0.0, false))];
    assert_eq!(*losses, wanted.into());
    match (&events[1], step(0.01)) {
        (Event::Step { loss, aux, grad_norm, .. }, paper) => {
            assert_eq!((*loss, aux, *grad_norm), (paper.0, &paper.1, paper.2));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_phase_may_hide_the_tasks() {
    let (model, head) = (model(3), head());
    let hide = |_: &Batch, cx: Context| Ok(cx);
    let e = evaluate(&model, &head, &data(2), 4, &hide).unwrap_err().to_string();
    assert!(e.contains("a task name for each row"), "{e}");
}

/// The largest and the smallest number other than 0 in a parameter's size.
fn sizes(model: &Modular, name: &str) -> (f64, f64) {
    let all: Vec<f32> = model.params().get(name).unwrap().to_vec().unwrap();
    let all = all.into_iter().map(|v| f64::from(v.abs())).filter(|v| *v > 0.0);
    all.fold((0.0, f64::INFINITY), |(most, least), v| (v.max(most), v.min(least)))
}

#[test]
fn what_goes_back_to_its_start_has_no_momentum_left() {
    let sizes_after = |steps: u64| {
        let (mut model, head) = (Modular::new(toy::backbone(), Seed(3)).unwrap(), head());
        let lt_sft = LtSft { density: 0.2, choose_at: 4.0 / steps as f64, l1: 0.0 };
        model.attach("a", Box::new(lt_sft), &Targets::names(["query"])).unwrap();
        model.route(Box::new(Fixed::modules(["a"])), false).unwrap();
        model.aggregate(Box::new(WeightedSum::default())).unwrap();
        head.setup(&mut model).unwrap();
        let mut trainer = Trainer::new("toy", &model, &head, config(steps), Seed(7)).unwrap();
        trainer.train(&data(10), &Batch::describe, &mut ()).unwrap();
        sizes(&model, "modules.a.layer.0.query.delta.weight")
    };
    assert_eq!(sizes_after(4), (0.0, f64::INFINITY), "rewound");
    // The first step of a fresh Adam is the learning rate for every number, whatever its gradient.
    let (most, least) = sizes_after(5);
    assert!(
        (most / 0.02 - 1.0).abs() < 1e-3 && (least / 0.02 - 1.0).abs() < 0.05,
        "{least} {most}"
    );
}

#[test]
fn alpha_of_cross_stitch_units_learns_a_hundred_times_faster() {
    let mut model = Modular::new(toy::backbone(), Seed(3)).unwrap();
    for task in toy::TASKS {
        let lora = Lora { r: 2, ..Lora::default() };
        model.attach(task, Box::new(lora), &Targets::names(["query", "value"])).unwrap();
    }
    let tasks = toy::TASKS.map(str::to_owned).to_vec();
    let unit = CrossStitch { tasks, ..CrossStitch::default() };
    let stitched = |task: &str| {
        let both = [(task.to_owned(), 1.0), ("stitch".to_owned(), 1.0)];
        (task.to_owned(), modl_route::Choice::Weighted(both.into()))
    };
    let table = Some(toy::TASKS.map(stitched).into());
    model.attach("stitch", Box::new(unit), &Targets::pattern("all-block")).unwrap();
    let by_task = Fixed { table, skip_absent: true, ..Fixed::default() };
    model.route(Box::new(by_task), false).unwrap();
    model.aggregate(Box::new(WeightedSum::default())).unwrap();
    let head = head();
    head.setup(&mut model).unwrap();
    let before = params(&model);
    let lr_scale = [("modules.stitch.*.alpha".to_owned(), 100.0)].into();
    let config = TrainConfig { lr: 1e-3, lr_scale, ..config(1) };
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    trainer.train(&data(10), &Batch::describe, &mut ()).unwrap();
    let mut most = [0.0f64; 2];
    for ((name, old), (_, new)) in before.iter().zip(params(&model)) {
        let alpha = usize::from(name.starts_with("modules.stitch."));
        most[alpha] = most[alpha].max(new.max_abs_diff(old).unwrap());
    }
    let [others, alpha] = most;
    assert!((others / 1e-3 - 1.0).abs() < 0.01 && (alpha / 0.1 - 1.0).abs() < 0.01, "{most:?}");
}

/// The toy data with one example whose target is no number.
fn with_a_broken_example() -> Dataset {
    let mut examples = data(10).examples().to_vec();
    examples[7].target = f32::NAN;
    Dataset::new(examples).unwrap()
}

fn skipping(most: u64, steps: u64) -> TrainConfig {
    let sgd = serde_json::from_value(serde_json::json!({"type": "sgd", "momentum": 0.9})).unwrap();
    TrainConfig { on_nan: OnNan::Skip(most), optimizer: sgd, ..config(steps) }
}

/// Trains on data with a broken example in each epoch of five steps: the numbers of the steps that
/// were left out, and what the training came to.
fn past_a_broken_example(
    config: TrainConfig,
    folder: Option<&Path>,
) -> (Vec<u64>, Vec<(String, Tensor)>, Result<()>) {
    let (model, head) = (model(3), head());
    let mut events: Vec<Event> = Vec::new();
    let mut trainer = Trainer::new("toy", &model, &head, config, Seed(7)).unwrap();
    if let Some(folder) = folder {
        trainer = trainer.keep_in(folder);
    }
    let done = trainer.train(&with_a_broken_example(), &Batch::describe, &mut events);
    let left_out = events.iter().filter_map(|e| match e {
        Event::Notice { step, text } if text.contains("loss is NaN") => Some(*step),
        _ => None,
    });
    (left_out.collect(), params(&model), done)
}

#[test]
fn a_step_that_is_not_finite_is_left_out_so_many_times() {
    let (left_out, _, done) = past_a_broken_example(skipping(2, 10), None);
    done.unwrap();
    let [first, second] = left_out[..] else { panic!("{left_out:?}") };
    assert!((1..=5).contains(&first) && (6..=10).contains(&second), "{left_out:?}");
    // It changes nothing, momentum included: the step after it is the one that would have been next.
    let (_, before, _) = past_a_broken_example(skipping(2, second - 1), None);
    let (_, after, _) = past_a_broken_example(skipping(2, second), None);
    assert_bit_equal(&before, &after);
    let start = params(&model(3));
    assert!(before.iter().zip(&start).any(|((_, a), (_, b))| !a.bit_equal(b).unwrap()));
    // The third is one too many, also where the first two were before a stop.
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    let with_states = TrainConfig { checkpoint_every: 1, ..skipping(2, 20) };
    let (all, _, done) = past_a_broken_example(with_states.clone(), Some(folder));
    let e = done.unwrap_err().to_string();
    assert_eq!(all.len(), 2);
    assert!(e.contains("loss: is NaN") && e.contains("the state of step"), "{e}");
    let (again, _, done) = past_a_broken_example(with_states, Some(folder));
    assert!(again.is_empty() && done.is_err(), "{again:?}");
}

#[test]
fn a_run_that_breaks_leaves_the_state_of_before_and_goes_on_from_it() {
    let (straight, expected, _) = past_a_broken_example(skipping(9, 10), None);
    // The seed puts the broken example behind the first step, so that there is something to keep.
    let first = straight[0];
    assert!(first > 1, "{straight:?}");
    let dir = tempfile::tempdir().unwrap();
    let stopping = TrainConfig { on_nan: OnNan::Stop, ..skipping(9, 10) };
    let (_, kept, done) = past_a_broken_example(stopping, Some(dir.path()));
    let e = done.unwrap_err().to_string();
    let place = format!("step {first}`");
    let state = format!("the state of step {} is in", first - 1);
    assert!(e.contains(&place) && e.contains(&state) && e.contains("on_nan"), "{e}");
    let (_, before, _) = past_a_broken_example(skipping(9, first - 1), None);
    assert_bit_equal(&kept, &before);
    // The policy has no part in the steps that were made, and may be another after the stop.
    let (resumed, found, done) = past_a_broken_example(skipping(9, 10), Some(dir.path()));
    done.unwrap();
    assert_eq!(resumed, straight);
    assert_bit_equal(&found, &expected);
}
