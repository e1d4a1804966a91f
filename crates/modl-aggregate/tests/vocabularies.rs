//! Models with other vocabularies, merged here and by mergekit, compared token by token: the order in
//! which a union puts the tokens of the second model is mergekit's own affair. The fixtures come from
//! `tests/python/make_vocabulary_golden.py`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_aggregate::merge::{Elements, MergeMethods, Source, run};
use modl_aggregate::mergekit::{Options, plan, read_documents};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vocabulary")
}

/// Tokens and their ids, of a folder with `tokenizer.json`.
fn ids(dir: &Path) -> BTreeMap<String, usize> {
    let json: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("tokenizer.json")).unwrap()).unwrap();
    let vocabulary = json["model"]["vocab"].as_object().unwrap().iter();
    let mut ids: BTreeMap<String, usize> =
        vocabulary.map(|(t, id)| (t.clone(), id.as_u64().unwrap() as usize)).collect();
    for added in json["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        ids.insert(added["content"].as_str().unwrap().to_owned(), id);
    }
    ids
}

fn values(source: &Source, name: &str) -> (Vec<usize>, Vec<f32>) {
    let shape = source.place(name).unwrap().shape.clone();
    let mut values = vec![0.0; shape.iter().product()];
    source.elements(name, None).unwrap().read(0, &mut values).unwrap();
    (shape, values)
}

fn close(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-6, "{what}: {a} {b}");
    }
}

#[test]
fn rows_of_tokens_are_those_that_mergekit_gives() {
    for name in ["base", "model", "union", "tokens", "task"] {
        let dir = fixtures().join(name);
        let made = tempfile::tempdir().unwrap();
        let out = made.path().join("m");
        let text = fs::read_to_string(dir.join("config.yml")).unwrap();
        let methods = MergeMethods::default();
        let options = Options { folder: fixtures().join("models"), ..Options::default() };
        let plan = plan(&read_documents(&text).unwrap()[0], &methods, &options).unwrap();
        run(&plan, &methods, &out, |_| {}).unwrap();

        let ours = Source::open("ours", &out).unwrap();
        let theirs = Source::open("theirs", &dir.join("merged.safetensors")).unwrap();
        let (our_ids, their_ids) = (ids(&out), ids(&dir));
        assert!(our_ids.keys().eq(their_ids.keys()), "{name}");
        let stated: Value =
            serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(ours.config["vocab_size"], stated["vocab_size"], "{name}");
        for tensor in theirs.tensors().keys() {
            let (shape, a) = values(&ours, tensor);
            let (their_shape, b) = values(&theirs, tensor);
            assert_eq!(shape, their_shape, "{name} {tensor}");
            if !tensor.contains("embed_tokens") && !tensor.contains("lm_head") {
                close(&a, &b, &format!("{name} {tensor}"));
                continue;
            }
            let width = shape[1];
            let row = |v: &[f32], id: usize| v[id * width..(id + 1) * width].to_vec();
            for (token, id) in &our_ids {
                let what = format!("{name} {tensor} {token:?}");
                close(&row(&a, *id), &row(&b, their_ids[token]), &what);
            }
            // Places without a token.
            for id in our_ids.len()..shape[0] {
                close(&row(&a, id), &row(&b, id), &format!("{name} {tensor} {id}"));
            }
        }
    }
}

#[test]
fn without_a_word_on_tokenizers_other_vocabularies_are_refused() {
    let text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n\
                - {model: b, parameters: {weight: 1}}\n";
    let options = Options { folder: fixtures().join("models"), ..Options::default() };
    let methods = MergeMethods::default();
    let error =
        plan(&read_documents(text).unwrap()[0], &methods, &options).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("tokenizer_source"), "{error}");
}
