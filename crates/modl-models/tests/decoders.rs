//! GPT-2 and Llama against transformers' outputs, and what their inputs and sites promise.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::{Prompt, Scale, WeightMask};
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Kind, Layers, Modular, ModuleConfig, Seed, Select, SiteKind,
    Targets, Tensor, Tensors, no_grad,
};
use modl_models::{LoadOptions, open};

const ALL: [&str; 4] = ["base_gpt2", "base_llama", "deterministic_gpt2", "deterministic_llama"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn decoder(name: &str) -> Box<dyn Backbone> {
    open(fixture(name), &LoadOptions::default()).unwrap()
}

fn run(model: &dyn Backbone, inputs: &Tensors) -> Tensors {
    no_grad(|| model.forward(inputs, &Layers::none(model.sites().len()), &Context::eval())).unwrap()
}

#[track_caller]
fn close(found: &Tensor, wanted: &Tensor, what: &str) {
    let apart = found.max_abs_diff(wanted).unwrap();
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{what}: {apart}");
}

#[test]
fn outputs_are_those_of_transformers() {
    for name in ALL {
        let wanted = read(&format!("{name}/outputs.safetensors"));
        let found = run(&*decoder(name), &read(&format!("{name}/inputs.safetensors")));
        close(found.need("logits").unwrap(), wanted.need("logits").unwrap(), name);
        if let Some(last) = wanted.get("hidden_2") {
            close(found.need("last_hidden_state").unwrap(), last, name);
        }
        assert_eq!(found.len(), 2);
    }
}
