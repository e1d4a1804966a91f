//! `peft_type` IA3: PEFT's `IA3Config` as of version 0.21.2.

use modl_core::Result;
use serde_json::{Value, json};

use super::{Fields, PeftType, Provenance, Read, Written, object, read_targets};
use crate::{Ia3, Ia3Init};

pub(super) const IA3: PeftType = PeftType::in_model("IA3", "ia3", read, write);

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
    let ia3: Ia3 = modl_core::from_json("ia3", config)?;
    let fields = object(json!({
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "feedforward_modules": ia3.feedforward_modules,
        "init_ia3_weights": ia3.init == Ia3Init::Ones,
        "modules_to_save": null,
        "target_modules": null,
    }));
    Ok((fields, ia3.peft))
}
