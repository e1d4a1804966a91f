//! `peft_type` LORA: PEFT's `LoraConfig` as of version 0.21.2.

use modl_core::{ParamStore, Result, Tensor, Tensors};
use serde_json::{Map, Value, json};

use super::{Fields, PeftType, Provenance, Read, Written, number, object, read_targets};
use crate::low_rank::{Dora, EMBEDDING_A, START_A, START_B};
use crate::{Lora, LoraInit};

pub(super) const LORA: PeftType = PeftType {
    unpack: Some(without_tables),
    pack: Some(with_starts),
    ..PeftType::in_model("LORA", "lora", read, write)
};

/// PEFT's DoRA is a LoRA that says `use_dora`; [`LORA`] reads it.
pub(super) const DORA: PeftType =
    PeftType { kind: "dora", write: |config| written(config, true), ..LORA };

/// Leaves out the frozen table that PEFT writes beside a LoRA of embeddings.
fn without_tables(found: Tensors, wanted: &ParamStore) -> Result<Tensors> {
    let is_table = |key: &str| {
        key.strip_suffix("base_layer.weight")
            .is_some_and(|site| wanted.find(&format!("{site}{EMBEDDING_A}")).is_some())
    };
    let own = found.iter().filter(|(key, _)| !is_table(key));
    Ok(own.map(|(key, t)| (key.to_owned(), t.clone())).collect())
}

/// Writes B A − B₀ A₀ as one product [B, −B₀] [A; A₀] of twice the rank.
fn with_starts(mut tensors: Tensors, _: &mut Map<String, Value>) -> Result<Tensors> {
    let mut pairs = Vec::new();
    for (key, start) in tensors.iter() {
        if let Some(site) = key.strip_suffix(START_A) {
            let key = format!("{site}lora_A.weight");
            let whole = Tensor::cat(&[tensors.need(&key)?.clone(), start.clone()], 0)?;
            pairs.push((key, whole));
        } else if let Some(site) = key.strip_suffix(START_B) {
            let key = format!("{site}lora_B.weight");
            let whole = Tensor::cat(&[tensors.need(&key)?.clone(), start.neg()?], 1)?;
            pairs.push((key, whole));
        }
    }
    pairs.into_iter().for_each(|(key, whole)| tensors.set(key, whole));
    let is_start = |key: &str| key.ends_with(START_A) || key.ends_with(START_B);
    let own = tensors.iter().filter(|(key, _)| !is_start(key));
    Ok(own.map(|(key, t)| (key.to_owned(), t.clone())).collect())
}

/// As [`with_starts`] writes it: twice the rank under the same scale.
fn doubled(lora: Lora) -> Lora {
    if !lora.init.is_from_weight() {
        return lora;
    }
    let factor = if lora.use_rslora { 2f64.sqrt() } else { 2.0 };
    let ranks = lora.rank_pattern.iter().map(|(k, r)| (k.to_owned(), 2 * r)).collect();
    let alphas = lora.alpha_pattern.iter().map(|(k, a)| (k.to_owned(), factor * a)).collect();
    Lora {
        r: 2 * lora.r,
        alpha: factor * lora.alpha,
        rank_pattern: ranks,
        alpha_pattern: alphas,
        init: LoraInit::Kaiming,
        ..lora
    }
}

/// Ways to start that leave the backbone as it is, so that the tensors in the file say all. The
/// others (`pissa`, `olora`, `corda`, `loftq`, `lora_ga`) take the start out of θ.
const STARTS_WITHOUT_TRACE: &[&str] = &["eva", "orthogonal", "mica"];

fn read(fields: &mut Fields, peft: Provenance) -> Result<Read> {
    let targets = read_targets(fields)?;
    let start: Value = fields.optional("init_lora_weights")?.unwrap_or(Value::Bool(true));
    let init = match (&start, start.as_str()) {
        (Value::Bool(true), _) => LoraInit::Kaiming,
        (Value::Bool(false), _) => LoraInit::Random,
        (_, Some("gaussian")) => LoraInit::Gaussian,
        (_, Some(s)) if STARTS_WITHOUT_TRACE.contains(&s) => LoraInit::Kaiming,
        _ => {
            fields.refuse("init_lora_weights", &start);
            LoraInit::Kaiming
        }
    };
    fields.refuse_unless("bias", "none")?;
    // Settings of methods that are off; `use_qalora` and `megatron_config` turn them on.
    fields.ignore("qalora_group_size");
    fields.ignore("megatron_core");
    // Never written by PEFT, and ignored by it.
    fields.ignore("runtime_config");
    let standard = Lora::default();
    let lora = Lora {
        r: fields.optional("r")?.unwrap_or(standard.r),
        alpha: fields.optional("lora_alpha")?.unwrap_or(standard.alpha),
        dropout: fields.optional("lora_dropout")?.unwrap_or(standard.dropout),
        use_rslora: fields.optional("use_rslora")?.unwrap_or(standard.use_rslora),
        rank_pattern: fields.optional("rank_pattern")?.unwrap_or_default(),
        alpha_pattern: fields.optional("alpha_pattern")?.unwrap_or_default(),
        lora_bias: fields.optional("lora_bias")?.unwrap_or(standard.lora_bias),
        // Beside this one, in a part of its own.
        target_parameters: Vec::new(),
        init,
        peft,
    };
    match fields.optional("use_dora")? {
        Some(true) => Ok((Box::new(Dora(lora)), targets)),
        _ => Ok((Box::new(lora), targets)),
    }
}

fn write(config: Value) -> Result<Written> {
    written(config, false)
}

fn written(config: Value, use_dora: bool) -> Result<Written> {
    let lora = doubled(modl_core::from_json("lora", config)?);
    let start = match lora.init {
        LoraInit::Kaiming | LoraInit::Pissa | LoraInit::Olora => json!(true),
        LoraInit::Random => json!(false),
        LoraInit::Gaussian => json!("gaussian"),
    };
    let ranks: Map<String, Value> =
        lora.rank_pattern.iter().map(|(k, r)| (k.to_owned(), json!(r))).collect();
    let alphas: Map<String, Value> =
        lora.alpha_pattern.iter().map(|(k, a)| (k.to_owned(), number(*a))).collect();
    let mut fields = lora_fields();
    fields.extend(object(json!({
        "alpha_pattern": alphas,
        "init_lora_weights": start,
        "lora_alpha": number(lora.alpha),
        "lora_bias": lora.lora_bias,
        "lora_dropout": lora.dropout,
        "r": lora.r,
        "rank_pattern": ranks,
        "use_dora": use_dora,
        "use_rslora": lora.use_rslora,
    })));
    Ok((fields, lora.peft))
}

/// All fields of `LoraConfig`, as PEFT writes them where nothing was said.
pub(super) fn lora_fields() -> Map<String, Value> {
    object(json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": {},
        "arrow_config": null,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": false,
        "lora_dropout": 0.0,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": null,
        "target_parameters": null,
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": false,
        "velora_config": null,
    }))
}
