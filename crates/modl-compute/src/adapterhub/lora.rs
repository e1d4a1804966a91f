//! `LoRAConfig` with `composition_mode` "add": LoRA at the matrices of BERT and its kin, and what
//! its kin in these settings have in common.

use modl_core::{Error, Result, Targets};
use serde_json::{Map, Value, json};

use super::{Fields, Header, Method, Places, Read, Standing};
use crate::Lora;
use crate::peft::{number, object};

pub(super) const LORA: Method = Method {
    architecture: Some("lora"),
    asked: |settings| !has_dora(settings) && !has_vera(settings) && !scales(settings),
    kind: "lora",
    read,
    write,
    key: |p| {
        let own = p.own.strip_suffix(".weight").unwrap_or(p.own);
        format!("{}.loras.{}.{own}", p.site, p.adapter)
    },
    unpack: None,
    pack: None,
};

/// Whether there is a magnitude of its own.
pub(super) fn has_dora(settings: &Map<String, Value>) -> bool {
    settings.get("use_dora") == Some(&json!(true)) && !has_vera(settings)
}

/// Whether the matrices are random and shared.
pub(super) fn has_vera(settings: &Map<String, Value>) -> bool {
    ["vera_d", "vera_b"].iter().any(|name| settings.get(*name).is_some_and(Value::is_number))
}

/// Whether outputs are scaled.
pub(super) fn scales(settings: &Map<String, Value>) -> bool {
    settings.get(MODE) == Some(&json!("scale"))
}

const MODE: &str = "composition_mode";

/// `attn_matrices`, and the linear layers that they mean.
const MATRICES: [(&str, &str); 3] =
    [("q", "attention.self.query"), ("k", "attention.self.key"), ("v", "attention.self.value")];
/// What `intermediate_lora` means.
const INTERMEDIATE: &str = "intermediate.dense";
/// What `output_lora` means.
const OUTPUT: &str = "output.dense";

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    let targets = read_common(fields, "add", "lora")?;
    Ok((Box::new(read_factors(fields, header)?), targets))
}

/// Rank, α and dropout.
pub(super) fn read_factors(fields: &mut Fields, header: &Header) -> Result<Lora> {
    let (r, alpha): (i64, f64) = (fields.required("r")?, fields.required("alpha")?);
    // The library's own correction: up to then it had computed without α ⁄ r.
    let alpha = if header.is_before([1, 1]) { r as f64 } else { alpha };
    let dropout = fields.optional("dropout")?.unwrap_or(0.0);
    Ok(Lora { r, alpha, dropout, ..Lora::default() })
}

/// What all methods in these settings have: the way of composition and of the start, which are to
/// be those, and the sites.
pub(super) fn read_common(fields: &mut Fields, mode: &str, start: &str) -> Result<Targets> {
    fields.ignore("init_weights_seed");
    // Where the module is made; the tensors say in which kind they are.
    fields.ignore("dtype");
    fields.refuse_unless(MODE, mode)?;
    fields.refuse_unless("init_weights", start)?;
    let matrices: Vec<String> = fields.required("attn_matrices")?;
    let mut parts = Vec::new();
    if fields.optional::<bool>("selfattn_lora")?.unwrap_or(true) {
        for name in &matrices {
            let known = MATRICES.iter().find(|(short, _)| short == name);
            let names = MATRICES.iter().map(|(short, _)| *short);
            parts.push(known.ok_or_else(|| Error::unknown("attn_matrices", name, names))?.1);
        }
    }
    for (name, end) in [("intermediate_lora", INTERMEDIATE), ("output_lora", OUTPUT)] {
        if fields.optional::<bool>(name)?.unwrap_or(false) {
            parts.push(end);
        }
    }
    let leave_out: Vec<i64> = fields.optional("leave_out")?.unwrap_or_default();
    Ok(Places::targets(&parts, &leave_out))
}

fn write(config: Value, standing: &Standing) -> Result<Map<String, Value>> {
    let lora: Lora = modl_core::from_json("lora", config)?;
    let own = write_factors(&lora)?;
    write_common(standing, own)
}

/// Rank, α and dropout.
///
/// # Errors
/// Where there is more to say.
pub(super) fn write_factors(lora: &Lora) -> Result<Map<String, Value>> {
    let plain = Lora { r: lora.r, alpha: lora.alpha, dropout: lora.dropout, ..Lora::default() };
    if lora != &(Lora { init: lora.init, peft: lora.peft.clone(), ..plain })
        || lora.init.is_from_weight()
    {
        return Err(Error::unsupported(
            "rank patterns, rsLoRA and other extensions of LoRA in an AdapterHub folder",
            "save it as a PEFT folder",
        ));
    }
    Ok(object(json!({ "alpha": number(lora.alpha), "dropout": lora.dropout, "r": lora.r })))
}

/// All settings, with those of the sites, and `own` in place of the usual ones.
///
/// # Errors
/// Where AdapterHub has no LoRA there.
pub(super) fn write_common(
    standing: &Standing,
    own: Map<String, Value>,
) -> Result<Map<String, Value>> {
    let places = standing.places()?;
    let known = |end: &&String| {
        MATRICES.iter().any(|(_, m)| m == end) || [INTERMEDIATE, OUTPUT].contains(&end.as_str())
    };
    if let Some(other) = places.ends.iter().find(|e| !known(e)) {
        return Err(Error::unsupported(
            format!("LoRA or its kin at `{other}` in an AdapterHub folder"),
            "AdapterHub has it at query, key, value, intermediate and output; save it for PEFT",
        ));
    }
    let matrices: Vec<&str> = MATRICES
        .iter()
        .filter(|(_, m)| places.ends.contains(*m))
        .map(|(short, _)| *short)
        .collect();
    let mut fields = object(json!({
        "alpha": 8,
        "architecture": "lora",
        "attn_matrices": matrices,
        "composition_mode": "add",
        "dropout": 0.0,
        "dtype": null,
        "init_weights": "lora",
        "init_weights_seed": null,
        "intermediate_lora": places.ends.contains(INTERMEDIATE),
        "leave_out": places.leave_out,
        "output_lora": places.ends.contains(OUTPUT),
        "r": 8,
        "selfattn_lora": !matrices.is_empty(),
        "use_dora": false,
        "use_gating": false,
        "vera_b": null,
        "vera_d": null,
    }));
    fields.extend(own);
    Ok(fields)
}
