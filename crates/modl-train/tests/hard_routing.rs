//! Hard routers in the trainer: the right module is learned from rules, paths are kept, and what
//! becomes of modules that are trained together with their router.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use modl_core::{Context, Init, Modular, Seed, Targets, no_grad};
use modl_route::{Fixed, RoutingStats, next_task, off_path, winning_path};
use modl_train::{
    Batch, Batches, Combine, Dataset, Event, Example, Objective, Passes, TrainConfig, Trainer,
};
use serde_json::{Value, json};
use toy::{backbone, head, methods};

const MODULES: [&str; 3] = ["a", "b", "c"];
/// The module of each rule.
const RIGHT: [(&str, &str); 3] = [("r0", "c"), ("r1", "a"), ("r2", "b")];

/// LoRA modules that are different functions, where `different`, or else untrained ones.
fn model(config: Value, sites: &[&str], different: bool, seed: u64) -> Modular {
    let mut model = Modular::new(backbone(), Seed(seed)).unwrap();
    for name in MODULES {
        let lora = modl_compute::Lora { r: 2, alpha: 4.0, ..Default::default() };
        model.attach(name, Box::new(lora), &Targets::names(sites.iter().copied())).unwrap();
    }
    if different {
        for (name, p) in model.params().iter().filter(|(n, _)| n.contains("lora_B")) {
            let t = p.tensor();
            let drawn =
                Init::Normal(1.5).tensor(&t.size(), Seed(5).child(name), t.kind(), t.device());
            no_grad(|| t.clone().copy_from(&drawn.unwrap())).unwrap();
        }
    }
    route(&mut model, config);
    model.aggregate(Box::new(modl_aggregate::WeightedSum::default())).unwrap();
    head().setup(&mut model).unwrap();
    // A wrong module is to cost some nats, which is what the controller of a modular network weighs
    // against the probability of its choice.
    let mut weight = model.params().get("heads.score.weight").unwrap().clone();
    no_grad(|| weight.mul_scalar_in_place(5.0)).unwrap();
    model
}

fn route(model: &mut Modular, config: Value) {
    model.route(methods().registry.routers.parse(&config).unwrap(), false).unwrap();
}

/// Texts of three rules, which their tokens tell apart; the target is what the model says that is
/// routed rightly, by this table or to the one module for all.
fn data(sites: &[&str], one: Option<&str>) -> Dataset {
    let mut examples = Vec::new();
    for (t, (task, _)) in RIGHT.iter().enumerate() {
        for i in 0..24usize {
            let ids = (0..3 + i % 3).map(|k| (t * 5 + (i + k * k) % 3) as i64).collect();
            examples.push(Example { id: format!("{i}"), task: task.to_string(), ids, target: 0.0 });
        }
    }
    let config = match one {
        Some(one) => json!({"type": "fixed", "modules": [one]}),
        None => {
            let table: serde_json::Map<String, Value> =
                RIGHT.iter().map(|(t, m)| (t.to_string(), json!(m))).collect();
            json!({"type": "fixed", "table": table})
        }
    };
    let teacher = model(config, sites, true, 3);
    let all = Dataset::new(examples.clone()).unwrap();
    for (example, batch) in examples.iter_mut().zip(one_by_one(&all)) {
        let cx = batch.describe(Context::eval()).unwrap();
        example.target =
            no_grad(|| head().predict(&teacher, &batch, &cx)).unwrap().item().unwrap() as f32;
    }
    Dataset::new(examples).unwrap()
}

/// The loss of each example with each module alone.
fn costs(data: &Dataset, sites: &[&str]) -> Vec<[f64; 3]> {
    let of_module = |name: &str| {
        let model = model(json!({"type": "fixed", "modules": [name]}), sites, true, 3);
        let loss = |batch: &Batch| {
            let cx = batch.describe(Context::eval()).unwrap();
            let said = no_grad(|| head().predict(&model, batch, &cx)).unwrap();
            head().losses(&said, batch).unwrap().item().unwrap()
        };
        one_by_one(data).iter().map(loss).collect::<Vec<_>>()
    };
    let [a, b, c] = MODULES.map(of_module);
    (0..a.len()).map(|i| [a[i], b[i], c[i]]).collect()
}

/// Each example as a batch, in order.
fn one_by_one(data: &Dataset) -> Vec<Batch> {
    let device = modl_core::Device::Cpu;
    data.examples()
        .iter()
        .map(|e| {
            let single = Dataset::new(vec![e.clone()]).unwrap();
            Batches::new(&single, 1, Seed(0), device, Default::default())
                .unwrap()
                .advance()
                .unwrap()
        })
        .collect()
}

