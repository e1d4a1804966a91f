//! A toy model and toy data: two tasks with opposite targets over a tiny random backbone.
#![allow(dead_code, reason = "each test binary uses a part")]

use modl_aggregate::WeightedSum;
use modl_compute::Lora;
use modl_core::testing::TinyBackbone;
use modl_core::{Device, Error, Init, Kind, Modular, Registry, Result, Seed, Targets, Tensor};
use modl_route::Fixed;
use modl_train::{Dataset, Event, Example, Methods, Objective, Regression, Sink, TokenIds};

pub const TASKS: [&str; 2] = ["plus", "minus"];

pub fn head() -> Regression {
    Regression { head: "score".into(), dim: 8 }
}

pub fn backbone() -> TinyBackbone {
    TinyBackbone::new(Seed(1), Kind::Float).unwrap()
}

/// LoRA with dropout for each task, routed by task, with a head.
pub fn model(seed: u64) -> Modular {
    with_dropout(0.2, seed)
}

pub fn with_dropout(dropout: f64, seed: u64) -> Modular {
    let mut model = Modular::new(backbone(), Seed(seed)).unwrap();
    for name in TASKS {
        let lora = Lora { r: 2, alpha: 4.0, dropout, ..Lora::default() };
        model.attach(name, Box::new(lora), &Targets::names(["query", "value"])).unwrap();
    }
    model.route(Box::new(Fixed::default()), false).unwrap();
    model.aggregate(Box::new(WeightedSum::default())).unwrap();
    head().setup(&mut model).unwrap();
    model
}

/// `n` examples for each task: the target is the share of even tokens, positive or negative.
pub fn data(n: usize) -> Dataset {
    let mut examples = Vec::new();
    for (t, task) in TASKS.iter().enumerate() {
        for i in 0..n {
            let ids: Vec<i64> =
                (0..2 + i % 5).map(|k| ((i * 7 + k * k * 3 + t) % 16) as i64).collect();
            let even = ids.iter().filter(|k| **k % 2 == 0).count() as f32 / ids.len() as f32;
            let target = if t == 0 { even } else { -even };
            let ids = ids.into();
            examples.push(Example { id: format!("{i}"), task: task.to_string(), ids, target });
        }
    }
    Dataset::new(examples).unwrap()
}

pub const THREE: [&str; 3] = ["a", "b", "c"];
pub const CLASSES: usize = 4;
pub const SIDE: i64 = 32;

/// Prototypes of four classes with noise, each task with their numbers in an order of its own.
pub fn stream(n: usize, seed: u64) -> Dataset {
    let draw = |size: &[i64], by, seed: Seed| {
        Init::Normal(by).tensor(size, seed, Kind::Float, Device::Cpu).unwrap()
    };
    let prototypes = draw(&[CLASSES as i64, SIDE], 1.0, Seed(5));
    let of = |(t, task): (usize, &&str)| {
        let classes: Vec<i64> = (0..n).map(|i| (i % CLASSES) as i64).collect();
        let index = Tensor::from_slice(&classes, &[n as i64], Device::Cpu).unwrap();
        let mut order: Vec<i64> = (0..SIDE).collect();
        order.sort_by_key(|i| Seed(t as u64).nth(*i as u64).0);
        let order = Tensor::from_slice(&order, &[SIDE], Device::Cpu).unwrap();
        let noise = draw(&[n as i64, SIDE], 0.3, Seed(seed).nth(t as u64));
        let x = prototypes.index_select(0, &index).unwrap().add(&noise).unwrap();
        let example = |(i, class): (usize, &i64)| Example {
            id: i.to_string(),
            task: (*task).to_owned(),
            ids: TokenIds::default(),
            target: *class as f32,
        };
        let examples = classes.iter().enumerate().map(example).collect();
        Dataset::dense(examples, "pixel_values", x.index_select(1, &order).unwrap()).unwrap()
    };
    THREE.iter().enumerate().map(of).reduce(|all, task| all.and(&task).unwrap()).unwrap()
}

pub fn methods() -> Methods {
    let registry = Registry::new().with(modl_compute::register).unwrap();
    let registry = registry.with(modl_route::register).unwrap();
    let registry = registry.with(modl_models::register).unwrap();
    Methods::new(registry.with(modl_aggregate::register).unwrap()).unwrap()
}

/// Stops once so many states have been saved.
pub struct StopAfter(pub usize);

impl Sink for StopAfter {
    fn event(&mut self, event: &Event) -> Result<()> {
        self.0 -= usize::from(matches!(event, Event::Saved { .. }));
        if self.0 == 0 { Err(Error::invalid("test", "stop")) } else { Ok(()) }
    }
}
