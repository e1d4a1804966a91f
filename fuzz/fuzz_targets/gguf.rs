//! Any bytes as a GGUF file, as a model and as a tokenizer: an error, or what was asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_models::{LoadOptions, Tokenizer, open};

fuzz_target!(|data: &[u8]| {
    let path = modl_fuzz::write("model.gguf", data);
    let _ = open(&path, &LoadOptions::default());
    let _ = Tokenizer::open(&path);
});
