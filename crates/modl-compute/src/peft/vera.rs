//! `peft_type` VERA: PEFT's `VeraConfig` as of version 0.21.2.

use modl_core::{Error, Result, Tensor, Tensors};
use serde_json::{Map, Value, json};

use super::{Fields, PREFIX, PeftType, Provenance, Read, Written, object, read_targets};
use crate::low_rank::{VERA_B, VERA_D, VERA_SHARED, Vera};

pub(super) const VERA: PeftType = PeftType {
    // The shared matrices stand beside the user's model, not in it.
    key: |param| match VERA_SHARED.contains(&param) {
        true => format!("base_model.{param}"),
        false => format!("{PREFIX}{param}"),
    },
    pack: Some(pack),
    ..PeftType::in_model("VERA", "vera", read, write)
};

/// A factor of AdapterHub's, from `write` to [`pack`].
const SCALING: &str = "scaling";

/// Makes vectors of AdapterHub's diagonal matrices, with its factor in b.
fn pack(tensors: Tensors, fields: &mut Map<String, Value>) -> Result<Tensors> {
    let scaling = fields.shift_remove(SCALING).and_then(|s| s.as_f64()).unwrap_or(1.0);
    tensors.map(|key, t| {
        let is_b = key.ends_with(VERA_B);
        if !is_b && !key.ends_with(VERA_D) {
            return Ok(t.clone());
        }
        let vector = if t.dim() == 2 { diagonal(key, t)? } else { t.clone() };
        if is_b && scaling != 1.0 { vector.mul_scalar(scaling) } else { Ok(vector) }
    })
}

fn diagonal(key: &str, t: &Tensor) -> Result<Tensor> {
    let own = t.mul(&Tensor::eye(t.len_of(0), t.kind(), t.device())?)?;
    if !own.bit_equal(t)? {
        return Err(Error::unsupported(
            format!("`{key}`, a trained matrix, in a PEFT folder"),
            "PEFT's VeRA has vectors, this one has numbers beside the diagonal; convert it to LoRA",
        ));
    }
    own.sum_dims(&[1], false)
}

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    if fields.optional("save_projection")? == Some(false) {
        // The matrices are then to be drawn by PyTorch's generator.
        fields.refuse("save_projection", &json!(false));
    }
    let standard = Vera::default();
    let vera = Vera {
        r: fields.optional("r")?.unwrap_or(standard.r),
        d_initial: fields.optional("d_initial")?.unwrap_or(standard.d_initial),
        init_weights: fields.optional("init_weights")?.unwrap_or(standard.init_weights),
        dropout: fields.optional("vera_dropout")?.unwrap_or(standard.dropout),
        projection_prng_key: fields.optional("projection_prng_key")?.unwrap_or(0),
        peft,
        ..standard
    };
    Ok((Box::new(vera), targets))
}

fn write(config: Value) -> Result<Written> {
    let vera: Vera = modl_core::from_json("vera", config)?;
    let mut fields = object(json!({
        "bias": "none",
        "d_initial": vera.d_initial,
        "fan_in_fan_out": false,
        "init_weights": vera.init_weights,
        "layers_pattern": null,
        "layers_to_transform": null,
        "modules_to_save": null,
        "projection_prng_key": vera.projection_prng_key,
        "r": vera.r,
        "save_projection": true,
        "target_modules": null,
        "vera_dropout": vera.dropout,
    }));
    fields.insert(SCALING.to_owned(), json!(vera.scaling));
    Ok((fields, vera.peft))
}
