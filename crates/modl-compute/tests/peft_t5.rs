//! Adapters that PEFT made for T5 and for a BERT with a classifier: outputs, merged weights, and
//! folders written again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Modular, Seed, Tensors, no_grad};
use modl_models::{LoadOptions, open};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn with_adapter(base: &str, adapter: &Path) -> Modular {
    let base = open(fixture(base), &LoadOptions::default()).unwrap();
    let mut model = Modular::from_box(base, Seed(1)).unwrap();
    peft::load(&mut model, adapter, Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

fn logits(model: &Modular, base: &str) -> Tensors {
    let inputs = tensors(fixture(base).join("inputs.safetensors"));
    no_grad(|| model.forward(&inputs, &Context::eval())).unwrap()
}

#[track_caller]
fn same(found: &Tensors, golden: &Tensors, name: &str) {
    let (found, wanted) = (found.need("logits").unwrap(), golden.need(name).unwrap());
    let apart = found.max_abs_diff(wanted).unwrap();
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {apart}");
}

fn outputs_are_pefts(base: &str, adapter: &Path, golden: &Path, [adapted, merged]: [&str; 2]) {
    let golden = tensors(golden.to_owned());
    let mut model = with_adapter(base, adapter);
    let found = logits(&model, base);
    same(&found, &golden, adapted);
    let inputs = tensors(fixture(base).join("inputs.safetensors"));
    let plain = || no_grad(|| model.forward_base(&inputs, &Context::eval())).unwrap();
    let apart = found.need("logits").unwrap().max_abs_diff(plain().need("logits").unwrap());
    assert!(apart.unwrap() > 1e-2, "{}", adapter.display());
    model.merge("a").unwrap();
    let found = no_grad(|| model.forward_base(&inputs, &Context::eval())).unwrap();
    same(&found, &golden, merged);
}

fn written_again_it_is_the_same(base: &str, adapter: &Path) {
    let model = with_adapter(base, adapter);
    let dir = tempfile::tempdir().unwrap();
    peft::save(&model, "a", dir.path()).unwrap();
    let file = |dir: &Path| Checkpoint::open(dir.join("adapter_model.safetensors")).unwrap();
    let (ours, theirs) = (file(dir.path()), file(adapter));
    assert_eq!(ours.names(), theirs.names(), "{}", adapter.display());
    for key in theirs.names() {
        let (a, b) = (ours.tensor(&key, Device::Cpu), theirs.tensor(&key, Device::Cpu));
        assert!(a.unwrap().bit_equal(&b.unwrap()).unwrap(), "{key}");
    }
}

#[test]
fn t5_with_adapters_is_that_of_peft() {
    for name in ["t5_lora", "t5_lora_all", "t5_rslora"] {
        let adapter = fixture(name).join("adapter");
        let golden = fixture(name).join("outputs.safetensors");
        outputs_are_pefts("base_t5", &adapter, &golden, ["adapted.logits", "merged.logits"]);
        written_again_it_is_the_same("base_t5", &adapter);
    }
}

#[test]
fn merged_weights_of_t5_are_those_of_peft() {
    for name in ["t5_lora", "t5_lora_all", "t5_rslora"] {
        let mut model = with_adapter("base_t5", &fixture(name).join("adapter"));
        model.merge("a").unwrap();
        let changed = tensors(fixture(name).join("merged_changed_weights.safetensors"));
        for (weight, merged) in changed.iter() {
            let now = model.backbone().params().get(weight).unwrap();
            assert!(now.all_close(merged, 1e-6, 1e-6).unwrap(), "{name}: {weight}");
        }
        let before = tensors(fixture("base_t5").join("model.safetensors"));
        let now = model.backbone().params().iter();
        let moved = now.filter(|(n, p)| !p.tensor().bit_equal(before.need(n).unwrap()).unwrap());
        assert_eq!(moved.count(), changed.len(), "{name}");
    }
}

#[test]
fn deterministic_models_with_adapters_are_those_of_peft() {
    for base in ["deterministic_t5", "deterministic_bert"] {
        for name in ["lora", "rslora"] {
            let adapter = fixture(base).join(name);
            let golden = adapter.join("outputs.safetensors");
            outputs_are_pefts(base, &adapter, &golden, ["logits", "merged_logits"]);
            written_again_it_is_the_same(base, &adapter);
        }
    }
}
