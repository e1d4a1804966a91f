//! The real all-MiniLM-L6-v2 against transformers: tokens, hidden states, sentence embeddings.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Layers, Tensors, no_grad};
use modl_models::{LoadOptions, Tokenizer, mean_pool, open};
use serde_json::Value;

fn manifest() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn model() -> PathBuf {
    manifest().join("../../assets/all-MiniLM-L6-v2")
}

fn golden() -> (Vec<String>, Tensors) {
    let dir = manifest().join("tests/fixtures/real_minilm");
    let meta = std::fs::read_to_string(dir.join("meta.json")).unwrap();
    let meta: Value = serde_json::from_str(&meta).unwrap();
    let texts = serde_json::from_value(meta["texts"].clone()).unwrap();
    let file = Checkpoint::open(dir.join("golden.safetensors")).unwrap();
    (texts, file.tensors(Device::Cpu).unwrap().into_iter().collect())
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn sentences_become_the_embeddings_of_transformers() {
    let (texts, golden) = golden();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let batch = Tokenizer::open(model()).unwrap().encode(&texts, 128).unwrap();
    assert!(batch.ids.bit_equal(golden.need("input_ids").unwrap()).unwrap());
    assert!(batch.mask.bit_equal(golden.need("attention_mask").unwrap()).unwrap());
    let bert = open(model(), &LoadOptions::default()).unwrap();
    let none = Layers::none(bert.sites().len());
    let outputs = no_grad(|| bert.forward(&batch.inputs(), &none, &Context::eval())).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    let wanted = golden.need("last_hidden_state").unwrap();
    assert!(
        hidden.all_close(wanted, 1e-5, 1e-5).unwrap(),
        "{}",
        hidden.max_abs_diff(wanted).unwrap()
    );
    // The golden embeddings have been brought to length 1.
    let mean = mean_pool(hidden, &batch.mask).unwrap();
    let length = mean.square().unwrap().sum_dims(&[-1], true).unwrap().sqrt().unwrap();
    let embedding = mean.div(&length).unwrap();
    let wanted = golden.need("embedding").unwrap();
    let off = embedding.max_abs_diff(wanted).unwrap();
    assert!(embedding.all_close(wanted, 1e-5, 1e-5).unwrap(), "{off}");
}

#[test]
#[ignore = "needs: cargo xtask assets"]
fn the_caller_pads_and_cuts_and_special_tokens_stay() {
    let tokenizer = Tokenizer::open(model()).unwrap();
    let words = "word ".repeat(300);
    let one = tokenizer.encode_one(&words).unwrap();
    assert_eq!(one.len(), 302, "neither cut to nor padded to the file's 128");
    let batch = tokenizer.encode(&[&words, "a word"], 7).unwrap();
    let word = one[1];
    let (cls, sep) = (101, 102);
    let a = tokenizer.encode_one("a").unwrap()[1];
    let wanted = [cls, word, word, word, word, word, sep, cls, a, word, sep, 0, 0, 0];
    assert_eq!(batch.ids.to_vec::<i64>().unwrap(), wanted);
    assert_eq!(batch.mask.to_vec::<i64>().unwrap(), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]);
    assert!(tokenizer.encode(&["a"], 2).is_err());
    assert!(tokenizer.encode(&[], 8).is_err());
}

#[test]
fn a_folder_without_tokenizer_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let e = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json: is not there"), "{e}");
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let e = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("is not a tokenizer"), "{e}");
}
