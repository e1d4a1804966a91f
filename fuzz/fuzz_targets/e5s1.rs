//! Any bytes after the mark of an E5S1 file: an error, or a model.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_models::{LoadOptions, open};

fuzz_target!(|data: &[u8]| {
    let path = modl_fuzz::write("e5.bin", &[b"E5S1", data].concat());
    let _ = open(&path, &LoadOptions::default());
});
