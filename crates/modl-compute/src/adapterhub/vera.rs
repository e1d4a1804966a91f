//! `LoRAConfig` with `vera_d` and `vera_b`: VeRA, whose diagonals are full matrices that the library
//! trains as such.

use modl_core::{Error, Result, Tensor};
use serde_json::{Map, Value, json};

use super::lora::{LORA, has_vera, read_common, read_factors, write_common};
use super::{Fields, Header, Method, Read, Standing};
use crate::Vera;
use crate::low_rank::{VERA_D, VERA_SHARED};
use crate::peft::{number, object};

pub(super) const VERA: Method = Method {
    asked: has_vera,
    kind: "vera",
    read,
    write,
    key: |p| match (p.site, p.own == VERA_SHARED[0]) {
        ("", true) => format!("{}shared_parameters.{}.lora_A", p.model, p.adapter),
        ("", false) => format!("{}shared_parameters.{}.lora_B", p.model, p.adapter),
        _ => {
            let own = if p.own == VERA_D { D } else { B };
            format!("{}.loras.{}.{own}", p.site, p.adapter)
        }
    },
    // Makes matrices of vectors.
    pack: Some(|tensors, _, _| {
        tensors.map(|key, t| match t.dim() {
            1 if key.ends_with(D) || key.ends_with(B) => {
                Tensor::eye(t.len_of(0), t.kind(), t.device())?.mul(t)
            }
            _ => Ok(t.clone()),
        })
    }),
    ..LORA
};

const D: &str = "vera_D";
const B: &str = "vera_B";

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    let targets = read_common(fields, "add", "vera")?;
    let factors = read_factors(fields, header)?;
    let start: f64 = fields.required("vera_b")?;
    let vera = Vera {
        r: factors.r,
        d_initial: fields.required("vera_d")?,
        init_weights: start == 0.0,
        dropout: factors.dropout,
        scaling: factors.alpha / factors.r as f64,
        full_matrices: true,
        ..Vera::default()
    };
    Ok((Box::new(vera), targets))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let vera: Vera = modl_core::from_json("vera", config)?;
    let shape = |s: &modl_core::Site| (s.input, s.output);
    let mut sites = standing.sites.iter();
    if let Some(first) = sites.next()
        && let Some(other) = sites.find(|s| shape(s) != shape(first))
    {
        return Err(Error::unsupported(
            format!("VeRA at `{}` and `{}` in an AdapterHub folder", first.path, other.path),
            "AdapterHub shares its matrices among sites of one shape only; save it for PEFT",
        ));
    }
    let own = object(json!({
        "alpha": number(vera.scaling * vera.r as f64),
        "dropout": vera.dropout,
        "init_weights": "vera",
        "r": vera.r,
        "vera_b": if vera.init_weights { 0.0 } else { 0.1 },
        "vera_d": vera.d_initial,
    }));
    write_common(standing, own)
}
