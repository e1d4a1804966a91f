//! `LoRAConfig` with `composition_mode` "add": LoRA at the matrices of BERT and its kin.

use modl_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{Fields, Header, Method, Places, Read};
use crate::Lora;
use crate::peft::number;

pub(super) const LORA: Method = Method {
    architecture: Some("lora"),
    kind: "lora",
    read,
    write,
    key: |site, param, name| {
        let param = param.strip_suffix(".weight").unwrap_or(param);
        format!("{site}.loras.{name}.{param}")
    },
};

/// `attn_matrices`, and the linear layers that they mean.
const MATRICES: [(&str, &str); 3] =
    [("q", "attention.self.query"), ("k", "attention.self.key"), ("v", "attention.self.value")];
/// What `intermediate_lora` means.
const INTERMEDIATE: &str = "intermediate.dense";
/// What `output_lora` means.
const OUTPUT: &str = "output.dense";

fn read(fields: &mut Fields, header: &Header) -> Result<Read> {
    fields.ignore("init_weights_seed");
    // Where the module is made; the tensors say in which kind they are.
    fields.ignore("dtype");
    let mode: String = fields.optional("composition_mode")?.unwrap_or_else(|| "add".into());
    if mode != "add" {
        fields.refuse("composition_mode", &json!(mode));
    }
    let start: String = fields.optional("init_weights")?.unwrap_or_else(|| "lora".into());
    if start != "lora" {
        fields.refuse("init_weights", &json!(start));
    }
    if !header.model_type.contains("bert") {
        return Err(Error::unsupported(
            format!("LoRA of AdapterHub on a {}", header.model_type),
            "its names are known for BERT and its kin; save it in PEFT's format instead",
        ));
    }
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
    let lora = Lora {
        r: fields.required("r")?,
        alpha: fields.required("alpha")?,
        dropout: fields.optional("dropout")?.unwrap_or(0.0),
        ..Lora::default()
    };
    Ok((Box::new(lora), Places::targets(&parts, &leave_out)))
}

fn write(config: Value, places: &Places) -> Result<Map<String, Value>> {
    let lora: Lora = modl_core::from_json("lora", config)?;
    let plain = Lora { r: lora.r, alpha: lora.alpha, dropout: lora.dropout, ..Lora::default() };
    if lora != (Lora { init: lora.init, peft: lora.peft.clone(), ..plain }) {
        return Err(Error::unsupported(
            "rank patterns, rsLoRA and other extensions of LoRA in an AdapterHub folder",
            "save it as a PEFT folder",
        ));
    }
    let known = |end: &&String| {
        MATRICES.iter().any(|(_, m)| m == end) || [INTERMEDIATE, OUTPUT].contains(&end.as_str())
    };
    if let Some(other) = places.ends.iter().find(|e| !known(e)) {
        return Err(Error::unsupported(
            format!("LoRA at `{other}` in an AdapterHub folder"),
            "AdapterHub has it at query, key, value, intermediate and output; save it for PEFT",
        ));
    }
    let matrices: Vec<&str> = MATRICES
        .iter()
        .filter(|(_, m)| places.ends.contains(*m))
        .map(|(short, _)| *short)
        .collect();
    let fields = json!({
        "alpha": number(lora.alpha),
        "architecture": "lora",
        "attn_matrices": matrices,
        "composition_mode": "add",
        "dropout": lora.dropout,
        "dtype": null,
        "init_weights": "lora",
        "init_weights_seed": null,
        "intermediate_lora": places.ends.contains(INTERMEDIATE),
        "leave_out": places.leave_out,
        "output_lora": places.ends.contains(OUTPUT),
        "r": lora.r,
        "selfattn_lora": !matrices.is_empty(),
        "use_dora": false,
        "use_gating": false,
        "vera_b": null,
        "vera_d": null,
    });
    Ok(fields.as_object().cloned().unwrap_or_default())
}
