//! Folders: how names are read, and that whatever does not fit is refused before anything is
//! loaded.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_core::checkpoint::{Checkpoint, save};
use modl_core::{Backbone, Device, Error, Kind, Tensor};
use modl_models::{Bert, LoadOptions, open};
use serde_json::{Value, json};

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/base_bert")
}

/// The fixture's tensors under changed names; those that become `None` are left out.
fn renamed(rename: impl Fn(&str) -> Option<String>) -> Vec<(String, Tensor)> {
    let file = Checkpoint::open(fixture().join("model.safetensors")).unwrap();
    let all = file.tensors(Device::Cpu).unwrap().into_iter();
    all.filter_map(|(name, t)| Some((rename(&name)?, t))).collect()
}

fn write(path: PathBuf, tensors: &[(String, Tensor)]) {
    save(path, tensors.iter().map(|(n, t)| (n.as_str(), t)), HashMap::new()).unwrap();
}

/// A folder with the fixture's settings, some of them changed.
fn folder(changes: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn folder_with(tensors: &[(String, Tensor)]) -> tempfile::TempDir {
    let dir = folder(json!({}));
    write(dir.path().join("model.safetensors"), tensors);
    dir
}

fn load(dir: &Path) -> Result<Bert, Error> {
    Bert::load(dir, &LoadOptions::default())
}

#[test]
fn names_with_prefix_heads_old_norms_and_position_ids_are_the_same_model() {
    let mut tensors = renamed(|name| {
        let name = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        Some(format!("bert.{}", name.replace("LayerNorm.bias", "LayerNorm.beta")))
    });
    let extra = || Tensor::zeros(&[1, 40], Kind::Int64, Device::Cpu).unwrap();
    tensors.push(("bert.embeddings.position_ids".to_owned(), extra()));
    tensors.push(("cls.predictions.bias".to_owned(), extra()));
    let dir = folder_with(&tensors);
    let (a, b) = (load(dir.path()).unwrap(), load(&fixture()).unwrap());
    assert_eq!(a.fingerprint().unwrap(), b.fingerprint().unwrap());
    assert!(a.params().get("embeddings.LayerNorm.weight").is_ok());
}

#[test]
fn shards_are_the_same_model_and_a_lost_one_is_named() {
    let dir = folder(json!({}));
    let (first, second): (Vec<_>, Vec<_>) =
        renamed(|n| Some(n.to_owned())).into_iter().partition(|(n, _)| n.starts_with("emb"));
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", &first), ("b.safetensors", &second)] {
        write(dir.path().join(file), part);
        map.extend(part.iter().map(|(n, _)| (n.clone(), json!(file))));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let whole = load(&fixture()).unwrap().fingerprint().unwrap();
    assert_eq!(load(dir.path()).unwrap().fingerprint().unwrap(), whole);
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    let e = load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("b.safetensors"), "{e}");
}

#[test]
fn a_model_without_pooler_has_no_pooler_site() {
    let dir = folder_with(&renamed(|n| (!n.starts_with("pooler")).then(|| n.to_owned())));
    let bert = load(dir.path()).unwrap();
    assert!(!bert.sites().iter().any(|s| s.path.starts_with("pooler")));
    let dir = folder_with(&renamed(|n| (n != "pooler.dense.bias").then(|| n.to_owned())));
    assert!(load(dir.path()).unwrap_err().to_string().contains("pooler.dense.bias"));
}

#[test]
fn every_key_that_does_not_fit_is_in_one_error() {
    let mut tensors = renamed(|name| match name {
        "encoder.layer.0.output.dense.bias" => None,
        "encoder.layer.1.attention.self.query.weight" => {
            Some("encoder.layer.1.attention.self.qurey.weight".to_owned())
        }
        name => Some(name.to_owned()),
    });
    for (name, t) in &mut tensors {
        if name == "embeddings.LayerNorm.bias" {
            *t = t.narrow(0, 0, 31).unwrap();
        }
    }
    let dir = folder_with(&tensors);
    let e = load(dir.path()).unwrap_err();
    let Error::Mismatch(m) = &e else { panic!("{e}") };
    let missing: Vec<_> = m.missing.iter().map(|(n, _)| n.as_str()).collect();
    let query = "encoder.layer.1.attention.self.query.weight";
    let typo = "encoder.layer.1.attention.self.qurey.weight";
    assert_eq!(missing, ["encoder.layer.0.output.dense.bias", query]);
    assert_eq!(m.unexpected, [(typo.to_owned(), Some(query.to_owned()))]);
    assert_eq!(m.misshapen, [("embeddings.LayerNorm.bias".to_owned(), vec![32], vec![31])]);
}

