//! Reads a PEFT adapter and writes it again: `resave_peft MODEL_DIR ADAPTER_IN ADAPTER_OUT`.

use modl_compute::peft;
use modl_core::{Error, Modular, Result, Seed};
use modl_models::{LoadOptions, open};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, from, to] = args.as_slice() else {
        return Err(Error::invalid("arguments", "want MODEL_DIR ADAPTER_IN ADAPTER_OUT"));
    };
    let mut model = Modular::from_box(open(model, &LoadOptions::default())?, Seed(0))?;
    let name = peft::load(&mut model, from, None)?;
    peft::save(&model, &name, to)
}
