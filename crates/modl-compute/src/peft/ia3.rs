//! `peft_type` IA3: PEFT's `IA3Config` as of version 0.21.2.

use modl_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, read_targets};
use crate::{Ia3, Ia3Init};

pub(super) const IA3: PeftType = PeftType {
    name: "IA3",
    kind: "ia3",
    read,
    write,
    key: |param| format!("{PREFIX}{param}"),
    unpack: None,
    pack: None,
};

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    let ones = fields.optional("init_ia3_weights")?.unwrap_or(true);
    let ia3 = Ia3 {
        feedforward_modules: fields.required("feedforward_modules")?,
        init: if ones { Ia3Init::Ones } else { Ia3Init::Random },
        peft,
    };
    Ok((Box::new(ia3), targets))
}

fn write(config: Value) -> Result<Written> {
    let ia3: Ia3 =
        serde_json::from_value(config).map_err(|e| Error::invalid("ia3", e.to_string()))?;
    let fields = Map::from_iter([
        ("exclude_modules".to_owned(), Value::Null),
        ("fan_in_fan_out".to_owned(), json!(false)),
        ("feedforward_modules".to_owned(), json!(ia3.feedforward_modules)),
        ("init_ia3_weights".to_owned(), json!(ia3.init == Ia3Init::Ones)),
        ("modules_to_save".to_owned(), Value::Null),
        ("target_modules".to_owned(), Value::Null),
    ]);
    Ok((fields, ia3.peft))
}
