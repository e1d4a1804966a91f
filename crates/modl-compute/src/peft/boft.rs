//! `peft_type` BOFT: PEFT's `BOFTConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, read_targets, same_names};
use crate::low_rank::Boft;

pub(super) const BOFT: PeftType = PeftType {
    name: "BOFT",
    kind: "boft",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

/// What both sides call the same.
const NAMES: &[&str] = &[
    "boft_block_size",
    "boft_block_num",
    "boft_n_butterfly_factor",
    "boft_dropout",
    "init_weights",
];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    let module = same_names::read::<Boft>(fields, "boft", NAMES, &peft)?;
    Ok((module, targets))
}

fn write(config: Value) -> Result<Written> {
    let config: Boft = modl_core::from_json("boft", config)?;
    let fields = same_names::write(
        "boft",
        &config,
        json!({
        "exclude_modules": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "target_modules": null,
        "bias": "none",
        "fan_in_fan_out": false,
        }),
    )?;
    Ok((fields, config.peft))
}
