//! Routers by task and by lot in training: skills against a shared module, THOR's passes, AdaMix's
//! average.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use modl_aggregate::{Average, Factors, MultiHead, WeightedSum, merge_low_rank};
use modl_compute::Lora;
use modl_core::testing::{Given, TinyBackbone, perturb};
use modl_core::{
    AggregatorConfig, Context, Kind, Modular, RouterConfig, Seed, Select, Targets, Tensor, Weights,
    no_grad,
};
use modl_route::{AdaMix, Fixed, Polytropon, SkillSettings, TaskLabels, Thor};
use modl_train::{
    Batch, Combine, Event, Objective, Passes, Prediction, TrainConfig, Trainer, evaluate,
};
use toy::{TASKS, backbone, data, head};

fn model(
    names: &[&str],
    router: Box<dyn RouterConfig>,
    aggregator: Box<dyn AggregatorConfig>,
) -> Modular {
    let mut model = Modular::new(backbone(), Seed(3)).unwrap();
    for name in names {
        let lora = Lora { r: 2, alpha: 4.0, ..Lora::default() };
        model.attach(name, Box::new(lora), &Targets::names(["query", "value"])).unwrap();
    }
    model.route(router, false).unwrap();
    model.aggregate(aggregator).unwrap();
    head().setup(&mut model).unwrap();
    model
}

fn train(model: &Modular, config: TrainConfig) -> Vec<Event> {
    let (head, mut events) = (head(), Vec::new());
    let mut trainer = Trainer::new("toy", model, &head, config, Seed(7)).unwrap();
    trainer.train(&data(10), &Batch::describe, &mut events).unwrap();
    events
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig { steps: Some(steps), batch_size: 4, lr: 0.02, ..TrainConfig::default() }
}

fn said(model: &Modular) -> Vec<f64> {
    let all: Vec<Prediction> = evaluate(model, &head(), &data(10), 5, &Batch::describe).unwrap();
    all.iter().map(|p| p.prediction).collect()
}

fn error(model: &Modular) -> f64 {
    let all: Vec<Prediction> = evaluate(model, &head(), &data(10), 5, &Batch::describe).unwrap();
    all.iter().map(|p| (p.prediction - p.target).powi(2)).sum::<f64>() / all.len() as f64
}

fn labels() -> TaskLabels {
    TaskLabels { tasks: TASKS.map(String::from).to_vec(), ..TaskLabels::default() }
}

/// A router's parameters learn faster than modules.
fn two_speeds(steps: u64) -> TrainConfig {
    TrainConfig {
        lr_scale: [("routers.*".to_owned(), 20.0)].into(),
        loss_weights: [("ibp".to_owned(), 1e-4)].into(),
        ..config(steps)
    }
}

#[test]
fn tasks_that_contradict_one_another_are_learned_by_skills_and_not_by_a_shared_module() {
    let skills = |n: usize| ["s0", "s1", "s2"].into_iter().take(n).collect::<Vec<_>>();
    let polytropon = || {
        let settings = SkillSettings { ibp: Some(3.0), ..SkillSettings::default() };
        Box::new(Polytropon { labels: labels(), skills: settings })
    };
    let heads =
        || Box::new(modl_route::MultiHead { heads: 2, labels: labels(), ..Default::default() });
    let shared = model(&skills(1), polytropon(), Box::new(Average::default()));
    train(&shared, two_speeds(60));
    let floor = error(&shared);
    for poly in [
        model(&skills(3), polytropon(), Box::new(Average::default())),
        model(&skills(3), polytropon(), Box::new(WeightedSum::default())),
        model(&skills(3), heads(), Box::new(MultiHead {})),
    ] {
        let events = train(&poly, two_speeds(60));
        let Some(Event::Finished { unused, .. }) = events.last() else { panic!() };
        assert!(unused.is_empty(), "{unused:?}");
        let found = error(&poly);
        assert!(found < 0.25 * floor, "{found} with skills, {floor} shared");
    }
}

#[test]
fn one_skill_is_a_shared_module_and_private_skills_are_private_modules() {
    let poly = |names: &[&str]| {
        let router = Polytropon { labels: labels(), ..Polytropon::default() };
        model(names, Box::new(router), Box::new(Average::default()))
    };
    let close = |a: &Modular, b: &Modular| {
        for m in [a, b] {
            perturb(m, &Select::new("modules.*"), 0.3, Seed(9)).unwrap();
            perturb(m, &Select::new("heads.*"), 0.3, Seed(9)).unwrap();
        }
        for (x, y) in said(a).iter().zip(said(b)) {
            assert!((x - y).abs() < 1e-5, "{x} is not {y}");
        }
    };
    let shared = model(&["s0"], Box::new(Fixed::modules(["s0"])), Box::new(WeightedSum::default()));
    close(&poly(&["s0"]), &shared);
    // Z = I: the first task has the first skill alone.
    let skilled = poly(&TASKS);
    for (name, p) in skilled.params().iter().filter(|(n, _)| n.ends_with(".logits")) {
        let z =
            Tensor::from_slice(&[60f32, -60.0, -60.0, 60.0], &[2, 1, 2], modl_core::Device::Cpu);
        assert_eq!(p.tensor().size(), [2, 1, 2], "{name}");
        no_grad(|| p.tensor().clone().copy_from(&z.unwrap())).unwrap();
    }
    let private = model(&TASKS, Box::new(Fixed::default()), Box::new(WeightedSum::default()));
    close(&skilled, &private);
    assert!(said(&private).iter().any(|v| (v - said(&shared)[0]).abs() > 1e-3));
}

