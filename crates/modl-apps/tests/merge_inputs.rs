//! What `modl merge` takes for a model: a folder with an adapter (`MODEL+ADAPTER`), against what mergekit
//! and PEFT make of the same files (`tests/python/make_merge_lora_golden.py`), and PyTorch's own files.

#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_core::Device;
use modl_core::checkpoint::Checkpoint;

use modl::{refuse, succeed};

const GOLDEN: &str = "../modl-aggregate/tests/fixtures/mergekit_lora";
const MODELS: &str = "../modl-aggregate/tests/fixtures/mergekit/models";
const TORCH: &str = "../modl-models/tests/fixtures/torch_bert";

fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let file = Checkpoint::open(path).unwrap();
    let all = file.tensors(Device::Cpu).unwrap();
    all.into_iter().map(|(n, t)| (n, t.reshape(&[-1]).unwrap().to_vec().unwrap())).collect()
}

fn worst(a: &BTreeMap<String, Vec<f64>>, b: &BTreeMap<String, Vec<f64>>) -> (f64, String) {
    assert!(a.keys().eq(b.keys()), "{:?} {:?}", a.keys(), b.keys());
    let mut worst = (0.0, String::new());
    for (name, a) in a {
        assert_eq!(a.len(), b[name].len(), "{name}");
        for (x, y) in a.iter().zip(&b[name]) {
            let off = (x - y).abs() / y.abs().max(1.0);
            if off.is_nan() || off > worst.0 {
                worst = (off, name.clone());
            }
        }
    }
    worst
}

/// A folder with the models and the adapters, as the files of the fixtures name them.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: PathBuf, name: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap().path();
            fs::copy(&file, dir.path().join(name).join(file.file_name().unwrap())).unwrap();
        }
    };
    ["base", "ft1"].iter().for_each(|n| copy(Path::new(MODELS).join(n), n));
    ["lora", "rslora", "dora"].iter().for_each(|n| copy(Path::new(GOLDEN).join(n), n));
    dir
}

#[test]
fn adapters_in_a_merge_are_what_mergekit_makes_of_them() {
    let dir = place();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["linear", "ties", "dora"] {
        let golden = Path::new(GOLDEN).join(format!("merged_{name}"));
        fs::copy(golden.join("config.yml"), dir.path().join("config.yml")).unwrap();
        let out = format!("merged_{name}");
        succeed(&["merge", &at("config.yml"), "--out", &at(&out)]);
        let ours = tensors(&dir.path().join(&out).join("model.safetensors"));
        let (off, at) = worst(&ours, &tensors(&golden.join("merged.safetensors")));
        assert!(off <= 1e-6, "{name}: {off} at {at}");
    }
}

#[test]
fn an_adapter_stands_beside_a_model_on_the_command_line_too() {
    let dir = place();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let both = format!("{}+{}", at("base"), at("rslora"));
    succeed(&["merge", "--method", "passthrough", &both, "--out", &at("a")]);
    let merged = ["convert", "--model", &at("base"), &at("rslora"), "--to", "model", "--out"];
    succeed(&[&merged[..], &[&at("b")]].concat());
    let read = |name: &str| tensors(&dir.path().join(name).join("model.safetensors"));
    let (off, name) = worst(&read("a"), &read("b"));
    assert!(off <= 1e-6, "{off} at {name}");
    // An evaluation of the base alone would say nothing of the model that is merged.
    let args =
        ["merge", "--method", "passthrough", &both, "--out", &at("c"), "--eval", "echo 31337"];
    let text = succeed(&args);
    assert_eq!(text.matches("31337").count(), 1, "{text}");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let dir = place();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let merge = |model: &str, part: &str| {
        refuse(&["merge", "--method", "passthrough", model, "--out", &at("m")], part);
        assert!(!dir.path().join("m").exists() && !dir.path().join("m.merging").exists());
    };
    merge(&format!("{}+{}", at("base"), at("nowhere")), "nowhere");
    let prompt = "../modl-compute/tests/fixtures/deterministic_llama/prompt";
    merge(&format!("{}+{prompt}", at("base")), "as a LoRA");
    let other = "../modl-models/tests/fixtures/base_bert";
    merge(&format!("{other}+{}", at("lora")), "tensor of");
}

#[test]
fn pytorchs_own_files_are_models_too() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (name, file) in [("bin", "pytorch_model.bin"), ("safe", "model.safetensors")] {
        fs::create_dir(dir.path().join(name)).unwrap();
        for file in ["config.json", file] {
            fs::copy(Path::new(TORCH).join(file), dir.path().join(name).join(file)).unwrap();
        }
    }
    let keep = ["--uneven", "keep"];
    for (name, model) in [("a", "bin"), ("b", "safe")] {
        let (model, out) = (at(model), at(name));
        let args = ["merge", "--method", "linear", &model, "--weight", "2", "--out", &out];
        succeed(&[&args[..], &["--set", "normalize=false"], &keep].concat());
    }
    let read = |name: &str| tensors(&dir.path().join(name).join("model.safetensors"));
    let (mut a, b) = (read("a"), read("b"));
    a.retain(|name, _| b.contains_key(name));
    assert_eq!(worst(&a, &b).0, 0.0);
    // The two have the same numbers, so that their average has them, too.
    let args = ["merge", "--method", "linear", &at("bin"), &at("safe"), "--out", &at("c")];
    succeed(&[&args[..], &keep].concat());
    let mut c = read("c");
    c.retain(|name, _| b.contains_key(name));
    let half = |all: &BTreeMap<String, Vec<f64>>| -> BTreeMap<String, Vec<f64>> {
        all.iter().map(|(n, v)| (n.clone(), v.iter().map(|x| x / 2.0).collect())).collect()
    };
    assert!(worst(&c, &half(&b)).0 <= 1e-6);
}