/// Steps of a run as events tell of them: the losses.
fn train(model: &Modular, data: &Dataset, config: TrainConfig, seed: u64) -> Vec<f64> {
    let (head, mut events) = (head(), Vec::new());
    Trainer::new("toy", model, &head, config, Seed(seed))
        .unwrap()
        .train(data, &Batch::describe, &mut events)
        .unwrap();
    let loss = |e: &Event| match e {
        Event::Step { loss, .. } => Some(*loss),
        _ => None,
    };
    events.iter().filter_map(loss).collect()
}

fn config(names: &[&str], lr: f64, steps: u64) -> TrainConfig {
    TrainConfig {
        train: names.iter().map(|n| n.to_string()).collect(),
        steps: Some(steps),
        batch_size: 12,
        lr,
        loss_weights: ["reinforce", "relax", "controller"].map(|n| (n.to_owned(), 1.0)).into(),
        ..TrainConfig::default()
    }
}

/// What the model says and chooses in evaluation: the mean loss, the share of right choices of the
/// first site, and the effective number of its modules. A text counts for the choices where by
/// `costs` each wrong module shows, with a loss above 1; all do where there are none.
fn evaluated(model: &Modular, data: &Dataset, costs: &[[f64; 3]]) -> (f64, f64, f64) {
    let (mut loss, mut right, mut told, mut chosen) = (0.0, 0.0, 0.0, [0.0f64; 3]);
    let batches = one_by_one(data);
    for (i, (example, batch)) in data.examples().iter().zip(&batches).enumerate() {
        let cx = batch.describe(Context::eval()).unwrap();
        let said = no_grad(|| head().predict(model, batch, &cx)).unwrap();
        loss += head().losses(&said, batch).unwrap().item().unwrap();
        let stats = RoutingStats::of(&cx.take_trace().routings[0].1).unwrap();
        let wanted = RIGHT.iter().find(|(t, _)| *t == example.task).unwrap().1;
        let wrong = |j: usize| MODULES[j] != wanted;
        let shows = |c: &[f64; 3]| (0..3).all(|j| !wrong(j) || c[j] > 1.0);
        let counts = costs.get(i).is_none_or(shows);
        told += f64::from(u8::from(counts));
        for (j, (sum, load)) in chosen.iter_mut().zip(&stats.load).enumerate() {
            *sum += load;
            right += if counts && !wrong(j) { *load } else { 0.0 };
        }
    }
    let n = batches.len() as f64;
    let entropy: f64 = chosen.iter().map(|c| c / n).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
    assert!(told > 0.4 * n, "{told} of {n} texts tell modules apart");
    (loss / n, right / told, entropy.exp())
}

