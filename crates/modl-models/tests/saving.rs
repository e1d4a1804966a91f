//! Folders that are written are those that were read.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::shards::{Index, ShardSize};
use modl_core::{Backbone, Device, Kind};
use modl_models::{ExpertNames, LoadOptions, open, save};
use serde_json::Value;

const WHOLE: ShardSize = ShardSize::USUAL;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(dir: &Path) -> Box<dyn Backbone> {
    open(dir, &LoadOptions::default()).unwrap()
}

fn file(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir.join("model.safetensors")).unwrap()
}

fn config(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
}

/// Names, shapes and bytes of each tensor, and the settings. All were written by transformers, with
/// a tensor for each expert.
#[test]
fn a_folder_that_is_read_and_written_is_the_same() {
    for name in [
        "deterministic_mixtral",
        "deterministic_olmoe",
        "tiny_qwen2_moe",
        "tiny_deepseek_v3",
        "tiny_deepseek_v3_yarn",
        "tiny_switch",
        "tiny_switch_untied",
        "base_llama",
        "base_gpt2",
        "base_t5",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new/folder");
        save(&*load(&fixture(name)), &out, ExpertNames::Each, WHOLE).unwrap();
        let (before, after) = (file(&fixture(name)), file(&out));
        assert_eq!(before.names(), after.names(), "{name}");
        for tensor in before.names() {
            let [one, other] = [&before, &after].map(|f| f.tensor(&tensor, Device::Cpu).unwrap());
            assert_eq!(one.kind(), other.kind(), "{name} {tensor}");
            assert_eq!(one.size(), other.size(), "{name} {tensor}");
            assert_eq!(one.to_bytes().unwrap(), other.to_bytes().unwrap(), "{name} {tensor}");
        }
        assert_eq!(config(&fixture(name)), config(&out), "{name}");
        let e = save(&*load(&out), &out, ExpertNames::Each, WHOLE).unwrap_err().to_string();
        assert!(e.contains("has a config.json already"), "{e}");
    }
}

#[test]
fn fused_names_are_those_of_transformers_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["deterministic_mixtral", "tiny_qwen2_moe", "tiny_deepseek_v3"] {
        let (model, out) = (load(&fixture(name)), dir.path().join(name));
        save(&*model, &out, ExpertNames::Fused, WHOLE).unwrap();
        let params: Vec<_> = model.params().iter().map(|(n, _)| n.to_owned()).collect();
        assert_eq!(file(&out).names(), params);
        assert!(params.iter().any(|n| n.ends_with("mlp.experts.gate_up_proj")));
        assert_eq!(load(&out).fingerprint().unwrap(), model.fingerprint().unwrap());
    }
    let out = dir.path().join("switch");
    let e = save(&*load(&fixture("tiny_switch")), &out, ExpertNames::Fused, WHOLE).unwrap_err();
    assert!(e.to_string().contains("mlp.experts.wi") && !out.exists(), "{e}");
}

#[test]
fn the_kind_of_the_file_is_that_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let options = LoadOptions { kind: Some(Kind::BFloat16), ..LoadOptions::default() };
    let model = open(fixture("tiny_deepseek_v3"), &options).unwrap();
    save(&*model, dir.path().join("new"), ExpertNames::Each, WHOLE).unwrap();
    let out = dir.path().join("new");
    assert_eq!(config(&out)["dtype"], "bfloat16");
    let kind = |name: &str| file(&out).info(name).unwrap().1;
    assert_eq!(kind("model.layers.1.mlp.gate.weight"), Kind::BFloat16);
    assert_eq!(kind("model.layers.1.mlp.gate.e_score_correction_bias"), Kind::Float);
}

#[test]
fn shards_are_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tiny_qwen2_moe", "tiny_switch", "base_gpt2"] {
        let (model, out) = (load(&fixture(name)), dir.path().join(name));
        save(&*model, &out, ExpertNames::Each, "10KB".parse().unwrap()).unwrap();
        assert!(!out.join("model.safetensors").exists());
        let shards = Index::read(out.join("model.safetensors.index.json")).unwrap().files();
        assert!(shards.len() > 2);
        let again = load(&out);
        for (name, p) in model.params().iter() {
            assert!(again.params().get(name).unwrap().bit_equal(p.tensor()).unwrap(), "{name}");
        }
        let e = save(&*model, &out, ExpertNames::Each, WHOLE).unwrap_err().to_string();
        assert!(e.contains("already"), "{e}");
    }
}
