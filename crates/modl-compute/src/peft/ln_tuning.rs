//! `peft_type` LN_TUNING: PEFT's `LNTuningConfig` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Map, Value};

use super::{Fields, PeftType, Provenance, Read, Written, read_targets};
use crate::LnTuning;

pub(super) const LN_TUNING: PeftType = PeftType::in_model("LN_TUNING", "ln_tuning", read, write);

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    Ok((Box::new(LnTuning { peft }), targets))
}

fn write(config: Value) -> Result<Written> {
    let ln: LnTuning = modl_core::from_json("ln_tuning", config)?;
    let open = ["exclude_modules", "modules_to_save", "target_modules"];
    Ok((Map::from_iter(open.map(|name| (name.to_owned(), Value::Null))), ln.peft))
}
