//! `peft_type` LOKR: PEFT's `LoKrConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{
    Fields, PREFIX, PeftType, Provenance, Read, Written, number, read_targets, same_names,
};
use crate::low_rank::{Lokr, LokrInit};

pub(super) const LOKR: PeftType = PeftType {
    name: "LOKR",
    kind: "lokr",
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
    "decompose_both",
    "decompose_factor",
    "rank_dropout_scale",
    "rank_pattern",
    "alpha_pattern",
    "init_weights",
];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;

    // How the factors started is of no use to a trained one, but is written again.
    let start: Value = fields.optional("init_weights")?.unwrap_or(json!(true));
    let start = match (start.as_bool(), start.as_str()) {
        (Some(true), _) => "standard",
        (Some(false), _) => "random",
        (_, Some("lycoris")) => "lycoris",
        _ => {
            fields.refuse("init_weights", &start);
            "standard"
        }
    };
    fields.give("init_weights", json!(start));
    let module = same_names::read::<Lokr>(fields, "lokr", NAMES, &peft)?;
    Ok((module, targets))
}

fn write(config: Value) -> Result<Written> {
    let config: Lokr = modl_core::from_json("lokr", config)?;
    let mut fields = same_names::write(
        "lokr",
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
    // PEFT says it by a truth value or a name.
    let start = match config.init_weights {
        LokrInit::Standard => json!(true),
        LokrInit::Random => json!(false),
        LokrInit::Lycoris => json!("lycoris"),
    };
    fields.insert("init_weights".to_owned(), start);
    Ok((fields, config.peft))
}
