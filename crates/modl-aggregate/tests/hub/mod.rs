//! Adapters that AdapterHub made, and what it computed with them.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use modl_compute::adapterhub;
use modl_core::checkpoint::Checkpoint;
use modl_core::{
    Bank, Context, Device, Modular, Result, Router, RouterConfig, Routing, Scope, Seed, Signal,
    Site, Tensors, Weights,
};
use modl_models::{Bert, LoadOptions};
use serde_json::{Value, json};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapterhub").join(name)
}

fn base(file: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../modl-models/tests/fixtures");
    models.join("base_bert").join(file)
}

pub fn json_of(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

pub fn inputs() -> Tensors {
    tensors(base("inputs.safetensors"))
}

/// What AdapterHub computed, by the names of the compositions.
pub fn outputs() -> Tensors {
    tensors(fixture("outputs.safetensors"))
}

/// The tiny BERT with some of the adapters.
pub fn model(names: &[&str]) -> Modular {
    let bert = Bert::load(base(""), &LoadOptions::default()).unwrap();
    let mut model = Modular::new(bert, Seed(1)).unwrap();
    for name in names {
        assert_eq!(adapterhub::load(&mut model, fixture(name), None).unwrap(), *name);
    }
    model
}

/// How far the last hidden state is from the recorded one.
pub fn apart(model: &Modular, recorded: &str) -> f64 {
    let found = model.forward(&inputs(), &Context::eval()).unwrap();
    let wanted = outputs();
    found.need("last_hidden_state").unwrap().max_abs_diff(wanted.need(recorded).unwrap()).unwrap()
}

/// A router that names modules, each with the same weight, where they stand.
#[derive(Debug, Clone)]
pub struct Named(Vec<String>);

impl Named {
    pub fn all(names: &[&str]) -> Box<Self> {
        Box::new(Named(names.iter().map(|n| (*n).to_owned()).collect()))
    }
}

impl RouterConfig for Named {
    fn kind(&self) -> &'static str {
        "named"
    }

    fn to_json(&self) -> Result<Value> {
        Ok(json!({}))
    }

    fn build(&self, _: &Site, _: &Bank, _: &mut Scope) -> Result<Box<dyn Router>> {
        Ok(Box::new(self.clone()))
    }
}

impl Router for Named {
    fn kind(&self) -> &'static str {
        "named"
    }

    fn route(&self, _: &Signal, bank: &Bank, _: &Context) -> Result<Routing> {
        let here: Vec<usize> = self.0.iter().flat_map(|n| bank.position(n)).collect();
        let each = 1.0 / here.len().max(1) as f64;
        let all = here.into_iter().map(|j| (j, each)).collect();
        Ok(Routing::new(Weights::Fixed(all), bank.len()))
    }
}
