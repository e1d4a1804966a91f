//! A toy model and toy data: two tasks with opposite targets over a tiny random backbone.
#![allow(dead_code, reason = "each test binary uses a part")]

use modl_aggregate::WeightedSum;
use modl_compute::Lora;
use modl_core::testing::TinyBackbone;
use modl_core::{Error, Kind, Modular, Registry, Result, Seed, Targets};
use modl_route::Fixed;
use modl_train::{Dataset, Event, Example, Methods, Objective, Regression, Sink};

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
            examples.push(Example { id: format!("{i}"), task: task.to_string(), ids, target });
        }
    }
    Dataset::new(examples).unwrap()
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
