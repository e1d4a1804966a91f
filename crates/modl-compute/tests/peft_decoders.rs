//! LoRA adapters that PEFT made for GPT-2 and Llama: outputs, merged weights, and folders written
//! again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Modular, Seed, Tensors};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};

/// `MODEL_METHOD` of every fixture.
fn adapters() -> impl Iterator<Item = (&'static str, String)> {
    let methods = ["lora", "lora_all", "rslora", "lora_rank_pattern"];
    let of = move |model| methods.map(|method| (model, format!("{model}_{method}")));
    ["gpt2", "llama"].into_iter().flat_map(of)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn json_of(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn with_adapter(base: &Path, adapter: &Path) -> Modular {
    let backbone = open(base, &LoadOptions::default()).unwrap();
    let mut model = Modular::from_box(backbone, Seed(1)).unwrap();
    peft::load(&mut model, adapter, Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

fn snapshot(model: &Modular) -> Vec<(String, Vec<u8>)> {
    let all = model.backbone().params().iter();
    all.map(|(n, p)| (n.to_owned(), p.tensor().to_bytes().unwrap())).collect()
}

#[test]
fn outputs_and_merged_weights_are_pefts() {
    for (base, name) in adapters() {
        let base = fixture(&format!("base_{base}"));
        let inputs = tensors(base.join("inputs.safetensors"));
        let golden = tensors(fixture(&name).join("outputs.safetensors"));
        let mut model = with_adapter(&base, &fixture(&name).join("adapter"));
        let cx = Context::eval();
        let same = |found: &Tensors, state: &str| {
            let expected = golden.need(&format!("{state}.logits")).unwrap();
            let found = found.need("logits").unwrap();
            let apart = found.max_abs_diff(expected).unwrap();
            assert!(found.all_close(expected, 1e-5, 1e-5).unwrap(), "{name} {state}: {apart}");
        };
        same(&model.forward(&inputs, &cx).unwrap(), "adapted");
        same(&model.forward_base(&inputs, &cx).unwrap(), "base");
        let adapted = golden.need("adapted.logits").unwrap();
        assert!(adapted.max_abs_diff(golden.need("base.logits").unwrap()).unwrap() > 1e-2);

        let before = snapshot(&model);
        model.merge("a").unwrap();
        same(&model.forward_base(&inputs, &cx).unwrap(), "merged");
        let changed = tensors(fixture(&name).join("merged_changed_weights.safetensors"));
        assert!(!changed.is_empty());
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
        model.unmerge().unwrap();
        assert_eq!(snapshot(&model), before);
    }
}

#[test]
fn what_is_written_again_is_what_was_read() {
    for (base, name) in adapters() {
        let golden = fixture(&name).join("adapter");
        let model = with_adapter(&fixture(&format!("base_{base}")), &golden);
        let dir = tempfile::tempdir().unwrap();
        peft::save(&model, "a", dir.path()).unwrap();
        let config = json_of(dir.path());
        assert_eq!(config, json_of(&golden), "{name}");
        assert_eq!(config["fan_in_fan_out"], json!(base == "gpt2"), "{name}");
        let ours = tensors(dir.path().join("adapter_model.safetensors"));
        let theirs = tensors(golden.join("adapter_model.safetensors"));
        assert_eq!(ours.len(), theirs.len());
        for (key, t) in theirs.iter() {
            assert!(ours.need(key).unwrap().bit_equal(t).unwrap(), "{name}: {key}");
        }
    }
}

/// An adapter made for the network with a head fits the one without, and gives the same hidden
/// states.
#[test]
fn an_adapter_fits_the_network_without_its_head() {
    for (base, class, prefix) in
        [("gpt2", "GPT2Model", "transformer."), ("llama", "LlamaModel", "model.")]
    {
        let dir = tempfile::tempdir().unwrap();
        let golden = fixture(&format!("base_{base}"));
        let text = std::fs::read_to_string(golden.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["architectures"] = json!([class]);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = "model.safetensors";
        std::fs::copy(golden.join(weights), dir.path().join(weights)).unwrap();
        let adapter = fixture(&format!("{base}_lora")).join("adapter");
        let inputs = tensors(golden.join("inputs.safetensors"));
        let cx = Context::eval();
        let (whole, bare) = (with_adapter(&golden, &adapter), with_adapter(dir.path(), &adapter));
        assert!(bare.modular_sites().iter().all(|s| !s.path.starts_with(prefix)));
        let hidden = |m: &Modular| {
            m.forward(&inputs, &cx).unwrap().need("last_hidden_state").unwrap().clone()
        };
        assert!(hidden(&whole).bit_equal(&hidden(&bare)).unwrap());
    }
}
