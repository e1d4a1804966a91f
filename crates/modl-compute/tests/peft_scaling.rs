//! (IA)³ and layer-norm tuning against adapters that PEFT made: outputs, merged weights, and
//! folders written again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Modular, Seed, Tensors};
use modl_models::{LoadOptions, open};
use serde_json::Value;

/// Backbone and adapter.
const ADAPTERS: [(&str, &str); 2] = [("base_bert", "bert_ia3"), ("base_bert", "bert_ln_tuning")];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn with_adapter(base: &str, name: &str) -> Modular {
    let backbone = open(fixture(base), &LoadOptions::default()).unwrap();
    let mut model = Modular::from_box(backbone, Seed(1)).unwrap();
    peft::load(&mut model, fixture(name).join("adapter"), Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

/// Every golden output of `state`, of which there has to be one.
#[track_caller]
fn same_outputs(found: &Tensors, golden: &Tensors, state: &str) {
    let prefix = format!("{state}.");
    let mut seen = 0;
    for (name, expected) in golden.iter() {
        let Some(output) = name.strip_prefix(&prefix) else { continue };
        let own = found.need(output).unwrap();
        assert!(
            own.all_close(expected, 1e-5, 1e-5).unwrap(),
            "{name}: {}",
            own.max_abs_diff(expected).unwrap()
        );
        seen += 1;
    }
    assert!(seen > 0, "the fixture has no outputs for {state}");
}

fn snapshot(model: &Modular) -> Vec<(String, Vec<u8>)> {
    let all = model.backbone().params().iter();
    all.map(|(n, p)| (n.to_owned(), p.tensor().to_bytes().unwrap())).collect()
}

#[test]
fn outputs_and_merged_weights_are_pefts() {
    for (base, name) in ADAPTERS {
        let inputs = tensors(fixture(base).join("inputs.safetensors"));
        let golden = tensors(fixture(name).join("outputs.safetensors"));
        let mut model = with_adapter(base, name);
        let cx = Context::eval();
        let adapted = model.forward(&inputs, &cx).unwrap();
        same_outputs(&adapted, &golden, "adapted");
        let plain = model.forward_base(&inputs, &cx).unwrap();
        same_outputs(&plain, &golden, "base");
        let (output, moved) = adapted.iter().next().unwrap();
        assert!(moved.max_abs_diff(plain.need(output).unwrap()).unwrap() > 1e-2, "{name}");

        let before = snapshot(&model);
        model.merge("a").unwrap();
        same_outputs(&model.forward_base(&inputs, &cx).unwrap(), &golden, "merged");
        let changed = tensors(fixture(name).join("merged_changed_weights.safetensors"));
        for (weight, bytes) in &before {
            let now = model.backbone().params().get(weight).unwrap();
            match changed.get(weight) {
                Some(merged) => {
                    assert!(now.all_close(merged, 1e-6, 1e-6).unwrap(), "{name}: {weight}");
                    assert_ne!(&now.to_bytes().unwrap(), bytes, "{name}: {weight}");
                }
                None => assert_eq!(&now.to_bytes().unwrap(), bytes, "{name}: {weight}"),
            }
        }
        // (IA)³ cannot be divided out where l is 0: θ comes back from a copy.
        model.unmerge().unwrap();
        assert_eq!(snapshot(&model), before, "{name}");
    }
}

fn json(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn what_is_written_again_is_what_was_read() {
    for (base, name) in ADAPTERS {
        let dir = tempfile::tempdir().unwrap();
        let model = with_adapter(base, name);
        peft::save(&model, "a", dir.path()).unwrap();
        let golden = fixture(name).join("adapter");
        assert_eq!(json(dir.path()), json(&golden), "{name}");
        let ours = Checkpoint::open(dir.path().join("adapter_model.safetensors")).unwrap();
        let theirs = Checkpoint::open(golden.join("adapter_model.safetensors")).unwrap();
        assert_eq!(ours.names(), theirs.names(), "{name}");
        for key in theirs.names() {
            let (a, b) = (ours.tensor(&key, Device::Cpu), theirs.tensor(&key, Device::Cpu));
            assert!(a.unwrap().bit_equal(&b.unwrap()).unwrap(), "{name}: {key}");
        }
    }
}
