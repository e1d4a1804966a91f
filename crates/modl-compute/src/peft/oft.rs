//! `peft_type` OFT: PEFT's `OFTConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, read_targets, same_names};
use crate::low_rank::Oft;

pub(super) const OFT: PeftType = PeftType {
    name: "OFT",
    kind: "oft",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

/// What both sides call the same.
const NAMES: &[&str] = &[
    "r",
    "oft_block_size",
    "module_dropout",
    "coft",
    "eps",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "init_weights",
];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    let module = same_names::read::<Oft>(fields, "oft", NAMES, &peft)?;
    Ok((module, targets))
}

fn write(config: Value) -> Result<Written> {
    let config: Oft = modl_core::from_json("oft", config)?;
    let fields = same_names::write(
        "oft",
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