const EXPERTS: [&str; 4] = ["e0", "e1", "e2", "e3"];

/// How far predictions of single experts are apart, the mean square over pairs.
fn apart(model: &mut Modular) -> f64 {
    let all: Vec<Vec<f64>> = (0..EXPERTS.len())
        .map(|j| {
            model.route(Given::only(j), false).unwrap();
            said(model)
        })
        .collect();
    let mut sum = 0.0;
    for a in &all {
        for b in &all {
            sum += a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / a.len() as f64;
        }
    }
    sum
}

#[test]
fn the_passes_of_thor_make_experts_agree() {
    let trained = |weight: f64| {
        let mut model =
            model(&EXPERTS, Box::new(Thor::default()), Box::new(WeightedSum::default()));
        perturb(&model, &Select::new("modules.*"), 0.5, Seed(5)).unwrap();
        let passes = Passes { count: 2, combine: Combine::Consistent(weight), ..Passes::default() };
        train(&model, TrainConfig { passes, ..config(120) });
        apart(&mut model)
    };
    let (with, without) = (trained(5.0), trained(0.0));
    assert!(with < 0.5 * without, "{with} with, {without} without");
}

#[test]
fn a_step_of_adamix_moves_one_module_at_each_site() {
    moves_one(AdaMix::default(), Box::new(Average::default()), &[""]);
}

#[test]
fn a_step_of_independent_adamix_moves_one_factor_of_each_kind_at_each_site() {
    moves_one(AdaMix { independent: true }, Box::new(Factors {}), &["lora_A", "lora_B"]);
}

/// Of all that begins so in the modules at a site, one module's moves in a step.
fn moves_one(router: AdaMix, aggregator: Box<dyn AggregatorConfig>, parts: &[&str]) {
    let model = model(&EXPERTS, Box::new(router), aggregator);
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(5)).unwrap();
    let before: Vec<_> =
        model.params().iter().map(|(n, p)| (n.to_owned(), p.tensor().copy().unwrap())).collect();
    train(&model, config(1));
    for site in model.modular_sites() {
        for part in parts {
            let moves = |name: &&str| {
                let own = format!("modules.{name}.{}.{part}", site.path);
                before
                    .iter()
                    .filter(|(n, _)| n.starts_with(&own))
                    .any(|(n, old)| !old.bit_equal(model.params().get(n).unwrap()).unwrap())
            };
            let moved: Vec<&str> = EXPERTS.into_iter().filter(moves).collect();
            assert_eq!(moved.len(), 1, "{} {part}: {moved:?}", site.path);
        }
    }
}

#[test]
fn adamix_is_one_average_module_in_evaluation() {
    let mut model = model(&EXPERTS, Box::new(AdaMix::default()), Box::new(Average::default()));
    perturb(&model, &Select::new("modules.*"), 0.5, Seed(5)).unwrap();
    let inputs = TinyBackbone::inputs(3, 5, Seed(4)).unwrap();
    let output = |model: &Modular| -> Tensor {
        model.forward(&inputs, &Context::eval()).unwrap().need("logits").unwrap().copy().unwrap()
    };
    let averaged = output(&model);
    let equal: Vec<(&str, f64)> = EXPERTS.iter().map(|n| (*n, 0.25)).collect();
    let merged = merge_low_rank(&model, &equal, &Average::default()).unwrap();
    // The factors of the merged module in the place of the first, alone, at the cost of one.
    let lora = |model: &Modular, name: &str, site: &str, part: &str| {
        model.params().get(&format!("modules.{name}.{site}.{part}.weight")).unwrap().clone()
    };
    model.route(Box::new(Given(Weights::Fixed(vec![(0, 1.0)]))), false).unwrap();
    for (site, factors) in &merged {
        for (part, value) in [("lora_A", &factors.down), ("lora_B", &factors.up)] {
            no_grad(|| lora(&model, "e0", site, part).copy_from(value)).unwrap();
        }
    }
    assert!(output(&model).all_close(&averaged, 1e-6, 1e-5).unwrap());
    // Equal modules are their average.
    let names = ["a", "b", "c", "d"];
    let mut equal =
        Modular::new(TinyBackbone::new(Seed(1), Kind::Float).unwrap(), Seed(2)).unwrap();
    for name in names {
        let lora = Lora { r: 2, alpha: 4.0, ..Lora::default() };
        equal.attach(name, Box::new(lora), &Targets::names(["query", "value"])).unwrap();
    }
    perturb(&equal, &Select::new("modules.a.*"), 0.5, Seed(5)).unwrap();
    for (name, t) in equal.params().select(&Select::new("modules.a.*")) {
        for other in &names[1..] {
            let twin = name.replacen("modules.a.", &format!("modules.{other}."), 1);
            no_grad(|| equal.params().get(&twin).unwrap().clone().copy_from(t)).unwrap();
        }
    }
    equal.aggregate(Box::new(Average::default())).unwrap();
    equal.route(Box::new(AdaMix::default()), false).unwrap();
    let all = output(&equal);
    equal.route(Given::only(2), false).unwrap();
    assert!(output(&equal).all_close(&all, 1e-7, 1e-6).unwrap());
}
