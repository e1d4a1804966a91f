//! PEFT folders from before transformers 5 on ViT, whose sites had other names then; and LoRA of the
//! convolution that makes patches.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

use modl_compute::{Lora, peft};
use modl_core::checkpoint::{self, Checkpoint};
use modl_core::testing::{Given, Sum, perturb};
use modl_core::{Context, Device, Error, Modular, Result, Seed, Select, Targets, Tensor, Tensors};
use modl_models::{LoadOptions, open};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn tensors(path: PathBuf) -> Vec<(String, Tensor)> {
    Checkpoint::open(path).unwrap().tensors(Device::Cpu).unwrap()
}

fn model(base: &str) -> Modular {
    let backbone = open(fixture(base), &LoadOptions::default()).unwrap();
    Modular::from_box(backbone, Seed(1)).unwrap()
}

/// A key by the names before transformers 5.
fn before(key: &str) -> String {
    [
        ("model.layers.", "model.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]
    .into_iter()
    .fold(key.to_owned(), |key, (today, before)| key.replace(today, before))
}

/// An adapter as it was before, with some fields as given and the tensors that `keep` takes.
fn former(name: &str, fields: Value, keep: impl Fn(&str) -> bool) -> TempDir {
    let (from, to) = (fixture(name).join("adapter"), tempfile::tempdir().unwrap());
    let all = tensors(from.join("adapter_model.safetensors")).into_iter();
    let all: Vec<_> = all.map(|(k, t)| (before(&k), t)).filter(|(k, _)| keep(k)).collect();
    let path = to.path().join("adapter_model.safetensors");
    checkpoint::save(path, all.iter().map(|(n, t)| (n.as_str(), t)), Default::default()).unwrap();
    let text = fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    fs::write(to.path().join("adapter_config.json"), config.to_string()).unwrap();
    to
}

fn attach(base: &str, dir: &Path) -> Result<Modular> {
    let mut model = model(base);
    peft::load(&mut model, dir, Some("a"))?;
    model.aggregate(Box::new(Sum::default()))?;
    model.route(Given::only(0), false)?;
    Ok(model)
}

fn run(model: &Modular) -> Tensor {
    let inputs: Tensors = tensors(fixture("base_vit/inputs.safetensors")).into_iter().collect();
    let outputs = model.forward(&inputs, &Context::eval()).unwrap();
    outputs.need("last_hidden_state").unwrap().clone()
}

fn paths(model: &Modular) -> Vec<String> {
    let sites = model.recipe("a").unwrap().1.select(model.backbone().sites()).unwrap();
    sites.iter().map(|s| s.path.clone()).collect()
}

#[test]
fn former_names_in_every_field_mean_todays_sites() {
    let feed_forward = ["0.output.dense", "layer.1.output.dense"];
    let patterns = json!({
        "target_modules": ["query", "value"], "r": 9, "lora_alpha": 40,
        "rank_pattern": {"query": 4, ".*value": 4},
        "alpha_pattern": {"layer.0.attention.attention.query": 8, "que.y": 8, "value": 8},
    });
    let all = r"encoder\.layer\.\d\.(attention\.attention\..*|intermediate.dense|output.dense)";
    for (name, fields) in [
        ("vit_lora", json!({"target_modules": ["query", "value"]})),
        ("vit_lora", patterns),
        (
            "vit_dora",
            json!({"target_modules": ["attention.query", "1.attention.attention.value",
            "encoder.layer.0.attention.attention.value"]}),
        ),
        ("vit_lora_all", json!({"target_modules": all})),
        (
            "vit_lora_all",
            json!({"target_modules": ["query", "key", "value", "dense"],
            "exclude_modules": r"pooler.dense|.*attention\.output\.dense"}),
        ),
        (
            "vit_ia3",
            json!({"target_modules": ["key", "value", feed_forward[0], feed_forward[1]],
            "feedforward_modules": feed_forward}),
        ),
        (
            "vit_ia3",
            json!({"target_modules": ["key", "value", feed_forward[0], feed_forward[1]],
            "feedforward_modules": r".*\d\.output\.dense"}),
        ),
        ("vit_ln_tuning", json!({})),
        ("vit_adalora", json!({"target_modules": ["query", "value"]})),
        ("vit_vera", json!({"target_modules": ["query"]})),
    ] {
        let dir = former(name, fields.clone(), |_| true);
        let model = attach("base_vit", dir.path()).unwrap();
        let found = run(&model);
        let todays = attach("base_vit", &fixture(name).join("adapter")).unwrap();
        assert!(run(&todays).bit_equal(&found).unwrap(), "{name} with {fields}");

        // Written again it is as PEFT makes it today.
        let again = tempfile::tempdir().unwrap();
        peft::save(&model, "a", again.path()).unwrap();
        let keys = |dir: &Path| Checkpoint::open(dir.join("adapter_model.safetensors"));
        let theirs = keys(&fixture(name).join("adapter")).unwrap().names();
        assert_eq!(keys(again.path()).unwrap().names(), theirs, "{name}");
        let same = attach("base_vit", again.path()).unwrap();
        assert!(run(&same).bit_equal(&found).unwrap(), "{name} with {fields}");
    }
}

#[test]
fn layers_are_chosen_by_the_list_that_they_were_in() {
    let fields = json!({"target_modules": ["query", "value"], "layers_to_transform": 1,
        "layers_pattern": "layer"});
    let dir = former("vit_lora", fields, |key| key.contains("layer.1."));
    let model = attach("base_vit", dir.path());
    assert_eq!(paths(&model.unwrap()), ["layers.1.attention.q_proj", "layers.1.attention.v_proj"]);
}

#[test]
fn a_classifier_takes_the_adapter_of_the_bare_model() {
    let fields = json!({"target_modules": ["query", "value"]});
    let dir = former("vit_lora", fields, |_| true);
    let model = attach("deterministic_vit", dir.path()).unwrap();
    assert_eq!(paths(&model)[0], "vit.layers.0.attention.q_proj");
}

#[test]
fn what_is_missing_is_missed_under_former_names_too() {
    let fields = json!({"target_modules": ["query", "value"]});
    let lost = "layer.1.attention.attention.value.lora_B";
    let dir = former("vit_lora", fields.clone(), |key| !key.contains(lost));
    let Err(Error::Mismatch(m)) = attach("base_vit", dir.path()) else { panic!("no mismatch") };
    let missing: Vec<_> = m.missing.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(missing, ["base_model.model.layers.1.attention.v_proj.lora_B.weight"]);
    assert!(m.unexpected.is_empty() && m.misshapen.is_empty(), "{m:?}");
    let dir = former("vit_lora", json!({"target_modules": ["qeury", "value"]}), |_| true);
    let e = attach("base_vit", dir.path()).unwrap_err().to_string();
    assert!(e.contains("`qeury`; did you mean `query`?"), "{e}");
}

#[test]
fn lora_of_the_patches_is_its_merged_convolution() {
    let mut model = model("base_vit");
    let lora = Lora { r: 3, alpha: 6.0, ..Lora::default() };
    let site = "embeddings.patch_embeddings.projection";
    model.attach("a", Box::new(lora), &Targets::names(["projection"])).unwrap();
    model.aggregate(Box::new(Sum::default())).unwrap();
    model.route(Given::only(0), false).unwrap();
    perturb(&model, &Select::all(), 0.3, Seed(2)).unwrap();
    let adapted = run(&model);

    let dir = tempfile::tempdir().unwrap();
    peft::save(&model, "a", dir.path()).unwrap();
    let file: Tensors = tensors(dir.path().join("adapter_model.safetensors")).into_iter().collect();
    let part = |name: &str| file.need(&format!("base_model.model.{site}.{name}.weight")).unwrap();
    let (a, b) = (part("lora_A"), part("lora_B"));
    assert_eq!((a.size(), b.size()), (vec![3, 3, 4, 4], vec![32, 3, 1, 1]));
    let again = attach("base_vit", dir.path()).unwrap();
    assert!(run(&again).bit_equal(&adapted).unwrap());

    let weight = |model: &Modular| {
        let w = model.backbone().params().get(&format!("{site}.weight")).unwrap();
        w.to_vec::<f64>().unwrap()
    };
    let start = weight(&model);
    model.merge("a").unwrap();
    let inputs: Tensors = tensors(fixture("base_vit/inputs.safetensors")).into_iter().collect();
    let merged = model.forward_base(&inputs, &Context::eval()).unwrap();
    assert!(merged.need("last_hidden_state").unwrap().all_close(&adapted, 1e-5, 1e-5).unwrap());
    let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
    for (i, (now, was)) in weight(&model).iter().zip(&start).enumerate() {
        let (out, within) = (i / 48, i % 48);
        let change: f64 = (0..3).map(|r| b[out * 3 + r] * a[r * 48 + within]).sum();
        assert!((now - was - 2.0 * change).abs() < 1e-5, "{i}");
    }
}
