//! Any text as the header of a module file: an error, or a module.
#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use modl_core::{Registry, checkpoint};

fuzz_target!(|text: &str| {
    let path = modl_fuzz::folder().join("module.safetensors");
    let metadata = HashMap::from([("modl".to_owned(), text.to_owned())]);
    checkpoint::save(&path, [], metadata).expect("a temporary file");
    let registry = Registry::new().with(modl_compute::register).expect("distinct names");
    let mut model = modl_fuzz::model();
    assert!(model.load_module(&path, None, &registry).is_err(), "there are no tensors");
});
