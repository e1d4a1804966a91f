//! Any bytes as `adapter_config.json` of an AdapterHub folder without tensors: always an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_compute::adapterhub;

fuzz_target!(|data: &[u8]| {
    modl_fuzz::write("adapter_config.json", data);
    let mut model = modl_fuzz::model();
    let loaded = adapterhub::load(&mut model, modl_fuzz::folder(), None);
    assert!(loaded.is_err() && model.modules().is_empty());
});
