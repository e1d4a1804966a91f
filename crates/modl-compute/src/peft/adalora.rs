//! `peft_type` ADALORA: PEFT's `AdaLoraConfig` as of version 0.21.2.
//!
//! PEFT keeps which triplets stay as `rank_pattern`, a list of booleans for each site, and leaves
//! the others out of the file; the site's rank is then the number that stay.

use modl_core::{Error, ParamStore, Result, Tensor, Tensors, no_grad};
use serde_json::{Map, Value, json};

use super::{
    Fields, PREFIX, PeftType, Provenance, Read, Written, lora_fields, number, object, read_targets,
};
use crate::low_rank::{AdaLora, E, averaged};

pub(super) const ADALORA: PeftType = PeftType {
    unpack: Some(unpack),
    pack: Some(pack),
    ..PeftType::in_model("ADALORA", "adalora", read, write)
};

fn read(fields: &mut Fields, mut peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    fields.refuse_unless("bias", "none")?;
    for unused in ["r", "qalora_group_size", "megatron_core", "runtime_config"] {
        fields.ignore(unused);
    }
    let start: Value = fields.optional("init_lora_weights")?.unwrap_or(json!(true));
    if !start.is_boolean() {
        fields.refuse("init_lora_weights", &start);
    }
    let masks: Option<Map<String, Value>> = fields.optional("rank_pattern")?;
    let mut ranks = Vec::new();
    if let Some(masks) = &masks {
        peft.start.insert("rank_pattern".to_owned(), json!(masks));
    }
    for (key, mask) in masks.into_iter().flatten() {
        // `encoder.layer.0.attention.self.query.lora_E`, in some versions with the adapter's name.
        let site = key.rsplit_once(&format!(".{E}")).map_or(key.as_str(), |(site, _)| site);
        let rank = match &mask {
            Value::Array(kept) => kept.iter().filter(|k| k.as_bool() == Some(true)).count() as i64,
            _ => return Err(Error::invalid("rank_pattern", format!("says {mask} for `{key}`"))),
        };
        ranks.push((regex::escape(site), rank));
    }
    let standard = AdaLora::default();
    let adalora = AdaLora {
        init_r: fields.optional("init_r")?.unwrap_or(standard.init_r),
        target_r: fields.optional("target_r")?.unwrap_or(standard.target_r),
        ranks: ranks.into_iter().collect(),
        alpha: fields.optional("lora_alpha")?.unwrap_or(standard.alpha),
        dropout: fields.optional("lora_dropout")?.unwrap_or(standard.dropout),
        tinit: fields.optional("tinit")?.unwrap_or(standard.tinit),
        tfinal: fields.optional("tfinal")?.unwrap_or(standard.tfinal),
        delta_t: fields.optional("deltaT")?.unwrap_or(standard.delta_t),
        beta1: fields.optional("beta1")?.unwrap_or(standard.beta1),
        beta2: fields.optional("beta2")?.unwrap_or(standard.beta2),
        orth_reg_weight: fields.optional("orth_reg_weight")?.unwrap_or(standard.orth_reg_weight),
        total_step: fields.optional("total_step")?,
        init_lora_weights: start != json!(false),
        peft,
    };
    Ok((Box::new(adalora), targets))
}

fn write(config: Value) -> Result<Written> {
    let adalora: AdaLora = modl_core::from_json("adalora", config)?;
    let total = adalora.total_step.ok_or_else(|| {
        let advice = "set `total_step`, which PEFT's file has to have";
        Error::unsupported("AdaLoRA without `total_step` in a PEFT folder", advice)
    })?;
    let mut fields = lora_fields();
    fields.extend(object(json!({
        "beta1": adalora.beta1,
        "beta2": adalora.beta2,
        "deltaT": adalora.delta_t,
        "init_lora_weights": adalora.init_lora_weights,
        "init_r": adalora.init_r,
        "lora_alpha": number(adalora.alpha),
        "lora_dropout": adalora.dropout,
        "orth_reg_weight": adalora.orth_reg_weight,
        "rank_pattern": null,
        "target_r": adalora.target_r,
        "tfinal": adalora.tfinal,
        "tinit": adalora.tinit,
        "total_step": total,
    })));
    fields.extend(adalora.peft.start.clone());
    Ok((fields, adalora.peft))
}

/// Running averages are not in the file; they start again.
fn unpack(mut found: Tensors, wanted: &ParamStore) -> Result<Tensors> {
    for (key, _) in wanted.iter().filter(|(key, _)| averaged(key).is_some()) {
        // Of the shape that the file has, and not of one that is only asked for.
        if let Some(t) = averaged(key).and_then(|of| found.get(of)) {
            found.set(key.to_owned(), t.zeros_like()?);
        }
    }
    Ok(found)
}

/// Leaves out running averages and, where the budget has taken some, the triplets that are off.
fn pack(all: Tensors, fields: &mut Map<String, Value>) -> Result<Tensors> {
    let is_e = |key: &str| key.rsplit('.').next() == Some(E);
    let mut masks = Map::new();
    let mut kept = Tensors::new();
    let mut values = Vec::new();
    for (_, t) in all.iter().filter(|(key, _)| is_e(key)) {
        values.extend(t.to_vec::<f64>()?);
    }
    // A fresh module has nothing but zeros. What came pruned from a file is as it was.
    let was = fields.get("rank_pattern").is_some_and(Value::is_object);
    let pruned = !was && values.contains(&0.0) && values.iter().any(|v| *v != 0.0);
    for (key, e) in all.iter().filter(|(key, _)| is_e(key)) {
        let site = key.strip_suffix(E).unwrap_or(key);
        let on: Vec<bool> = e.to_vec::<f64>()?.iter().map(|v| !pruned || *v != 0.0).collect();
        let index: Vec<i64> = (0..).zip(&on).filter(|(_, on)| **on).map(|(i, _)| i).collect();
        let index = Tensor::from_slice(&index, &[index.len() as i64], e.device())?;
        for (name, dim) in [("lora_A", 0), ("lora_B", 1), (E, 0)] {
            let key = format!("{site}{name}");
            let whole = all.need(&key)?;
            let part =
                if pruned { no_grad(|| whole.index_select(dim, &index))? } else { whole.clone() };
            kept.set(key, part);
        }
        masks.insert(key.strip_prefix(PREFIX).unwrap_or(key).to_owned(), json!(on));
    }
    if pruned {
        fields.insert("rank_pattern".to_owned(), Value::Object(masks));
    }
    Ok(kept)
}
