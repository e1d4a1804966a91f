//! The rule data of Mittal, Bengio, Lajoie 2022 (arXiv 2206.02713): a, b ~ N(0, 1), rule r says
//! y = c₁ᵣ a + c₂ᵣ b with c ~ N(0, 1), and x is a, b and the rule as a unit vector. Module j computes
//! rule j and is not trained; a router is to find it. Held out, the squared error falls, and the
//! module with the largest weight is that of the rule.

use std::collections::BTreeMap;

use modl_compute::Lora;
use modl_core::{Context, Device, Init, Kind, Modular, Result, Seed, Targets, Tensor, no_grad};
use modl_train::{Batch, Dataset, Example, Objective, Regression, TrainConfig, Trainer};

use serde_json::{Value, json};

use super::last_layer::LastLayer;
use super::{Said, Trial, every_router, particular, registry};

const RULES: [&str; 4] = ["r0", "r1", "r2", "r3"];

const WIDTH: i64 = 2 + RULES.len() as i64;

/// The squared error held out is to fall below this share of what it was.
const FALLS_BELOW: f64 = 0.3;

/// The share of right choices is to be above this.
const ABOVE: f64 = 0.9;

fn normal(shape: &[i64], seed: Seed) -> Vec<f64> {
    Init::Normal(1.0).tensor(shape, seed, Kind::Double, Device::Cpu).unwrap().to_vec().unwrap()
}

/// c, `[rules, 2]`: the first draw in which no two rules are nearly the same.
fn coefficients() -> Vec<f64> {
    let apart = |c: &Vec<f64>| {
        let d = |i: usize, j: usize| (c[2 * i] - c[2 * j]).hypot(c[2 * i + 1] - c[2 * j + 1]);
        (0..RULES.len()).all(|i| (0..i).all(|j| d(i, j) > 1.0))
    };
    let drawn = (0..).map(|seed| normal(&[RULES.len() as i64, 2], Seed(seed)));
    drawn.into_iter().find(apart).unwrap()
}

/// `n` points, the rules in turn. Each is a row of one token.
fn points(n: usize, seed: Seed) -> Dataset {
    let (ab, c) = (normal(&[n as i64, 2], seed), coefficients());
    let (mut examples, mut x) = (Vec::new(), Vec::new());
    for (i, ab) in ab.chunks(2).enumerate() {
        let rule = i % RULES.len();
        let y = c[2 * rule] * ab[0] + c[2 * rule + 1] * ab[1];
        x.extend(ab.iter().map(|v| *v as f32));
        x.extend((0..RULES.len()).map(|r| f32::from(u8::from(r == rule))));
        examples.push(Example {
            id: i.to_string(),
            task: RULES[rule].to_owned(),
            ids: vec![rule as i64].into(),
            target: y as f32,
        });
    }
    let x = Tensor::from_slice(&x, &[n as i64, 1, WIDTH], Device::Cpu).unwrap();
    Dataset::new(examples).unwrap().with_feature("hidden", x).unwrap()
}

fn head() -> Regression {
    Regression { head: "score".into(), dim: WIDTH }
}

/// A module for each rule, whose answer stands in the first place, where the head reads it; the base
/// function is 0.
fn model() -> Result<Modular> {
    let mut model = Modular::new(LastLayer::new(WIDTH, 0.0)?, Seed(3))?;
    head().setup(&mut model)?;
    let set = |model: &Modular, name: &str, places: &[(i64, f64)]| -> Result<()> {
        let t = model.params().get(name)?;
        let mut values = vec![0f32; t.numel()];
        places.iter().for_each(|(i, v)| values[*i as usize] = *v as f32);
        let new = Tensor::from_slice(&values, &t.size(), Device::Cpu)?;
        no_grad(|| t.clone().copy_from(&new))
    };
    set(&model, "heads.score.weight", &[(0, 1.0)])?;
    for (name, c) in RULES.iter().zip(coefficients().chunks(2)) {
        let lora = Lora { r: 1, alpha: 1.0, ..Lora::default() };
        model.attach(name, Box::new(lora), &Targets::names(["last"]))?;
        set(&model, &format!("modules.{name}.last.lora_A.weight"), &[(0, c[0]), (1, c[1])])?;
        set(&model, &format!("modules.{name}.last.lora_B.weight"), &[(0, 1.0)])?;
    }
    Ok(model)
}

