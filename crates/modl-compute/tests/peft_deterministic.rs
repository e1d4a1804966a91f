//! Adapters that PEFT made with weights by a closed formula, on seven tiny models.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::peft;
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Kind, Modular, Seed, Tensor, Tensors};
use modl_models::{LoadOptions, open};
use serde_json::Value;

const BASES: [&str; 7] = [
    "deterministic_bert",
    "deterministic_gpt2",
    "deterministic_llama",
    "deterministic_mixtral",
    "deterministic_olmoe",
    "deterministic_t5",
    "deterministic_vit",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

/// All pairs of a model and one of its adapters.
fn adapters() -> Vec<(&'static str, PathBuf)> {
    let mut all = Vec::new();
    for base in BASES {
        let folders = std::fs::read_dir(fixture(base)).unwrap().map(|f| f.unwrap().path());
        let mut folders: Vec<PathBuf> = folders.filter(|f| f.is_dir()).collect();
        folders.sort();
        all.extend(folders.into_iter().map(|f| (base, f)));
    }
    assert!(all.len() >= 49, "fixtures are missing: {all:?}");
    all
}

fn with_adapter(base: &str, folder: &Path) -> Modular {
    with_adapter_as(base, folder, &LoadOptions::default())
}

fn with_adapter_as(base: &str, folder: &Path, options: &LoadOptions) -> Modular {
    let backbone = open(fixture(base), options).unwrap();
    let mut model = Modular::from_box(backbone, Seed(1)).unwrap();
    peft::load(&mut model, folder, Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

/// LoRA at attention, at the shared expert and its gate, and in the layer that has no mixture;
/// at latent attention and the stacked matrices of experts; and at the matrices of each expert.
#[test]
fn a_lora_finds_the_sites_of_mixtures() {
    for name in ["tiny_qwen2_moe", "tiny_deepseek_v3", "tiny_switch"] {
        a_lora_finds_its_sites(name);
    }
}

fn a_lora_finds_its_sites(name: &str) {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../modl-models/tests/fixtures");
    let base = base.join(name);
    let mut model =
        Modular::from_box(open(&base, &LoadOptions::default()).unwrap(), Seed(1)).unwrap();
    peft::load(&mut model, base.join("lora"), Some("a")).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    let inputs = tensors(base.join("inputs.safetensors"));
    let wanted = tensors(base.join("lora/outputs.safetensors"));
    let wanted = wanted.need("logits").unwrap();
    let found = model.forward(&inputs, &Context::eval()).unwrap();
    assert!(found.need("logits").unwrap().all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}");
    let plain = model.forward_base(&inputs, &Context::eval()).unwrap();
    assert!(plain.need("logits").unwrap().max_abs_diff(wanted).unwrap() > 1e-2);
    model.merge("a").unwrap();
    let merged = model.forward_base(&inputs, &Context::eval()).unwrap();
    assert!(merged.need("logits").unwrap().all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}");
}

/// How far logits are from those of the same model and adapter in f64.
fn lost(logits: &Tensor, base: &str, folder: &Path) -> f64 {
    let wide = LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() };
    let exact = with_adapter_as(base, folder, &wide);
    let inputs = tensors(fixture(base).join("inputs.safetensors"));
    let exact = exact.forward(&inputs, &Context::eval()).unwrap();
    let logits = logits.to_kind(Kind::Double).unwrap();
    logits.max_abs_diff(exact.need("logits").unwrap()).unwrap()
}

#[test]
fn logits_are_pefts_attached_and_merged() {
    for (base, folder) in adapters() {
        let inputs = tensors(fixture(base).join("inputs.safetensors"));
        let golden = tensors(folder.join("outputs.safetensors"));
        let mut model = with_adapter(base, &folder);
        let cx = Context::eval();
        let at = folder.display();
        let check = |found: &Tensors, key: &str| {
            let (found, wanted) = (found.need("logits").unwrap(), golden.need(key).unwrap());
            if found.all_close(wanted, 1e-5, 1e-5).unwrap() {
                return;
            }
            // Sums of another order are apart where PEFT's own f32 is farther than that from f64.
            let [own, pefts] = [found, wanted].map(|t| lost(t, base, &folder));
            let apart = found.max_abs_diff(wanted).unwrap();
            let told = format!("{at}: {key}: {apart}; from f64 {own}, PEFT {pefts}");
            assert!(pefts > 1e-5 && own < 1.5 * pefts, "{told}");
        };
        let adapted = model.forward(&inputs, &cx).unwrap();
        check(&adapted, "logits");
        let plain = model.forward_base(&inputs, &cx).unwrap();
        let (moved, still) = (adapted.need("logits").unwrap(), plain.need("logits").unwrap());
        let longer = moved.size() != still.size();
        assert!(longer || moved.max_abs_diff(still).unwrap() > 1e-3, "{at}");
        if golden.get("merged_logits").is_none() {
            // A prompt has nothing to merge. Biases of LoRA on layers that have none: PEFT refuses, too.
            let e = model.merge("a").unwrap_err().to_string();
            let bias = folder.ends_with("lora_bias");
            assert_eq!(bias, e.contains("bias"), "{at}: {e}");
            continue;
        }
        model.merge("a").unwrap();
        check(&model.forward_base(&inputs, &cx).unwrap(), "merged_logits");
    }
}

#[test]
fn what_is_written_again_is_what_was_read() {
    let json = |dir: &Path| -> Value {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        // PEFT takes a name as a list of one.
        if let Some(name) = config["layers_pattern"].as_str() {
            config["layers_pattern"] = serde_json::json!([name]);
        }
        // What PEFT writes for no parameters where transformers has renamed some of the backbone's.
        if config["target_parameters"] == serde_json::json!([]) {
            config["target_parameters"] = Value::Null;
        }
        config
    };
    for (base, folder) in adapters() {
        let to = tempfile::tempdir().unwrap();
        peft::save(&with_adapter(base, &folder), "a", to.path()).unwrap();
        assert_eq!(json(to.path()), json(&folder), "{}", folder.display());
        let file = "adapter_model.safetensors";
        let (ours, theirs) = (tensors(to.path().join(file)), tensors(folder.join(file)));
        assert_eq!(ours.len(), theirs.len(), "{}", folder.display());
        for (key, t) in theirs.iter() {
            assert!(ours.need(key).unwrap().bit_equal(t).unwrap(), "{}: {key}", folder.display());
        }
    }
}

/// PEFT lets the output layer compute with the trained rows, where it is the table of words.
#[test]
fn trained_tokens_of_a_shared_table_are_refused() {
    let base = fixture("tied_llama");
    let backbone = open(&base, &LoadOptions::default()).unwrap();
    let mut model = Modular::from_box(backbone, Seed(1)).unwrap();
    let e = peft::load(&mut model, base.join("tokens"), None).unwrap_err().to_string();
    assert!(e.contains("model.embed_tokens") && e.contains("lm_head"), "{e}");
    assert!(model.modules().is_empty());
}
