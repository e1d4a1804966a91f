//! Any bytes as `adapter_config.json` of a PEFT folder, attached to a tiny BERT where it can be
//! read: an error or a module, and a model that still computes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use modl_compute::peft;

fuzz_target!(|data: &[u8]| {
    modl_fuzz::write("adapter_config.json", data);
    let Ok(config) = peft::read_config(modl_fuzz::folder()) else { return };
    // What a huge rank asks for is not this parser's business.
    let Ok(json) = config.module.to_json() else { return };
    if json.get("r").and_then(|r| r.as_i64()).is_some_and(|r| r > 64) {
        return;
    }
    let model = modl_fuzz::model();
    let _ = model.parameters_of(config.module.as_ref(), &config.targets);
});
