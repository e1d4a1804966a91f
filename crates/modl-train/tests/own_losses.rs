//! The losses of a mixture's own routers, as transformers adds them: Σ over a mixture's
//! `router_aux_loss_coef` · `aux_loss` where `output_router_logits` asks for it.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Base, Context, Device, Error, Kind, Modular, Result, Seed, Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};
use modl_train::{
    Batch, Combine, Dataset, Event, Example, LossWeight, Objective, OptimizerConfig, Passes,
    TrainConfig, Trainer,
};

/// The mean cross entropy of the next token.
#[derive(Debug)]
struct NextToken;

impl Objective for NextToken {
    fn setup(&self, _: &mut Modular) -> Result<()> {
        Ok(())
    }

    fn predict(&self, model: &Modular, batch: &Batch, cx: &Context) -> Result<Tensor> {
        let outputs = model.forward(&batch.inputs, cx)?;
        let (logits, ids) = (outputs.need("logits")?, batch.inputs.need("input_ids")?);
        let n = ids.len_of(1) - 1;
        let next = ids.narrow(1, 1, n)?.unsqueeze(-1)?;
        let p = logits.narrow(1, 0, n)?.log_softmax(-1)?.gather(-1, &next)?;
        p.reshape(&[-1, n])?.mean_dims(&[-1], false)?.neg()
    }

    fn losses(&self, predicted: &Tensor, _: &Batch) -> Result<Tensor> {
        Ok(predicted.clone())
    }

    fn divergence(&self, _: &Tensor, _: &Tensor, _: &Batch) -> Result<Tensor> {
        Err(Error::unsupported("two passes", "one is enough here"))
    }
}

const GATE: &str = "model.layers.1.mlp.gate.weight";

fn options() -> LoadOptions {
    LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() }
}

fn model(name: &str, options: &LoadOptions) -> Modular {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../modl-models/tests/fixtures");
    Modular::from_box(open(fixtures.join(name), options).unwrap(), Seed(1)).unwrap()
}

fn data() -> Dataset {
    let example = |i: i64| Example {
        id: i.to_string(),
        task: "t".into(),
        ids: (0..6).map(|k| (7 * i + 5 * k * k + k) % 64).collect(),
        target: 0.0,
    };
    Dataset::new((0..2).map(example).collect()).unwrap()
}

fn gate(model: &Modular) -> Tensor {
    model.backbone().params().get(GATE).unwrap().clone()
}

