//! `peft_type` FOURIERFT: PEFT's `FourierFTConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, read_targets, same_names};
use crate::low_rank::FourierFt;

pub(super) const FOURIERFT: PeftType = PeftType {
    name: "FOURIERFT",
    kind: "fourierft",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

/// What both sides call the same.
const NAMES: &[&str] =
    &["n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights"];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    let module = same_names::read::<FourierFt>(fields, "fourierft", NAMES, &peft)?;
    Ok((module, targets))
}

fn write(config: Value) -> Result<Written> {
    let config: FourierFt = modl_core::from_json("fourierft", config)?;
    let fields = same_names::write(
        "fourierft",
        &config,
        json!({
        "exclude_modules": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "target_modules": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "n_frequency_pattern": {},
        }),
    )?;
    Ok((fields, config.peft))
}
