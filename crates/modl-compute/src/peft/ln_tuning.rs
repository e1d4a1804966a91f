//! `peft_type` LN_TUNING: PEFT's `LNTuningConfig` as of version 0.21.2.

use modl_core::{Error, Result};
use serde_json::{Map, Value};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, read_targets};
use crate::LnTuning;

pub(super) const LN_TUNING: PeftType = PeftType {
    name: "LN_TUNING",
    kind: "ln_tuning",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    Ok((Box::new(LnTuning { peft }), targets))
}

fn write(config: Value) -> Result<Written> {
    let ln: LnTuning =
        serde_json::from_value(config).map_err(|e| Error::invalid("ln_tuning", e.to_string()))?;
    let open = ["exclude_modules", "modules_to_save", "target_modules"];
    Ok((Map::from_iter(open.map(|name| (name.to_owned(), Value::Null))), ln.peft))
}
