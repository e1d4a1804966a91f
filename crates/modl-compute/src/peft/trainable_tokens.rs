//! `peft_type` TRAINABLE_TOKENS: PEFT's `TrainableTokensConfig` as of version 0.21.2.

use modl_core::{Result, Targets};
use serde_json::{Value, json};

use super::{Fields, PeftType, Provenance, Read, Written, object, read_targets};
use crate::TrainableTokens;

pub(super) const TRAINABLE_TOKENS: PeftType =
    PeftType::in_model("TRAINABLE_TOKENS", "trainable_tokens", read, write);

fn read(fields: &mut Fields, mut peft: Provenance) -> Result<Read> {
    let targets = match fields.says("target_modules") {
        true => read_targets(fields)?,
        false => Targets::pattern("all-embedding"),
    };
    // How the rows started; the file has what became of them.
    peft.start = fields.rest(&["init_weights"]);
    let token_indices = fields.required("token_indices")?;
    Ok((Box::new(TrainableTokens { token_indices, peft }), targets))
}

fn write(config: Value) -> Result<Written> {
    let own: TrainableTokens = modl_core::from_json("trainable_tokens", config)?;
    let mut fields = object(json!({
        "init_weights": true,
        "target_modules": null,
        "token_indices": own.token_indices,
    }));
    fields.extend(own.peft.start.clone());
    Ok((fields, own.peft))
}
