//! Adapters that AdapterHub's library made: what they compute, and folders written again.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_compute::{adapterhub, peft};
use modl_core::checkpoint::Checkpoint;
use modl_core::testing::{Given, Sum};
use modl_core::{Context, Device, Modular, Seed, Tensors};
use modl_models::{Bert, LoadOptions};
use serde_json::{Value, json};

const ADAPTERS: &[&str] =
    &["seq_bn", "double_seq_bn", "par_bn", "par_bn_learned", "post_add", "lora", "lora_qkv"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Tensors {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn model() -> Modular {
    let bert = Bert::load(fixture("base_bert"), &LoadOptions::default()).unwrap();
    Modular::new(bert, Seed(1)).unwrap()
}

fn with_adapter(dir: &Path) -> Modular {
    let mut model = model();
    assert_eq!(adapterhub::load(&mut model, dir, None).unwrap(), "own");
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    model
}

fn json_of(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn outputs_are_those_of_adapterhub() {
    let inputs = tensors(fixture("base_bert").join("inputs.safetensors"));
    for name in ADAPTERS {
        let folder = fixture(&format!("adapterhub_{name}"));
        let golden = tensors(folder.join("outputs.safetensors"));
        let model = with_adapter(&folder.join("adapter"));
        let found = model.forward(&inputs, &Context::eval()).unwrap();
        let (found, wanted) = (
            found.need("last_hidden_state").unwrap(),
            golden.need("adapted.last_hidden_state").unwrap(),
        );
        let apart = found.max_abs_diff(wanted).unwrap();
        assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap(), "{name}: {apart}");
    }
}

#[test]
fn what_is_written_again_is_what_was_read() {
    for name in ADAPTERS {
        let from = fixture(&format!("adapterhub_{name}")).join("adapter");
        let to = tempfile::tempdir().unwrap();
        adapterhub::save(&with_adapter(&from), "own", to.path()).unwrap();
        let (ours, mut theirs) = (json_of(to.path()), json_of(&from));
        // Where the model lay.
        theirs["model_name"] = ours["model_name"].clone();
        assert_eq!(ours, theirs, "{name}");
        let ours = tensors(to.path().join("adapter.safetensors"));
        let theirs = tensors(from.join("adapter.safetensors"));
        let names = |t: &Tensors| t.iter().map(|(n, _)| n.to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&theirs), "{name}");
        for (key, t) in theirs.iter() {
            assert!(ours.need(key).unwrap().bit_equal(t).unwrap(), "{name}: {key}");
        }
    }
}

/// A copy of a folder with other settings.
fn copy_with(name: &str, to: &Path, edit: impl FnOnce(&mut Value)) {
    let from = fixture(&format!("adapterhub_{name}")).join("adapter");
    std::fs::copy(from.join("adapter.safetensors"), to.join("adapter.safetensors")).unwrap();
    let mut config = json_of(&from);
    edit(&mut config);
    std::fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn settings_that_modl_would_not_follow_are_refused_by_name() {
    for (name, setting, value) in [
        ("seq_bn", "ln_before", json!(true)),
        ("seq_bn", "use_gating", json!(true)),
        ("seq_bn", "stochastic_depth", json!(0.1)),
        ("seq_bn", "made_up", json!(3)),
        ("lora", "composition_mode", json!("product")),
        ("lora", "use_gating", json!(true)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        copy_with(name, dir.path(), |c| c["config"][setting] = value.clone());
        let mut model = model();
        let e = adapterhub::load(&mut model, dir.path(), None).unwrap_err().to_string();
        assert!(e.contains(setting), "{e}");
        assert!(model.modules().is_empty());
    }
    let dir = tempfile::tempdir().unwrap();
    copy_with("lora", dir.path(), |c| c["hidden_size"] = json!(48));
    let e = adapterhub::load(&mut model(), dir.path(), None).unwrap_err().to_string();
    assert!(e.contains("width 48"), "{e}");
    copy_with("lora", dir.path(), |c| c["config"]["architecture"] = json!("mtl_lora"));
    let e = adapterhub::load(&mut model(), dir.path(), None).unwrap_err().to_string();
    assert!(e.contains("mtl_lora"), "{e}");
}

#[test]
fn the_two_formats_are_told_apart() {
    let theirs = fixture("adapterhub_lora").join("adapter");
    let pefts = fixture("bert_lora").join("adapter");
    assert!(adapterhub::is_folder(&theirs) && !adapterhub::is_folder(&pefts));
    let e = peft::load(&mut model(), &theirs, None).unwrap_err().to_string();
    assert!(e.contains("AdapterHub"), "{e}");
    let e = adapterhub::load(&mut model(), &pefts, None).unwrap_err().to_string();
    assert!(e.contains("PEFT"), "{e}");
}