/// One step of plain gradient descent: what happened, and the gradient of the gate.
fn step(model: &Modular, config: &TrainConfig) -> (Vec<Event>, Vec<f64>) {
    let before = gate(model).detach().unwrap().copy().unwrap();
    let mut events = Vec::new();
    let config = TrainConfig {
        train: vec![format!("base.{GATE}")],
        steps: Some(1),
        batch_size: 2,
        lr: 0.5,
        clip: None,
        optimizer: serde_json::from_str::<OptimizerConfig>(r#"{"type":"sgd"}"#).unwrap(),
        ..config.clone()
    };
    let mut trainer = Trainer::new("lm", model, &NextToken, config, Seed(3)).unwrap();
    trainer.train(&data(), &Batch::describe, &mut events).unwrap();
    let moved = gate(model).detach().unwrap().sub(&before).unwrap();
    no_grad(|| gate(model).copy_from(&before)).unwrap();
    let found = moved.mul_scalar(-2.0).unwrap().reshape(&[-1]).unwrap();
    (events, found.to_vec().unwrap())
}

fn rows(t: &Tensor) -> Vec<Vec<f64>> {
    let width = t.len_of(-1) as usize;
    t.to_kind(Kind::Double)
        .unwrap()
        .to_vec::<f64>()
        .unwrap()
        .chunks(width)
        .map(<[f64]>::to_vec)
        .collect()
}

fn softmax(l: &[f64]) -> Vec<f64> {
    let most = l.iter().copied().fold(f64::MIN, f64::max);
    let sum: f64 = l.iter().map(|v| (v - most).exp()).sum();
    l.iter().map(|v| (v - most).exp() / sum).collect()
}

/// Cross entropy and `load_balancing_loss_func` of transformers, in loops.
fn by_hand(model: &Modular, top_k: usize) -> [f64; 2] {
    let batch = data().batch(&[0, 1], Device::Cpu).unwrap();
    let outputs: Tensors = no_grad(|| model.forward(&batch.inputs, &Context::eval())).unwrap();
    let logits = rows(outputs.need("logits").unwrap());
    let ids: Vec<Vec<i64>> = data().examples().iter().map(|e| e.ids.to_vec().unwrap()).collect();
    let mut entropy = 0.0;
    for (b, ids) in ids.iter().enumerate() {
        for t in 0..5 {
            entropy -= softmax(&logits[6 * b + t])[ids[t + 1] as usize].ln() / 10.0;
        }
    }
    let routers = outputs.iter().filter(|(n, _)| n.starts_with("router_logits."));
    let all: Vec<Vec<f64>> = routers.flat_map(|(_, t)| rows(t)).map(|l| softmax(&l)).collect();
    let (experts, tokens) = (all[0].len(), all.len() as f64);
    let (mut chosen, mut mean) = (vec![0.0; experts], vec![0.0; experts]);
    for p in &all {
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        order[..top_k].iter().for_each(|e| chosen[*e] += 1.0 / tokens);
        p.iter().enumerate().for_each(|(e, p)| mean[e] += p / tokens);
    }
    let balance = chosen.iter().zip(&mean).map(|(f, p)| f * p).sum::<f64>() * experts as f64;
    [entropy, balance]
}

/// The derivatives of both in the direction `d` of the gate.
fn derivatives(model: &Modular, top_k: usize, d: &Tensor) -> [f64; 2] {
    let (own, step) = (gate(model), 1e-5);
    let before = own.detach().unwrap().copy().unwrap();
    let at = |by: f64| {
        let moved = before.add(&d.mul_scalar(by).unwrap()).unwrap();
        no_grad(|| own.clone().copy_from(&moved)).unwrap();
        by_hand(model, top_k)
    };
    let (ahead, behind) = (at(step), at(-step));
    no_grad(|| own.clone().copy_from(&before)).unwrap();
    [0, 1].map(|i| (ahead[i] - behind[i]) / (2.0 * step))
}

fn close(found: f64, wanted: f64, what: &str) {
    assert!((found - wanted).abs() < 1e-6 * wanted.abs().max(1e-3), "{what}: {found} {wanted}");
}

#[test]
fn the_auxiliary_loss_counts_as_transformers_counts_it() {
    // Both fixtures have `output_router_logits`; the numbers are those of their `config.json`.
    for (name, usual) in [("deterministic_mixtral", 0.001), ("deterministic_olmoe", 0.01)] {
        let model = model(name, &options());
        let d = modl_core::Init::Normal(1.0)
            .tensor(&gate(&model).size(), Seed(8), Kind::Double, Device::Cpu)
            .unwrap();
        let [entropy, balance] = by_hand(&model, 2);
        let [of_entropy, of_balance] = derivatives(&model, 2, &d);
        assert!(of_balance.abs() > 1e-4, "the balance has a gradient: {of_balance}");
        let along: Vec<f64> = d.reshape(&[-1]).unwrap().to_vec().unwrap();
        for given in [None, Some(0.0), Some(0.5)] {
            let loss_weights = given.map(|w| ("aux_loss".to_owned(), w)).into_iter().collect();
            let config = TrainConfig { loss_weights, ..TrainConfig::default() };
            let (events, gradient) = step(&model, &config);
            let weight = given.unwrap_or(usual);
            let Event::Started { losses, .. } = &events[0] else { panic!("{events:?}") };
            let wanted = LossWeight { weight, default: given.is_none() };
            assert_eq!(losses.get("aux_loss"), Some(&wanted));
            let Event::Step { loss, aux, .. } = &events[1] else { panic!("{events:?}") };
            close(*loss, entropy, "the objective's loss");
            // The routers' loss is computed in f32.
            assert!((aux["aux_loss"] - balance).abs() < 1e-6 * balance, "{aux:?} {balance}");
            let found: f64 = gradient.iter().zip(&along).map(|(g, d)| g * d).sum();
            let wanted = of_entropy + weight * of_balance;
            assert!(
                (found - wanted).abs() < 1e-5 * of_balance.abs().max(wanted.abs()),
                "{name} {given:?}: {found} {wanted}"
            );
        }
        let quiet = LoadOptions { router_losses: Some(false), ..options() };
        let (events, gradient) = step(&self::model(name, &quiet), &TrainConfig::default());
        let Event::Step { aux, .. } = &events[1] else { panic!("{events:?}") };
        assert!(aux.is_empty());
        let found: f64 = gradient.iter().zip(&along).map(|(g, d)| g * d).sum();
        assert!((found - of_entropy).abs() < 1e-5 * of_balance.abs(), "{found} {of_entropy}");
    }
}

/// Of several passes of which the best is taken, the routers' losses are averaged.
#[test]
fn several_passes_count_it_once() {
    let model = model("deterministic_mixtral", &options());
    let passes = Passes { count: 3, combine: Combine::Best, ..Passes::default() };
    let (events, _) = step(&model, &TrainConfig { passes, ..TrainConfig::default() });
    let Event::Step { aux, .. } = &events[1] else { panic!("{events:?}") };
    let balance = by_hand(&model, 2)[1];
    assert!((aux["aux_loss"] - balance).abs() < 1e-6 * balance, "{aux:?} {balance}");
}

#[test]
fn a_loss_that_is_left_out_is_named_once() {
    let mut model = model("deterministic_mixtral", &options());
    let block = Targets::names(["model.layers.1"]);
    model.attach("m", Box::new(Scale), &block).unwrap();
    model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
    let config = TrainConfig {
        steps: Some(3),
        batch_size: 2,
        train: vec![format!("base.{GATE}")],
        ..TrainConfig::default()
    };
    let notices = |model: &Modular| {
        let mut events: Vec<Event> = Vec::new();
        let mut trainer = Trainer::new("lm", model, &NextToken, config.clone(), Seed(3)).unwrap();
        trainer.train(&data(), &Batch::describe, &mut events).unwrap();
        let notice = |e: Event| match e {
            Event::Notice { step, text } => Some((step, text)),
            _ => None,
        };
        events.into_iter().filter_map(notice).collect::<Vec<_>>()
    };
    model.route(Given::only(0), false).unwrap();
    assert_eq!(notices(&model), []);
    // One row goes through the module and one past it: the router within sees them apart.
    model.route(Given::rows(&[Some(0), None]), false).unwrap();
    let told = notices(&model);
    assert!(
        matches!(told.as_slice(), [(1, text)] if text.contains("`aux_loss` is left out")),
        "{told:?}"
    );
}
