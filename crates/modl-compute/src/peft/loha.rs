//! `peft_type` LOHA: PEFT's `LoHaConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{
    Fields, PREFIX, PeftType, Provenance, Read, Written, number, read_targets, same_names,
};
use crate::low_rank::Loha;

pub(super) const LOHA: PeftType = PeftType {
    name: "LOHA",
    kind: "loha",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

/// What both sides call the same.
const NAMES: &[&str] = &[
    "r",
    "alpha",
    "rank_dropout",
    "module_dropout",
    "use_effective_conv2d",
    "init_weights",
    "rank_pattern",
    "alpha_pattern",
];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;

    let module = same_names::read::<Loha>(fields, "loha", NAMES, &peft)?;
    Ok((module, targets))
}

fn write(config: Value) -> Result<Written> {
    let config: Loha = modl_core::from_json("loha", config)?;
    let mut fields = same_names::write(
        "loha",
        &config,
        json!({
        "exclude_modules": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "target_modules": null,
        "alpha_pattern": {},
        "rank_pattern": {},
        }),
    )?;
    fields.insert("alpha".to_owned(), number(config.alpha));
    Ok((fields, config.peft))
}
