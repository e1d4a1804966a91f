//! Everything that is refused of a PEFT folder is refused by name, and leaves nothing behind.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use modl_compute::{Bottleneck, Lora, peft};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{Given, Sum, TinyBackbone};
use modl_core::{
    Context, Device, Error, Kind, Modular, Names, Seed, Select, Targets, Tensor, testing,
};
use serde_json::{Value, json};

fn model(seed: u64) -> Modular {
    Modular::new(TinyBackbone::new(Seed(seed), Kind::Float).unwrap(), Seed(seed)).unwrap()
}

/// A good adapter of `query` and `value`, as modl writes it.
fn good(dir: &Path) {
    let mut m = model(1);
    let config = Lora { r: 2, ..Lora::default() };
    m.attach("a", Box::new(config), &Targets::names(["query", "value"])).unwrap();
    testing::perturb(&m, &Select::all(), 0.3, Seed(3)).unwrap();
    peft::save(&m, "a", dir).unwrap();
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let path = dir.join("adapter_model.safetensors");
    let file = Checkpoint::open(&path).unwrap();
    let (mut all, metadata) = (file.tensors(Device::Cpu).unwrap(), file.metadata());
    edit(&mut all);
    checkpoint::save(&path, all.iter().map(|(n, t)| (n.as_str(), t)), metadata).unwrap();
}

/// The refusal of a folder, after checking that the model is as it was.
#[track_caller]
fn refused(dir: &Path) -> Error {
    let mut m = model(1);
    m.attach("own", Box::new(Lora::default()), &Targets::names(["query", "value"])).unwrap();
    testing::perturb(&m, &Select::all(), 0.3, Seed(4)).unwrap();
    m.aggregate(Box::new(Sum::default())).unwrap();
    m.route(Given::only(0), false).unwrap();
    let inputs = TinyBackbone::inputs(2, 5, Seed(6)).unwrap();
    let output =
        |m: &Modular| m.forward(&inputs, &Context::eval()).unwrap().need("logits").cloned();
    let before = output(&m).unwrap();
    let e = peft::load(&mut m, dir, Some("new")).unwrap_err();
    assert_eq!(m.modules(), ["own"]);
    assert!(output(&m).unwrap().bit_equal(&before).unwrap(), "the routers are still there");
    assert!(m.params().iter().all(|(n, _)| n.starts_with("modules.own.")));
    e
}

fn refused_with(edit: impl FnOnce(&mut Value)) -> Error {
    let dir = tempfile::tempdir().unwrap();
    good(dir.path());
    edit_config(dir.path(), edit);
    refused(dir.path())
}

#[test]
fn the_good_adapter_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("my.adapter");
    good(&dir);
    let config = peft::read_config(&dir).unwrap();
    assert_eq!((config.peft_type(), config.module.kind()), ("LORA", "lora"));
    assert_eq!(config.targets, Targets::names(["query", "value"]));
    let mut m = model(1);
    assert_eq!(peft::load(&mut m, &dir, None).unwrap(), "my_adapter");
    assert!(matches!(peft::load(&mut m, &dir, None), Err(Error::Duplicate { .. })));
    assert_eq!(m.modules(), ["my_adapter"]);
}

#[test]
fn fields_that_would_change_the_result_are_named() {
    let cases = [
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("layer_replication", json!([[0, 2]])),
        ("use_qalora", json!(true)),
        ("alora_invocation_tokens", json!([5])),
        ("arrow_config", json!({"top_k": 3})),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("megatron_config", json!({"x": 1})),
        ("velora_config", json!({"x": 1})),
        ("kasa_config", json!({"x": 1})),
        ("use_bdlora", json!({"x": 1})),
        ("monteclora_config", json!({"x": 1})),
        ("ensure_weight_tying", json!(true)),
        ("a_field_of_the_future", json!(0.5)),
    ];
    for (field, value) in cases {
        let e = refused_with(|c| c[field] = value.clone());
        let Error::Unsupported { what, .. } = &e else { panic!("{e}") };
        assert!(what.contains(&format!("`{field}` = {value}")), "{e}");
    }
    let e = refused_with(|c| {
        c["use_qalora"] = true.into();
        c["bias"] = "all".into();
        c["new"] = 1.into();
    });
    let text = e.to_string();
    assert!(["use_qalora", "bias", "new"].iter().all(|f| text.contains(f)), "all at once: {text}");
}

