//! The real multilingual-e5-small (4 bits, E5S1) against transformers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Layers, Tensor, no_grad};
use modl_models::{LoadOptions, Tokenizer, mean_pool, open};

const TEXTS: [&str; 4] = [
    "query: The cat sleeps on the sofa.",
    "query: Die Katze schläft auf dem Sofa.",
    "query: El gato duerme en el sofá.",
    "query: 猫がソファで寝ている。",
];

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn golden(name: &str) -> Tensor {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/real_e5/golden.safetensors");
    Checkpoint::open(path).unwrap().tensor(name, Device::Cpu).unwrap()
}

#[test]
#[ignore = "needs: cargo xtask assets multilingual-e5-small multilingual-e5-small-tokenizer"]
fn sentences_in_four_languages_are_transformers() {
    let file = asset("multilingual-e5-small/e5-small-q4.bin");
    let tokenizer = asset("multilingual-e5-small-tokenizer");
    if !file.exists() || !tokenizer.exists() {
        // Optional assets, which the run of all tests does not fetch.
        eprintln!(
            "skipped: `cargo xtask assets multilingual-e5-small multilingual-e5-small-tokenizer` \
             fetches the model"
        );
        return;
    }
    let batch = Tokenizer::open(tokenizer).unwrap().encode(&TEXTS, 64).unwrap();
    assert!(batch.ids.bit_equal(&golden("input_ids")).unwrap());
    let model = open(file, &LoadOptions::default()).unwrap();
    let none = Layers::none(model.sites().len());
    let outputs = no_grad(|| model.forward(&batch.inputs(), &none, &Context::eval())).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    let mask = batch.mask.to_kind(hidden.kind()).unwrap().unsqueeze(-1).unwrap();
    let (real, wanted) =
        (hidden.mul(&mask).unwrap(), golden("last_hidden_state").mul(&mask).unwrap());
    let apart = real.max_abs_diff(&wanted).unwrap();
    eprintln!("last_hidden_state: {apart:.1e} apart");
    assert!(real.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{apart}");
    let pooled = mean_pool(hidden, &batch.mask).unwrap();
    let length = pooled.square().unwrap().sum_dims(&[1], true).unwrap().sqrt().unwrap();
    let found = pooled.div(&length).unwrap();
    assert!(found.all_close(&golden("embedding"), 1e-5, 1e-5).unwrap());
}
