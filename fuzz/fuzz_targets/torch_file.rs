//! Any bytes as a file of PyTorch's: an error or tensors, nothing executed, and no tensor beyond
//! the file's size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_core::Device;
use modl_core::checkpoint::{TensorFile, TorchFile};

fuzz_target!(|data: &[u8]| {
    let path = modl_fuzz::write("pytorch_model.bin", data);
    let Ok(file) = TorchFile::open(&path) else { return };
    for name in file.names() {
        if let Ok(t) = file.tensor(&name, Device::Cpu) {
            assert!(t.numel() * t.kind().elt_size_in_bytes() <= data.len());
        }
    }
});