#[test]
fn the_right_module_is_learned_in_the_trainer() {
    modl_core::set_threads(1);
    let data = data(&["value"], None);
    let costs = costs(&data, &["value"]);
    let tasks = json!(["r0", "r1", "r2"]);
    let mut failed = Vec::new();
    for (router, lr, combine) in [
        (json!({"type": "gumbel_softmax", "anneal": {"to": 0.5, "steps": 150}}), 0.1, None),
        (json!({"type": "gumbel_softmax", "hard": true}), 0.1, None),
        (json!({"type": "concrete_bernoulli", "anneal": {"to": 0.3, "steps": 150}}), 0.1, None),
        (json!({"type": "reinforce"}), 0.1, None),
        (json!({"type": "reinforce", "baseline": "learned"}), 0.1, None),
        (json!({"type": "relax"}), 0.1, None),
        (json!({"type": "modular_network"}), 0.1, Some(Combine::Best)),
        (json!({"type": "routing_network", "tasks": tasks}), 0.0, None),
        (json!({"type": "routing_network", "tasks": tasks, "agent": "q_learning"}), 0.0, None),
        (json!({"type": "routing_network", "tasks": tasks, "agent": "reinforce"}), 0.0, None),
    ] {
        let model = model(router.clone(), &["value"], true, 3);
        let before = evaluated(&model, &data, &costs);
        // Tables are not among the trained parameters, and something has to be.
        let names: &[&str] = if lr > 0.0 { &["routers.*"] } else { &["heads.*"] };
        let passes = combine
            .map(|combine| Passes { count: 4, combine, ..Passes::default() })
            .unwrap_or_default();
        train(&model, &data, TrainConfig { passes, ..config(names, lr, 300) }, 7);
        let after = evaluated(&model, &data, &costs);
        println!(
            "{router}: loss {:.3} → {:.3}, right {:.2} → {:.2}",
            before.0, after.0, before.1, after.1
        );
        // Gates may open several modules that make up the answer together.
        let right = after.1 > 0.95 || router["type"] == "concrete_bernoulli";
        if !(right && before.1 < 0.8 && after.0 < 0.05 * before.0) {
            failed.push(router.to_string());
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn path_net_finds_the_module_and_its_path_is_kept() {
    modl_core::set_threads(1);
    let sites = ["query", "value"];
    let (data, rules) = (data(&sites, Some("b")), data(&sites, None));
    let router = json!({
        "type": "path_net", "active": 1, "layers": 2, "population": 8, "evaluate_for": 2,
    });
    let model = model(router, &sites, true, 3);
    train(&model, &data, config(&["heads.*"], 0.0, 240), 7);
    let path = winning_path(&model).unwrap();
    assert_eq!(path["layer.0.value"], ["b"], "{path:?}");
    assert_eq!(path.len(), 2);

    // The next task: all is trained but the path.
    let free = off_path(&model).unwrap();
    assert_eq!(free.len(), 4, "{free:?}");
    let copies: Vec<_> = model
        .params()
        .iter()
        .filter(|(n, _)| n.starts_with("modules."))
        .map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap()))
        .collect();
    let names: Vec<&str> = free.iter().map(String::as_str).collect();
    train(&model, &rules, config(&names, 0.05, 60), 8);
    let on_path = |name: &str| {
        path.iter().any(|(site, kept)| {
            kept.iter().any(|m| name.starts_with(&format!("modules.{m}.{site}.")))
        })
    };
    let mut moved = 0;
    for (name, before) in &copies {
        let same = model.params().get(name).unwrap().bit_equal(before).unwrap();
        assert!(same || !on_path(name), "{name} is on the path");
        moved += usize::from(!same);
    }
    assert!(copies.iter().filter(|(n, _)| on_path(n)).count() == 4 && moved > 0, "{moved}");

    // What is off the path begins again, and so does the population.
    let all = |model: &Modular| -> Vec<(String, modl_core::Tensor)> {
        let copy = |(n, p): (&str, &modl_core::Param)| (n.to_owned(), p.tensor().copy().unwrap());
        model.params().iter().map(copy).collect()
    };
    let (before, path) = (all(&model), winning_path(&model).unwrap());
    let on_path = |name: &str| {
        path.iter().any(|(site, kept)| {
            kept.iter().any(|m| name.starts_with(&format!("modules.{m}.{site}.")))
        })
    };
    let free = next_task(&model, Seed(40)).unwrap();
    assert_eq!(free.len(), 4, "{free:?}");
    for (name, old) in &before {
        let now = model.params().get(name).unwrap();
        let begun = if name.ends_with("lora_B.weight") && !on_path(name) {
            now.abs().unwrap().sum().unwrap().item().unwrap() == 0.0
        } else if name.starts_with("modules.") && !on_path(name) || name.ends_with("population") {
            !now.bit_equal(old).unwrap()
        } else if name.ends_with("fitness") || name.ends_with("leader") {
            now.to_kind(modl_core::Kind::Double).unwrap().sum().unwrap().item().unwrap() == 0.0
        } else {
            name.ends_with("tournament") || now.bit_equal(old).unwrap()
        };
        assert!(begun, "{name}");
    }

    let mut other = model;
    other.route(Box::new(Fixed::modules(["a"])), false).unwrap();
    let e = winning_path(&other).unwrap_err().to_string();
    assert!(e.contains("`fixed`"), "{e}");
}

/// Modules that start alike and are trained with their router. What is asserted is that the model
/// learns; how many modules are in use at the end is printed, and is a property of the method:
/// hard choices with little exploration may leave some of them unused.
#[test]
fn modules_and_routers_are_trained_together() {
    modl_core::set_threads(1);
    let data = data(&["value"], None);
    let tasks = json!(["r0", "r1", "r2"]);
    for (router, combine) in [
        (json!({"type": "gumbel_softmax"}), None),
        (json!({"type": "reinforce"}), None),
        (json!({"type": "reinforce", "entropy": 0.1}), None),
        (json!({"type": "modular_network"}), Some(Combine::Best)),
        (json!({"type": "routing_network", "tasks": tasks}), None),
    ] {
        let mut used = Vec::new();
        for seed in 0..2 {
            let model = model(router.clone(), &["value"], false, 10 + seed);
            let before = evaluated(&model, &data, &[]).0;
            let passes = combine
                .map(|combine| Passes { count: 4, combine, ..Passes::default() })
                .unwrap_or_default();
            let names = ["modules.*", "routers.*", "heads.*"];
            train(&model, &data, TrainConfig { passes, ..config(&names, 0.02, 150) }, seed);
            let (after, _, active) = evaluated(&model, &data, &[]);
            used.push(format!("{before:.2} → {after:.3}, {active:.2} modules"));
            assert!(after < 0.7 * before, "{router}: {before} → {after}");
        }
        println!("{router}: {used:?}");
    }
}