fn say(model: &Modular, data: &Dataset) -> Result<Said> {
    let rows: Vec<usize> = (0..data.len()).collect();
    let batch = data.batch(&rows, Device::Cpu)?;
    let cx = batch.describe(Context::eval())?;
    let said = no_grad(|| head().predict(model, &batch, &cx))?;
    let loss = head().losses(&said, &batch)?.mean()?.item()?;
    let routing = cx.take_trace().routings.remove(0).1;
    let alpha = routing.dense(Kind::Double, Device::Cpu)?.to_vec::<f64>()?;
    let m = RULES.len();
    let one =
        |(i, a): (usize, &[f64])| a.iter().enumerate().all(|(j, v)| j == i % m || *v < a[i % m]);
    let hits = alpha.chunks(m).enumerate().filter(|c| one(*c)).count();
    Ok(Said { loss, right: hits as f64 / data.len() as f64, all: said.to_vec()? })
}

/// Why a router cannot find out which rule it is.
fn not_here(name: &str) -> Option<&'static str> {
    match name {
        "fixed" | "uniform" | "random" | "hash" | "thor" | "adamix" | "arrow" | "sub_network" => {
            Some("learns nothing")
        }
        "path_net" => Some("learns one path for all points"),
        _ => None,
    }
}

/// Settings of routers that by default try one module and stay with it where it is not the worst.
fn exploring(name: &str) -> Value {
    match name {
        "top_k" => json!({"noise": 1.0}),
        "product_key" => json!({"k": 3}),
        "hierarchical" => json!({"k": 2}),
        _ => json!({}),
    }
}

#[test]
fn every_router_that_learns_finds_the_rule_of_a_point() {
    modl_core::set_threads(1);
    let (train, test) = (points(800, Seed(1)), points(400, Seed(2)));
    let put = |name: &str, trial: &Trial| -> Result<(Said, Said)> {
        let mut model = model()?;
        model.route(registry().routers.parse(&json!({"type": "uniform"}))?, false)?;
        let aggregator = json!({"type": "weighted_sum"});
        model.aggregate(registry().aggregators.parse(&aggregator)?)?;
        let before = say(&model, &test)?;
        let mut router = trial.settings.clone();
        router["type"] = name.into();
        for (key, value) in exploring(name).as_object().into_iter().flatten() {
            router[key] = value.clone();
        }
        model.route(registry().routers.parse(&router)?, false)?;
        let learned =
            model.params().iter().any(|(n, p)| n.starts_with("routers.") && !p.is_buffer());
        let credits = ["reinforce", "relax", "controller"];
        let config = TrainConfig {
            // Tables are not among the trained parameters, and something has to be.
            train: vec![if learned { "routers.*" } else { "heads.*" }.to_owned()],
            steps: Some(300),
            batch_size: 40,
            lr: if learned { 0.1 } else { 0.0 },
            passes: trial.passes,
            loss_weights: credits
                .map(|n| (n.to_owned(), 1.0))
                .into_iter()
                .chain(BALANCE.map(|n| (n.to_owned(), 0.01)))
                .collect::<BTreeMap<_, _>>(),
            ..TrainConfig::default()
        };
        let head = head();
        Trainer::new(name, &model, &head, config, Seed(7))?.train(
            &train,
            &Batch::describe,
            &mut (),
        )?;
        Ok((before, say(&model, &test)?))
    };
    let above = |name: &str| match name {
        // Several modules may make up the answer together.
        "concrete_bernoulli" | "polytropon" | "multi_head" => 0.0,
        // It learns through its gate alone, of modules that an even share has chosen.
        "base" => 0.8,
        _ => ABOVE,
    };
    every_router(FALLS_BELOW, above, |name| match not_here(name) {
        Some(reason) => Err(reason),
        None => particular(name, &RULES).map(|trial| put(name, &trial)),
    });
}

const BALANCE: [&str; 5] = ["balance", "z", "importance", "load", "sequence_balance"];