#[test]
fn the_same_parameter_twice_is_refused() {
    let mut tensors = renamed(|n| Some(n.to_owned()));
    let again = tensors.iter().find(|(n, _)| n == "pooler.dense.bias").unwrap().1.clone();
    tensors.push(("bert.pooler.dense.bias".to_owned(), again));
    let e = load(folder_with(&tensors).path()).unwrap_err().to_string();
    assert!(e.contains("`bert.pooler.dense.bias`") && e.contains("same parameter"), "{e}");
}

#[test]
fn broken_and_missing_files_are_named() {
    let whole = fs::read(fixture().join("model.safetensors")).unwrap();
    for cut in [0, 9, 4000, whole.len() - 1] {
        let dir = folder(json!({}));
        fs::write(dir.path().join("model.safetensors"), &whole[..cut]).unwrap();
        let e = load(dir.path()).unwrap_err().to_string();
        assert!(e.contains("model.safetensors"), "{e}");
    }
    let dir = folder(json!({}));
    let e = load(dir.path()).unwrap_err().to_string();
    assert!(e.contains("has no model.safetensors and no pytorch_model.bin"), "{e}");
    fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(load(dir.path()).unwrap_err().to_string().contains("config.json: is not JSON"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(e.contains("config.json: cannot be read"), "{e}");
}

#[test]
fn settings_that_would_change_the_result_are_refused_by_name() {
    for (changes, words) in [
        (json!({"model_type": "brt"}), "unknown architecture `brt`; did you mean `bert`?"),
        (json!({"model_type": null}), "has no `model_type`"),
        (json!({"hidden_act": "mish"}), "hidden_act: unknown variant `mish`"),
        (json!({"position_embedding_type": "relative_key"}), "position_embedding_type"),
        (json!({"is_decoder": true}), "is_decoder"),
        (json!({"add_cross_attention": true}), "add_cross_attention"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"num_attention_heads": 5}), "num_attention_heads: 5 has to divide hidden_size"),
        (json!({"hidden_size": "wide"}), "hidden_size: invalid type"),
        (json!({"vocab_size": 0}), "vocab_size: 0 is to be positive"),
        (json!({"num_hidden_layers": 1_000_000_000_000_i64}), "num_hidden_layers"),
        (json!({"hidden_dropout_prob": 1.5}), "hidden_dropout_prob"),
        (json!({"num_hidden_layers": 3}), "missing    encoder.layer.2.output.dense.weight"),
    ] {
        let dir = folder(changes);
        fs::copy(fixture().join("model.safetensors"), dir.path().join("model.safetensors"))
            .unwrap();
        let e = open(dir.path(), &LoadOptions::default()).unwrap_err().to_string();
        assert!(e.contains(words), "{e}\n  does not say: {words}");
    }
}

#[test]
fn weights_are_converted_as_asked() {
    let options = LoadOptions { kind: Some(Kind::Double), ..LoadOptions::default() };
    let bert = Bert::load(fixture(), &options).unwrap();
    assert!(bert.params().iter().all(|(_, p)| p.tensor().kind() == Kind::Double));
    let options = LoadOptions { kind: Some(Kind::Int64), ..LoadOptions::default() };
    let e = Bert::load(fixture(), &options).unwrap_err().to_string();
    assert!(e.contains("computing in Int64"), "{e}");
}

#[test]
fn what_torch_saved_is_the_same_model() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch_bert");
    let wanted = load(&fixture).unwrap().fingerprint().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| fs::copy(fixture.join(from), dir.path().join(to)).unwrap();
    copy("config.json", "config.json");
    copy("pytorch_model.bin", "pytorch_model.bin");
    assert_eq!(load(dir.path()).unwrap().fingerprint().unwrap(), wanted);
    fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    copy("pytorch_model.bin", "pytorch_model-00001-of-00001.bin");
    let index = json!({ "weight_map": { "x": "pytorch_model-00001-of-00001.bin" } });
    fs::write(dir.path().join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
    assert_eq!(load(dir.path()).unwrap().fingerprint().unwrap(), wanted);
}
