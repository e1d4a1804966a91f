//! RoBERTa, XLM-R and classifiers against transformers' outputs, and the names of their sites.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::testing::standins::Scale;
use modl_core::testing::{Given, Sum};
use modl_core::{
    Backbone, Base, Context, Device, Layers, Modular, Seed, SiteKind, Targets, Tensor, Tensors,
    no_grad,
};
use modl_models::{Bert, LoadOptions, open};

const MODELS: [(&str, &[&str]); 4] = [
    ("xlm_roberta", &["last_hidden_state", "pooler_output"]),
    ("roberta_classifier", &["logits"]),
    ("bert_tagger", &["logits"]),
    ("deterministic_bert", &["logits"]),
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

#[track_caller]
fn same(name: &str, outputs: &[&str], found: &Tensors) {
    let wanted = read(&format!("{name}/outputs.safetensors"));
    for output in outputs {
        let (f, w) = (found.need(output).unwrap(), wanted.need(output).unwrap());
        let apart = f.max_abs_diff(w).unwrap();
        assert!(f.all_close(w, 1e-5, 1e-5).unwrap(), "{name}: {output}: {apart}");
    }
}

#[test]
fn outputs_are_those_of_transformers_with_and_without_modules_on_the_way() {
    for (name, outputs) in MODELS {
        let model = open(fixture(name), &LoadOptions::default()).unwrap();
        let inputs = read(&format!("{name}/inputs.safetensors"));
        let none = Layers::none(model.sites().len());
        let found = no_grad(|| model.forward(&inputs, &none, &Context::eval())).unwrap();
        same(name, outputs, &found);
        let sites = model.sites().iter().filter(|s| s.kind != SiteKind::Attention);
        let targets = Targets::names(sites.map(|s| s.path.clone()).collect::<Vec<_>>());
        let mut model = Modular::from_box(model, Seed(1)).unwrap();
        model.attach("m", Box::new(Scale), &targets).unwrap();
        model.route(Given::only(0), false).unwrap();
        model.aggregate(Box::new(Sum(Base::Kept))).unwrap();
        let found = no_grad(|| model.forward(&inputs, &Context::eval())).unwrap();
        same(name, outputs, &found);
    }
}

#[test]
fn names_are_those_of_the_class_and_others_are_understood() {
    let query = "encoder.layer.0.attention.self.query";
    for (name, prefix, foreign, head) in [
        ("xlm_roberta", "", "roberta.", "pooler.dense"),
        ("roberta_classifier", "roberta.", "", "classifier.out_proj"),
        ("bert_tagger", "bert.", "", "classifier"),
        ("base_bert", "", "bert.", "pooler.dense"),
    ] {
        let model = Bert::load(fixture(name), &LoadOptions::default()).unwrap();
        let own = format!("{prefix}{query}");
        assert!(model.sites().iter().any(|s| s.path == own), "{name}");
        assert!(model.params().get(&format!("{own}.weight")).is_ok(), "{name}");
        assert_eq!(model.canonical(&format!("{foreign}{query}")), own, "{name}");
        assert_eq!(model.canonical(&own), own, "{name}");
        assert_eq!(model.canonical("classifier.dense"), "classifier.dense", "{name}");
        assert_eq!(model.sites().last().unwrap().path, head, "{name}");
    }
}

#[test]
fn positions_beyond_the_table_are_refused() {
    let model = Bert::load(fixture("xlm_roberta"), &LoadOptions::default()).unwrap();
    let run = |n: i64| {
        let ids = Tensor::from_slice(&vec![5i64; n as usize], &[1, n], Device::Cpu).unwrap();
        let none = Layers::none(model.sites().len());
        model.forward(&Tensors::new().with("input_ids", ids), &none, &Context::eval())
    };
    // 14 rows, of which padding's and the one before it are not for tokens.
    assert!(run(12).is_ok());
    let e = run(13).unwrap_err().to_string();
    assert!(e.contains("max_position_embeddings is 14"), "{e}");
}
