//! Llama and its tokenizer out of GGUF files.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Layers, Tensors, no_grad};
use modl_models::{LoadOptions, Tokenizer, open};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read(path: &str) -> Tensors {
    let file = Checkpoint::open(fixture(path)).unwrap();
    file.tensors(Device::Cpu).unwrap().into_iter().collect()
}

fn refusal(path: &Path) -> String {
    open(path, &LoadOptions::default()).unwrap_err().to_string()
}

/// The file was made of the same tensors by the gguf package, with the rows of queries and keys in
/// llama.cpp's order.
#[test]
fn a_file_of_llama_cpp_is_the_model_that_it_was_made_of() {
    let model = open(fixture("gguf/llama.gguf"), &LoadOptions::default()).unwrap();
    let same = open(fixture("base_llama"), &LoadOptions::default()).unwrap();
    assert_eq!(model.sites(), same.sites());
    for (name, p) in same.params().iter() {
        let found = model.params().get(name).unwrap();
        assert!(found.bit_equal(p.tensor()).unwrap(), "{name}");
    }
    let none = Layers::none(model.sites().len());
    let inputs = read("base_llama/inputs.safetensors");
    let found = no_grad(|| model.forward(&inputs, &none, &Context::eval())).unwrap();
    let wanted = read("base_llama/outputs.safetensors");
    let (found, wanted) = (found.need("logits").unwrap(), wanted.need("logits").unwrap());
    assert!(found.all_close(wanted, 1e-5, 1e-5).unwrap());
    assert_eq!(model.config()["eos_token_id"], 1);
}

#[test]
fn its_tokenizer_cuts_and_joins() {
    let tokenizer = Tokenizer::open(fixture("gguf/llama.gguf")).unwrap();
    // <s> <e> h e l o w r d ! 0 1 2 3 Ġ he ll hell hello Ġw, and <s> before each text.
    assert_eq!(tokenizer.vocabulary(), 20);
    let ids = tokenizer.encode_one("hello world!12<e>").unwrap();
    assert_eq!(ids, [0, 18, 19, 5, 7, 4, 8, 9, 11, 12, 1]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "hello world!12");
    assert!(tokenizer.decode(&[-1]).is_err());
}

#[test]
fn files_that_are_broken_or_of_other_models_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.gguf");
    let whole = std::fs::read(fixture("gguf/llama.gguf")).unwrap();
    for cut in [0, 3, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let e = refusal(&path);
        assert!(e.contains("x.gguf"), "{e}");
    }
    let replaced = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, bytes).unwrap();
    };
    replaced("llama", "bloom");
    assert!(refusal(&path).contains("architecture \"bloom\""), "{}", refusal(&path));
    replaced("llama.block_count", "llama.clock_count");
    assert!(refusal(&path).contains("`llama.block_count`"), "{}", refusal(&path));
    replaced("blk.1.attn_q.weight", "blk.1.attn_x.weight");
    let e = refusal(&path);
    assert!(e.contains("missing    model.layers.1.self_attn.q_proj.weight"), "{e}");
    assert!(e.contains("unexpected blk.1.attn_x.weight"), "{e}");
    replaced("smollm", "qwenxx");
    let e = Tokenizer::open(&path).unwrap_err().to_string();
    assert!(e.contains("pre \"qwenxx\""), "{e}");
    assert!(refusal(&fixture("gguf/formats.gguf")).contains("architecture \"none\""));
}