#[test]
fn fields_that_say_nothing_are_let_through() {
    let dir = tempfile::tempdir().unwrap();
    good(dir.path());
    edit_config(dir.path(), |c| {
        for (i, v) in [json!(null), json!(false), json!(0), json!(""), json!([]), json!({})]
            .iter()
            .enumerate()
        {
            c[format!("future_{i}")] = v.clone();
        }
        c["runtime_config"] = json!({"ephemeral_gpu_offload": true});
        c["init_lora_weights"] = "eva".into();
        c["peft_version"] = "0.9.0".into();
    });
    peft::load(&mut model(1), dir.path(), None).unwrap();
    edit_config(dir.path(), |c| {
        c["layers_pattern"] = "layer".into();
        c["layers_to_transform"] = 3.into();
        c["exclude_modules"] = "head.*".into();
    });
    let targets = peft::read_config(dir.path()).unwrap().targets;
    assert_eq!(targets.layers, Some(vec![3]));
    assert_eq!(targets.layers_pattern, ["layer"]);
    assert_eq!(targets.exclude, Some(Names::Pattern("head.*".into())));
}

#[test]
fn old_files_without_newer_fields_get_pefts_defaults() {
    let dir = tempfile::tempdir().unwrap();
    good(dir.path());
    let minimal = json!({"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]});
    edit_config(dir.path(), |c| *c = minimal);
    let config = peft::read_config(dir.path()).unwrap().module.to_json().unwrap();
    assert_eq!(config["alpha"], 8.0);
    peft::load(&mut model(1), dir.path(), None).unwrap();
}

#[test]
fn values_that_cannot_be_are_named() {
    let e = refused_with(|c| c["r"] = 0.into()).to_string();
    assert!(e.contains("lora.r") && e.contains("layer.0.query"), "{e}");
    let e = refused_with(|c| c["r"] = "two".into()).to_string();
    assert!(e.contains("`r`") && e.contains("adapter_config.json"), "{e}");
    let e = refused_with(|c| c["target_modules"] = Value::Null).to_string();
    assert!(e.contains("target_modules"), "{e}");
    let e = refused_with(|c| c["target_modules"] = json!(["query", "valeu"])).to_string();
    assert!(e.contains("valeu") && e.contains("did you mean `value`"), "{e}");
    let e = refused_with(|c| c["task_type"] = "SEQ_CLASS".into()).to_string();
    assert!(e.contains("did you mean `SEQ_CLS`"), "{e}");
    let e = refused_with(|c| c["rank_pattern"] = json!({"(": 3})).to_string();
    assert!(e.contains("pattern `(`"), "{e}");
    let e = refused_with(|c| c["lora_dropout"] = 1.5.into()).to_string();
    assert!(e.contains("dropout"), "{e}");
}

#[test]
fn other_types_and_other_projects_are_told_apart() {
    let e = refused_with(|c| c["peft_type"] = "LILY".into());
    assert!(matches!(&e, Error::Unsupported { what, .. } if what.contains("LILY")), "{e}");
    let e = refused_with(|c| c["peft_type"] = "LORRA".into());
    assert!(matches!(&e, Error::Unknown { nearest: Some(n), .. } if n == "LORA"), "{e}");
    let e = refused_with(|c| drop(c.as_object_mut().unwrap().shift_remove("peft_type")));
    assert!(e.to_string().contains("peft_type"), "{e}");
    let hub = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapterhub_pfeiffer");
    let e = refused(&hub);
    assert!(matches!(&e, Error::Unsupported { what, .. } if what.contains("AdapterHub")), "{e}");
}

#[test]
fn every_tensor_that_does_not_fit_is_named_as_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    good(dir.path());
    let query = "base_model.model.layer.0.query.lora_A.weight";
    let renamed = "base_model.model.layer.0.qurey.lora_A.weight";
    let bare = "layer.0.value.lora_A.weight";
    edit_tensors(dir.path(), |all| {
        for (name, t) in all.iter_mut() {
            match name.as_str() {
                n if n == query => *name = renamed.into(),
                "base_model.model.layer.0.value.lora_A.weight" => *name = bare.into(),
                "base_model.model.layer.0.value.lora_B.weight" => *t = t.narrow(1, 0, 1).unwrap(),
                _ => {}
            }
        }
    });
    let e = refused(dir.path());
    let Error::Mismatch(m) = &e else { panic!("{e}") };
    assert_eq!(m.missing.len(), 2);
    assert_eq!(m.missing[0], (query.to_owned(), Some(renamed.to_owned())));
    assert_eq!(m.unexpected.len(), 2, "a key without PEFT's prefix is not taken for one with it");
    assert_eq!(
        m.misshapen,
        [("base_model.model.layer.0.value.lora_B.weight".to_owned(), vec![8, 2], vec![8, 1])]
    );
}

#[test]
fn ranks_are_checked_site_by_site() {
    let e = refused_with(|c| c["rank_pattern"] = json!({"value": 3}));
    let Error::Mismatch(m) = &e else { panic!("{e}") };
    assert_eq!(m.misshapen.len(), 2);
    assert!(m.misshapen.iter().all(|(n, wanted, _)| n.contains("value") && wanted.contains(&3)));
}

#[test]
fn another_backbone_is_refused_where_the_file_says_so() {
    let dir = tempfile::tempdir().unwrap();
    good(dir.path());
    let mut other = model(2);
    let e = peft::load(&mut other, dir.path(), None).unwrap_err().to_string();
    let own = other.backbone().fingerprint().unwrap();
    assert!(e.contains("was made for") && e.contains(&own), "{e}");
    assert!(other.modules().is_empty());
    // PEFT's own files say nothing.
    let path = dir.path().join("adapter_model.safetensors");
    let all = Checkpoint::open(&path).unwrap().tensors(Device::Cpu).unwrap();
    checkpoint::save(&path, all.iter().map(|(n, t)| (n.as_str(), t)), HashMap::new()).unwrap();
    peft::load(&mut other, dir.path(), None).unwrap();
}

#[test]
fn files_that_are_missing_broken_or_unsafe_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    assert!(refused(dir).to_string().contains("adapter_config.json"));
    good(dir);
    let weights = dir.join("adapter_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 5]).unwrap();
    assert!(refused(dir).to_string().contains("not a whole safetensors file"));
    fs::remove_file(&weights).unwrap();
    assert!(refused(dir).to_string().contains("adapter_model.safetensors"));
    // A pickle that calls os.system, as `torch.save` would have written it.
    let calls = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\
                  \x80\x02}X\x0d\0\0\0little_endian\x88s.\x80\x02cposix\nsystem\nX\x02\0\0\0ls\x85R.";
    fs::write(dir.join("adapter_model.bin"), calls).unwrap();
    let e = refused(dir);
    let Error::Unsupported { what, advice } = &e else { panic!("{e}") };
    assert!(what.contains("`posix.system`") && advice.contains("save_file"), "{e}");
    fs::write(dir.join("adapter_config.json"), "[1]").unwrap();
    assert!(refused(dir).to_string().contains("not a table"));
}

#[test]
fn what_peft_has_no_format_for_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = model(1);
    m.attach("b", Box::new(Bottleneck::parallel()), &Bottleneck::parallel_sites()).unwrap();
    let e = peft::save(&m, "b", dir.path().join("out")).unwrap_err();
    assert!(
        matches!(&e, Error::Unsupported { advice, .. } if advice.contains("save_module")),
        "{e}"
    );
    assert!(!dir.path().join("out").exists());
    assert!(matches!(peft::save(&m, "c", dir.path()), Err(Error::Unknown { .. })));
}
