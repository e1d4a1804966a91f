//! Any bytes as a safetensors file: an error or tensors, and nothing beyond the file's size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_core::Device;
use modl_core::checkpoint::Checkpoint;

fuzz_target!(|data: &[u8]| {
    let path = modl_fuzz::write("model.safetensors", data);
    let Ok(file) = Checkpoint::open(&path) else { return };
    for name in file.names() {
        if let Ok(t) = file.tensor(&name, Device::Cpu) {
            assert!(t.numel() <= data.len());
        }
    }
});
